//! The on-disk format shared by kiln's compiler and runtime.
//!
//! A bundle is a directory: [`Manifest`] as `bundle.json`, one safetensors file of packed weights a
//! target, the tokenizer. [`Bundle`] reads it as untrusted input; [`BundleWriter`] (feature
//! `write`) writes it atomically.

mod dtype;
mod format;
mod kernel;
mod launch;
mod manifest;
pub mod packing;
mod read;
pub mod trace;
mod verify;
mod whole_file;
pub mod work;
#[cfg(feature = "write")]
mod write;

pub use dtype::{DType, UnknownDType};
pub use format::{Activations, GroupSize, IntFormat, UnknownFormat, WeightFormat};
pub use kernel::{Activation, BufferId, KernelSpec, Linear, Norm, Residual, Rows};
pub use launch::{
    Argument, BlockCopies, COPIES_PER_LAUNCH, CopyLaunch, Image, LAST_SAMPLED, Launch,
    MAX_CONTINUATIONS, NO_TOKEN, StepContinuation, StepCounts, StepDraw, StepPointers,
    StepSequence, StepTile, TILE_QUERIES, TokenRule, kv_layer_bytes,
};
pub use manifest::{
    ALIGN_BYTES, BLOCK_TOKENS, Bounds, Buffer, Executable, FORMAT_VERSION, FileRecord, Limits,
    MANIFEST_FILE, Manifest, ModelInfo, Phase, Program, RowKind, SelfTest, TOKENIZER_FILE, Tap,
    Target,
};
pub use read::{Bundle, BundleError, TensorView, WeightFile};
pub use verify::{ManifestError, WeightRole};
pub use whole_file::{WholeFile, WholeFileError};
#[cfg(feature = "write")]
pub use write::{BundleWriter, TensorDecl, TensorSink, WriteError};
