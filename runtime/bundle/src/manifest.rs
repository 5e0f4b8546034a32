//! `bundle.json`: what a bundle holds. Plain data; [`crate::verify`] says when it is sound.

use crate::{
    Activations, BufferId, CopyLaunch, DType, Image, KernelSpec, Launch, Linear, Norm,
    WeightFormat, packing::Layout,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the bundle format; a reader refuses any other.
pub const FORMAT_VERSION: u32 = 7;
/// Tokens in a block of the paged KV cache.
pub const BLOCK_TOKENS: usize = 16;
/// Alignment of activation buffers and weight tensors, in bytes: a cache line, and the widest
/// vector register.
pub const ALIGN_BYTES: usize = 64;
/// The manifest's file name.
pub const MANIFEST_FILE: &str = "bundle.json";
/// The tokenizer's file name.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The whole manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Version of the compiler that wrote it.
    pub kiln_version: String,
    /// The model.
    pub model: ModelInfo,
    /// What the executables were specialised for.
    pub limits: Limits,
    /// One entry a target.
    pub targets: Vec<Target>,
    /// Known answers for `kiln verify`.
    pub self_test: SelfTest,
    /// Every other file of the bundle, by its path inside it.
    pub files: BTreeMap<String, FileRecord>,
}

/// The model's facts that a runtime needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Name for people, such as `opt-125m`.
    pub name: String,
    /// `opt` or `gpt2`.
    pub architecture: String,
    /// V, rows of the LM head.
    pub vocab_size: u32,
    /// C.
    pub hidden_size: u32,
    /// L.
    pub layers: u32,
    /// H.
    pub heads: u32,
    /// D.
    pub head_dim: u32,
    /// Positions the model was built for.
    pub max_positions: u32,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Any of these ends a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Padding; kiln never pads, clients may ask.
    pub pad_token_id: Option<u32>,
}

impl ModelInfo {
    /// Bytes of the keys and values that a position leaves behind in all layers, of elements of `dtype`. What a device
    /// fills up its blocks with is not counted.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> u64 {
        2 * u64::from(self.layers) * u64::from(self.hidden_size) * dtype.size_bytes() as u64
    }
}

/// Bounds on requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Most sequences in one step.
    pub max_batch: u32,
    /// Most positions of a sequence, prompt and generated.
    pub max_seq_len: u32,
}

/// The executables and weights of one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// `cpu`, `sm_90a`, ...
    pub name: String,
    /// How weight matrices are stored; vectors are f32.
    pub weights: WeightFormat,
    /// Matrices that are stored otherwise, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exceptions: BTreeMap<String, WeightFormat>,
    /// Element type of position tables.
    pub tables: DType,
    /// Element type of the KV cache, and of activations where the target stores them so (the CPU
    /// computes and stores activations in f32).
    pub dtype: DType,
    /// What the CPU rounds rows to before products. When absent: nothing beside floating-point numbers,
    /// integers of 16 bits beside integers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<Activations>,
    /// Arrangement of weight matrices.
    pub layout: Layout,
    /// Path of the weight file.
    pub weights_file: String,
    /// Kernel lists, shared by the executables that differ in bounds only.
    pub programs: Vec<Program>,
    /// Prefill executables by rising `max_tokens`, those that show hidden states behind others, then decode executables by rising
    /// (`max_sequences`, `max_kv_len`).
    pub executables: Vec<Executable>,
    /// The kernels of a CUDA target.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Image>,
    /// How a CUDA target copies blocks of its KV cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_blocks: Option<CopyLaunch>,
}

impl Target {
    /// How a matrix is stored.
    pub fn format(&self, matrix: &str) -> WeightFormat {
        *self.exceptions.get(matrix).unwrap_or(&self.weights)
    }

    /// How the LM head is stored; none in a target without programs.
    pub fn lm_head(&self) -> Option<WeightFormat> {
        let head = self.programs.first()?.lm_head()?;
        Some(self.format(&head.weight))
    }
}

/// What a row of a buffer stands for: its row count in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowKind {
    /// One row a new token (T).
    Tokens,
    /// One row a requested row of logits (R).
    Logits,
}

/// An activation buffer: rows of `width` elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Meaning of its rows.
    pub rows: RowKind,
    /// Elements of a row.
    pub width: u32,
    /// Element type.
    pub dtype: DType,
}

/// A straight line of kernels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// `prefill`, `prefill-hidden` or `decode`.
    pub name: String,
    /// Indexed by [`BufferId`].
    pub buffers: Vec<Buffer>,
    /// In order of execution.
    pub kernels: Vec<KernelSpec>,
    /// f32 (R, V).
    pub logits: BufferId,
    /// Where the L+1 hidden states can be read off: the embedding output, then each layer's. None in a program
    /// that does not compute all of their rows.
    pub hidden_states: Vec<Tap>,
}

impl Program {
    /// The linear that computes the logits.
    pub fn lm_head(&self) -> Option<&Linear> {
        let mut linears = self.kernels.iter().filter_map(KernelSpec::linear);
        linears.find(|linear| linear.out == self.logits)
    }
}

/// A value that exists in a buffer right after a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tap {
    /// Index of the kernel.
    pub after_kernel: u32,
    /// The rows (T, C).
    pub buffer: BufferId,
    /// Still to be applied to each row.
    pub norm: Option<Norm>,
}

/// Kind of step an executable is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Any number of new tokens a sequence.
    Prefill,
    /// One new token a sequence.
    Decode,
}

impl Phase {
    /// The spelling in names and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

/// A program with the bounds and the memory plan of one bucket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Executable {
    /// `prefill-t64`, `prefill-t512-hidden`, `decode-b4-kv2048`, ...
    pub name: String,
    /// Kind of step.
    pub phase: Phase,
    /// Index into the target's programs.
    pub program: u32,
    /// What a step must keep to.
    pub bounds: Bounds,
    /// Bytes of the activation arena.
    pub arena_bytes: u64,
    /// Offset of each buffer in the arena, in bytes; buffers that are never alive together share.
    pub offsets_bytes: Vec<u64>,
    /// What a CUDA target launches, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub launches: Vec<Launch>,
    /// Bytes of the launches' workspace.
    #[serde(default)]
    pub workspace_bytes: u64,
    /// Words of the launches' counters.
    #[serde(default)]
    pub counters: u32,
}

/// Bounds of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bounds {
    /// Most new tokens (T) of a step.
    pub max_tokens: u32,
    /// Most sequences (B) of a step.
    pub max_sequences: u32,
    /// Longest past plus new positions of a sequence.
    pub max_kv_len: u32,
    /// Most rows of logits (R) of a step.
    pub max_logit_rows: u32,
    /// Whether a step may show its hidden states.
    pub hidden_states: bool,
}

impl Bounds {
    /// Most rows of a buffer of this kind.
    pub const fn rows(&self, kind: RowKind) -> u32 {
        match kind {
            RowKind::Tokens => self.max_tokens,
            RowKind::Logits => self.max_logit_rows,
        }
    }
}

/// A prompt and the logits that must follow it, from the compiler's reference interpreter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfTest {
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// The largest logits after the last prompt token, falling.
    pub top_logits: Vec<(u32, f32)>,
    /// Largest difference that passes, as a share of the largest |logit| listed.
    pub tolerance: f32,
}

/// Size and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length.
    pub bytes: u64,
    /// blake3, hexadecimal.
    pub blake3: String,
}
