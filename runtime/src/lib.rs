//! The kiln runtime: loads a bundle, chains its executables and generates text.
//!
//! [`Engine`] takes [`Request`]s and gives [`Event`]s, batching what runs at the same time. It plans
//! [`device::Step`]s for a [`device::Device`], which holds the weights and the KV cache.

mod active;
mod beams;
mod choices;
mod completion;
mod conversation;
pub mod cpu;
pub mod device;
mod engine;
mod kv;
mod request;
mod sampling;
mod scheduler;
#[cfg(test)]
mod testing;
mod tokenizer;

pub use beams::{BeamParams, EarlyStopping};
pub use choices::{Choices, MAX_CHOICES};
pub use completion::{Choice, Completion, FinishReason, Timing, TokenEvent};
pub use conversation::Conversation;
pub use device::LoadOptions;
pub use engine::{Engine, EngineError, Event, PhaseStats, RequestId, Stats};
pub use kv::{BlockCopy, BlockPool, Prefix, blocks_for};
pub use request::{
    DEFAULT_MAX_NEW_TOKENS, Embedding, Layers, MAX_BEAMS, Outputs, Pooling, Prompt, Request,
    RequestError,
};
pub use sampling::{
    BeamDraw, Continuation, Draw, DrawParams, MAX_LOGPROBS, Processors, Rules, Sampler,
    SamplingParams, SequenceBias, Taken, TokenLogprob, ranges,
};
pub use tokenizer::{TextDelta, TextStream, Tokenizer, TokenizerError};
