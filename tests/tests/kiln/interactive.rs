//! `kiln generate --interactive` with its input from a pipe: turns, commands, Ctrl-C.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, interrupt, program, repository};
use serde_json::Value;
use std::{
    fs,
    io::{Read, Write},
    process::{Child, Output, Stdio},
    sync::OnceLock,
};

/// The demo model, compiled once.
fn demo() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE
        .get_or_init(|| TestBundle::compile(&repository("models/demo"), &CompileOptions::default()))
}

const TURN: [&str; 3] = ["--max-new-tokens", "12", "--ignore-eos"];

fn start(flags: &[&str]) -> Child {
    program("kiln")
        .arg("generate")
        .arg(demo().path())
        .arg("--interactive")
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What comes to standard output and standard error when these lines are typed.
fn talk(flags: &[&str], lines: &str) -> (String, String) {
    let mut child = start(flags);
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    texts(&child.wait_with_output().unwrap())
}

fn texts(output: &Output) -> (String, String) {
    let [out, err] =
        [&output.stdout, &output.stderr].map(|t| String::from_utf8(t.clone()).unwrap());
    assert!(output.status.success(), "{err}");
    (out, err)
}

/// `kiln generate --json`.
fn generate(flags: &[&str]) -> Value {
    let mut command = program("kiln");
    let command = command.arg("generate").arg(demo().path()).args(flags);
    let output = command.arg("--json").output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The ids that `kiln generate` starts from and comes to.
fn ids_and_text(prompt: &[&str]) -> (Vec<String>, String) {
    let found = generate(&[prompt, &TURN].concat());
    let choice = &found["choices"][0];
    let ids = [&found["prompt_ids"], &choice["ids"]].map(|ids| ids.as_array().unwrap().clone());
    let ids = ids.concat().iter().map(Value::to_string).collect();
    (ids, choice["text"].as_str().unwrap().to_owned())
}

#[test]
fn turns_continue_the_text() {
    let (first, reply) = ids_and_text(&["ROMEO:"]);
    // Enter alone goes on from all that came before.
    let (_, more) = ids_and_text(&["--prompt-ids", &first.join(",")]);
    let (out, err) = talk(&TURN, "ROMEO:\n\n");
    assert_eq!(out, format!("{reply}\n{more}\n"));
    // The last token of a reply was never fed.
    assert_eq!(err.matches("[12 tokens, ").count(), 2, "{err}");
    let again = format!(
        "cached: {} of {} before them]",
        first.len() - 1,
        first.len()
    );
    assert!(err.contains(&again), "{err}");
    // A prompt of the command line is the first turn, by text and by ids.
    assert_eq!(talk(&[&["ROMEO:"], &TURN[..]].concat(), "\n").0, out);
    let ids = &first[..first.len() - 12].join(",");
    assert_eq!(
        talk(&[&["--prompt-ids", ids], &TURN[..]].concat(), "\n").0,
        out
    );
    // A new text goes on from the old one, over several lines.
    let (out, _) = talk(&TURN, "ROMEO:\n\\\nJULIET:\n/save /dev/stdout\n");
    let (replies, saved) = out.split_once("\nROMEO:").unwrap();
    let last = replies.strip_prefix(&format!("{reply}\n")).unwrap();
    assert_eq!(saved, format!("{reply}\nJULIET:{last}"));
}

#[test]
fn turns_are_dropped_and_kept() {
    let (_, reply) = ids_and_text(&["ROMEO:"]);
    let file = demo()
        .beside("conversation.txt")
        .to_string_lossy()
        .into_owned();
    let lines =
        format!("/undo\nROMEO:\nJULIET:\n/undo\n/save {file}\n/reset\n\nROMEO:\n/quit\nROMEO:\n");
    let (out, err) = talk(&TURN, &lines);
    assert!(out.starts_with(&format!("{reply}\n")) && out.ends_with(&format!("\n{reply}\n")));
    assert_eq!(out.matches(&reply).count(), 2, "{out}");
    assert!(err.contains("error: there is no turn to drop"), "{err}");
    assert!(err.contains("[turns left: 1]"), "{err}");
    assert!(err.contains("error: the prompt is empty"), "{err}");
    assert_eq!(fs::read_to_string(file).unwrap(), format!("ROMEO:{reply}"));
}

#[test]
fn settings_are_changed_between_turns() {
    let sampled = generate(&[&["ROMEO:", "--seed", "4", "--top-k", "9"], &TURN[..]].concat());
    let sampled = sampled["choices"][0]["text"].as_str().unwrap();
    let beams = generate(&[&["ROMEO:", "--num-beams", "3"], &TURN[..]].concat());
    let beams = beams["choices"][0]["text"].as_str().unwrap();
    let lines = "/settings\n/set top-k 9\n/set --seed 4\n/settings\nROMEO:\n/reset\n\
                 /set temperature 0\n/set num_beams 3\nROMEO:\n\
                 /set num_beams 4\n/set num_beam_groups 3\nROMEO:\n/set top_q 1\n/sing\n";
    let (out, err) = talk(&TURN, lines);
    assert_eq!(out, format!("{sampled}\n{beams}\n"));
    assert!(
        err.starts_with("ignore_eos true\nmax_new_tokens 12\n"),
        "{err}"
    );
    assert!(
        err.contains("max_new_tokens 12\nseed 4\ntop_k 9\n"),
        "{err}"
    );
    let problem = "num_beam_groups is 3; it must be a divisor of num_beams, which is 4";
    for message in [
        &format!("note: {problem}"),
        &format!("error: {problem}"),
        "error: top_q: unknown; known are",
        "error: unknown command /sing",
    ] {
        assert!(err.contains(message), "{err}");
    }
}

#[test]
fn a_full_context_says_how_to_go_on() {
    let flags = ["ROMEO:", "--max-new-tokens", "10000", "--ignore-eos"];
    let (out, err) = talk(&flags, " more\n/undo\nROMEO:\n");
    assert!(err.contains("[the context is full. /undo drops"), "{err}");
    assert!(
        err.contains("error: the context is full: with this the text has"),
        "{err}"
    );
    assert!(err.contains("[turns left: 0]"), "{err}");
    // The turn that was dropped can be had again; the refused one left nothing.
    let half = out.len() / 2;
    assert_eq!(out[..half], out[half..]);
}

#[test]
fn ctrl_c_stops_a_turn_and_keeps_what_came() {
    let mut child = start(&["ROMEO:", "--max-new-tokens", "490", "--ignore-eos"]);
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    interrupt(&child);
    let file = demo().beside("stopped.txt").to_string_lossy().into_owned();
    let lines = format!("/save {file}\n/set max_new_tokens 5\n\n");
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    let (out, err) = texts(&child.wait_with_output().unwrap());
    let kept = fs::read_to_string(file).unwrap();
    let reply = kept.strip_prefix("ROMEO:").unwrap();
    let out = [&first[..], out.as_bytes()].concat();
    let out = String::from_utf8(out).unwrap();
    assert!(out.starts_with(&format!("{reply}\n")) && out.len() > reply.len() + 2);
    assert!(
        !err.contains("[490 tokens") && err.contains("[5 tokens"),
        "{err}"
    );
}

#[test]
fn a_conversation_is_text_alone() {
    let refused = |flags: &[&str], message: &str| {
        let child = start(flags);
        let error = failure(&child.wait_with_output().unwrap(), 2);
        assert!(error.contains(message), "{error}");
    };
    refused(&["--json"], "cannot be used with");
    refused(&["--input", "x"], "cannot be used with");
    refused(&["--output-scores", "x"], "cannot be used with");
    refused(&["--num-return-sequences", "2"], "cannot be used with");
    refused(
        &["--num-beams", "4", "--num-beam-groups", "3"],
        "num_beam_groups is 3; it must be a divisor",
    );
}
