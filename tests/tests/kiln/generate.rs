//! `kiln generate` on the demo model: text in, text out, and requests that must be refused.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, fixture, interrupt, program, repository};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    process::{Output, Stdio},
    sync::OnceLock,
};

/// The demo model, compiled once.
fn demo() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE
        .get_or_init(|| TestBundle::compile(&repository("models/demo"), &CompileOptions::default()))
}

fn kiln(flags: &[&str]) -> Output {
    let mut command = program("kiln");
    command
        .arg("generate")
        .arg(demo().path())
        .args(flags)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json_line(output: &Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}

#[test]
fn text_and_ids_are_those_of_transformers() {
    let cases = fs::read_to_string(fixture("expected/demo.json")).unwrap();
    let cases: Value = serde_json::from_str(&cases).unwrap();
    let prompts = cases["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty());
    for case in prompts {
        let prompt = case["prompt"].as_str().unwrap();
        let found = json_line(&kiln(&[
            prompt,
            "--max-new-tokens",
            "64",
            "--ignore-eos",
            "--json",
        ]));
        assert_eq!(found["prompt_ids"], case["prompt_ids"]);
        assert_eq!(found["choices"][0]["ids"], case["greedy_ids"]);
        assert_eq!(found["choices"][0]["text"], case["text"]);
        assert_eq!(found["choices"][0]["finish_reason"], "length");
        assert_eq!(found["usage"]["completion_tokens"], 64);
        // The plain form streams the same text.
        let plain = text(&kiln(&[prompt, "--max-new-tokens", "64", "--ignore-eos"]));
        assert_eq!(
            plain.trim_end_matches('\n'),
            case["text"].as_str().unwrap().trim_end_matches('\n')
        );
    }
}

#[test]
fn texts_get_the_ids_of_transformers() {
    // OPT's own vocabulary under a small model: every text is a prompt, its ids are printed.
    let model = tempfile::TempDir::new().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(fixture("opt-tokenizer").join(name), model.path().join(name)).unwrap();
    }
    let config = json!({
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272,
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 256,
        "do_layer_norm_before": true, "activation_function": "relu", "torch_dtype": "float16",
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    });
    fs::write(model.path().join("config.json"), config.to_string()).unwrap();
    let bundle = TestBundle::compile_dummy(model.path(), &CompileOptions::default());
    let cases = fs::read_to_string(fixture("expected/opt-tokenizer.json")).unwrap();
    let cases: Value = serde_json::from_str(&cases).unwrap();
    let cases = cases["cases"].as_array().unwrap().iter();
    // An empty prompt is refused, so its ids are never seen.
    let cases: Vec<&Value> = cases.filter(|case| case["text"] != "").collect();
    assert!(cases.len() >= 30, "{} cases", cases.len());
    let requests: Vec<Value> = cases
        .iter()
        .map(|case| json!({"prompt": case["text"], "max_new_tokens": 1}))
        .collect();
    let found = bundle.generate(&requests, &[], None);
    for (case, result) in cases.into_iter().zip(&found.results) {
        assert_eq!(result["prompt_ids"], case["ids"], "{}", case["text"]);
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let whole = json_line(&kiln(&[
        "ROMEO:",
        "--max-new-tokens",
        "40",
        "--ignore-eos",
        "--json",
    ]));
    let whole = whole["choices"][0]["text"].as_str().unwrap();
    // A piece from the middle, which in general does not fall on token boundaries.
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 5].iter().collect();
    let flags = [
        "ROMEO:",
        "--max-new-tokens",
        "40",
        "--ignore-eos",
        "--stop",
        &stop,
    ];
    let stopped = json_line(&kiln(&[&flags[..], &["--json"]].concat()));
    let expected = &whole[..whole.find(&stop).unwrap()];
    assert_eq!(stopped["choices"][0]["text"], expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(
        text(&kiln(&flags)).trim_end_matches('\n'),
        expected.trim_end_matches('\n')
    );
}

#[test]
fn a_stop_token_ends_the_sequence_after_it() {
    let whole = json_line(&kiln(&[
        "ROMEO:",
        "--max-new-tokens",
        "20",
        "--ignore-eos",
        "--json",
    ]));
    let ids: Vec<u32> = serde_json::from_value(whole["choices"][0]["ids"].clone()).unwrap();
    let stop = ids[7];
    let first = ids.iter().position(|&id| id == stop).unwrap();
    let stopped = json_line(&kiln(&[
        "ROMEO:",
        "--max-new-tokens",
        "20",
        "--ignore-eos",
        "--json",
        "--stop-token-ids",
        &stop.to_string(),
    ]));
    assert_eq!(stopped["choices"][0]["ids"], json!(ids[..=first]));
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
}

#[test]
fn seeds_repeat_and_differ() {
    let sample = |seed: &str| {
        text(&kiln(&[
            "JULIET:",
            "--max-new-tokens",
            "30",
            "--temperature",
            "1",
            "--seed",
            seed,
        ]))
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn results_come_in_the_order_of_the_requests() {
    let path = demo().beside("order.jsonl");
    let lines = [
        json!({"prompt": "ROMEO:", "max_new_tokens": 30, "ignore_eos": true}),
        json!({"prompt": "JULIET:", "max_new_tokens": 1}),
        json!({"prompt_ids": [2, 40, 41], "max_new_tokens": 5, "ignore_eos": true}),
    ];
    fs::write(&path, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let output = kiln(&["--input", &path.to_string_lossy(), "--json"]);
    let results: Vec<Value> = text(&output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let counts: Vec<&Value> = results
        .iter()
        .map(|result| &result["usage"]["completion_tokens"])
        .collect();
    assert_eq!(counts, [30, 1, 5]);
}

/// The flags must be refused with this message and exit code.
fn refused(flags: &[&str], code: i32, message: &str) {
    let error = failure(&kiln(flags), code);
    assert!(error.contains(message), "found: {error}\nneeded: {message}");
}

#[test]
fn prompts_that_must_be_refused() {
    refused(&["--prompt-ids", "2,99999"], 1, "99999");
    let long = vec!["2"; 600].join(",");
    refused(&["--prompt-ids", &long], 1, "600");
    let empty = demo().beside("empty.txt");
    fs::write(&empty, "").unwrap();
    refused(
        &["--prompt-file", &empty.to_string_lossy()],
        1,
        "the prompt is empty; give some text, or token ids to start from",
    );
    let invalid = demo().beside("invalid.txt");
    fs::write(&invalid, b"ROMEO: \xff\xfe").unwrap();
    refused(
        &["--prompt-file", &invalid.to_string_lossy()],
        1,
        "invalid.txt",
    );
    refused(
        &["--prompt-file", &invalid.to_string_lossy()],
        1,
        "offset 7",
    );
    refused(
        &["--prompt-file", "/nonexistent/prompt"],
        1,
        "/nonexistent/prompt",
    );
}

#[test]
fn wrong_usage_exits_with_2() {
    refused(&[], 2, "required");
    refused(&["x", "--temperature", "-1"], 2, "temperature");
    refused(&["x", "--top-p", "0"], 2, "top-p");
    refused(&["x", "--top-p", "nan"], 2, "top-p");
    refused(&["x", "--num-unicorns", "3"], 2, "unexpected argument");
    refused(&["x", "--prompt-ids", "2"], 2, "cannot be used with");
    refused(&["--prompt-ids", ""], 2, "prompt-ids");
}

#[test]
fn lines_that_are_no_request_are_named() {
    let path = demo().beside("requests.jsonl");
    for (lines, message) in [
        ("{\"prompt\": \"a\"}\nnot json", "line 2"),
        ("{\"prompt\": \"a\", \"top_q\": 1}", "top_q"),
        ("{\"max_new_tokens\": 3}", "line 1"),
        ("{\"prompt_ids\": []}", "line 1"),
        ("{\"prompt\": \"a\", \"prompt_ids\": [1]}", "line 1"),
        ("{\"prompt\": \"a\", \"temperature\": -1}", "line 1"),
        ("{\"prompt_ids\": [99999]}", "line 1"),
    ] {
        fs::write(&path, lines).unwrap();
        let error = failure(&kiln(&["--input", &path.to_string_lossy()]), 1);
        assert!(error.contains(message), "for {lines}: {error}");
    }
}

#[test]
fn an_output_that_cannot_be_written_is_told() {
    refused(
        &[
            "ROMEO:",
            "--max-new-tokens",
            "1",
            "--output-logits",
            "/nonexistent/logits",
        ],
        1,
        "/nonexistent/logits",
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = program("kiln")
        .arg("generate")
        .arg(demo().path())
        .args(["ROMEO:", "--max-new-tokens", "200", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
    assert!(output.status.success(), "{:?}", output.status);
}

#[test]
fn an_interrupt_ends_the_program_cleanly() {
    let mut child = program("kiln")
        .arg("generate")
        .arg(demo().path())
        .args(["ROMEO:", "--max-new-tokens", "400", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{:?}", output.status);
    assert!(
        String::from_utf8(output.stdout).is_ok(),
        "half a character was printed"
    );
}

#[test]
fn a_prompt_may_come_from_standard_input() {
    let mut child = program("kiln")
        .arg("generate")
        .arg(demo().path())
        .args([
            "--prompt-file",
            "-",
            "--max-new-tokens",
            "8",
            "--ignore-eos",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"ROMEO:").unwrap();
    let piped = text(&child.wait_with_output().unwrap());
    assert_eq!(
        piped,
        text(&kiln(&["ROMEO:", "--max-new-tokens", "8", "--ignore-eos"]))
    );
}
