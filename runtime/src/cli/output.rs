//! Where results go: JSON lines and text on standard output, tensors in files.

use super::milliseconds;
use anyhow::Context;
use kiln_runtime::{Completion, TokenEvent};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
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

    /// Takes in a token's text.
    pub(super) fn token(&mut self, index: usize, token: &TokenEvent) -> io::Result<()> {
        if self.json || token.text.is_empty() {
            return Ok(());
        }
        self.later.entry(index).or_default().text += &token.text;
        self.flush()
    }

    /// Takes in a result.
    pub(super) fn finished(&mut self, index: usize, completion: &Completion) -> io::Result<()> {
        let end = if self.json {
            let mut line = serde_json::to_string(&Result::new(completion, self.load_time))?;
            line.push('\n');
            line
        } else {
            "\n".to_owned()
        };
        self.later.entry(index).or_default().done = Some(end);
        self.flush()
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
fn stdout_error(error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot write to standard output: {error}"),
    )
}

/// A line of `--json`.
#[derive(Serialize)]
struct Result<'a> {
    prompt_ids: &'a [u32],
    choices: [Choice<'a>; 1],
    usage: Usage,
    timing: Timing,
}

#[derive(Serialize)]
struct Choice<'a> {
    ids: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    /// Of beam search.
    score: Option<f32>,
    logprobs: Option<f32>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct Timing {
    load_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
}

impl<'a> Result<'a> {
    fn new(completion: &'a Completion, load_time: Duration) -> Result<'a> {
        let (prompt_tokens, completion_tokens) =
            (completion.prompt_ids.len(), completion.ids.len());
        Result {
            prompt_ids: &completion.prompt_ids,
            choices: [Choice {
                ids: &completion.ids,
                text: &completion.text,
                finish_reason: completion.finish_reason.name(),
                score: None,
                logprobs: None,
            }],
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
            },
            timing: Timing {
                load_ms: milliseconds(load_time),
                prefill_ms: milliseconds(completion.timing.prefill),
                decode_ms: milliseconds(completion.timing.decode),
            },
        }
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

    fn completion(text: &str) -> Completion {
        Completion {
            request: RequestId(0),
            prompt_ids: vec![2, 713],
            ids: vec![16, 2],
            text: text.to_owned(),
            finish_reason: FinishReason::Stop,
            logprobs: None,
            logits: Vec::new(),
            hidden_states: Vec::new(),
            timing: Default::default(),
        }
    }

    fn token(text: &str) -> TokenEvent {
        TokenEvent {
            request: RequestId(0),
            id: 0,
            text: text.to_owned(),
        }
    }

    #[test]
    fn text_comes_in_order_and_as_it_is_made() {
        let mut printer = Printer::new(Vec::new(), false, Duration::ZERO);
        printer.token(1, &token("B")).unwrap();
        assert_eq!(printer.out, b"");
        printer.token(0, &token("a")).unwrap();
        assert_eq!(printer.out, b"a");
        printer.finished(1, &completion("B")).unwrap();
        printer.finished(0, &completion("a")).unwrap();
        assert_eq!(printer.out, b"a\nB\n");
        printer.token(2, &token("c")).unwrap();
        assert_eq!(printer.out, b"a\nB\nc");
        assert_eq!(printer.printed(), 2);
    }

    #[test]
    fn json_is_as_the_contract_says() {
        let mut printer = Printer::new(Vec::new(), true, Duration::from_millis(5));
        printer.token(0, &token("never printed")).unwrap();
        printer.finished(0, &completion(" is")).unwrap();
        assert_eq!(
            String::from_utf8(printer.out).unwrap(),
            "{\"prompt_ids\":[2,713],\"choices\":[{\"ids\":[16,2],\"text\":\" is\",\
             \"finish_reason\":\"stop\",\"score\":null,\"logprobs\":null}],\
             \"usage\":{\"prompt_tokens\":2,\"completion_tokens\":2,\"total_tokens\":4},\
             \"timing\":{\"load_ms\":5.0,\"prefill_ms\":0.0,\"decode_ms\":0.0}}\n"
        );
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
