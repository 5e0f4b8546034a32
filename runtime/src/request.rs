//! What is asked of the engine, and what is wrong with it.

use crate::beams::BeamParams;
use crate::choices::Choices;
use crate::device::Observe;
use crate::kv::blocks_for;
use crate::sampling::ranges::{
    CUTOFF, EXPONENT, FACTOR, FINITE, MIN_P, NOT_NEGATIVE, PENALTY, Range, TOP_P,
};
use crate::sampling::{MAX_LOGPROBS, Processors, SamplingParams, SequenceBias};
use crate::tokenizer::{Tokenizer, TokenizerError};
use kiln_bundle::{BLOCK_TOKENS, ModelInfo};

/// New tokens of a request that does not say how many, where the bundle's limit leaves room.
pub const DEFAULT_MAX_NEW_TOKENS: u32 = 128;

/// Most stop strings of a request: each piece of text is searched for all of them.
pub const MAX_STOP_STRINGS: usize = 64;

/// Most beams of a search.
pub const MAX_BEAMS: u32 = 128;

/// What a sequence starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text; the tokenizer adds what its model expects around it.
    Text(String),
    /// Token ids, taken as they are.
    Ids(Vec<u32>),
}

/// One generation.
///
/// ```
/// use kiln_runtime::{Prompt, Request};
///
/// let mut request = Request::new(Prompt::Text("The sea was".to_owned()));
/// request.max_new_tokens = Some(100);
/// request.stop = vec!["\n\n".to_owned()];
/// request.processors.repetition_penalty = 1.2;
/// assert!(request.check().is_ok());
///
/// request.min_new_tokens = 200;
/// assert_eq!(
///     request.check().unwrap_err().to_string(),
///     "min_new_tokens is 200; it must be at most max_new_tokens, which is 100"
/// );
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most new tokens; none: [`DEFAULT_MAX_NEW_TOKENS`], or as many as there is room for.
    pub max_new_tokens: Option<u32>,
    /// Generated tokens before which no token that ends the sequence can be chosen.
    pub min_new_tokens: u32,
    /// As `min_new_tokens`, the prompt's tokens counted; without effect beside `min_new_tokens`.
    pub min_length: u32,
    /// What changes the scores that tokens are chosen by.
    pub processors: Processors,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Ends the text before the first of these.
    pub stop: Vec<String>,
    /// End the sequence, after themselves, like the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Goes on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Searches with beams instead of generating token by token. Where the request samples, the beams'
    /// continuations are drawn.
    pub beams: Option<BeamParams>,
    /// How often the prompt is continued.
    pub choices: Choices,
    /// Reports the log-probability of every generated token, and so many of the likeliest in its place.
    pub logprobs: Option<u32>,
    /// With `logprobs`, reports those of the prompt too.
    pub echo: bool,
    /// What to report besides.
    pub outputs: Outputs,
}

/// What a request reports of the model's work.
///
/// ```
/// # use kiln_bundle::Bundle;
/// # use kiln_runtime::{Engine, Event, LoadOptions};
/// use kiln_runtime::{Embedding, Layers, Pooling, Prompt, Request};
/// # use std::path::Path;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let bundle = Bundle::open(Path::new("examples/tiny.kiln"))?;
/// # let mut engine = Engine::load(&bundle, &LoadOptions::default())?;
///
/// // A vector for a text, and nothing generated.
/// let mut request = Request::new(Prompt::Ids(vec![2, 30, 7]));
/// request.max_new_tokens = Some(0);
/// request.outputs.embedding = Some(Embedding { pooling: Pooling::Last, layer: None });
/// // Besides, the hidden states of the embedding and of the last layer.
/// request.outputs.hidden_states = Layers::Of(vec![0, 2]);
/// engine.submit(request)?;
/// while !engine.is_idle() {
///     for event in engine.step()? {
///         if let Event::Finished(completion) = event {
///             let hidden = &completion.choices[0].hidden_states; // (2, 3, C)
///             assert_eq!(completion.embedding.len(), 32);
///             assert_eq!(hidden.len(), 2 * 3 * 32);
///             assert!(hidden.ends_with(&completion.embedding));
///         }
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// The logits of every position of prompt and generation.
    pub logits: bool,
    /// What each generated token was chosen by: logits as the processors left them, and where it was
    /// sampled over the temperature and with -inf for what was cut.
    pub scores: bool,
    /// Hidden states of every position of prompt and generation.
    pub hidden_states: Layers,
    /// A vector for the prompt.
    pub embedding: Option<Embedding>,
}

/// Hidden states: 0 is the embedding's output, l that of layer l, before the final normalisation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Layers {
    /// None.
    #[default]
    None,
    /// Those of the embedding and of all layers.
    All,
    /// These, in this order.
    Of(Vec<u32>),
}

impl Layers {
    /// Their indices for a model of so many layers.
    pub(crate) fn of(&self, layers: usize) -> Vec<usize> {
        match self {
            Layers::None => Vec::new(),
            Layers::All => (0..=layers).collect(),
            Layers::Of(chosen) => chosen.iter().map(|&layer| layer as usize).collect(),
        }
    }
}

/// A vector (C) for a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// How the hidden states of its tokens become one.
    pub pooling: Pooling,
    /// Which hidden states, as in [`Layers`]; none: the last layer's. 0 has no attention in it.
    pub layer: Option<u32>,
}

/// How the hidden states of several tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

impl Request {
    /// A greedy request with everything else left at its default.
    pub fn new(prompt: Prompt) -> Request {
        Request {
            prompt,
            max_new_tokens: None,
            min_new_tokens: 0,
            min_length: 0,
            processors: Processors::NONE,
            sampling: SamplingParams::GREEDY,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            echo: false,
            beams: None,
            choices: Choices::ONE,
            outputs: Outputs::default(),
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
        /// The parameter, with the id's index in `prompt_ids`.
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
        "{tokens} positions take {needed} blocks of the KV cache, which has {kv_blocks}; give it more \
         memory"
    )]
    TooLargeForCache {
        /// Prompt and new tokens.
        tokens: usize,
        /// Blocks that they take, in all beams.
        needed: usize,
        /// Blocks of the cache.
        kv_blocks: usize,
    },
    /// Nothing is asked for.
    #[error(
        "max_new_tokens is 0 and neither logits, hidden states, an embedding nor the prompt's logprobs \
         (logprobs and echo) are asked for"
    )]
    NothingToDo,
    /// A parameter outside its range, which others may narrow.
    #[error("{name} is {found}; it must be {needed}")]
    Parameter {
        /// The parameter, with an index where it is one of several.
        name: String,
        /// Its value.
        found: String,
        /// Its range.
        needed: String,
    },
}

/// What of an engine bounds a request.
#[derive(Clone, Copy)]
pub(crate) struct Room<'a> {
    pub(crate) model: &'a ModelInfo,
    pub(crate) max_seq_len: usize,
    /// Blocks of the KV cache.
    pub(crate) kv_blocks: usize,
    /// Sequences that run at a time.
    pub(crate) slots: usize,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
}

impl Request {
    /// The tokens that end the sequence, each once.
    pub(crate) fn ends(&self, model: &ModelInfo) -> Vec<u32> {
        let own: &[u32] = if self.ignore_eos {
            &[]
        } else {
            &model.eos_token_ids
        };
        let mut ends = [own, &self.stop_token_ids].concat();
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// Generated tokens before which none that ends the sequence can be chosen.
    pub(crate) fn min_new_tokens(&self, prompt_len: usize) -> u32 {
        let prompt_len = u32::try_from(prompt_len).unwrap_or(u32::MAX);
        match self.min_new_tokens {
            0 => self.min_length.saturating_sub(prompt_len),
            // As in transformers, it takes precedence.
            new_tokens => new_tokens,
        }
    }

    /// Whether the log-probabilities of the prompt are wanted.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.echo && self.logprobs.is_some()
    }

    /// How many of the likeliest tokens are noted with each generated one; none where not even its own
    /// log-probability is.
    pub(crate) fn top_logprobs(&self) -> Option<u32> {
        let ranks = self.choices.generated > self.choices.returned;
        self.logprobs.or(ranks.then_some(0))
    }

    /// What is needed of every position of prompt and generation.
    pub(crate) fn observe(&self) -> Observe {
        let Outputs {
            logits,
            scores: _,
            hidden_states,
            embedding,
        } = &self.outputs;
        Observe {
            logits: *logits,
            hidden_states: *hidden_states != Layers::None || embedding.is_some(),
            ..Observe::default()
        }
    }

    /// Whether the prompt alone gives a result.
    fn reads_prompt(&self) -> bool {
        self.observe().is_any() || self.scores_prompt()
    }

    /// What is wrong with the request whatever it runs on: parameters out of range or at odds with each
    /// other.
    ///
    /// # Errors
    /// [`RequestError::Parameter`] and [`RequestError::NothingToDo`].
    pub fn check(&self) -> Result<(), RequestError> {
        check_sampling(&self.sampling)?;
        check_processors(&self.processors)?;
        self.choices.check(self)?;
        self.check_beams()?;
        self.check_outputs()?;
        if self.stop.len() > MAX_STOP_STRINGS {
            let (name, found) = ("stop", format!("{} strings", self.stop.len()));
            let needed = format!("at most {MAX_STOP_STRINGS} strings");
            return Err(parameter(name, found, needed));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(parameter(
                "stop",
                "\"\"",
                "a string of at least one character",
            ));
        }
        if let Some(logprobs) = self.logprobs.filter(|&logprobs| logprobs > MAX_LOGPROBS) {
            let needed = format!("from 0 to {MAX_LOGPROBS}");
            return Err(parameter("logprobs", logprobs, needed));
        }
        if self.max_new_tokens == Some(0) && !self.reads_prompt() {
            return Err(RequestError::NothingToDo);
        }
        if let Some(most) = self
            .max_new_tokens
            .filter(|&most| most < self.min_new_tokens)
        {
            let needed = format!("at most max_new_tokens, which is {most}");
            return Err(parameter("min_new_tokens", self.min_new_tokens, needed));
        }
        Ok(())
    }

    fn check_beams(&self) -> Result<(), RequestError> {
        let Some(BeamParams {
            num_beams,
            length_penalty,
            early_stopping: _,
            num_beam_groups,
            diversity_penalty,
        }) = self.beams
        else {
            return Ok(());
        };
        if !(2..=MAX_BEAMS).contains(&num_beams) {
            let needed = format!("from 2 to {MAX_BEAMS}, or absent");
            return Err(parameter("num_beams", num_beams, needed));
        }
        in_range("length_penalty", length_penalty, &EXPONENT)?;
        in_range("diversity_penalty", diversity_penalty, &NOT_NEGATIVE)?;
        if num_beam_groups == 0 || num_beams % num_beam_groups != 0 {
            let needed = format!("a divisor of num_beams, which is {num_beams}");
            return Err(parameter("num_beam_groups", num_beam_groups, needed));
        }
        if (num_beam_groups > 1) != (diversity_penalty > 0.0) {
            let needed = match num_beam_groups {
                1 => "0 where num_beam_groups is 1",
                _ => "above 0 where num_beam_groups is above 1",
            };
            return Err(parameter("diversity_penalty", diversity_penalty, needed));
        }
        if num_beam_groups > 1 && self.sampling.temperature > 0.0 {
            let needed = "0 where num_beam_groups is above 1";
            return Err(parameter("temperature", self.sampling.temperature, needed));
        }
        if let Some(stop) = self.stop.first() {
            let needed = "absent with num_beams; stop_token_ids can be given";
            return Err(parameter("stop", format!("{stop:?}"), needed));
        }
        if self.max_new_tokens == Some(0) {
            return Err(parameter("max_new_tokens", 0, "above 0 with num_beams"));
        }
        Ok(())
    }

    fn check_outputs(&self) -> Result<(), RequestError> {
        let Outputs {
            logits,
            scores,
            hidden_states,
            embedding,
        } = &self.outputs;
        let of_positions = [
            ("logits are", *logits),
            ("scores are", *scores),
            ("hidden states are", *hidden_states != Layers::None),
            ("an embedding is", embedding.is_some()),
        ];
        let Some((what, _)) = of_positions.into_iter().find(|(_, asked)| *asked) else {
            return Ok(());
        };
        let needed = format!("1 where {what} written");
        if let Some(BeamParams { num_beams, .. }) = self.beams {
            return Err(parameter("num_beams", num_beams, needed));
        }
        let Choices {
            returned,
            generated,
        } = self.choices;
        match (returned, generated) {
            (1, 1) => Ok(()),
            (1, several) => Err(parameter("best_of", several, needed)),
            (several, _) => Err(parameter("num_return_sequences", several, needed)),
        }
    }

    /// Checks the request. Returns the prompt's ids and the most new tokens.
    pub(crate) fn resolve(&self, room: &Room<'_>) -> Result<(Vec<u32>, u32), RequestError> {
        self.check()?;
        if !self.stop.is_empty() && room.tokenizer.is_none() {
            return Err(RequestError::NoTokenizer("stop strings"));
        }
        self.check_ids(room.model)?;
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
        for (index, &id) in prompt_ids.iter().enumerate() {
            check_id(&|| format!("prompt_ids[{index}]"), id, room.model)?;
        }

        let (found, limit) = (prompt_ids.len(), room.max_seq_len);
        let left = limit
            .checked_sub(found)
            .ok_or(RequestError::PromptTooLong { found, limit })?;
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let max_new_tokens = self
            .max_new_tokens
            .unwrap_or(DEFAULT_MAX_NEW_TOKENS.min(left));
        let needs_new_tokens =
            !self.reads_prompt() || self.choices.generated > 1 || self.beams.is_some();
        if max_new_tokens == 0 && needs_new_tokens {
            return Err(RequestError::PromptTooLong { found, limit });
        }
        if max_new_tokens > left {
            return Err(RequestError::TooManyNewTokens {
                prompt: found,
                asked: max_new_tokens,
                limit,
            });
        }
        if self.min_new_tokens > max_new_tokens {
            let needed = format!("at most max_new_tokens, which is {max_new_tokens}");
            return Err(parameter("min_new_tokens", self.min_new_tokens, needed));
        }
        let tokens = found + max_new_tokens as usize;
        if self.min_length as usize > tokens {
            let needed = format!("at most prompt and max_new_tokens together, which are {tokens}");
            return Err(parameter("min_length", self.min_length, needed));
        }
        let beams = self.beams.map_or(1, |beams| beams.num_beams as usize);
        if beams > room.slots {
            let most = room.slots;
            let needed = format!("at most {most}, the largest batch of this bundle (--max-batch)");
            return Err(parameter("num_beams", beams, needed));
        }
        // Beams share the whole blocks of the prompt.
        let shared = found / BLOCK_TOKENS;
        let needed = shared + beams * (blocks_for(tokens) - shared);
        if needed > room.kv_blocks {
            return Err(RequestError::TooLargeForCache {
                tokens,
                needed,
                kv_blocks: room.kv_blocks,
            });
        }
        Ok((prompt_ids, max_new_tokens))
    }

    /// Holds every id but the prompt's against the vocabulary, and layers against the model's.
    fn check_ids(&self, model: &ModelInfo) -> Result<(), RequestError> {
        let Processors {
            sequence_bias,
            bad_words_ids,
            suppress_tokens,
            begin_suppress_tokens,
            forced_bos_token_id,
            forced_eos_token_id,
            exponential_decay_length_penalty,
            ..
        } = &self.processors;
        let (single, several): (Vec<_>, Vec<_>) = sequence_bias
            .iter()
            .map(|sequence| &sequence.ids)
            .partition(|ids| ids.len() == 1);
        let lists: [(&str, &mut dyn Iterator<Item = &u32>); 8] = [
            ("stop_token_ids", &mut self.stop_token_ids.iter()),
            ("logit_bias", &mut single.into_iter().flatten()),
            ("sequence_bias", &mut several.into_iter().flatten()),
            ("bad_words_ids", &mut bad_words_ids.iter().flatten()),
            ("suppress_tokens", &mut suppress_tokens.iter()),
            ("begin_suppress_tokens", &mut begin_suppress_tokens.iter()),
            ("forced_bos_token_id", &mut forced_bos_token_id.iter()),
            ("forced_eos_token_id", &mut forced_eos_token_id.iter()),
        ];
        for (field, ids) in lists {
            for &id in ids {
                check_id(&|| field.to_owned(), id, model)?;
            }
        }
        let hidden = self.outputs.hidden_states.of(model.layers as usize);
        let hidden = hidden.into_iter().map(|layer| ("hidden_layers", layer));
        let embedding = self.outputs.embedding.and_then(|embedding| embedding.layer);
        let embedding = embedding.map(|layer| ("layer", layer as usize));
        for (name, layer) in hidden.chain(embedding) {
            if layer > model.layers as usize {
                let needed = format!("from 0 to {}, the layers of the model", model.layers);
                return Err(parameter(name, layer, needed));
            }
        }
        if let Some((start, factor)) = exponential_decay_length_penalty
            && model.eos_token_ids.is_empty()
        {
            let found = format!("{start},{factor}");
            let needed = "absent: the model has no end-of-sequence token";
            return Err(parameter("exponential_decay_length_penalty", found, needed));
        }
        Ok(())
    }
}

fn check_id(field: &dyn Fn() -> String, id: u32, model: &ModelInfo) -> Result<(), RequestError> {
    let vocab_size = model.vocab_size;
    if id < vocab_size {
        return Ok(());
    }
    Err(RequestError::TokenIdOutOfRange {
        field: field(),
        id,
        vocab_size,
    })
}

fn check_sampling(params: &SamplingParams) -> Result<(), RequestError> {
    let SamplingParams {
        temperature,
        top_k: _,
        top_p,
        min_p,
        typical_p,
        epsilon_cutoff,
        eta_cutoff,
        seed: _,
    } = *params;
    in_range("temperature", temperature, &NOT_NEGATIVE)?;
    in_range("top_p", top_p, &TOP_P)?;
    in_range("min_p", min_p, &MIN_P)?;
    in_range("typical_p", typical_p, &TOP_P)?;
    in_range("epsilon_cutoff", epsilon_cutoff, &CUTOFF)?;
    in_range("eta_cutoff", eta_cutoff, &CUTOFF)
}

fn check_processors(processors: &Processors) -> Result<(), RequestError> {
    let Processors {
        sequence_bias,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        no_repeat_ngram_size: _,
        bad_words_ids,
        suppress_tokens,
        begin_suppress_tokens: _,
        forced_bos_token_id,
        forced_eos_token_id,
        renormalize_logits: _,
        exponential_decay_length_penalty,
    } = processors;
    in_range("repetition_penalty", *repetition_penalty, &FACTOR)?;
    in_range("presence_penalty", *presence_penalty, &PENALTY)?;
    in_range("frequency_penalty", *frequency_penalty, &PENALTY)?;
    for SequenceBias { ids, bias } in sequence_bias {
        let name = match ids[..] {
            [] => {
                return Err(parameter(
                    "sequence_bias",
                    "of no tokens",
                    "of at least one",
                ));
            }
            [id] => format!("logit_bias of token {id}"),
            _ => format!("sequence_bias of tokens {ids:?}"),
        };
        in_range(&name, *bias, &FINITE)?;
    }
    if let Some(index) = bad_words_ids.iter().position(Vec::is_empty) {
        let name = format!("bad_words_ids[{index}]");
        return Err(parameter(name, "[]", "a list of at least one token"));
    }
    if let Some((_, factor)) = exponential_decay_length_penalty {
        in_range("exponential_decay_length_penalty[1]", *factor, &FACTOR)?;
    }
    let forced = [
        ("forced_bos_token_id", forced_bos_token_id),
        ("forced_eos_token_id", forced_eos_token_id),
    ];
    for (name, id) in forced {
        if let Some(id) = id.filter(|id| suppress_tokens.contains(id)) {
            return Err(parameter(name, id, "none of suppress_tokens"));
        }
    }
    Ok(())
}

fn in_range(name: &str, value: f32, range: &Range) -> Result<(), RequestError> {
    match range.contains(value) {
        true => Ok(()),
        false => Err(parameter(name, value, range.needed)),
    }
}

pub(crate) fn parameter(
    name: impl Into<String>,
    found: impl ToString,
    needed: impl Into<String>,
) -> RequestError {
    RequestError::Parameter {
        name: name.into(),
        found: found.to_string(),
        needed: needed.into(),
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
            kv_blocks: 3,
            slots: 4,
            tokenizer: Some(&tokenizer),
        };
        let error = request.resolve(&room).unwrap_err().to_string();
        assert!(error.contains(expect), "{error:?} lacks {expect:?}");
    }

    fn ids(ids: &[u32]) -> Request {
        Request::new(Prompt::Ids(ids.to_vec()))
    }

    #[test]
    fn outputs_are_of_one_result() {
        let request = |returned, generated| {
            let mut request = ids(&[1]);
            request.outputs.logits = true;
            request.sampling.temperature = 1.0;
            request.choices = Choices {
                returned,
                generated,
            };
            request
        };
        check(
            request(1, 3),
            "best_of is 3; it must be 1 where logits are written",
        );
        check(
            request(2, 3),
            "num_return_sequences is 2; it must be 1 where logits are written",
        );
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
                logprobs: Some(21),
                ..ids(&[1])
            },
            "logprobs is 21; it must be from 0 to 20",
        );
        check(
            Request {
                min_length: 20,
                max_new_tokens: Some(8),
                ..ids(&[1])
            },
            "min_length is 20; it must be at most prompt and max_new_tokens together, which are 9",
        );
        check(
            Request {
                stop: vec!["x".to_owned(); 65],
                ..ids(&[1])
            },
            "stop is 65 strings; it must be at most 64 strings",
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
    fn mistakes_in_processors_are_named() {
        let fails = |processors, expect| {
            let request = Request {
                processors,
                ..ids(&[1])
            };
            check(request, expect);
        };
        let none = || Processors::NONE;
        fails(
            Processors {
                repetition_penalty: 0.0,
                ..none()
            },
            "repetition_penalty is 0; it must be a number above 0",
        );
        fails(
            Processors {
                presence_penalty: 2.5,
                ..none()
            },
            "presence_penalty is 2.5; it must be from -2 to 2",
        );
        fails(
            Processors {
                frequency_penalty: f32::NAN,
                ..none()
            },
            "frequency_penalty is NaN; it must be from -2 to 2",
        );
        let bias = |ids: &[u32], bias| Processors {
            sequence_bias: vec![SequenceBias {
                ids: ids.to_vec(),
                bias,
            }],
            ..none()
        };
        fails(
            bias(&[1], f32::INFINITY),
            "logit_bias of token 1 is inf; it must be a finite number",
        );
        fails(
            bias(&[1, 2], f32::NAN),
            "sequence_bias of tokens [1, 2] is NaN",
        );
        fails(bias(&[], 1.0), "sequence_bias is of no tokens");
        fails(bias(&[300], 1.0), "logit_bias: token id 300");
        fails(bias(&[1, 300], 1.0), "sequence_bias: token id 300");
        fails(
            Processors {
                bad_words_ids: vec![vec![1], vec![]],
                ..none()
            },
            "bad_words_ids[1] is []; it must be a list of at least one token",
        );
        fails(
            Processors {
                suppress_tokens: vec![4, 300],
                ..none()
            },
            "suppress_tokens: token id 300 is out of range",
        );
        fails(
            Processors {
                forced_eos_token_id: Some(4),
                suppress_tokens: vec![5, 4],
                ..none()
            },
            "forced_eos_token_id is 4; it must be none of suppress_tokens",
        );
        fails(
            Processors {
                exponential_decay_length_penalty: Some((3, -1.0)),
                ..none()
            },
            "exponential_decay_length_penalty[1] is -1; it must be a number above 0",
        );
        let sampling = SamplingParams {
            epsilon_cutoff: 1.0,
            ..SamplingParams::GREEDY
        };
        check(
            Request {
                sampling,
                ..ids(&[1])
            },
            "epsilon_cutoff is 1; it must be from 0 up and below 1",
        );
    }

    #[test]
    fn text_needs_a_tokenizer() {
        let manifest = manifest(16, 4, 64);
        let room = Room {
            model: &manifest.model,
            max_seq_len: 64,
            kv_blocks: 4,
            slots: 4,
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
