//! `requests.jsonl`: one request a line, `prompt` or `prompt_ids` and any generation flag under its
//! long name with underscores. Flags of the command line hold where a line is silent.

use super::settings::{Ids, Settings, StopEarly};
use kiln_runtime::{Prompt, SequenceBias};
use serde_json::{Map, Value};

/// A prompt and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    /// From 1.
    pub(super) number: usize,
    pub(super) prompt: Prompt,
    pub(super) settings: Settings,
}

/// Reads the lines of a file; empty ones are skipped. The error names line and field.
pub(super) fn parse(bytes: &[u8], defaults: &Settings) -> Result<Vec<Line>, String> {
    objects(bytes, |number, fields| {
        let prompt = prompt(fields)?;
        let mut settings = defaults.clone();
        for (name, value) in fields {
            if !PROMPTS.contains(&name.as_str()) {
                set(&mut settings, name, value)
                    .map_err(|problem| format!("field {name:?}: {problem}"))?;
            }
        }
        Ok(Line {
            number,
            prompt,
            settings,
        })
    })
}

/// As [`parse`], of lines that hold prompts and nothing else. Returns them with their numbers.
pub(super) fn parse_prompts(bytes: &[u8]) -> Result<Vec<(usize, Prompt)>, String> {
    objects(bytes, |number, fields| {
        let prompt = prompt(fields)?;
        match fields.keys().find(|name| !PROMPTS.contains(&name.as_str())) {
            Some(name) => Err(format!(
                "field {name:?}: unknown; known are prompt, prompt_ids"
            )),
            None => Ok((number, prompt)),
        }
    })
}

/// The fields that are no settings.
const PROMPTS: [&str; 2] = ["prompt", "prompt_ids"];

/// What `read` makes of each line's object and number, which counts from 1.
fn objects<T>(
    bytes: &[u8],
    read: impl Fn(usize, &Map<String, Value>) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        let line = std::str::from_utf8(line).map_err(|error| {
            format!(
                "line {number}: not valid UTF-8 at byte {} of the line",
                error.valid_up_to()
            )
        })?;
        if line.trim().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(line)
            .map_err(|error| format!("line {number}: not JSON: {error}"))?;
        let read = match &value {
            Value::Object(fields) => read(number, fields),
            other => Err(format!("expected an object, found {}", kind(other))),
        };
        lines.push(read.map_err(|problem| format!("line {number}: {problem}"))?);
    }
    Ok(lines)
}

fn prompt(fields: &Map<String, Value>) -> Result<Prompt, String> {
    match (fields.get("prompt"), fields.get("prompt_ids")) {
        (Some(_), Some(_)) => Err("it has both \"prompt\" and \"prompt_ids\"".to_owned()),
        (None, None) => Err("it has neither \"prompt\" nor \"prompt_ids\"".to_owned()),
        (Some(text), None) => {
            Ok(Prompt::Text(string(text).map_err(|problem| {
                format!("field \"prompt\": {problem}")
            })?))
        }
        (None, Some(ids)) => {
            Ok(Prompt::Ids(list(ids, unsigned).map_err(|problem| {
                format!("field \"prompt_ids\": {problem}")
            })?))
        }
    }
}

/// Sets the field `name`.
pub(super) fn set(settings: &mut Settings, name: &str, value: &Value) -> Result<(), String> {
    match name {
        "max_new_tokens" => settings.max_new_tokens = Some(unsigned(value)?),
        "min_new_tokens" => settings.min_new_tokens = Some(unsigned(value)?),
        "min_length" => settings.min_length = Some(unsigned(value)?),
        "temperature" => settings.temperature = Some(float(value)?),
        "top_k" => settings.top_k = Some(unsigned(value)?),
        "top_p" => settings.top_p = Some(float(value)?),
        "min_p" => settings.min_p = Some(float(value)?),
        "typical_p" => settings.typical_p = Some(float(value)?),
        "epsilon_cutoff" => settings.epsilon_cutoff = Some(float(value)?),
        "eta_cutoff" => settings.eta_cutoff = Some(float(value)?),
        "seed" => settings.seed = Some(unsigned(value)?),
        "repetition_penalty" => settings.repetition_penalty = Some(float(value)?),
        "presence_penalty" => settings.presence_penalty = Some(float(value)?),
        "frequency_penalty" => settings.frequency_penalty = Some(float(value)?),
        "no_repeat_ngram_size" => settings.no_repeat_ngram_size = Some(unsigned(value)?),
        "logit_bias" => settings.logit_bias = logit_bias(value)?,
        "sequence_bias" => settings.sequence_bias = list(value, sequence_bias)?,
        "bad_words_ids" => settings.bad_words_ids = list(value, ids)?,
        "suppress_tokens" => settings.suppress_tokens = list(value, unsigned)?,
        "begin_suppress_tokens" => settings.begin_suppress_tokens = list(value, unsigned)?,
        "forced_bos_token_id" => settings.forced_bos_token_id = Some(unsigned(value)?),
        "forced_eos_token_id" => settings.forced_eos_token_id = Some(unsigned(value)?),
        "renormalize_logits" => settings.renormalize_logits = flag(value)?,
        "exponential_decay_length_penalty" => {
            let (start, factor) = pair(value, "[start, factor]")?;
            settings.exponential_decay_length_penalty = Some((unsigned(start)?, float(factor)?));
        }
        "logprobs" => settings.logprobs = Some(unsigned(value)?),
        "echo" => settings.echo = flag(value)?,
        "num_beams" => settings.num_beams = Some(unsigned(value)?),
        "length_penalty" => settings.length_penalty = Some(float(value)?),
        "early_stopping" => settings.early_stopping = Some(early_stopping(value)?),
        "num_beam_groups" => settings.num_beam_groups = Some(unsigned(value)?),
        "diversity_penalty" => settings.diversity_penalty = Some(float(value)?),
        "num_return_sequences" => settings.num_return_sequences = Some(unsigned(value)?),
        "best_of" => settings.best_of = Some(unsigned(value)?),
        "stop" => {
            settings.stop = match value {
                Value::String(stop) => vec![stop.clone()],
                _ => list(value, string)?,
            }
        }
        "stop_token_ids" => settings.stop_token_ids = list(value, unsigned)?,
        "ignore_eos" => settings.ignore_eos = flag(value)?,
        _ => {
            return Err(
                "unknown; known are max_new_tokens, min_new_tokens, min_length, \
                 temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, seed, \
                 repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size, \
                 logit_bias, sequence_bias, bad_words_ids, suppress_tokens, begin_suppress_tokens, \
                 forced_bos_token_id, forced_eos_token_id, renormalize_logits, exponential_decay_length_penalty, stop, \
                 stop_token_ids, ignore_eos, logprobs, echo, num_beams, length_penalty, \
                 early_stopping, num_beam_groups, diversity_penalty, num_return_sequences, best_of"
                    .to_owned(),
            );
        }
    }
    Ok(())
}

fn unsigned<T: TryFrom<u64>>(value: &Value) -> Result<T, String> {
    let bits = 8 * size_of::<T>();
    let number = value.as_u64().and_then(|number| T::try_from(number).ok());
    number.ok_or_else(|| unexpected(&format!("an unsigned integer of {bits} bits"), value))
}

fn float(value: &Value) -> Result<f32, String> {
    value
        .as_f64()
        .map(|number| number as f32)
        .ok_or_else(|| unexpected("a number", value))
}

fn flag(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| unexpected("true or false", value))
}

fn early_stopping(value: &Value) -> Result<StopEarly, String> {
    match value {
        Value::Bool(true) => Ok(StopEarly::True),
        Value::Bool(false) => Ok(StopEarly::False),
        Value::String(word) if word == "never" => Ok(StopEarly::Never),
        other => Err(unexpected("true, false or \"never\"", other)),
    }
}

fn ids(value: &Value) -> Result<Ids, String> {
    list(value, unsigned).map(Ids)
}

/// `[[ids], bias]`.
fn sequence_bias(value: &Value) -> Result<SequenceBias, String> {
    let (ids, bias) = pair(value, "[[ids], bias]")?;
    Ok(SequenceBias {
        ids: list(ids, unsigned)?,
        bias: float(bias)?,
    })
}

/// `{"id": bias, ...}`, as OpenAI has it.
fn logit_bias(value: &Value) -> Result<Vec<SequenceBias>, String> {
    let biases = value
        .as_object()
        .ok_or_else(|| unexpected("an object of token ids and numbers", value))?;
    let bias = |(id, bias): (&String, &Value)| {
        let token = id.parse().map_err(|_| format!("{id:?} is no token id"))?;
        let bias = float(bias).map_err(|problem| format!("{id:?}: {problem}"))?;
        Ok(SequenceBias {
            ids: vec![token],
            bias,
        })
    };
    biases.iter().map(bias).collect()
}

fn pair<'a>(value: &'a Value, expected: &str) -> Result<(&'a Value, &'a Value), String> {
    match value.as_array().map(Vec::as_slice) {
        Some([first, second]) => Ok((first, second)),
        _ => Err(unexpected(expected, value)),
    }
}

fn string(value: &Value) -> Result<String, String> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| unexpected("a string", value))
}

fn list<T>(value: &Value, item: fn(&Value) -> Result<T, String>) -> Result<Vec<T>, String> {
    let items = value
        .as_array()
        .ok_or_else(|| unexpected("an array", value))?;
    let item = |(index, value)| item(value).map_err(|problem| format!("[{index}]: {problem}"));
    items.iter().enumerate().map(item).collect()
}

fn unexpected(expected: &str, found: &Value) -> String {
    format!("expected {expected}, found {}", kind(found))
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str, expect: &str) {
        let error = parse(text.as_bytes(), &Settings::default()).unwrap_err();
        assert!(error.contains(expect), "{error:?} lacks {expect:?}");
    }

    #[test]
    fn lines_overlay_the_flags() {
        let flags = Settings {
            top_k: Some(5),
            ignore_eos: true,
            ..Settings::default()
        };
        let text = "{\"prompt\": \"a\", \"max_new_tokens\": 3}\n\n\
                    {\"prompt_ids\": [1, 2], \"top_k\": 7, \"stop\": \"x\", \"ignore_eos\": false}\r\n";
        let lines = parse(text.as_bytes(), &flags).unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].prompt, Prompt::Text("a".to_owned()));
        assert_eq!(
            lines[0].settings,
            Settings {
                max_new_tokens: Some(3),
                ..flags.clone()
            }
        );
        assert_eq!(
            (lines[1].number, &lines[1].prompt),
            (3, &Prompt::Ids(vec![1, 2]))
        );
        assert_eq!(lines[1].settings.top_k, Some(7));
        assert_eq!(lines[1].settings.stop, ["x"]);
        assert!(!lines[1].settings.ignore_eos);
    }

    #[test]
    fn fields_are_the_flags() {
        let text = "{\"prompt\": \"a\", \"logit_bias\": {\"5\": -100, \"6\": 2.5}, \
                    \"sequence_bias\": [[[1, 2], 0.5]], \"bad_words_ids\": [[3], [4, 5]], \
                    \"exponential_decay_length_penalty\": [7, 1.25], \"repetition_penalty\": 1.5, \
                    \"logprobs\": 3, \"echo\": true, \"num_return_sequences\": 2, \"best_of\": 4}";
        let lines = parse(text.as_bytes(), &Settings::default()).unwrap();
        let settings = &lines[0].settings;
        let bias = |ids: &[u32], bias| SequenceBias {
            ids: ids.to_vec(),
            bias,
        };
        assert_eq!(settings.logit_bias, [bias(&[5], -100.0), bias(&[6], 2.5)]);
        assert_eq!(settings.sequence_bias, [bias(&[1, 2], 0.5)]);
        assert_eq!(settings.bad_words_ids, [Ids(vec![3]), Ids(vec![4, 5])]);
        assert_eq!(settings.exponential_decay_length_penalty, Some((7, 1.25)));
        assert_eq!(settings.repetition_penalty, Some(1.5));
        assert_eq!((settings.logprobs, settings.echo), (Some(3), true));
        assert_eq!(settings.best_of, Some(4));
        // They are written as they are read.
        let mut again = Settings::default();
        for (name, value) in settings.fields().unwrap() {
            set(&mut again, &name, &value).unwrap();
        }
        assert_eq!(&again, settings);
    }

    #[test]
    fn prompts_alone() {
        let text = "{\"prompt\": \"a\"}\n\n{\"prompt_ids\": [1, 2]}\n";
        assert_eq!(
            parse_prompts(text.as_bytes()).unwrap(),
            [
                (1, Prompt::Text("a".to_owned())),
                (3, Prompt::Ids(vec![1, 2]))
            ]
        );
        let error = parse_prompts(b"{\"prompt\": \"a\", \"top_k\": 1}").unwrap_err();
        assert_eq!(
            error,
            "line 1: field \"top_k\": unknown; known are prompt, prompt_ids"
        );
        assert!(parse_prompts(b"{\"prompt\": 5}").is_err());
    }

    #[test]
    fn mistakes_name_line_and_field() {
        let good = "{\"prompt\": \"a\"}\n";
        fails(&format!("{good}{{]"), "line 2: not JSON");
        fails("[1]", "line 1: expected an object, found an array");
        fails("{}", "line 1: it has neither \"prompt\" nor \"prompt_ids\"");
        fails("{\"prompt\": \"a\", \"prompt_ids\": [1]}", "both");
        fails(
            "{\"prompt\": 5}",
            "line 1: field \"prompt\": expected a string, found 5",
        );
        fails(
            "{\"prompt_ids\": [1, -2]}",
            "field \"prompt_ids\": [1]: expected an unsigned integer of 32 bits, found -2",
        );
        fails(
            "{\"prompt\": \"a\", \"num_bears\": 4}",
            "field \"num_bears\": unknown; known are",
        );
        fails(
            "{\"prompt\": \"a\", \"early_stopping\": \"ever\"}",
            "field \"early_stopping\": expected true, false or \"never\", found a string",
        );
        fails(
            "{\"prompt\": \"a\", \"top_p\": \"x\"}",
            "field \"top_p\": expected a number, found a string",
        );
        fails(
            "{\"prompt\": \"a\", \"logit_bias\": {\"x\": 1}}",
            "field \"logit_bias\": \"x\" is no token id",
        );
        fails(
            "{\"prompt\": \"a\", \"sequence_bias\": [[[1], 2], [3]]}",
            "field \"sequence_bias\": [1]: expected [[ids], bias], found an array",
        );
        fails(
            "{\"prompt\": \"a\", \"bad_words_ids\": [[1, \"x\"]]}",
            "field \"bad_words_ids\": [0]: [1]: expected an unsigned integer",
        );
        fails(
            "{\"prompt\": \"a\", \"seed\": 1.5}",
            "field \"seed\": expected an unsigned integer of 64 bits",
        );
        fails(
            "{\"prompt\": \"a\", \"ignore_eos\": 1}",
            "expected true or false, found 1",
        );
        fails(
            "{\"prompt\": \"a\", \"stop\": [\"x\", null]}",
            "field \"stop\": [1]: expected a string, found null",
        );
        let error = parse(b"{\"prompt\": \"a\"}\n\xff", &Settings::default()).unwrap_err();
        assert_eq!(error, "line 2: not valid UTF-8 at byte 0 of the line");
    }
}
