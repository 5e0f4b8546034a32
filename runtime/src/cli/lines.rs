//! Lines that a user types: with editing and a history on a terminal, as they come from anywhere else.

use anyhow::Context;
use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

/// Lines that the history keeps.
const HISTORY_LINES: usize = 1000;

/// Where lines come from.
pub(super) enum Lines {
    /// Standard input is a terminal.
    Terminal(Box<Terminal>),
    /// Standard input is anything else.
    Plain,
}

/// A terminal's editor and its history file.
pub(super) struct Terminal {
    editor: DefaultEditor,
    history: Option<PathBuf>,
}

/// What came of a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// A line without its end.
    Line(String),
    /// Ctrl-C: what was typed is dropped.
    Cleared,
    /// Ctrl-D, or the end of the input.
    End,
}

impl Lines {
    /// Standard input. A history that cannot be read is warned of.
    pub(super) fn open() -> anyhow::Result<Lines> {
        if !io::stdin().is_terminal() {
            return Ok(Lines::Plain);
        }
        let config = Config::builder()
            .max_history_size(HISTORY_LINES)?
            // Prompts and what is typed stay out of a standard output that goes elsewhere.
            .behavior(Behavior::PreferTerm)
            .build();
        let mut editor = DefaultEditor::with_config(config)?;
        let history = history_file(|name| env::var_os(name));
        if let Some(path) = history.as_deref().filter(|path| path.exists())
            && let Err(error) = editor.load_history(path)
        {
            warn("read", path, &error.into());
        }
        Ok(Lines::Terminal(Box::new(Terminal { editor, history })))
    }

    /// The next line, behind a prompt on a terminal.
    pub(super) fn next(&mut self, prompt: &str) -> anyhow::Result<Read> {
        match self {
            Lines::Terminal(terminal) => terminal.next(prompt),
            Lines::Plain => plain(&mut io::stdin().lock()),
        }
    }
}

impl Terminal {
    fn next(&mut self, prompt: &str) -> anyhow::Result<Read> {
        let line = match self.editor.readline(prompt) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Ok(Read::Cleared),
            Err(ReadlineError::Eof) => return Ok(Read::End),
            Err(error) => return Err(error).context("cannot read from the terminal"),
        };
        if let Some(path) = &self.history
            && let Err(error) = remember(&mut self.editor, &line, path)
        {
            warn("write", path, &error);
            // Once is enough.
            self.history = None;
        }
        Ok(Read::Line(line))
    }
}

/// Adds a line to the history and its file. At once, so that nothing is lost however the program ends.
fn remember(editor: &mut DefaultEditor, line: &str, path: &Path) -> anyhow::Result<()> {
    if editor.add_history_entry(line)? {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        editor.append_history(path)?;
    }
    Ok(())
}

fn warn(what: &str, path: &Path, error: &anyhow::Error) {
    let path = path.display();
    eprintln!("warning: cannot {what} the history {path}: {error}");
}

/// `KILN_HISTORY`, or else `kiln/history` in `XDG_STATE_HOME` or in `~/.local/state`.
/// `KILN_HISTORY=off` does without one.
fn history_file(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let variable = |name| variable(name).filter(|value| !value.is_empty());
    match variable("KILN_HISTORY") {
        Some(off) if off == "off" => return None,
        Some(path) => return Some(path.into()),
        None => {}
    }
    let state = variable("XDG_STATE_HOME")
        .map(PathBuf::from)
        // The standard has relative paths ignored.
        .filter(|path| path.is_absolute())
        .or_else(|| Some(Path::new(&variable("HOME")?).join(".local/state")));
    state.map(|state| state.join("kiln/history"))
}

fn plain(input: &mut impl BufRead) -> anyhow::Result<Read> {
    let mut line = String::new();
    let bytes = input.read_line(&mut line);
    if bytes.context("cannot read standard input")? == 0 {
        return Ok(Read::End);
    }
    let line = line.strip_suffix('\n').unwrap_or(&line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    Ok(Read::Line(line.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_have_no_ends() {
        let mut input = &b"one\r\n\n two \\\nlast"[..];
        let mut next = || plain(&mut input).unwrap();
        for line in ["one", "", " two \\", "last"] {
            assert_eq!(next(), Read::Line(line.to_owned()));
        }
        assert_eq!(next(), Read::End);
        let error = plain(&mut &b"\xff\n"[..]).unwrap_err();
        assert_eq!(error.to_string(), "cannot read standard input");
    }

    #[test]
    fn the_history_lies_with_the_users_state() {
        let file = |variables: &[(&str, &str)]| {
            let found = history_file(|name| {
                let set = variables.iter().find(|(set, _)| *set == name);
                set.map(|(_, value)| (*value).into())
            });
            found.map(|path| path.to_string_lossy().into_owned())
        };
        let home = ("HOME", "/home/x");
        let default = Some("/home/x/.local/state/kiln/history".to_owned());
        assert_eq!(file(&[home]), default);
        assert_eq!(file(&[home, ("XDG_STATE_HOME", "state")]), default);
        assert_eq!(file(&[home, ("KILN_HISTORY", "")]), default);
        assert_eq!(
            file(&[home, ("XDG_STATE_HOME", "/state")]).unwrap(),
            "/state/kiln/history"
        );
        assert_eq!(file(&[home, ("KILN_HISTORY", "mine")]).unwrap(), "mine");
        assert_eq!(file(&[home, ("KILN_HISTORY", "off")]), None);
        assert_eq!(file(&[]), None);
    }

    #[test]
    fn the_history_is_written_as_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/kiln/history");
        let mut editor = DefaultEditor::new().unwrap();
        for line in ["one", "two", "two", "/help"] {
            remember(&mut editor, line, &path).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("one\ntwo\n/help\n"), "{text}");
        let occupied = path.join("not a directory");
        assert!(remember(&mut editor, "three", &occupied).is_err());
    }
}
