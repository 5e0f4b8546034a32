//! Generation settings: flags, and fields of `requests.jsonl` under the same names.

use kiln_runtime::ranges::{self, Range};
use kiln_runtime::{
    BeamParams, Choices, DEFAULT_MAX_NEW_TOKENS, EarlyStopping, MAX_BEAMS, MAX_CHOICES,
    MAX_LOGPROBS, Processors, Prompt, Request, SamplingParams, SequenceBias,
};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// How to generate. Without --temperature, --top-k, --top-p, --min-p, --typical-p, --epsilon-cutoff,
/// --eta-cutoff and --seed the likeliest token is taken each time; any of the others alone samples at
/// temperature 1
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Settings {
    /// Most new tokens [default: 128, or as many as the bundle has room for]
    #[arg(long, value_name = "N")]
    pub(super) max_new_tokens: Option<u32>,
    /// New tokens before which neither an end-of-sequence nor a stop token is chosen [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) min_new_tokens: Option<u32>,
    /// As --min-new-tokens, counting the prompt's tokens too [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) min_length: Option<u32>,
    /// Divides the logits; 0 always takes the likeliest token [default: 0, or 1 with any of
    /// --top-k, --top-p, --min-p, --typical-p, --epsilon-cutoff, --eta-cutoff, --seed]
    #[arg(long, value_name = "T", value_parser = |t: &str| number(t, &ranges::NOT_NEGATIVE),
          allow_negative_numbers = true)]
    pub(super) temperature: Option<f32>,
    /// Samples from the K likeliest tokens; 0 is all [default: 0]
    #[arg(long, value_name = "K")]
    pub(super) top_k: Option<u32>,
    /// Samples from the fewest tokens whose probabilities sum to P [default: 1]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::TOP_P),
          allow_negative_numbers = true)]
    pub(super) top_p: Option<f32>,
    /// Samples from tokens at least P times as probable as the likeliest [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::MIN_P),
          allow_negative_numbers = true)]
    pub(super) min_p: Option<f32>,
    /// Samples from the tokens whose information is closest to the entropy, the fewest whose
    /// probabilities sum to P [default: 1]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::TOP_P),
          allow_negative_numbers = true)]
    pub(super) typical_p: Option<f32>,
    /// Samples from tokens of at least probability P [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::CUTOFF),
          allow_negative_numbers = true)]
    pub(super) epsilon_cutoff: Option<f32>,
    /// Samples from tokens of at least probability P, or sqrt(P) * exp(-entropy) where that is less
    /// [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::CUTOFF),
          allow_negative_numbers = true)]
    pub(super) eta_cutoff: Option<f32>,
    /// Makes sampling repeatable [default: random]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Divides positive and multiplies negative logits of tokens in prompt or output [default: 1]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::FACTOR),
          allow_negative_numbers = true)]
    pub(super) repetition_penalty: Option<f32>,
    /// Subtracts P from the logits of generated tokens [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::PENALTY),
          allow_negative_numbers = true)]
    pub(super) presence_penalty: Option<f32>,
    /// Subtracts P from a token's logit for each time it was generated [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::PENALTY),
          allow_negative_numbers = true)]
    pub(super) frequency_penalty: Option<f32>,
    /// Lets no N tokens in a row occur twice in prompt and output; 0 is no limit [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) no_repeat_ngram_size: Option<u32>,
    /// Adds to a token's logit; may be given several times
    #[arg(long, value_name = "ID=BIAS", value_parser = logit_bias)]
    #[serde(serialize_with = "biases_by_id")]
    pub(super) logit_bias: Vec<SequenceBias>,
    /// Adds to the logit of the last token where the others precede it; may be given several times
    #[arg(long, value_name = "ID,...=BIAS", value_parser = sequence_bias)]
    #[serde(serialize_with = "biases")]
    pub(super) sequence_bias: Vec<SequenceBias>,
    /// Never completes this sequence of tokens; may be given several times
    #[arg(long, value_name = "ID,...", value_parser = ids)]
    pub(super) bad_words_ids: Vec<Ids>,
    /// Never chooses these tokens
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub(super) suppress_tokens: Vec<u32>,
    /// Does not choose these tokens first
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub(super) begin_suppress_tokens: Vec<u32>,
    /// Makes this the first token after a prompt of one token
    #[arg(long, value_name = "ID")]
    pub(super) forced_bos_token_id: Option<u32>,
    /// Makes this the last of --max-new-tokens tokens
    #[arg(long, value_name = "ID")]
    pub(super) forced_eos_token_id: Option<u32>,
    /// Makes probabilities of the scores again behind all that changes them; of effect on the scores of
    /// beams and on --output-scores
    #[arg(long)]
    pub(super) renormalize_logits: bool,
    /// From START new tokens on, raises the logits of end-of-sequence tokens by growing powers of
    /// FACTOR
    #[arg(long, value_name = "START,FACTOR", value_parser = decay)]
    pub(super) exponential_decay_length_penalty: Option<(u32, f32)>,
    /// Ends the text before this string; may be given several times
    #[arg(long, value_name = "STR", value_parser = stop)]
    pub(super) stop: Vec<String>,
    /// Ends the sequence after any of these tokens, besides the model's own
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub(super) stop_token_ids: Vec<u32>,
    /// Goes on after an end-of-sequence token
    #[arg(long)]
    pub(super) ignore_eos: bool,
    /// Reports, with --json, the log-probability of each token and those of the N likeliest (0 to 20)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_LOGPROBS)))]
    pub(super) logprobs: Option<u32>,
    /// Begins the text with the prompt, and the log-probabilities with the prompt's
    #[arg(long)]
    pub(super) echo: bool,
    /// Searches with so many beams; 1 generates token by token. With a temperature above 0, or any of
    /// the flags that sample, their continuations are drawn [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_BEAMS)))]
    pub(super) num_beams: Option<u32>,
    /// With beams: divides a sequence's score by this power of its length; above 0 favours long ones
    /// [default: 1]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::EXPONENT),
          allow_negative_numbers = true)]
    pub(super) length_penalty: Option<f32>,
    /// With beams: ends the search with as many finished sequences as beams (true), when the best
    /// running one would not be among them (false), or when none can come to be (never)
    /// [default: false]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub(super) early_stopping: Option<StopEarly>,
    /// With beams: splits them into groups that keep away from each other's tokens [default: 1]
    #[arg(long, value_name = "N")]
    pub(super) num_beam_groups: Option<u32>,
    /// With groups: what a token costs for each beam of an earlier group that takes it in the same step
    /// [default: 0]
    #[arg(long, value_name = "P", value_parser = |t: &str| number(t, &ranges::NOT_NEGATIVE),
          allow_negative_numbers = true)]
    pub(super) diversity_penalty: Option<f32>,
    /// Returns so many continuations of a prompt: samples, or the best of a search with beams
    /// [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CHOICES)))]
    pub(super) num_return_sequences: Option<u32>,
    /// Samples so many and returns the --num-return-sequences of the highest log-probability per token
    /// [default: as many]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CHOICES)))]
    pub(super) best_of: Option<u32>,
}

/// As fields of `requests.jsonl` are written.
fn biases_by_id<S: Serializer>(biases: &[SequenceBias], to: S) -> Result<S::Ok, S::Error> {
    let by_id = |bias: &SequenceBias| Some((*bias.ids.first()?, bias.bias));
    to.collect_map(biases.iter().filter_map(by_id))
}

/// As [`biases_by_id`].
fn biases<S: Serializer>(biases: &[SequenceBias], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(biases.iter().map(|bias| (&bias.ids, bias.bias)))
}

/// When a search with beams ends.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopEarly {
    True,
    False,
    Never,
}

impl Serialize for StopEarly {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            StopEarly::True => to.serialize_bool(true),
            StopEarly::False => to.serialize_bool(false),
            StopEarly::Never => to.serialize_str("never"),
        }
    }
}

impl From<StopEarly> for EarlyStopping {
    fn from(when: StopEarly) -> EarlyStopping {
        match when {
            StopEarly::True => EarlyStopping::Yes,
            StopEarly::False => EarlyStopping::No,
            StopEarly::Never => EarlyStopping::Never,
        }
    }
}

/// A sequence of tokens, given as one argument.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Ids(pub(super) Vec<u32>);

impl Settings {
    /// The request for a prompt. What is said about defaults in the help is decided here and in
    /// [`Request`].
    pub(super) fn request(&self, prompt: Prompt) -> Request {
        let samples = self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some()
            || self.typical_p.is_some()
            || self.epsilon_cutoff.is_some()
            || self.eta_cutoff.is_some()
            || self.seed.is_some();
        let greedy = SamplingParams::GREEDY;
        Request {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens.unwrap_or(0),
            min_length: self.min_length.unwrap_or(0),
            processors: self.processors(),
            sampling: SamplingParams {
                temperature: self.temperature.unwrap_or(if samples { 1.0 } else { 0.0 }),
                top_k: self.top_k.unwrap_or(greedy.top_k),
                top_p: self.top_p.unwrap_or(greedy.top_p),
                min_p: self.min_p.unwrap_or(greedy.min_p),
                typical_p: self.typical_p.unwrap_or(greedy.typical_p),
                epsilon_cutoff: self.epsilon_cutoff.unwrap_or(greedy.epsilon_cutoff),
                eta_cutoff: self.eta_cutoff.unwrap_or(greedy.eta_cutoff),
                seed: self.seed,
            },
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            echo: self.echo,
            beams: self.beams(),
            choices: self.choices(),
            ..Request::new(prompt)
        }
    }

    /// What is not left at its default, as fields of `requests.jsonl`.
    pub(super) fn fields(&self) -> serde_json::Result<Map<String, Value>> {
        // By way of text, in which a number is as short as its type allows.
        let mut fields: Map<String, Value> = serde_json::from_str(&serde_json::to_string(self)?)?;
        fields.retain(|_, value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            _ => true,
        });
        Ok(fields)
    }

    /// One beam is none, unless something is said that only beams do.
    fn beams(&self) -> Option<BeamParams> {
        let num_beams = self.num_beams.unwrap_or(1);
        let in_groups = self.num_beam_groups.is_some_and(|groups| groups != 1)
            || self.diversity_penalty.is_some_and(|penalty| penalty != 0.0);
        if num_beams == 1 && !in_groups {
            return None;
        }
        let default = BeamParams::new(num_beams);
        Some(BeamParams {
            num_beams,
            length_penalty: self.length_penalty.unwrap_or(default.length_penalty),
            early_stopping: self
                .early_stopping
                .map_or(default.early_stopping, Into::into),
            num_beam_groups: self.num_beam_groups.unwrap_or(default.num_beam_groups),
            diversity_penalty: self.diversity_penalty.unwrap_or(default.diversity_penalty),
        })
    }

    fn choices(&self) -> Choices {
        let returned = self.num_return_sequences.unwrap_or(1);
        Choices {
            returned,
            generated: self.best_of.unwrap_or(returned),
        }
    }

    fn processors(&self) -> Processors {
        let none = Processors::NONE;
        let bad_words_ids = self.bad_words_ids.iter().map(|Ids(ids)| ids.clone());
        Processors {
            sequence_bias: [self.logit_bias.as_slice(), &self.sequence_bias].concat(),
            repetition_penalty: self.repetition_penalty.unwrap_or(none.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(none.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(none.frequency_penalty),
            no_repeat_ngram_size: self
                .no_repeat_ngram_size
                .unwrap_or(none.no_repeat_ngram_size),
            bad_words_ids: bad_words_ids.collect(),
            suppress_tokens: self.suppress_tokens.clone(),
            begin_suppress_tokens: self.begin_suppress_tokens.clone(),
            forced_bos_token_id: self.forced_bos_token_id,
            forced_eos_token_id: self.forced_eos_token_id,
            renormalize_logits: self.renormalize_logits,
            exponential_decay_length_penalty: self.exponential_decay_length_penalty,
        }
    }
}

// The help spells these out.
const _: () = assert!(DEFAULT_MAX_NEW_TOKENS == 128 && MAX_LOGPROBS == 20);

fn number(text: &str, range: &Range) -> Result<f32, String> {
    let value = text.parse().ok().filter(|&value| range.contains(value));
    value.ok_or_else(|| format!("it must be {}", range.needed))
}

pub(super) fn ids(text: &str) -> Result<Ids, String> {
    let ids: Result<_, _> = text.split(',').map(str::parse).collect();
    ids.map(Ids)
        .map_err(|_| "it must be token ids with commas between them".to_owned())
}

fn sequence_bias(text: &str) -> Result<SequenceBias, String> {
    let (before, bias) = text
        .split_once('=')
        .ok_or("it must be token ids, = and a number, such as 5,7=-1.5")?;
    let Ids(ids) = ids(before)?;
    let bias = number(bias, &ranges::FINITE)?;
    Ok(SequenceBias { ids, bias })
}

fn logit_bias(text: &str) -> Result<SequenceBias, String> {
    let bias = sequence_bias(text)?;
    match bias.ids.len() {
        1 => Ok(bias),
        _ => Err("it must be for one token; --sequence-bias takes several".to_owned()),
    }
}

fn decay(text: &str) -> Result<(u32, f32), String> {
    let needed = || "it must be a number of tokens and a factor, such as 20,1.05".to_owned();
    let (start, factor) = text.split_once(',').ok_or_else(needed)?;
    let factor = number(factor, &ranges::FACTOR)?;
    Ok((start.parse().map_err(|_| needed())?, factor))
}

fn stop(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("it must not be empty".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(settings: Settings) -> SamplingParams {
        settings.request(Prompt::Ids(vec![1])).sampling
    }

    #[test]
    fn greedy_unless_sampling_is_asked_for() {
        assert_eq!(sampling(Settings::default()), SamplingParams::GREEDY);
        let temperature = |settings| sampling(settings).temperature;
        assert_eq!(
            temperature(Settings {
                seed: Some(1),
                ..Settings::default()
            }),
            1.0
        );
        assert_eq!(
            temperature(Settings {
                top_k: Some(5),
                ..Settings::default()
            }),
            1.0
        );
        let both = Settings {
            top_p: Some(0.5),
            temperature: Some(0.3),
            ..Settings::default()
        };
        assert_eq!(temperature(both), 0.3);
    }

    #[test]
    fn impossible_values_are_wrong_usage() {
        let temperature = |text| number(text, &ranges::NOT_NEGATIVE);
        assert!(temperature("-1").is_err() && temperature("NaN").is_err());
        assert_eq!(
            number("0", &ranges::TOP_P).unwrap_err(),
            "it must be above 0 and at most 1"
        );
        assert!(number("1", &ranges::TOP_P).is_ok());
        assert!(number("x", &ranges::MIN_P).is_err() && number("0", &ranges::MIN_P).is_ok());
        assert!(ids("").is_err() && ids("1,").is_err() && ids("1,-2").is_err());
        assert_eq!(ids("3").unwrap(), Ids(vec![3]));
        assert!(decay("5").is_err() && decay("5,0").is_err() && decay("x,2").is_err());
        assert_eq!(decay("5,1.5").unwrap(), (5, 1.5));
    }

    #[test]
    fn biases_are_spelled() {
        let bias = |ids: &[u32], bias| SequenceBias {
            ids: ids.to_vec(),
            bias,
        };
        assert_eq!(logit_bias("5=-100").unwrap(), bias(&[5], -100.0));
        assert_eq!(sequence_bias("5,7=1.5").unwrap(), bias(&[5, 7], 1.5));
        for wrong in ["5", "5=", "=1", "5=inf", "5=NaN", "x=1"] {
            assert!(sequence_bias(wrong).is_err(), "{wrong}");
        }
        assert!(logit_bias("5,7=1").unwrap_err().contains("--sequence-bias"));
    }

    #[test]
    fn as_many_are_generated_as_returned() {
        let choices = |num_return_sequences, best_of| {
            let settings = Settings {
                num_return_sequences,
                best_of,
                ..Settings::default()
            };
            let Choices {
                returned,
                generated,
            } = settings.choices();
            (returned, generated)
        };
        assert_eq!(choices(None, None), (1, 1));
        assert_eq!(choices(Some(3), None), (3, 3));
        assert_eq!(choices(Some(3), Some(5)), (3, 5));
        assert_eq!(choices(None, Some(5)), (1, 5));
    }
}
