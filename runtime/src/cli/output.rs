//! Where results go: JSON lines and text on standard output, tensors in files.

use super::milliseconds;
use anyhow::Context;
use kiln_runtime::{Choice, Completion, TokenLogprob, Tokenizer, TokenizerError};
use safetensors::tensor::{Dtype, TensorView};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Prints results in the order of the requests, whatever order they come in. Of the first request
/// that is not done, text is printed as it comes.
pub(super) struct Printer<W> {
    out: W,
    json: bool,
    load_time: Duration,
    /// Index of the first request that is not done.
    next: usize,
    later: BTreeMap<usize, Later>,
}

/// What came of a request before its turn.
#[derive(Default)]
struct Later {
    text: String,
    done: Option<String>,
}

impl<W: Write> Printer<W> {
    pub(super) fn new(out: W, json: bool, load_time: Duration) -> Printer<W> {
        Printer {
            out,
            json,
            load_time,
            next: 0,
            later: BTreeMap::new(),
        }
    }

    /// Requests whose turn is over.
    pub(super) fn printed(&self) -> usize {
        self.next
    }

    /// Takes in a piece of text.
    pub(super) fn text(&mut self, index: usize, text: &str) -> io::Result<()> {
        if self.json || text.is_empty() {
            return Ok(());
        }
        self.later.entry(index).or_default().text += text;
        self.flush()
    }

    /// Takes in a result.
    pub(super) fn finished(
        &mut self,
        index: usize,
        printed: &Printed<'_>,
        tokenizer: Option<&Tokenizer>,
    ) -> anyhow::Result<()> {
        let end = if self.json {
            let line = Line::new(printed, self.load_time, tokenizer)?;
            format!("{}\n", serde_json::to_string(&line)?)
        } else if printed.streamed {
            "\n".to_owned()
        } else {
            let line = |choice: &Choice| format!("{}{}\n", printed.echo_text, choice.text);
            printed.completion.choices.iter().map(line).collect()
        };
        self.later.entry(index).or_default().done = Some(end);
        Ok(self.flush()?)
    }

    /// Leaves a request out.
    pub(super) fn failed(&mut self, index: usize) -> io::Result<()> {
        let end = if self.json { "" } else { "\n" };
        self.later.entry(index).or_default().done = Some(end.to_owned());
        self.flush()
    }

    /// Ends the line of the request that was being printed.
    pub(super) fn interrupted(&mut self) -> io::Result<()> {
        let end: &[u8] = if self.json { b"" } else { b"\n" };
        self.out
            .write_all(end)
            .and_then(|()| self.out.flush())
            .map_err(stdout_error)
    }

    /// Prints what can be printed by now.
    fn flush(&mut self) -> io::Result<()> {
        self.write_ready().map_err(stdout_error)
    }

    fn write_ready(&mut self) -> io::Result<()> {
        while let Some(later) = self.later.get_mut(&self.next) {
            self.out.write_all(later.text.as_bytes())?;
            later.text.clear();
            let Some(end) = later.done.take() else { break };
            self.out.write_all(end.as_bytes())?;
            self.later.remove(&self.next);
            self.next += 1;
        }
        self.out.flush()
    }
}

/// Says where, and keeps the kind: a closed pipe is told from a full disk by it.
pub(super) fn stdout_error(error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot write to standard output: {error}"),
    )
}

/// A request's result, and what is to be seen of it.
pub(super) struct Printed<'a> {
    pub(super) completion: &'a Completion,
    /// Whether the prompt is to be seen.
    pub(super) echo: bool,
    /// Its text.
    pub(super) echo_text: &'a str,
    /// Whether the text has been printed.
    pub(super) streamed: bool,
}

/// A line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    prompt_ids: &'a [u32],
    choices: Vec<LineChoice<'a>>,
    usage: Usage,
    timing: Timing,
}

#[derive(Serialize)]
struct LineChoice<'a> {
    ids: &'a [u32],
    text: String,
    finish_reason: &'static str,
    /// As in [`Choice`].
    score: Option<f32>,
    logprobs: Option<LogprobLists>,
}

/// Parallel lists; the first token of an echoed prompt follows nothing and has none.
#[derive(Serialize)]
struct LogprobLists {
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<String>>,
    token_ids: Vec<u32>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Top>>,
}

/// `{"id": logprob, ...}`, the likeliest first.
struct Top(Vec<(u32, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, logprob) in &self.0 {
            map.serialize_entry(id, logprob)?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    /// Of the prompt, those whose keys and values were still in the cache.
    cached_tokens: usize,
}

#[derive(Serialize)]
struct Timing {
    load_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
}

impl<'a> Line<'a> {
    fn new(
        printed: &Printed<'a>,
        load_time: Duration,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Line<'a>, TokenizerError> {
        let completion = printed.completion;
        let choice = |choice: &'a Choice| {
            let logprobs = choice.logprobs.as_ref().map(|generated| {
                let prompt = printed.echo.then_some(completion);
                LogprobLists::new(prompt, generated, tokenizer)
            });
            Ok(LineChoice {
                ids: &choice.ids,
                text: format!("{}{}", printed.echo_text, choice.text),
                finish_reason: choice.finish_reason.name(),
                score: choice.score,
                logprobs: logprobs.transpose()?,
            })
        };
        let prompt_tokens = completion.prompt_ids.len();
        let completion_tokens = completion.choices.iter().map(|c| c.ids.len()).sum();
        Ok(Line {
            prompt_ids: &completion.prompt_ids,
            choices: completion
                .choices
                .iter()
                .map(choice)
                .collect::<Result<_, _>>()?,
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
                cached_tokens: completion.cached_tokens,
            },
            timing: Timing {
                load_ms: milliseconds(load_time),
                prefill_ms: milliseconds(completion.timing.prefill),
                decode_ms: milliseconds(completion.timing.decode),
            },
        })
    }
}

impl LogprobLists {
    /// Those of generated tokens, behind those of the prompt where it is given.
    fn new(
        prompt: Option<&Completion>,
        generated: &[TokenLogprob],
        tokenizer: Option<&Tokenizer>,
    ) -> Result<LogprobLists, TokenizerError> {
        let mut lists = LogprobLists {
            tokens: None,
            token_ids: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
        };
        if let Some(&first) = prompt.and_then(|prompt| prompt.prompt_ids.first()) {
            lists.token_ids.push(first);
            lists.token_logprobs.push(None);
            lists.top_logprobs.push(None);
        }
        let prompt = prompt.map_or(&[][..], |prompt| &prompt.prompt_logprobs);
        for TokenLogprob { id, logprob, top } in prompt.iter().chain(generated) {
            lists.token_ids.push(*id);
            lists.token_logprobs.push(Some(*logprob));
            lists.top_logprobs.push(Some(Top(top.clone())));
        }
        if let Some(tokenizer) = tokenizer {
            let texts = lists.token_ids.iter().map(|&id| tokenizer.token_text(id));
            lists.tokens = Some(texts.collect::<Result<_, _>>()?);
        }
        Ok(lists)
    }
}

/// f32 tensors to be written to a safetensors file, which appears when it is whole.
///
/// The file next to it that it is written to is made at once, so that a path that cannot be written
/// is found out before the work and not after it.
pub(super) struct TensorFile {
    path: PathBuf,
    unfinished: PathBuf,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl TensorFile {
    pub(super) fn create(path: &Path) -> anyhow::Result<TensorFile> {
        let cannot = || format!("cannot write {}", path.display());
        anyhow::ensure!(
            !path.is_dir(),
            "cannot write {}: it is a directory",
            path.display()
        );
        let mut name = path.file_name().with_context(cannot)?.to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let unfinished = path.with_file_name(name);
        File::create(&unfinished).with_context(cannot)?;
        Ok(TensorFile {
            path: path.to_owned(),
            unfinished,
            tensors: BTreeMap::new(),
        })
    }

    /// Adds a tensor whose first or second dimension, `None` in `shape`, follows from its length.
    pub(super) fn add(&mut self, name: String, shape: &[Option<usize>], values: Vec<f32>) {
        let known: usize = shape.iter().flatten().product();
        let rest = values.len() / known.max(1);
        let shape = shape
            .iter()
            .map(|dimension| dimension.unwrap_or(rest))
            .collect();
        self.tensors.insert(name, (shape, values));
    }

    /// Writes the file.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", self.path.display());
        let mut views = Vec::new();
        for (name, (shape, values)) in &self.tensors {
            let bytes = bytemuck::cast_slice(values);
            views.push((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?));
        }
        // The library replaces the file by one that its owner alone may read.
        let permissions = fs::metadata(&self.unfinished)
            .with_context(cannot)?
            .permissions();
        safetensors::serialize_to_file(views, None, &self.unfinished).with_context(cannot)?;
        fs::set_permissions(&self.unfinished, permissions).with_context(cannot)?;
        fs::rename(&self.unfinished, &self.path).with_context(cannot)
    }
}

impl Drop for TensorFile {
    fn drop(&mut self) {
        // Renamed by now, unless something went wrong, which has been reported.
        let _ = fs::remove_file(&self.unfinished);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_runtime::{FinishReason, RequestId};

    fn choice(text: &str) -> Choice {
        Choice {
            ids: vec![16, 2],
            text: text.to_owned(),
            finish_reason: FinishReason::Stop,
            score: None,
            logprobs: None,
            logits: Vec::new(),
            scores: Vec::new(),
            hidden_states: Vec::new(),
        }
    }

    fn completion(choices: &[Choice]) -> Completion {
        Completion {
            request: RequestId(0),
            prompt_ids: vec![2, 713],
            cached_tokens: 0,
            prompt_logprobs: Vec::new(),
            embedding: Vec::new(),
            choices: choices.to_vec(),
            timing: Default::default(),
        }
    }

    fn printed(completion: &Completion) -> Printed<'_> {
        Printed {
            completion,
            echo: false,
            echo_text: "",
            streamed: true,
        }
    }

    #[test]
    fn text_comes_in_order_and_as_it_is_made() {
        let mut printer = Printer::new(Vec::new(), false, Duration::ZERO);
        printer.text(1, "B").unwrap();
        assert_eq!(printer.out, b"");
        printer.text(0, "a").unwrap();
        assert_eq!(printer.out, b"a");
        let (first, second) = (completion(&[choice("a")]), completion(&[choice("B")]));
        printer.finished(1, &printed(&second), None).unwrap();
        printer.finished(0, &printed(&first), None).unwrap();
        assert_eq!(printer.out, b"a\nB\n");
        printer.text(2, "c").unwrap();
        assert_eq!(printer.out, b"a\nB\nc");
        assert_eq!(printer.printed(), 2);
    }

    #[test]
    fn several_choices_are_a_line_each() {
        let mut printer = Printer::new(Vec::new(), false, Duration::ZERO);
        let choices = completion(&[choice(" x"), choice(" y")]);
        let several = Printed {
            echo_text: "So",
            streamed: false,
            ..printed(&choices)
        };
        printer.finished(0, &several, None).unwrap();
        assert_eq!(printer.out, b"So x\nSo y\n");
    }

    #[test]
    fn json_is_as_the_contract_says() {
        let mut printer = Printer::new(Vec::new(), true, Duration::from_millis(5));
        printer.text(0, "never printed").unwrap();
        let choices = completion(&[choice(" is")]);
        printer.finished(0, &printed(&choices), None).unwrap();
        assert_eq!(
            String::from_utf8(printer.out).unwrap(),
            "{\"prompt_ids\":[2,713],\"choices\":[{\"ids\":[16,2],\"text\":\" is\",\
             \"finish_reason\":\"stop\",\"score\":null,\"logprobs\":null}],\
             \"usage\":{\"prompt_tokens\":2,\"completion_tokens\":2,\"total_tokens\":4,\"cached_tokens\":0},\
             \"timing\":{\"load_ms\":5.0,\"prefill_ms\":0.0,\"decode_ms\":0.0}}\n"
        );
    }

    #[test]
    fn logprobs_are_parallel_lists() {
        let token = |id, logprob| TokenLogprob {
            id,
            logprob,
            top: vec![(16, -0.25), (9, -2.5)],
        };
        let choices = Completion {
            prompt_logprobs: vec![token(713, -1.0)],
            ..completion(&[Choice {
                score: Some(-3.25),
                logprobs: Some(vec![token(16, -0.25), token(2, -3.0)]),
                ..choice(" is")
            }])
        };
        let mut printer = Printer::new(Vec::new(), true, Duration::ZERO);
        let result = Printed {
            echo: true,
            echo_text: "So",
            ..printed(&choices)
        };
        printer.finished(0, &result, None).unwrap();
        let line = String::from_utf8(printer.out).unwrap();
        let top = "{\"16\":-0.25,\"9\":-2.5}";
        let expect = format!(
            "\"text\":\"So is\",\"finish_reason\":\"stop\",\"score\":-3.25,\"logprobs\":{{\
             \"token_ids\":[2,713,16,2],\"token_logprobs\":[null,-1.0,-0.25,-3.0],\
             \"top_logprobs\":[null,{top},{top},{top}]}}"
        );
        assert!(line.contains(&expect), "{line}");
    }

    #[test]
    fn a_tensor_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        drop(TensorFile::create(&path).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut file = TensorFile::create(&path).unwrap();
        file.add(
            "hidden.0".to_owned(),
            &[Some(2), None, Some(3)],
            vec![1.5; 24],
        );
        file.finish().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let bytes = fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("hidden.0").unwrap().shape(), [2, 4, 3]);
        assert!(TensorFile::create(&dir.path().join("none/x")).is_err());
        assert!(TensorFile::create(dir.path()).is_err());
    }
}
