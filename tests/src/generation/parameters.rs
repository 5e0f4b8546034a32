//! What a request says.

use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// How to generate, under the names that a line of requests.jsonl has. Defaults change nothing.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Parameters {
    /// The model's own end-of-sequence ids; no part of a request.
    #[serde(skip)]
    pub eos_token_ids: Vec<u32>,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Further ids that end a sequence.
    pub stop_token_ids: Vec<u32>,
    /// The model's own do not.
    pub ignore_eos: bool,

    /// Sequences that are followed at a time; 1 is greedy.
    pub num_beams: usize,
    /// Sequences that come back.
    pub num_return_sequences: usize,
    /// Exponent of the length that divides a score.
    pub length_penalty: f32,
    /// When beam search ends.
    pub early_stopping: EarlyStopping,
    /// Groups into which the beams are split.
    pub num_beam_groups: usize,
    /// What a token costs for each beam of an earlier group that takes it in the same step.
    pub diversity_penalty: f32,

    /// Added to the scores of these ids.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Added to the score of a sequence's last id where the others precede it; of equal sequences
    /// the last counts.
    pub sequence_bias: Vec<(Vec<u32>, f32)>,
    /// Divides positive and multiplies negative scores of ids of prompt and output.
    pub repetition_penalty: f32,
    /// Subtracted from the scores of ids of the output.
    pub presence_penalty: f32,
    /// The same, times how often they occur.
    pub frequency_penalty: f32,
    /// No n ids occur a second time in a row; 0: they may.
    pub no_repeat_ngram_size: usize,
    /// Sequences that do not occur; an end alone does not count as one.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// No end before prompt and output have this length; not used beside `min_new_tokens`.
    pub min_length: usize,
    /// No end before the output has this length.
    pub min_new_tokens: usize,
    /// Follows a prompt of a single token.
    pub forced_bos_token_id: Option<u32>,
    /// Is the token number `max_new_tokens`.
    pub forced_eos_token_id: Option<u32>,
    /// (start, factor): beyond `start` new tokens, ends gain |score| * (factor ^ tokens beyond - 1).
    pub exponential_decay_length_penalty: Option<(usize, f32)>,
    /// Do not occur.
    pub suppress_tokens: Vec<u32>,
    /// Makes probabilities of the scores again, behind everything that changes them.
    pub renormalize_logits: bool,

    /// Divides scores.
    pub temperature: f32,
    /// Keeps the k best and their equals; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest best with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps what is at least this share as probable as the best; 0 keeps all.
    pub min_p: f32,
    /// Keeps what is nearest to the expected information, with at least this probability; 1 keeps all.
    pub typical_p: f32,
    /// Keeps what is at least this probable; 0 keeps all.
    pub epsilon_cutoff: f32,
    /// The same, less strict where the distribution is flat; 0 keeps all.
    pub eta_cutoff: f32,
}

/// When beam search ends.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(try_from = "Value")]
pub enum EarlyStopping {
    /// As soon as `num_beams` sequences are finished.
    Yes,
    /// When the best running beam would not be among them if it ended here.
    #[default]
    No,
    /// When it cannot come among them.
    Never,
}

impl TryFrom<Value> for EarlyStopping {
    type Error = String;

    fn try_from(value: Value) -> Result<EarlyStopping, String> {
        match value {
            Value::Bool(true) => Ok(EarlyStopping::Yes),
            Value::Bool(false) => Ok(EarlyStopping::No),
            Value::String(word) if word == "never" => Ok(EarlyStopping::Never),
            other => Err(format!(
                "early_stopping is {other}; it must be true, false or \"never\""
            )),
        }
    }
}

impl Default for Parameters {
    fn default() -> Parameters {
        Parameters {
            eos_token_ids: Vec::new(),
            max_new_tokens: 16,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            num_beams: 1,
            num_return_sequences: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::No,
            num_beam_groups: 1,
            diversity_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            sequence_bias: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            min_length: 0,
            min_new_tokens: 0,
            forced_bos_token_id: None,
            forced_eos_token_id: None,
            exponential_decay_length_penalty: None,
            suppress_tokens: Vec::new(),
            renormalize_logits: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
        }
    }
}

impl Parameters {
    /// A request's prompt and parameters, for a model that ends sequences with `eos_token_ids`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_request(
        request: &Value,
        eos_token_ids: &[u32],
    ) -> Result<(Vec<u32>, Parameters), serde_json::Error> {
        let mut request = request.clone();
        let prompt = request["prompt_ids"].take();
        if let Some(fields) = request.as_object_mut() {
            fields.remove("prompt_ids");
        }
        let parameters = Parameters {
            eos_token_ids: eos_token_ids.to_vec(),
            ..serde_json::from_value(request)?
        };
        Ok((serde_json::from_value(prompt)?, parameters))
    }

    /// The ids that end a sequence, each once.
    pub fn ends(&self) -> Vec<u32> {
        let own: &[u32] = if self.ignore_eos {
            &[]
        } else {
            &self.eos_token_ids
        };
        let mut ends = [own, &self.stop_token_ids].concat();
        ends.sort_unstable();
        ends.dedup();
        ends
    }
}
