//! Architecture registry and checkpoint readers of kiln: config.json and tensors in, the graph of a
//! decoder step and its weights out.
//!
//! A new architecture is a variant of [`Architecture`], its reading of `config.json`, and a file of
//! tensor names like `opt.rs`.

pub mod builtin;
pub mod checkpoint;
pub mod config;
mod decoder;
pub mod dummy;
mod gpt2;
pub mod hub;
mod opt;
mod weights;

pub use builtin::{builtin, builtin_names, parameters};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{Activation, Architecture, ConfigError, GptqConfig, ModelConfig, NormPlacement};
pub use decoder::build;
pub use dummy::DummyCheckpoint;
pub use weights::{IntegerRows, WeightError, Weights};
