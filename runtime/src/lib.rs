//! The kiln runtime: loads a bundle, chains its executables and generates text.
//!
//! [`Engine`] takes [`Request`]s and gives [`Event`]s, batching what runs at the same time. It plans
//! [`device::Step`]s for a [`device::Device`], which holds the weights and the KV cache.

mod choices;
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

pub use choices::{Choices, MAX_CHOICES};
pub use device::LoadOptions;
pub use engine::{
    Completion, Engine, EngineError, Event, FinishReason, PhaseStats, RequestId, Stats, Timing,
    TokenEvent,
};
pub use kv::{BlockPool, blocks_for};
pub use request::{DEFAULT_MAX_NEW_TOKENS, Prompt, Request, RequestError};
pub use sampling::{
    Draw, DrawParams, Logprobs, MAX_LOGPROBS, Processors, Rules, Sampler, SamplingParams,
    SequenceBias, TokenLogprob, ranges,
};
pub use tokenizer::{TextDelta, TextStream, Tokenizer, TokenizerError};
