//! `requests.jsonl`: one request a line, `prompt` or `prompt_ids` and any generation flag under its
//! long name with underscores. Flags of the command line hold where a line is silent.

use super::settings::Settings;
use kiln_runtime::Prompt;
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
        let (prompt, settings) =
            request(value, defaults).map_err(|problem| format!("line {number}: {problem}"))?;
        lines.push(Line {
            number,
            prompt,
            settings,
        });
    }
    Ok(lines)
}

fn request(value: Value, defaults: &Settings) -> Result<(Prompt, Settings), String> {
    let Value::Object(fields) = value else {
        return Err(format!("expected an object, found {}", kind(&value)));
    };
    let prompt = prompt(&fields)?;
    let mut settings = defaults.clone();
    for (name, value) in &fields {
        let in_field = |problem: String| format!("field {name:?}: {problem}");
        set(&mut settings, name, value).map_err(in_field)?;
    }
    Ok((prompt, settings))
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
fn set(settings: &mut Settings, name: &str, value: &Value) -> Result<(), String> {
    match name {
        "prompt" | "prompt_ids" => {}
        "max_new_tokens" => settings.max_new_tokens = Some(unsigned(value)?),
        "min_new_tokens" => settings.min_new_tokens = Some(unsigned(value)?),
        "temperature" => settings.temperature = Some(float(value)?),
        "top_k" => settings.top_k = Some(unsigned(value)?),
        "top_p" => settings.top_p = Some(float(value)?),
        "min_p" => settings.min_p = Some(float(value)?),
        "seed" => settings.seed = Some(unsigned(value)?),
        "stop" => {
            settings.stop = match value {
                Value::String(stop) => vec![stop.clone()],
                _ => list(value, string)?,
            }
        }
        "stop_token_ids" => settings.stop_token_ids = list(value, unsigned)?,
        "ignore_eos" => {
            let flag = value.as_bool();
            settings.ignore_eos = flag.ok_or_else(|| unexpected("true or false", value))?;
        }
        _ => {
            return Err(
                "unknown; known are prompt, prompt_ids, max_new_tokens, min_new_tokens, \
                        temperature, top_k, top_p, min_p, seed, stop, stop_token_ids, ignore_eos"
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
            "{\"prompt\": \"a\", \"num_beams\": 4}",
            "field \"num_beams\": unknown; known are",
        );
        fails(
            "{\"prompt\": \"a\", \"top_p\": \"x\"}",
            "field \"top_p\": expected a number, found a string",
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
