//! The kiln compiler.
//!
//! ```text
//! Graph --fuse--> Graph --specialise--> Program --plan_memory--> Executable --package--> Bundle
//! ```
//!
//! [`compile`] is the table of contents; each stage is a module named after it.

mod calibrate;
pub mod cuda;
mod evaluate;
mod integers;
mod interpret;
mod model;
mod options;
mod package;
pub mod passes;
mod pipeline;
mod plan;
mod plan_memory;
mod predict;
mod product;
mod quantise;
mod specialise;
mod stored;
mod tokenizer;

pub use calibrate::{Factor, calibrate};
pub use evaluate::{EvalText, Evaluated};
pub use integers::OwnFormat;
pub use interpret::{Evaluation, LogitRows, interpret};
pub use model::{Model, ModelError};
pub use options::{CompileOptions, ElementTypes, OptionError, TargetChoice};
pub use package::{PackageError, pack_weights};
pub use pipeline::{Compiled, compile};
pub use plan::{KernelPlan, KernelText, executable_name};
pub use plan_memory::{MemoryPlan, plan_memory};
pub use predict::{GPUS, Gpu, Prediction, predict, predict_kernels};
pub use quantise::IntRows;
pub use specialise::{SpecialiseError, specialise};
pub use stored::{Calibrated, Stored};
pub use tokenizer::TokenizerError;

use kiln_bundle::{WriteError, trace::Label};
use kiln_ir::VerifyError;
use kiln_models::WeightError;
use std::{io, path::PathBuf, time::Instant};

impl From<cuda::BuildError> for CompileError {
    fn from(error: cuda::BuildError) -> CompileError {
        match error {
            cuda::BuildError::Cancelled => CompileError::Cancelled,
            error => CompileError::Build(Box::new(error)),
        }
    }
}

impl From<cuda::NvrtcError> for CompileError {
    fn from(error: cuda::NvrtcError) -> CompileError {
        cuda::BuildError::from(error).into()
    }
}

/// Hears how a compilation goes on.
pub trait Progress: Sync {
    /// A stage begins.
    fn stage(&self, name: &'static str);
    /// Bytes of the stage done, of its total.
    fn advance(&self, done_bytes: u64, total_bytes: u64);
    /// Work of the stage that began then ends, both on the calling thread.
    fn worked(&self, _what: Label, _began: Instant) {}
    /// Whether the compilation is to end, with nothing left behind.
    fn cancelled(&self) -> bool {
        false
    }
}

/// A [`Progress`] that tells nobody.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _: &'static str) {}
    fn advance(&self, _: u64, _: u64) {}
}

/// Why a compilation failed.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A choice of the caller.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The checkpoint.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The checkpoint's tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The compiler's mistake.
    #[error("after {pass}, the graph breaks a rule: {error}")]
    Verify {
        /// The pass that made the graph.
        pass: &'static str,
        /// The rule.
        error: VerifyError,
    },
    /// The compiler's mistake.
    #[error(transparent)]
    Specialise(#[from] SpecialiseError),
    /// The model, for a CUDA target.
    #[error(transparent)]
    Lower(#[from] cuda::LowerError),
    /// The machine has no CUDA compiler, or it refuses a kernel.
    #[error(transparent)]
    Build(Box<cuda::BuildError>),
    /// The checkpoint or the output, while packing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The text of `--calibrate`.
    #[error("cannot calibrate on {}: {problem}", path.display())]
    Calibrate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The text of `--eval`.
    #[error("cannot evaluate on {}: {problem}", path.display())]
    Eval {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory of `--dump-ir`.
    #[error("cannot write {}: {source}", path.display())]
    Dump {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The caller asked for it through [`Progress::cancelled`].
    #[error("cancelled; nothing was written")]
    Cancelled,
    /// The checkpoint's weights make no sense together.
    #[error(
        "the model gives the logit {logit} for token {id} after {token_ids:?}; its weights overflow"
    )]
    NotFinite {
        /// The prompt.
        token_ids: Vec<u32>,
        /// The token.
        id: u32,
        /// Its logit.
        logit: f32,
    },
}
