//! Checkpoints whose linears GPTQ has rounded already, as AutoGPTQ, GPTQModel and transformers write
//! them.
//!
//! A linear of N outputs and K inputs has, in place of `<name>.weight`:
//!
//! | tensor | type and shape | what it holds |
//! |---|---|---|
//! | `<name>.qweight` | I32 (K * bits / 32, N) | codes; a word has 32 / bits inputs of an output, the first in its lowest bits |
//! | `<name>.qzeros` | I32 (groups, N * bits / 32) | zero points; a word has those of 32 / bits outputs |
//! | `<name>.scales` | F16 (groups, N) | steps |
//! | `<name>.g_idx` | I32 (K) | the group of each input |
//!
//! ```text
//! W[n][k] = scales[g][n] * (q[k][n] - zeros[g][n])        g = g_idx[k]
//! ```
//!
//! The format "gptq" stores zero points less one, "gptq_v2" as they are. With scales of 16 bits the
//! product is exact in f32: `<name>.weight` is shown as a tensor of F32, so that whoever knows nothing
//! of integers reads what they stand for, and who does asks for [`GptqCheckpoint::codes`].

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Checkpoint, CheckpointError, SourceDType, TensorInfo, check_read};
use crate::config::{Architecture, GptqConfig, ModelConfig};

/// Scales from here on would leave the range of bf16 with their codes.
const LARGEST_SCALE: f32 = 1e30;

/// A checkpoint with the integers of some matrices beside what they stand for.
pub struct GptqCheckpoint {
    inner: Box<dyn Checkpoint>,
    config: GptqConfig,
    /// Whether a weight is (K, N), as GPT-2 has it, and not (N, K).
    inputs_first: bool,
    /// What the checkpoint would hold without integers.
    tensors: BTreeMap<String, TensorInfo>,
    /// By the name of the weight.
    matrices: BTreeMap<String, Integers>,
    /// The matrix read last: it is read by rows, one after the other.
    last: Mutex<Option<(String, Arc<Codes>)>>,
}

/// What is known of a matrix of integers without reading its codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Integers {
    /// Bits of a code, 4 or 8.
    pub bits: u32,
    /// The group of each input, (K).
    pub group_of: Vec<u32>,
    /// Whether every zero point is the middle code, 8 or 128.
    pub symmetric: bool,
    /// The tensors' names without what follows the last point.
    name: String,
    outputs: usize,
}

/// A matrix of integers.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// q, (K, N).
    pub codes: Vec<u8>,
    /// Zero points, (groups, N).
    pub zeros: Vec<u8>,
    /// Steps, (groups, N).
    pub scales: Vec<f32>,
}

/// Wraps the checkpoint of a model whose config.json says that it is quantised; others are returned as
/// they are.
///
/// # Errors
/// Tensors that are missing, mis-shaped or out of range.
pub fn dequantised(
    checkpoint: Box<dyn Checkpoint>,
    config: &ModelConfig,
) -> Result<Box<dyn Checkpoint>, CheckpointError> {
    match config.quantisation {
        None => Ok(checkpoint),
        Some(gptq) => {
            let inputs_first = config.architecture == Architecture::Gpt2;
            let checkpoint = GptqCheckpoint::new(checkpoint, gptq, inputs_first)?;
            Ok(Box::new(checkpoint))
        }
    }
}

impl GptqCheckpoint {
    fn new(
        inner: Box<dyn Checkpoint>,
        config: GptqConfig,
        inputs_first: bool,
    ) -> Result<GptqCheckpoint, CheckpointError> {
        let mut checkpoint = GptqCheckpoint {
            tensors: inner.tensors().clone(),
            inner,
            config,
            inputs_first,
            matrices: BTreeMap::new(),
            last: Mutex::new(None),
        };
        let quantised = checkpoint.tensors.keys();
        let names: Vec<String> = quantised
            .filter_map(|name| Some(name.strip_suffix(".qweight")?.to_owned()))
            .collect();
        if names.is_empty() {
            return Err(CheckpointError::File {
                path: checkpoint.inner.origin().to_owned(),
                found: "no tensor that ends in .qweight".to_owned(),
                needed: "those of a GPTQ checkpoint, which config.json says that it is (quantization_config)"
                    .to_owned(),
            });
        }
        for name in names {
            let integers = checkpoint.integers(name)?;
            let (n, k) = (integers.outputs, integers.group_of.len());
            let weight = format!("{}.weight", integers.name);
            for part in ["qweight", "qzeros", "scales", "g_idx"] {
                checkpoint
                    .tensors
                    .remove(&format!("{}.{part}", integers.name));
            }
            let info = TensorInfo {
                name: weight.clone(),
                dtype: SourceDType::F32,
                shape: match inputs_first {
                    true => vec![k, n],
                    false => vec![n, k],
                },
            };
            if !info.size_fits() {
                let found = format!("a matrix of shape {:?}", info.shape);
                return Err(checkpoint.bad(&weight, found, "a size that fits 64 bits"));
            }
            if checkpoint.tensors.insert(weight.clone(), info).is_some() {
                let found = format!("{:?} beside it", format!("{}.qweight", integers.name));
                return Err(checkpoint.bad(&weight, found, "one of the two"));
            }
            checkpoint.matrices.insert(weight, integers);
        }
        Ok(checkpoint)
    }

    /// What is known of a weight that is stored as integers.
    pub fn matrix(&self, weight: &str) -> Option<&Integers> {
        self.matrices.get(weight)
    }

    /// Inputs of a group, all of an output where absent, as config.json gives them.
    pub fn group_size(&self) -> Option<usize> {
        self.config.group_size
    }

    /// A weight that is stored as integers.
    ///
    /// # Errors
    /// Another weight, or one that cannot be read.
    pub fn codes(&self, weight: &str) -> Result<Arc<Codes>, CheckpointError> {
        let Some(integers) = self.matrices.get(weight) else {
            return Err(self.bad(weight, "no integers", "a quantised weight"));
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, codes)) = last.as_ref().filter(|(name, _)| name == weight) {
            return Ok(codes.clone());
        }
        let name = |part: &str| format!("{}.{part}", integers.name);
        let n = integers.outputs;
        let words = self.words(&name("qweight"))?;
        let per_word = 32 / integers.bits as usize;
        let mut codes = vec![0; words.len() * per_word];
        for (words, codes) in words.chunks(n).zip(codes.chunks_mut(per_word * n)) {
            for (input, codes) in codes.chunks_mut(n).enumerate() {
                for (code, &word) in codes.iter_mut().zip(words) {
                    *code = field(word, input, integers.bits);
                }
            }
        }
        let codes = Arc::new(Codes {
            codes,
            zeros: self.zeros(integers)?,
            scales: self.inner.read(&name("scales"))?.to_f32()?,
        });
        *last = Some((weight.to_owned(), codes.clone()));
        Ok(codes)
    }

    /// Checks the tensors of a matrix, but for its codes, any of which is valid.
    fn integers(&self, name: String) -> Result<Integers, CheckpointError> {
        let bits = self.config.bits;
        let per_word = 32 / bits as usize;
        let part = |part: &str, dtypes: &[SourceDType], dims: usize| {
            let tensor = format!("{name}.{part}");
            let Some(info) = self.tensors.get(&tensor) else {
                let found = format!("no tensor {tensor:?} beside it");
                return Err(self.bad(
                    &format!("{name}.qweight"),
                    found,
                    "all of qweight, qzeros, scales and g_idx",
                ));
            };
            match dtypes.contains(&info.dtype) && info.shape.len() == dims {
                true => Ok(info),
                false => Err(self.bad(
                    &tensor,
                    format!("{} of shape {:?}", info.dtype, info.shape),
                    format!("{} of {dims} dimensions", dtypes[0]),
                )),
            }
        };
        let integers = [SourceDType::I32];
        let floats = [SourceDType::F16, SourceDType::Bf16, SourceDType::F32];
        let qweight = part("qweight", &integers, 2)?;
        let (rows, n) = (qweight.shape[0], qweight.shape[1]);
        let Some(k) = rows.checked_mul(per_word).filter(|&k| k > 0) else {
            let found = format!("shape {:?}", qweight.shape);
            return Err(self.bad(&qweight.name, found, "a row for each word of inputs"));
        };
        if n == 0 || !n.is_multiple_of(per_word) {
            let found = format!("shape {:?}", qweight.shape);
            let needed = format!("outputs in a multiple of {per_word}");
            return Err(self.bad(&qweight.name, found, needed));
        }
        let groups = self.config.group_size.map_or(1, |size| k.div_ceil(size));
        let shapes = [
            (part("g_idx", &integers, 1)?, vec![k]),
            (part("qzeros", &integers, 2)?, vec![groups, n / per_word]),
            (part("scales", &floats, 2)?, vec![groups, n]),
        ];
        for (info, needed) in &shapes {
            if info.shape != *needed {
                let found = format!("shape {:?}", info.shape);
                let needed = format!(
                    "{needed:?}, for {n} outputs, {k} inputs and {groups} {} by quantization_config",
                    if groups == 1 { "group" } else { "groups" }
                );
                return Err(self.bad(&info.name, found, needed));
            }
        }
        let [g_idx, _, scales] = shapes.map(|(info, _)| info.name.clone());
        let group_of = self.words(&g_idx)?;
        if let Some(&group) = group_of.iter().find(|&&group| group as usize >= groups) {
            let found = format!("group {}", group.cast_signed());
            return Err(self.bad(&g_idx, found, format!("from 0 to {}", groups - 1)));
        }
        let steps = self.inner.read(&scales)?.to_f32()?;
        if let Some(step) = steps
            .iter()
            .find(|step| !(**step >= 0.0 && **step < LARGEST_SCALE))
        {
            let found = format!("the scale {step}");
            return Err(self.bad(&scales, found, "from 0 to 1e30"));
        }
        let mut integers = Integers {
            bits,
            group_of,
            symmetric: false,
            name,
            outputs: n,
        };
        let middle = 1 << (bits - 1);
        integers.symmetric = self.zeros(&integers)?.iter().all(|&zero| zero == middle);
        Ok(integers)
    }

    /// (groups, N).
    fn zeros(&self, integers: &Integers) -> Result<Vec<u8>, CheckpointError> {
        let name = format!("{}.qzeros", integers.name);
        let words = self.words(&name)?;
        let per_word = 32 / integers.bits as usize;
        let fields = |word| (0..per_word).map(move |at| field(word, at, integers.bits));
        if !self.config.zeros_less_one {
            return Ok(words.into_iter().flat_map(fields).collect());
        }
        let highest = u8::MAX >> (8 - integers.bits);
        let one_each = u32::MAX / u32::from(highest);
        let mut zeros = Vec::with_capacity(words.len() * per_word);
        for word in words {
            // Writers take one from whole words, so that 0 borrows from the next, or they store 0 less one
            // over the rest of the word, which loses what was there.
            let lost = fields(word)
                .rev()
                .take_while(|&zero| zero == highest)
                .count()
                > 1;
            if lost {
                return Err(self.bad(
                    &name,
                    format!("zero points stored as {highest} up to the end of a word"),
                    "others in the format \"gptq\", some of whose writers lose what follows a zero point of 0; \
                     quantise symmetrically, or save as \"gptq_v2\"",
                ));
            }
            zeros.extend(fields(word.wrapping_add(one_each)));
        }
        Ok(zeros)
    }

    fn words(&self, name: &str) -> Result<Vec<u32>, CheckpointError> {
        let tensor = self.inner.read(name)?;
        let words = tensor.bytes.as_chunks::<4>().0;
        Ok(words
            .iter()
            .map(|bytes| u32::from_le_bytes(*bytes))
            .collect())
    }

    fn bad(
        &self,
        tensor: &str,
        found: impl Into<String>,
        needed: impl Into<String>,
    ) -> CheckpointError {
        CheckpointError::Tensor {
            path: self.inner.origin().to_owned(),
            tensor: super::shorten(tensor),
            found: found.into(),
            needed: needed.into(),
        }
    }
}

/// The number in the bits of a word from `at * bits` on.
fn field(word: u32, at: usize, bits: u32) -> u8 {
    (word >> (at as u32 * bits)) as u8 & (u8::MAX >> (8 - bits))
}

impl Checkpoint for GptqCheckpoint {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn origin(&self) -> &Path {
        self.inner.origin()
    }

    fn quantised(&self) -> Option<&GptqCheckpoint> {
        Some(self)
    }

    fn read_rows_into(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Some(integers) = self.matrices.get(name) else {
            return self.inner.read_rows_into(name, rows, out);
        };
        check_read(self.origin(), self.info(name)?, &rows, out)?;
        let matrix = self.codes(name)?;
        let (n, k) = (integers.outputs, integers.group_of.len());
        let value = |input: usize, output: usize| {
            let at = integers.group_of[input] as usize * n + output;
            let code = i16::from(matrix.codes[input * n + output]) - i16::from(matrix.zeros[at]);
            matrix.scales[at] * f32::from(code)
        };
        let columns = if self.inputs_first { n } else { k };
        let bytes = out.as_chunks_mut::<4>().0;
        for (row, bytes) in rows.zip(bytes.chunks_mut(columns)) {
            for (column, bytes) in bytes.iter_mut().enumerate() {
                let value = match self.inputs_first {
                    true => value(row, column),
                    false => value(column, row),
                };
                *bytes = value.to_le_bytes();
            }
        }
        Ok(())
    }
}
