//! A small model's manifest, and a device that pretends to run it.

use crate::device::{
    Device, DeviceError, DeviceFacts, MemoryNeed, Step, StepId, StepOutput, SubmitPart, Tokens,
};
use crate::record::StepPart;
use crate::sampling::{Sampler, Taken};
use kiln_bundle::{
    BLOCK_TOKENS, Bounds, DType, Executable, FORMAT_VERSION, Limits, Manifest, ModelInfo, Phase,
    SelfTest, Target, WeightFormat, packing::Layout,
};
use std::collections::VecDeque;
use std::time::Instant;

pub(crate) const VOCAB: u32 = 300;
pub(crate) const LAYERS: u32 = 2;
pub(crate) const HIDDEN: u32 = 4;
pub(crate) const EOS: u32 = 0;

/// A manifest with prefill buckets of 8 tokens and of `max_tokens`, and decode buckets for 1 and for
/// `max_batch` sequences; a prefill step has half as many rows of logits as tokens.
pub(crate) fn manifest(max_tokens: u32, max_batch: u32, max_seq_len: u32) -> Manifest {
    let executable = |phase: Phase, max_tokens: u32, max_sequences, max_logit_rows| Executable {
        name: format!("{}-{max_tokens}", phase.name()),
        phase,
        program: 0,
        bounds: Bounds {
            max_tokens,
            max_sequences,
            max_kv_len: max_seq_len,
            max_logit_rows,
            hidden_states: true,
        },
        arena_bytes: 1 << 20,
        offsets_bytes: Vec::new(),
        launches: Vec::new(),
        workspace_bytes: 0,
        counters: 0,
    };
    let prefill = |tokens: u32| {
        let sequences = max_batch.min(tokens / 2);
        executable(
            Phase::Prefill,
            tokens,
            sequences,
            (tokens / 2).max(sequences),
        )
    };
    let decode = |batch: u32| executable(Phase::Decode, batch, batch, batch);
    let mut executables = vec![
        prefill(8),
        prefill(max_tokens),
        decode(1),
        decode(max_batch),
    ];
    executables.dedup_by_key(|executable| executable.name.clone());
    Manifest {
        format_version: FORMAT_VERSION,
        kiln_version: "0".to_owned(),
        model: ModelInfo {
            name: "fake".to_owned(),
            architecture: "opt".to_owned(),
            vocab_size: VOCAB,
            hidden_size: HIDDEN,
            layers: LAYERS,
            heads: 2,
            head_dim: HIDDEN / 2,
            max_positions: max_seq_len,
            bos_token_id: Some(EOS),
            eos_token_ids: vec![EOS],
            pad_token_id: None,
        },
        limits: Limits {
            max_batch,
            max_seq_len,
        },
        targets: vec![Target {
            name: "fake".to_owned(),
            weights: WeightFormat::F32,
            exceptions: Default::default(),
            activations: None,
            tables: DType::F32,
            dtype: DType::F32,
            layout: Layout::Panels,
            weights_file: String::new(),
            programs: Vec::new(),
            executables,
            images: Vec::new(),
            copy_blocks: None,
        }],
        self_test: SelfTest {
            token_ids: Vec::new(),
            top_logits: Vec::new(),
            tolerance: 0.0,
        },
        files: Default::default(),
    }
}

/// A model whose logits follow from the whole history of a sequence, which it keeps in a paged cache
/// like a real device: a wrong block, length or token changes everything after it.
pub(crate) struct FakeDevice {
    facts: DeviceFacts,
    executables: Vec<Executable>,
    depth: usize,
    cache: Vec<u32>,
    last_sampled: Vec<u32>,
    sampler: Sampler,
    outputs: VecDeque<(StepId, StepOutput)>,
    submit_parts: Vec<SubmitPart>,
    next_step: u64,
    /// A token whose logits are no numbers.
    pub(crate) poison: Option<u32>,
}

impl FakeDevice {
    pub(crate) fn new(manifest: &Manifest, kv_blocks: u32, depth: usize) -> FakeDevice {
        let slots = manifest.limits.max_batch;
        FakeDevice {
            facts: DeviceFacts {
                name: "fake".to_owned(),
                target: "fake".to_owned(),
                gpu: None,
                slots,
                kv_blocks,
                memory: MemoryNeed::default(),
                available_bytes: None,
            },
            executables: manifest.targets[0].executables.clone(),
            depth,
            cache: vec![u32::MAX; kv_blocks as usize * BLOCK_TOKENS],
            last_sampled: vec![u32::MAX; slots as usize],
            sampler: Sampler::default(),
            outputs: VecDeque::new(),
            submit_parts: Vec::new(),
            next_step: 0,
            poison: None,
        }
    }

    /// The row of logits after `history`.
    pub(crate) fn logits(history: &[u32]) -> Vec<f32> {
        let mix = |hash: u64, x: u32| {
            let hash = (hash ^ u64::from(x)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            hash ^ hash >> 29
        };
        let hash = history
            .iter()
            .fold(history.len() as u64, |hash, &id| mix(hash, id));
        (0..VOCAB)
            .map(|id| (mix(hash, id) % 1000) as f32 / 200.0)
            .collect()
    }
}

impl Device for FakeDevice {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn executables(&self) -> &[Executable] {
        &self.executables
    }

    fn pipeline_depth(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
        assert!(
            self.outputs.len() <= self.depth,
            "a step too many in flight"
        );
        let began = Instant::now();
        let executable = &self.executables[step.executable];
        assert!(
            step.extent().fits(&executable.bounds),
            "{:?}",
            step.extent()
        );
        for copy in &step.copies {
            let block = |index: u32| index as usize * BLOCK_TOKENS;
            let from = block(copy.from)..block(copy.from) + BLOCK_TOKENS;
            self.cache.copy_within(from, block(copy.to));
        }
        let mut output = StepOutput::default();
        let tokens = step.extent().tokens;
        output.hidden_states = vec![0.0; (LAYERS + 1) as usize * tokens * HIDDEN as usize];
        let mut row = 0;
        for sequence in step.sequences() {
            let last = [self.last_sampled[sequence.slot as usize]];
            let ids = match sequence.tokens {
                Tokens::Ids(ids) => ids,
                Tokens::LastSampled => &last,
            };
            if executable.phase == Phase::Decode {
                assert_eq!(ids.len(), 1);
            }
            let place = |p: usize| {
                sequence.block_table[p / BLOCK_TOKENS] as usize * BLOCK_TOKENS + p % BLOCK_TOKENS
            };
            let rows = sequence.logit_rows.count(ids.len());
            let mut logits = Vec::new();
            for (i, &id) in ids.iter().enumerate() {
                let position = sequence.past_len as usize + i;
                self.cache[place(position)] = id;
                for layer in 0..=LAYERS as usize {
                    let start = (layer * tokens + row) * HIDDEN as usize;
                    let value = (layer * 1000 + position) as f32;
                    output.hidden_states[start..start + HIDDEN as usize].fill(value);
                }
                row += 1;
                if ids.len() - i <= rows {
                    let history: Vec<u32> = (0..=position).map(|p| self.cache[place(p)]).collect();
                    logits = FakeDevice::logits(&history);
                    if Some(id) == self.poison {
                        logits.fill(f32::NAN);
                    }
                    output.logits.extend_from_slice(&logits);
                }
            }
            let Some(draw) = sequence.draw else {
                continue;
            };
            if let Some(beam) = &draw.beam {
                let taken = Taken::default();
                let continuations = self.sampler.continuations(&logits, &draw, beam, &taken);
                output.continuations.push(continuations);
            } else {
                let token = self.sampler.sample(&logits, &draw);
                self.last_sampled[sequence.slot as usize] = token.unwrap_or(0);
                output.tokens.push(token);
            }
        }
        if !step.observe.logits {
            output.logits.clear();
        }
        if !step.observe.hidden_states {
            output.hidden_states.clear();
        }
        let launched = SubmitPart {
            part: StepPart::Launch,
            ran: began..Instant::now(),
        };
        self.submit_parts = match step.observe.times {
            true => vec![launched],
            false => Vec::new(),
        };
        let id = StepId(self.next_step);
        self.next_step += 1;
        self.outputs.push_back((id, output));
        Ok(id)
    }

    fn submit_parts(&self) -> &[SubmitPart] {
        &self.submit_parts
    }

    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError> {
        let (oldest, output) = self.outputs.pop_front().unwrap();
        assert_eq!(oldest, id);
        Ok(output)
    }
}
