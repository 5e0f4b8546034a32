//! The kiln runtime: loads a bundle, chains its executables and generates text.
//!
//! [`Engine`] takes [`Request`]s and gives [`Event`]s, batching what runs at the same time. It plans
//! [`device::Step`]s for a [`device::Device`], which holds the weights and the KV cache.
//!
//! # A text, as it comes
//!
//! ```
//! use kiln_bundle::Bundle;
//! use kiln_runtime::{Engine, Event, LoadOptions, Prompt, Request};
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bundle = Bundle::open(Path::new("examples/tiny.kiln"))?;
//! let mut engine = Engine::load(&bundle, &LoadOptions::default())?;
//!
//! let mut request = Request::new(Prompt::Text("The sea was".to_owned()));
//! request.max_new_tokens = Some(20);
//! engine.submit(request)?;
//!
//! let mut streamed = String::new();
//! while !engine.is_idle() {
//!     for event in engine.step()? {
//!         match event {
//!             // Text that is certain: never half a character.
//!             Event::Token(token) => streamed += &token.text,
//!             Event::Finished(completion) => assert_eq!(completion.choices[0].text, streamed),
//!             Event::Failed { error, .. } => return Err(error.into()),
//!         }
//!     }
//! }
//! assert!(!streamed.is_empty());
//! # Ok(())
//! # }
//! ```
//!
//! # Several requests, and several continuations of one
//!
//! Requests run together, and may be added and cancelled at any time. What a request gives does not
//! depend on the others.
//!
//! ```
//! # use kiln_bundle::Bundle;
//! use kiln_runtime::{BeamParams, Choices, FinishReason, SamplingParams};
//! # use kiln_runtime::{Engine, Event, LoadOptions, Prompt, Request};
//! # use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let bundle = Bundle::open(Path::new("examples/tiny.kiln"))?;
//! # let mut engine = Engine::load(&bundle, &LoadOptions::default())?;
//! let mut request = Request::new(Prompt::Text("The sea was".to_owned()));
//! request.max_new_tokens = Some(20);
//! request.ignore_eos = true;
//!
//! // The best two of a search with four beams,
//! let mut search = request.clone();
//! search.beams = Some(BeamParams::new(4));
//! search.choices = Choices { returned: 2, generated: 2 };
//! let search = engine.submit(search)?;
//!
//! // three samples, which repeat as they have a seed,
//! let mut samples = request.clone();
//! samples.sampling = SamplingParams { temperature: 0.8, top_k: 50, seed: Some(7), ..SamplingParams::GREEDY };
//! samples.choices = Choices { returned: 3, generated: 3 };
//! let samples = engine.submit(samples)?;
//!
//! // and one that is cancelled after four tokens.
//! let short = engine.submit(request)?;
//! let (mut tokens, mut kept, mut finished) = (0, None, Vec::new());
//! while !engine.is_idle() {
//!     for event in engine.step()? {
//!         match event {
//!             Event::Token(token) if token.request == short => tokens += 1,
//!             Event::Token(_) => {}
//!             Event::Finished(completion) => finished.push(completion),
//!             Event::Failed { error, .. } => return Err(error.into()),
//!         }
//!     }
//!     if tokens == 4 && kept.is_none() {
//!         kept = engine.cancel(short);
//!     }
//! }
//!
//! let kept = &kept.ok_or("it was not cancelled")?.choices[0];
//! assert_eq!((kept.ids.len(), kept.finish_reason), (4, FinishReason::Cancelled));
//! for completion in finished {
//!     let expected = if completion.request == search { 2 } else { 3 };
//!     assert_eq!(completion.choices.len(), expected);
//!     if completion.request == search {
//!         // A beam search gives the best first.
//!         assert!(completion.choices[0].score >= completion.choices[1].score);
//!     }
//! }
//! # let _ = samples;
//! # Ok(())
//! # }
//! ```
//!
//! # A text in turns, vectors
//!
//! [`Conversation`] keeps a text that is written in turn, and leaves in the cache what is there.
//! [`Outputs`] lists what else a request reports: logits, hidden states, an embedding of its prompt.

mod active;
mod beams;
mod choices;
mod completion;
mod conversation;
pub mod cpu;
pub mod device;
mod engine;
mod kv;
mod record;
mod request;
mod sampling;
mod scheduler;
#[cfg(test)]
mod testing;
mod tokenizer;

pub use beams::{BeamParams, EarlyStopping};
pub use choices::{Choices, MAX_CHOICES};
pub use completion::{Choice, Completion, FinishReason, RequestId, Timing, TokenEvent};
pub use conversation::Conversation;
pub use device::LoadOptions;
pub use engine::{Engine, EngineError, Event, PhaseStats, Stats};
pub use kv::{BlockCopy, BlockPool, Prefix, blocks_for};
pub use record::{DEVICE_TRACK, HOST_TRACK, STREAM, StepPart};
pub use request::{
    DEFAULT_MAX_NEW_TOKENS, Embedding, Layers, MAX_BEAMS, Outputs, Pooling, Prompt, Request,
    RequestError,
};
pub use sampling::{
    BeamDraw, Continuation, Draw, DrawParams, MAX_LOGPROBS, Processors, Rules, Sampler,
    SamplingParams, SequenceBias, Taken, TokenLogprob, ranges,
};
pub use tokenizer::{TextDelta, TextStream, Tokenizer, TokenizerError};
