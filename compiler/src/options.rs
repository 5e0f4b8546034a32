//! What the caller chooses, and the buckets that follow from it.

use crate::cuda::CudaTarget;
use kiln_bundle::{Activations, Bounds, DType, IntFormat, Limits, Phase, WeightFormat};
use kiln_models::ModelConfig;
use std::path::PathBuf;

/// Rows of logits that a prefill step can give: enough to score a prompt at a good speed, few
/// enough that the (R, V) buffer stays small beside the weights.
const PREFILL_LOGIT_ROWS: u32 = 64;

/// What executables are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetChoice {
    /// Any CPU.
    Cpu,
    /// A GPU.
    Cuda(CudaTarget),
}

/// Choices of a compilation. `Default` gives what `kilnc compile` does without flags.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Name of the model, for people.
    pub model_name: String,
    /// What to compile for; repetitions count once.
    pub targets: Vec<TargetChoice>,
    /// Element type of the KV cache, and of activations where the target stores them so. When absent:
    /// for the CPU alone f32, or bf16 where `activations` are rounded; with a GPU among the targets that of
    /// the weights or the LM head, where one is of floating point, else the checkpoint's where it is one of
    /// 16 bits, else f16.
    pub dtype: Option<DType>,
    /// How weight matrices are stored. When absent: as the checkpoint's own, be they integers; with a GPU
    /// among the targets, as `dtype`.
    pub weights: Option<WeightFormat>,
    /// How the LM head is stored, and the token table. When absent: as int8 where `weights` are given as
    /// integers, else as `weights` or, where these are absent, as in the checkpoint.
    pub lm_head: Option<WeightFormat>,
    /// What the CPU rounds rows to before products with weights of the same kind of numbers.
    pub activations: Option<Activations>,
    /// A text to round matrices of integers by; without it each weight is rounded to the nearest.
    pub calibrate: Option<PathBuf>,
    /// A text whose perplexity is computed, by the checkpoint's weights and by those that are stored.
    pub eval: Option<PathBuf>,
    /// Tokens of that text that are read at most, two or more.
    pub eval_tokens: usize,
    /// Leave out the machine code of CUDA targets.
    pub emit_only: bool,
    /// Most sequences in a step.
    pub max_batch: u32,
    /// Most positions of a sequence; the model's own when absent.
    pub max_seq_len: Option<u32>,
    /// Bounds on the new tokens of a prefill step.
    pub prefill_buckets: Vec<u32>,
    /// Bounds on the sequences of a decode step.
    pub decode_batch: Vec<u32>,
    /// Bounds on the longest sequence of a decode step.
    pub decode_kv: Vec<u32>,
    /// Where the text of every stage goes.
    pub dump_ir: Option<PathBuf>,
}

impl Default for CompileOptions {
    fn default() -> CompileOptions {
        CompileOptions {
            model_name: "model".to_owned(),
            targets: vec![TargetChoice::Cpu],
            dtype: None,
            weights: None,
            lm_head: None,
            activations: None,
            calibrate: None,
            eval: None,
            eval_tokens: 4096,
            emit_only: false,
            max_batch: 16,
            max_seq_len: None,
            prefill_buckets: vec![16, 64, 256, 512],
            decode_batch: vec![1, 2, 4, 8, 16],
            decode_kv: vec![256, 1024],
            dump_ir: None,
        }
    }
}

/// A choice that cannot be honoured: the caller's mistake.
#[derive(Debug, thiserror::Error)]
#[error("--{flag} is {found}; {needed}")]
pub struct OptionError {
    flag: &'static str,
    found: String,
    needed: String,
}

/// How an LM head is stored beside such weights, unless the caller says otherwise.
const fn as_head(weights: WeightFormat) -> WeightFormat {
    match weights {
        WeightFormat::Int(_) => WeightFormat::Int(IntFormat::Int8 { group: None }),
        float => float,
    }
}

fn check(flag: &'static str, found: u32, most: u32, what: &str) -> Result<u32, OptionError> {
    if (1..=most).contains(&found) {
        return Ok(found);
    }
    Err(OptionError {
        flag,
        found: found.to_string(),
        needed: format!("it must be from 1 to {most}, {what}"),
    })
}

/// Most sequences that a bundle can be compiled for.
const MAX_BATCH: u32 = 4096;
/// Most tokens of a prefill step.
const MAX_PREFILL_TOKENS: u32 = 65536;

/// Element types of a bundle, the same for all of its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementTypes {
    /// Of the KV cache, and of activations where the target stores them so.
    pub dtype: DType,
    /// Of weight matrices.
    pub weights: WeightFormat,
    /// Of the LM head and of the token table.
    pub lm_head: WeightFormat,
    /// Of matrices that the checkpoint does not store as integers, where `weights` are its own.
    pub others: WeightFormat,
    /// Of position tables.
    pub tables: DType,
    /// What the CPU rounds rows to before products.
    pub activations: Option<Activations>,
}

impl ElementTypes {
    /// Everything stored in one floating-point type.
    pub const fn of(dtype: DType, weights: WeightFormat) -> ElementTypes {
        ElementTypes {
            dtype,
            weights,
            lm_head: weights,
            others: weights,
            tables: weights.element(),
            activations: None,
        }
    }
}

impl CompileOptions {
    /// The GPUs among the targets, each once, in order.
    pub fn cuda_targets(&self) -> Vec<CudaTarget> {
        let mut targets: Vec<CudaTarget> = self
            .targets
            .iter()
            .filter_map(|target| match target {
                TargetChoice::Cpu => None,
                TargetChoice::Cuda(target) => Some(*target),
            })
            .collect();
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// The element types that follow from the choices; `own` is how the checkpoint stores matrices.
    ///
    /// # Errors
    /// Types that a GPU among the targets does not take.
    pub fn element_types(
        &self,
        config: &ModelConfig,
        own: WeightFormat,
    ) -> Result<ElementTypes, OptionError> {
        let float = WeightFormat::of(config.dtype).unwrap_or(WeightFormat::F32);
        if let Some(path) = &self.calibrate
            && self.weights.and_then(WeightFormat::int).is_none()
        {
            return Err(OptionError {
                flag: "calibrate",
                found: path.display().to_string(),
                needed: "it is of use with --weights int8 or int4 alone".to_owned(),
            });
        }
        if self.cuda_targets().is_empty() {
            let weights = self.weights.unwrap_or(own);
            // What the checkpoint has in another type than its integers keeps that type.
            let lm_head = self.lm_head.unwrap_or(self.weights.map_or(float, as_head));
            return Ok(ElementTypes {
                dtype: self.dtype.unwrap_or(match self.activations {
                    None => DType::F32,
                    Some(_) => DType::Bf16,
                }),
                weights,
                lm_head,
                others: self.weights.unwrap_or(float),
                tables: match weights {
                    WeightFormat::Int(_) => float,
                    stored => stored,
                }
                .element(),
                activations: self.activations_of(weights)?,
            });
        }
        let narrow = |dtype: &DType| matches!(dtype, DType::F16 | DType::Bf16);
        let own_float = Some(config.dtype).filter(narrow).unwrap_or(DType::F16);
        let float = |format: Option<WeightFormat>| match format {
            None | Some(WeightFormat::Int(_)) => None,
            Some(float) => Some(float.element()),
        };
        let asked = float(self.weights).or(float(self.lm_head));
        let dtype = self.dtype.or(asked).unwrap_or(own_float);
        let others = WeightFormat::of(dtype).unwrap_or(WeightFormat::F16);
        let weights = self.weights.or(own.int().map(WeightFormat::Int));
        let weights = weights.unwrap_or(others);
        let lm_head = self.lm_head.unwrap_or(self.weights.map_or(others, as_head));
        for (flag, found) in [
            ("weights", float(self.weights)),
            ("lm-head", float(self.lm_head)),
            ("dtype", Some(dtype)),
        ] {
            if let Some(found) = found
                && (!narrow(&found) || found != dtype)
            {
                return Err(OptionError {
                    flag,
                    found: found.to_string(),
                    needed: "a CUDA target takes f16 or bf16, the same for --dtype, --weights and \
                             --lm-head, or integers for the latter two"
                        .to_owned(),
                });
            }
        }
        Ok(ElementTypes {
            dtype,
            weights,
            lm_head,
            others: self.weights.unwrap_or(others),
            tables: dtype,
            activations: self.activations_of(weights)?,
        })
    }

    /// What rows are rounded to, if that goes with such weights and any target.
    fn activations_of(&self, weights: WeightFormat) -> Result<Option<Activations>, OptionError> {
        let Some(activations) = self.activations else {
            return Ok(None);
        };
        let needed = if !self.targets.contains(&TargetChoice::Cpu) {
            "it is for the target cpu; GPUs compute with what --dtype says"
        } else if activations.suit(weights) {
            return Ok(Some(activations));
        } else {
            match activations {
                Activations::Bf16 => "that goes with --weights bf16",
                Activations::Int8 => "that goes with weights of int8 or int4",
            }
        };
        Err(OptionError {
            flag: "activations",
            found: format!("{} beside weights of {weights}", activations.name()),
            needed: needed.to_owned(),
        })
    }

    /// The bundle's limits for a model.
    ///
    /// # Errors
    /// A limit that is zero or above what the model has.
    pub fn limits(&self, config: &ModelConfig) -> Result<Limits, OptionError> {
        let positions = config.max_positions as u32;
        Ok(Limits {
            max_batch: check(
                "max-batch",
                self.max_batch,
                MAX_BATCH,
                "the most that kiln supports",
            )?,
            max_seq_len: check(
                "max-seq-len",
                self.max_seq_len.unwrap_or(positions),
                positions,
                "the positions of the model",
            )?,
        })
    }

    /// The buckets in rising order. The limits themselves always are a bucket, so that every
    /// request within them finds an executable; buckets above them are cut down to them.
    ///
    /// # Errors
    /// A bucket of zero, or too large.
    pub fn buckets(&self, limits: &Limits) -> Result<Vec<(Phase, Bounds)>, OptionError> {
        let (batch, kv_len) = (limits.max_batch, limits.max_seq_len);
        let mut buckets = vec![];
        let tokens = sorted(
            "prefill-buckets",
            &self.prefill_buckets,
            MAX_PREFILL_TOKENS,
            None,
        )?;
        // No step is longer than every sequence at its longest.
        let most_tokens = kv_len.saturating_mul(batch);
        let prefill = cut(&tokens, most_tokens).into_iter().map(|max_tokens| {
            let max_sequences = batch.min(max_tokens);
            Bounds {
                max_tokens,
                max_sequences,
                max_kv_len: kv_len,
                max_logit_rows: max_tokens.min(PREFILL_LOGIT_ROWS.max(max_sequences)),
                hidden_states: false,
            }
        });
        buckets.extend(prefill.map(|bounds| (Phase::Prefill, bounds)));
        // Few steps show hidden states: one bucket serves them all.
        if let Some(&(phase, largest)) = buckets.last() {
            let bounds = Bounds {
                hidden_states: true,
                ..largest
            };
            buckets.push((phase, bounds));
        }
        let batches = sorted("decode-batch", &self.decode_batch, MAX_BATCH, Some(batch))?;
        let kv_lens = sorted("decode-kv", &self.decode_kv, u32::MAX, Some(kv_len))?;
        for &max_sequences in &batches {
            for &max_kv_len in &kv_lens {
                buckets.push((
                    Phase::Decode,
                    Bounds {
                        max_tokens: max_sequences,
                        max_sequences,
                        max_kv_len,
                        max_logit_rows: max_sequences,
                        hidden_states: true,
                    },
                ));
            }
        }
        Ok(buckets)
    }
}

/// Checked, cut down to `limit` where there is one (which then is in the list), sorted, unique.
fn sorted(
    flag: &'static str,
    values: &[u32],
    most: u32,
    limit: Option<u32>,
) -> Result<Vec<u32>, OptionError> {
    if values.is_empty() {
        return Err(OptionError {
            flag,
            found: "empty".to_owned(),
            needed: "give at least one number".to_owned(),
        });
    }
    for &value in values {
        check(flag, value, most, "the most that kiln supports")?;
    }
    let mut values: Vec<u32> = values.iter().copied().chain(limit).collect();
    values.sort_unstable();
    values.dedup();
    Ok(match limit {
        Some(limit) => cut(&values, limit),
        None => values,
    })
}

/// Sorted values, those above `limit` cut down to it.
fn cut(values: &[u32], limit: u32) -> Vec<u32> {
    let mut values: Vec<u32> = values.iter().map(|&value| value.min(limit)).collect();
    values.dedup();
    values
}
