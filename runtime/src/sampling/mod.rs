//! Choosing the next token from a row of logits.
//!
//! The rules and their order are those of `generate()` in transformers 5
//! (`generation/utils.py`, `_get_logits_processor`): first the processors, which change scores by
//! what a request asks and by what its sequence holds ([`Processors`]); then, where the request
//! samples, temperature, top-k, top-p, min-p, typical-p, epsilon and eta cutoff. What is left is
//! drawn from with one uniform number, a function of the request's seed and of the index of the
//! token alone, so that a request gives the same ids in whatever company it runs.
//!
//! Dividing the remaining probabilities by their sum, the reference's last step, is part of the draw.

mod continuations;
mod cuts;
mod logprobs;
mod processors;
pub mod ranges;
mod sampler;

pub use continuations::{BeamDraw, Continuation, Taken};
pub use logprobs::{MAX_LOGPROBS, TokenLogprob};
pub(crate) use processors::Suppression;
pub use processors::{Processors, Rules, SequenceBias};
pub use sampler::Sampler;

use std::sync::Arc;

/// How the tokens of a request are drawn.
///
/// ```
/// use kiln_runtime::{Prompt, Request, SamplingParams};
///
/// let mut request = Request::new(Prompt::Ids(vec![2]));
/// assert_eq!(request.sampling, SamplingParams::GREEDY);
/// request.sampling = SamplingParams {
///     temperature: 0.8,
///     top_p: 0.95,
///     seed: Some(7), // the same tokens each time
///     ..SamplingParams::GREEDY
/// };
/// assert!(request.check().is_ok());
///
/// request.sampling.top_p = 0.0;
/// let error = request.check().unwrap_err().to_string();
/// assert_eq!(error, "top_p is 0; it must be above 0 and at most 1");
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the k likeliest tokens and those that equal the last of them; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keeps the tokens at least this share as probable as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Keeps the tokens whose information is closest to what is expected, the fewest whose
    /// probabilities sum to at least this; 1 keeps all.
    pub typical_p: f32,
    /// Keeps the tokens at least this probable, and the likeliest; 0 keeps all.
    pub epsilon_cutoff: f32,
    /// As `epsilon_cutoff`, with a bound that falls where the distribution is flat; 0 keeps all.
    pub eta_cutoff: f32,
    /// What the draws follow from; none takes one at random.
    pub seed: Option<u64>,
}

impl SamplingParams {
    /// Always the likeliest token.
    pub const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        epsilon_cutoff: 0.0,
        eta_cutoff: 0.0,
        seed: None,
    };

    /// These, with the seed decided.
    pub const fn with_seed(self, seed: u64) -> DrawParams {
        let SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            epsilon_cutoff,
            eta_cutoff,
            seed: _,
        } = self;
        DrawParams {
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            epsilon_cutoff,
            eta_cutoff,
            seed,
        }
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams::GREEDY
    }
}

/// [`SamplingParams`] as a device gets them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawParams {
    /// As in [`SamplingParams`].
    pub temperature: f32,
    /// As in [`SamplingParams`].
    pub top_k: u32,
    /// As in [`SamplingParams`].
    pub top_p: f32,
    /// As in [`SamplingParams`].
    pub min_p: f32,
    /// As in [`SamplingParams`].
    pub typical_p: f32,
    /// As in [`SamplingParams`].
    pub epsilon_cutoff: f32,
    /// As in [`SamplingParams`].
    pub eta_cutoff: f32,
    /// The request's seed.
    pub seed: u64,
}

impl DrawParams {
    /// Always the likeliest token.
    pub const GREEDY: DrawParams = SamplingParams::GREEDY.with_seed(0);
}

/// One choice of a token, or of the continuations of a beam.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw<'a> {
    /// How.
    pub params: DrawParams,
    /// Index of the token among the generated ones of its request.
    pub index: u32,
    /// Tokens that cannot be chosen.
    pub suppressed_ids: &'a [u32],
    /// What changes the scores before; none where nothing does.
    pub rules: Option<&'a Arc<Rules>>,
    /// Prompt and generated tokens, where [`Rules::read_history`]; else, and where the sequence is fed what
    /// a slot holds that keeps them, it may be empty.
    pub history: &'a [u32],
    /// Set where the row belongs to a beam: then its best continuations are chosen.
    pub beam: Option<BeamDraw>,
}

impl Draw<'_> {
    /// The likeliest token of the row as it is.
    pub const GREEDY: Draw<'static> = Draw {
        params: DrawParams::GREEDY,
        index: 0,
        suppressed_ids: &[],
        rules: None,
        history: &[],
        beam: None,
    };
}
