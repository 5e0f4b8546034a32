//! What is asked of the engine, and what is wrong with it.

use crate::device::Observe;
use crate::kv::blocks_for;
use crate::sampler::SamplingParams;
use crate::tokenizer::{Tokenizer, TokenizerError};
use kiln_bundle::ModelInfo;

/// New tokens of a request that does not say how many, where the bundle's limit leaves room.
pub const DEFAULT_MAX_NEW_TOKENS: u32 = 128;

/// What a sequence starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text; the tokenizer adds what its model expects around it.
    Text(String),
    /// Token ids, taken as they are.
    Ids(Vec<u32>),
}

/// One generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most new tokens; none: [`DEFAULT_MAX_NEW_TOKENS`], or as many as there is room for.
    pub max_new_tokens: Option<u32>,
    /// Generated tokens before which neither an end-of-sequence token nor one of `stop_token_ids`
    /// can be chosen.
    pub min_new_tokens: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Ends the text before the first of these.
    pub stop: Vec<String>,
    /// End the sequence, after themselves, like the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Goes on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// What to report for every position of prompt and generation.
    pub observe: Observe,
}

impl Request {
    /// A greedy request with everything else left at its default.
    pub fn new(prompt: Prompt) -> Request {
        Request {
            prompt,
            max_new_tokens: None,
            min_new_tokens: 0,
            sampling: SamplingParams::GREEDY,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            observe: Observe::default(),
        }
    }
}

/// What is wrong with a request: the caller's mistake.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt is empty; give some text, or token ids to start from")]
    EmptyPrompt,
    /// Text without a tokenizer.
    #[error("this bundle has no tokenizer, so it takes token ids and not {0}")]
    NoTokenizer(&'static str),
    /// The tokenizer fails on the prompt.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// An id beyond the vocabulary.
    #[error("{field}: token id {id} is out of range; the vocabulary has ids 0 to {}", vocab_size - 1)]
    TokenIdOutOfRange {
        /// `prompt_ids` with its index, or `stop_token_ids`.
        field: String,
        /// The id.
        id: u32,
        /// V.
        vocab_size: u32,
    },
    /// The prompt leaves no room.
    #[error(
        "the prompt has {found} tokens; this bundle's limit is {limit} positions, generated ones \
         included. Compile it with a larger --max-seq-len"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Positions of a sequence.
        limit: usize,
    },
    /// Prompt and new tokens together are too many.
    #[error(
        "{prompt} prompt tokens and max_new_tokens {asked} make {} positions; this bundle's limit \
         is {limit}", *prompt + *asked as usize
    )]
    TooManyNewTokens {
        /// Tokens of the prompt.
        prompt: usize,
        /// `max_new_tokens`.
        asked: u32,
        /// Positions of a sequence.
        limit: usize,
    },
    /// The KV cache is smaller than the sequence.
    #[error(
        "{tokens} positions take {} blocks of the KV cache, which has {kv_blocks}; give it more \
         memory", blocks_for(*tokens)
    )]
    TooLargeForCache {
        /// Prompt and new tokens.
        tokens: usize,
        /// Blocks of the cache.
        kv_blocks: usize,
    },
    /// Nothing is asked for.
    #[error("max_new_tokens is 0 and neither logits nor hidden states are asked for")]
    NothingToDo,
    /// A parameter outside its range.
    #[error("{name} is {found}; it must be {needed}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its value.
        found: String,
        /// Its range.
        needed: &'static str,
    },
}

/// What of an engine bounds a request.
#[derive(Clone, Copy)]
pub(crate) struct Room<'a> {
    pub(crate) model: &'a ModelInfo,
    pub(crate) max_seq_len: usize,
    /// Positions that the KV cache holds.
    pub(crate) cache_tokens: usize,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
}

impl Request {
    /// Checks the request. Returns the prompt's ids and the most new tokens.
    pub(crate) fn resolve(&self, room: &Room<'_>) -> Result<(Vec<u32>, u32), RequestError> {
        check_sampling(&self.sampling)?;
        if self.stop.iter().any(String::is_empty) {
            return Err(parameter(
                "stop",
                "\"\"",
                "a string of at least one character",
            ));
        }
        if !self.stop.is_empty() && room.tokenizer.is_none() {
            return Err(RequestError::NoTokenizer("stop strings"));
        }
        let check_ids = |field: &str, indexed: bool, ids: &[u32]| {
            let vocab_size = room.model.vocab_size;
            match ids.iter().enumerate().find(|&(_, &id)| id >= vocab_size) {
                None => Ok(()),
                Some((index, &id)) => {
                    let index = if indexed {
                        format!("[{index}]")
                    } else {
                        String::new()
                    };
                    let field = format!("{field}{index}");
                    Err(RequestError::TokenIdOutOfRange {
                        field,
                        id,
                        vocab_size,
                    })
                }
            }
        };
        check_ids("stop_token_ids", false, &self.stop_token_ids)?;
        let prompt_ids = match &self.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) if text.is_empty() => Vec::new(),
            Prompt::Text(text) => room
                .tokenizer
                .ok_or(RequestError::NoTokenizer("text"))?
                .encode(text)?,
        };
        if prompt_ids.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        check_ids("prompt_ids", true, &prompt_ids)?;

        let (found, limit) = (prompt_ids.len(), room.max_seq_len);
        let left = limit
            .checked_sub(found)
            .ok_or(RequestError::PromptTooLong { found, limit })?;
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let max_new_tokens = self
            .max_new_tokens
            .unwrap_or(DEFAULT_MAX_NEW_TOKENS.min(left));
        if max_new_tokens == 0 && self.observe == Observe::default() {
            return Err(match self.max_new_tokens {
                Some(_) => RequestError::NothingToDo,
                None => RequestError::PromptTooLong { found, limit },
            });
        }
        if max_new_tokens > left {
            return Err(RequestError::TooManyNewTokens {
                prompt: found,
                asked: max_new_tokens,
                limit,
            });
        }
        if self.min_new_tokens > max_new_tokens {
            let found = self.min_new_tokens.to_string();
            return Err(parameter(
                "min_new_tokens",
                &found,
                "at most max_new_tokens",
            ));
        }
        let tokens = found + max_new_tokens as usize;
        if tokens > room.cache_tokens {
            let kv_blocks = room.cache_tokens / kiln_bundle::BLOCK_TOKENS;
            return Err(RequestError::TooLargeForCache { tokens, kv_blocks });
        }
        Ok((prompt_ids, max_new_tokens))
    }
}

fn check_sampling(params: &SamplingParams) -> Result<(), RequestError> {
    let SamplingParams {
        temperature,
        top_k: _,
        top_p,
        min_p,
        seed: _,
    } = *params;
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return Err(parameter(
            "temperature",
            &temperature.to_string(),
            "a number from 0 up",
        ));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(parameter(
            "top_p",
            &top_p.to_string(),
            "above 0 and at most 1",
        ));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return Err(parameter("min_p", &min_p.to_string(), "from 0 to 1"));
    }
    Ok(())
}

fn parameter(name: &'static str, found: &str, needed: &'static str) -> RequestError {
    RequestError::Parameter {
        name,
        found: found.to_owned(),
        needed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::manifest;
    use crate::tokenizer::tests::byte_tokenizer;

    fn check(request: Request, expect: &str) {
        let manifest = manifest(16, 4, 64);
        let tokenizer = byte_tokenizer();
        let room = Room {
            model: &manifest.model,
            max_seq_len: 64,
            cache_tokens: 48,
            tokenizer: Some(&tokenizer),
        };
        let error = request.resolve(&room).unwrap_err().to_string();
        assert!(error.contains(expect), "{error:?} lacks {expect:?}");
    }

    fn ids(ids: &[u32]) -> Request {
        Request::new(Prompt::Ids(ids.to_vec()))
    }

    #[test]
    fn mistakes_are_named() {
        check(ids(&[]), "the prompt is empty");
        check(
            Request::new(Prompt::Text(String::new())),
            "the prompt is empty",
        );
        check(
            ids(&[1, 300]),
            "prompt_ids[1]: token id 300 is out of range; the vocabulary has ids 0 to 299",
        );
        check(
            Request {
                stop_token_ids: vec![999],
                ..ids(&[1])
            },
            "stop_token_ids: token id 999",
        );
        check(
            ids(&[1; 65]),
            "the prompt has 65 tokens; this bundle's limit is 64 positions",
        );
        check(
            ids(&[1; 64]),
            "the prompt has 64 tokens; this bundle's limit is 64 positions",
        );
        check(
            Request {
                max_new_tokens: Some(60),
                ..ids(&[1; 10])
            },
            "10 prompt tokens and max_new_tokens 60 make 70 positions; this bundle's limit is 64",
        );
        check(
            Request {
                max_new_tokens: Some(40),
                ..ids(&[1; 10])
            },
            "take 4 blocks of the KV cache, which has 3",
        );
        check(
            Request {
                max_new_tokens: Some(0),
                ..ids(&[1])
            },
            "max_new_tokens is 0",
        );
        check(
            Request {
                min_new_tokens: 9,
                max_new_tokens: Some(8),
                ..ids(&[1])
            },
            "min_new_tokens is 9",
        );
        check(
            Request {
                stop: vec![String::new()],
                ..ids(&[1])
            },
            "stop is \"\"",
        );
        let sampling = |sampling| Request {
            sampling,
            ..ids(&[1])
        };
        let greedy = SamplingParams::GREEDY;
        check(
            sampling(SamplingParams {
                temperature: -1.0,
                ..greedy
            }),
            "temperature is -1",
        );
        check(
            sampling(SamplingParams {
                temperature: f32::NAN,
                ..greedy
            }),
            "temperature is NaN",
        );
        check(
            sampling(SamplingParams {
                top_p: 0.0,
                ..greedy
            }),
            "top_p is 0; it must be above 0",
        );
        check(
            sampling(SamplingParams {
                top_p: 1.5,
                ..greedy
            }),
            "top_p is 1.5",
        );
        check(
            sampling(SamplingParams {
                min_p: -0.1,
                ..greedy
            }),
            "min_p is -0.1",
        );
    }

    #[test]
    fn text_needs_a_tokenizer() {
        let manifest = manifest(16, 4, 64);
        let room = Room {
            model: &manifest.model,
            max_seq_len: 64,
            cache_tokens: 64,
            tokenizer: None,
        };
        let text = Request::new(Prompt::Text("a".to_owned()));
        let error = text.resolve(&room).unwrap_err().to_string();
        assert_eq!(
            error,
            "this bundle has no tokenizer, so it takes token ids and not text"
        );
        let stop = Request {
            stop: vec!["a".to_owned()],
            ..ids(&[1])
        };
        assert!(
            stop.resolve(&room)
                .unwrap_err()
                .to_string()
                .contains("not stop strings")
        );
        assert_eq!(ids(&[1; 60]).resolve(&room).unwrap(), (vec![1; 60], 4));
    }
}
