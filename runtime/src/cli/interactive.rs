//! `kiln generate --interactive`: user and model write a text in turn.

use super::lines::{Lines, Read};
use super::output::stdout_error;
use super::settings::Settings;
use super::{Loaded, describe, interrupt, requests};
use anyhow::Context;
use kiln_runtime::{
    Completion, Conversation, Engine, Event, Prompt, Request, RequestError, RequestId, Tokenizer,
};
use serde_json::Value;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

const HELP: &str = "\
A line is appended to the text as it is, and the model goes on from there: begin it with a space where
a word begins. A line that ends with \\ goes on in the next one. Enter alone lets the model go on.
Ctrl-C stops the model and keeps what it wrote; Ctrl-D leaves.

  /help              this
  /undo              drop the last turn: what you wrote and what the model made of it
  /reset             drop everything and start anew
  /settings          how to generate, where it is not left to the defaults
  /set NAME VALUE    change that; names are those of the flags: /set temperature 0.8
  /set NAME default  leave it to the default
  /save FILE         write the text to a file
  /quit              leave

A text that begins with / is typed with //.";

/// A line of input.
#[derive(Debug, PartialEq, Eq)]
enum Command<'a> {
    Say(&'a str),
    Help,
    Undo,
    Reset,
    Settings,
    Set { name: &'a str, value: &'a str },
    Save(&'a str),
    Quit,
}

impl<'a> Command<'a> {
    /// Reads a line, or says what is wrong with it.
    fn parse(line: &'a str) -> Result<Command<'a>, String> {
        if !is_command(line) {
            // The first of two slashes stands for nothing.
            let says = line.strip_prefix('/').unwrap_or(line);
            return Ok(Command::Say(says));
        }
        let (name, rest) = split_word(line);
        match (name, rest) {
            ("/help", "") => Ok(Command::Help),
            ("/undo", "") => Ok(Command::Undo),
            ("/reset", "") => Ok(Command::Reset),
            ("/settings", "") => Ok(Command::Settings),
            ("/quit", "") => Ok(Command::Quit),
            ("/set", rest) => match split_word(rest) {
                (_, "") => Err("/set takes a name and a value: /set temperature 0.8".to_owned()),
                (name, value) => Ok(Command::Set { name, value }),
            },
            ("/save", "") => Err("/save takes a file: /save text.txt".to_owned()),
            ("/save", path) => Ok(Command::Save(path)),
            ("/help" | "/undo" | "/reset" | "/settings" | "/quit", rest) => {
                Err(format!("{name} takes nothing, found {rest:?}"))
            }
            _ => Err(format!(
                "unknown command {name}; /help lists them, and a text that begins with / is typed with //"
            )),
        }
    }
}

fn is_command(line: &str) -> bool {
    line.starts_with('/') && !line.starts_with("//")
}

/// The first word, and what comes after it and the space around it.
fn split_word(text: &str) -> (&str, &str) {
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (word, rest.trim())
}

/// Sets what a flag of this name sets, from a value as `requests.jsonl` has it. A word needs no quotes,
/// and the word default takes back what was set.
fn set(settings: &mut Settings, name: &str, value: &str) -> Result<(), String> {
    let name = name.trim_start_matches("--").replace('-', "_");
    if value == "default" {
        let mut fields = settings.fields().map_err(|error| error.to_string())?;
        if fields.remove(&name).is_none() {
            return Err(format!("{name} is not set"));
        }
        let mut rest = Settings::default();
        for (name, value) in &fields {
            requests::set(&mut rest, name, value)?;
        }
        *settings = rest;
        return Ok(());
    }
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    requests::set(settings, &name, &value).map_err(|problem| format!("{name}: {problem}"))
}

/// A conversation on an engine.
struct Session<W> {
    engine: Engine,
    conversation: Conversation,
    settings: Settings,
    /// What the model writes goes here, all else to standard error.
    out: W,
}

/// Talks until the input ends. What is in `first` is the first turn.
pub(super) fn run(
    first: Option<Prompt>,
    settings: Settings,
    loaded: Loaded,
) -> anyhow::Result<ExitCode> {
    let Loaded { engine, bundle, .. } = loaded;
    tokenizer(&engine)?;
    let mut lines = Lines::open()?;
    let mut session = Session {
        conversation: Conversation::new(bundle.manifest()),
        engine,
        settings,
        out: io::stdout().lock(),
    };
    if matches!(lines, Lines::Terminal(_)) {
        eprintln!("Write something for the model to continue; /help tells more.");
    }
    if let Some(prompt) = first {
        session.turn(prompt)?;
    }
    while let Some(line) = read(&mut lines)? {
        if !session.obey(&line)? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads a text or a command; none at the end.
fn read(lines: &mut Lines) -> anyhow::Result<Option<String>> {
    let mut text = String::new();
    let mut prompt = "> ";
    loop {
        match lines.next(prompt)? {
            // What an unfinished text has so far counts.
            Read::End => return Ok((!text.is_empty()).then_some(text)),
            Read::Cleared => {
                text.clear();
                prompt = "> ";
            }
            Read::Line(line) => {
                let goes_on = !(text.is_empty() && is_command(&line));
                let Some(line) = line.strip_suffix('\\').filter(|_| goes_on) else {
                    return Ok(Some(text + &line));
                };
                text += line;
                text.push('\n');
                prompt = "| ";
            }
        }
    }
}

fn tokenizer(engine: &Engine) -> anyhow::Result<&Tokenizer> {
    let tokenizer = engine.tokenizer();
    tokenizer.context("--interactive needs text, and this bundle has no tokenizer")
}

impl<W: Write> Session<W> {
    /// Does what a line says. Returns whether to go on. What is wrong with the line is told and changes
    /// nothing.
    fn obey(&mut self, line: &str) -> anyhow::Result<bool> {
        match Command::parse(line) {
            Err(problem) => eprintln!("error: {problem}"),
            Ok(Command::Quit) => return Ok(false),
            Ok(Command::Help) => eprintln!("{HELP}"),
            Ok(Command::Say(text)) => self.turn(Prompt::Text(text.to_owned()))?,
            Ok(Command::Undo) => match self.conversation.undo() {
                true => eprintln!("[turns left: {}]", self.conversation.turns()),
                false => eprintln!("error: there is no turn to drop"),
            },
            Ok(Command::Reset) => {
                self.conversation.reset();
                eprintln!("[started anew]");
            }
            Ok(Command::Settings) => {
                let fields = self.settings.fields()?;
                if fields.is_empty() {
                    eprintln!("[nothing is set]");
                }
                for (name, value) in fields {
                    eprintln!("{name} {value}");
                }
            }
            Ok(Command::Set { name, value }) => match set(&mut self.settings, name, value) {
                Err(problem) => eprintln!("error: {problem}"),
                // It may take another one to be right: groups of beams need beams.
                Ok(()) => {
                    let turn = self.settings.request(Prompt::Ids(Vec::new()));
                    if let Err(error) = turn.check() {
                        eprintln!("note: {error}");
                    }
                }
            },
            Ok(Command::Save(path)) => {
                let text = self.conversation.text(tokenizer(&self.engine)?)?;
                match fs::write(path, &text) {
                    Ok(()) => eprintln!("[wrote {} bytes to {path}]", text.len()),
                    Err(error) => eprintln!("error: cannot write {path}: {error}"),
                }
            }
        }
        Ok(true)
    }

    /// Appends to the text and has the model go on.
    fn turn(&mut self, added: Prompt) -> anyhow::Result<()> {
        let tokenizer = tokenizer(&self.engine)?;
        let turn = self.settings.request(added);
        let echo = match (&turn.prompt, turn.echo) {
            (_, false) => String::new(),
            (Prompt::Text(text), true) => text.clone(),
            (Prompt::Ids(ids), true) => tokenizer.decode(ids)?,
        };
        let streams = turn.choices.generated == 1 && turn.beams.is_none();
        let request = self.conversation.request(turn, tokenizer);
        let id = match request.and_then(|request: Request| self.engine.submit(request)) {
            Ok(id) => id,
            Err(error) => {
                eprintln!("error: {}", self.advise(&error));
                return Ok(());
            }
        };
        self.print(&echo)?;
        let mut printed_bytes = 0;
        let Some(completion) = self.generate(id, |session, text| {
            if streams {
                printed_bytes += text.len();
                session.print(text)?;
            }
            Ok(())
        })?
        else {
            return Ok(());
        };
        // Of a cancelled turn, the beginning of a character or of a stop string was held back.
        let text = completion.choices.first().map_or("", |choice| &choice.text);
        self.print(text.get(printed_bytes..).unwrap_or_default())?;
        self.print("\n")?;
        let tokenizer = self::tokenizer(&self.engine)?;
        self.conversation.push(&completion, tokenizer)?;
        eprintln!("[{}]", status(&completion));
        if self.conversation.is_full() {
            eprintln!("[the context is full. {TO_GO_ON}]");
        }
        Ok(())
    }

    /// Runs a request until it is done or Ctrl-C is pressed, and gives out its text. Returns none where
    /// it fails, which is told.
    fn generate(
        &mut self,
        id: RequestId,
        mut show: impl FnMut(&mut Self, &str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Option<Completion>> {
        // One that was pressed before is not meant for this.
        interrupt::take();
        loop {
            if interrupt::take() {
                return Ok(self.engine.cancel(id));
            }
            for event in self.engine.step()? {
                match event {
                    Event::Token(token) => show(self, &token.text)?,
                    Event::Finished(completion) => return Ok(Some(*completion)),
                    Event::Failed { error, .. } => {
                        eprintln!("error: {}", describe(&error.into()));
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn print(&mut self, text: &str) -> anyhow::Result<()> {
        let written = self.out.write_all(text.as_bytes());
        Ok(written
            .and_then(|()| self.out.flush())
            .map_err(stdout_error)?)
    }

    /// What is wrong with a turn, and how to go on.
    fn advise(&self, error: &RequestError) -> String {
        match error {
            RequestError::PromptTooLong { found, limit } if self.conversation.turns() > 0 => {
                format!(
                    "the context is full: with this the text has {found} tokens, and the bundle's limit \
                 is {limit}, new ones included. {TO_GO_ON}"
                )
            }
            other => other.to_string(),
        }
    }
}

/// Where the context is full.
const TO_GO_ON: &str = "/undo drops the last turn, /reset starts anew; a bundle compiled with a \
                        larger --max-seq-len has more room";

/// How many tokens came, how fast, and how much of the text before them was still in the cache.
fn status(completion: &Completion) -> String {
    let tokens = completion.choices.first().map_or(0, |c| c.ids.len());
    let seconds = (completion.timing.prefill + completion.timing.decode).as_secs_f64();
    format!(
        "{tokens} tokens, {:.1} tokens/s; cached: {} of {} before them",
        tokens as f64 / seconds.max(f64::MIN_POSITIVE),
        completion.cached_tokens,
        completion.prompt_ids.len(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_texts_or_commands() {
        let parse = |line| Command::parse(line).unwrap();
        for text in ["", " /help", "a /b", "\n/c"] {
            assert_eq!(parse(text), Command::Say(text));
        }
        assert_eq!(parse("//help"), Command::Say("/help"));
        assert_eq!(parse("/help "), Command::Help);
        assert_eq!(
            parse("/set  stop \"a b\""),
            Command::Set {
                name: "stop",
                value: "\"a b\""
            }
        );
        assert_eq!(parse("/save a file"), Command::Save("a file"));
        let fails = |line, expect: &str| {
            let problem = Command::parse(line).unwrap_err();
            assert!(problem.contains(expect), "{problem}");
        };
        fails("/nod", "unknown command /nod; /help lists them");
        fails("/undo 2", "/undo takes nothing, found \"2\"");
        fails("/set", "/set takes a name and a value");
        fails("/set top_k", "/set takes a name and a value");
        fails("/save", "/save takes a file");
    }

    #[test]
    fn settings_are_set_by_the_names_of_flags() {
        let mut settings = Settings::default();
        let mut set = |name, value| set(&mut settings, name, value);
        set("temperature", "0.5").unwrap();
        set("--max-new-tokens", "7").unwrap();
        set("stop", "END").unwrap();
        set("early-stopping", "never").unwrap();
        set("bad_words_ids", "[[1, 2]]").unwrap();
        assert_eq!(
            set("top_k", "few").unwrap_err(),
            "top_k: expected an unsigned integer of 32 bits, found a string"
        );
        assert!(
            set("prompt", "x")
                .unwrap_err()
                .starts_with("prompt: unknown")
        );
        let fields = Value::Object(settings.fields().unwrap());
        let expect = "{\"bad_words_ids\":[[1,2]],\"early_stopping\":\"never\",\
                      \"max_new_tokens\":7,\"stop\":[\"END\"],\"temperature\":0.5}";
        assert_eq!(fields.to_string(), expect);
        let mut unset = |name| super::set(&mut settings, name, "default");
        unset("early-stopping").unwrap();
        unset("stop").unwrap();
        unset("bad_words_ids").unwrap();
        assert_eq!(unset("stop").unwrap_err(), "stop is not set");
        let rest = Settings {
            temperature: Some(0.5),
            max_new_tokens: Some(7),
            ..Settings::default()
        };
        assert_eq!(settings, rest);
    }
}
