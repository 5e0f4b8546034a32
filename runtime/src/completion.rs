//! What comes of a request.

use crate::sampling::TokenLogprob;
use std::time::Duration;

/// Names a request of an engine; later ones are larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A new token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// Of this request.
    pub request: RequestId,
    /// And this one of its generations, of which there are [`Choices::generated`](crate::Choices).
    pub choice: u32,
    /// The token.
    pub id: u32,
    /// Text that is certain now: the token's, or that of earlier ones, or none.
    pub text: String,
}

/// A request's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The request.
    pub request: RequestId,
    /// Its prompt.
    pub prompt_ids: Vec<u32>,
    /// Tokens of the prompt whose keys and values were still in the cache.
    pub cached_tokens: usize,
    /// Of the prompt's tokens from the second on, where asked for.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// (C), where asked for.
    pub embedding: Vec<f32>,
    /// As many as were asked for, the best first where they were chosen among more. A request that was
    /// cancelled may have fewer.
    pub choices: Vec<Choice>,
    /// How long it took.
    pub timing: Timing,
}

/// A continuation of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// New tokens, the one that ended it included.
    pub ids: Vec<u32>,
    /// Their text, without special tokens and up to a stop string; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Of a beam search: its score. Else the log-probability of all its tokens, where those were asked
    /// for or choices were ranked by it.
    pub score: Option<f32>,
    /// Of its tokens, where asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// (P + new tokens, V), where asked for.
    pub logits: Vec<f32>,
    /// (new tokens, V), where asked for: what each token was chosen by.
    pub scores: Vec<f32>,
    /// (layers asked for, P + new tokens, C).
    pub hidden_states: Vec<f32>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// [`Engine::cancel`](crate::Engine::cancel).
    Cancelled,
}

impl FinishReason {
    /// As results spell it.
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// How long a request took, from its first step on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Until its first token.
    pub prefill: Duration,
    /// From then to its end.
    pub decode: Duration,
}
