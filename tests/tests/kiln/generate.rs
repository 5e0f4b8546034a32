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
#[test]
fn penalties_change_what_is_chosen() {
    let ids = |flags: &[&str]| -> Vec<u64> {
        let common = ["ROMEO:", "--max-new-tokens", "40", "--ignore-eos", "--json"];
        let found = json_line(&kiln(&[&common, flags].concat()));
        serde_json::from_value(found["choices"][0]["ids"].clone()).unwrap()
    };
    let plain = ids(&[]);
    let pairs = |ids: &[u64]| {
        let mut pairs: Vec<_> = ids.windows(2).map(<[u64]>::to_vec).collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs.len()
    };
    assert_eq!(pairs(&ids(&["--no-repeat-ngram-size", "2"])), 39);
    assert_ne!(ids(&["--repetition-penalty", "1.5"]), plain);
    assert_ne!(ids(&["--frequency-penalty", "2"]), plain);
    let first = plain[0].to_string();
    assert!(!ids(&["--suppress-tokens", &first]).contains(&plain[0]));
    assert_ne!(ids(&["--begin-suppress-tokens", &first])[0], plain[0]);
    let bias = format!("{first}=100");
    assert_eq!(ids(&["--logit-bias", &bias]), [plain[0]; 40]);
    let word = format!("{},{}", plain[3], plain[4]);
    let without = ids(&["--bad-words-ids", &word]);
    assert!(!without.windows(2).any(|pair| pair == &plain[3..5]));
    assert_eq!(ids(&["--forced-eos-token-id", "7"])[39], 7);
}

#[test]
fn logprobs_are_those_of_the_logits() {
    let flags = ["ROMEO:", "--max-new-tokens", "8", "--ignore-eos", "--json"];
    let generated = json_line(&kiln(&[&flags[..], &["--logprobs", "3"]].concat()));
    let choice = &generated["choices"][0];
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["token_ids"], choice["ids"]);
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 8);
    let values: Vec<f64> = serde_json::from_value(logprobs["token_logprobs"].clone()).unwrap();
    let score = choice["score"].as_f64().unwrap();
    assert!((values.iter().sum::<f64>() - score).abs() < 1e-4);
    for (place, top) in logprobs["top_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
    {
        let top = top.as_object().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the token is the likeliest.
        let best = top
            .values()
            .filter_map(Value::as_f64)
            .fold(f64::MIN, f64::max);
        assert_eq!(best, values[place]);
    }

    // What was generated, echoed as a prompt.
    let all = [&generated["prompt_ids"], &choice["ids"]].map(|ids| ids.as_array().unwrap().clone());
    let ids: Vec<String> = all.concat().iter().map(Value::to_string).collect();
    let prompt = ids.join(",");
    let echoed = json_line(&kiln(&[
        "--prompt-ids",
        &prompt,
        "--max-new-tokens",
        "0",
        "--logprobs",
        "0",
        "--echo",
        "--json",
    ]));
    let echoed: Vec<Option<f64>> =
        serde_json::from_value(echoed["choices"][0]["logprobs"]["token_logprobs"].clone()).unwrap();
    assert_eq!(echoed[0], None);
    // Prefill and decode give the same bits.
    let tail: Vec<f64> = echoed[echoed.len() - 8..]
        .iter()
        .map(|p| p.unwrap())
        .collect();
    assert_eq!(tail, values);
}

#[test]
fn the_best_of_several_are_returned() {
    let flags = ["ROMEO:", "--max-new-tokens", "12", "--seed", "5", "--json"];
    let choices = |more: &[&str]| -> Vec<Value> {
        let found = json_line(&kiln(&[&flags[..], more].concat()));
        found["choices"].as_array().unwrap().clone()
    };
    let all = choices(&["--num-return-sequences", "4", "--logprobs", "0"]);
    assert_eq!(all.len(), 4);
    assert_eq!(all[0]["ids"], choices(&[])[0]["ids"]);
    let mean = |choice: &Value| {
        choice["score"].as_f64().unwrap() / choice["ids"].as_array().unwrap().len() as f64
    };
    let mut ranked = all.clone();
    ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = choices(&["--num-return-sequences", "2", "--best-of", "4"]);
    let ids =
        |choices: &[Value]| -> Vec<Value> { choices.iter().map(|c| c["ids"].clone()).collect() };
    assert_eq!(ids(&best), ids(&ranked[..2]));
    assert!(best[0]["logprobs"].is_null() && best[0]["score"].is_number());
}

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
    refused(&["x", "--presence-penalty", "3"], 2, "from -2 to 2");
    refused(&["x", "--logprobs", "21"], 2, "logprobs");
    refused(
        &["x", "--num-return-sequences", "2"],
        2,
        "it must be 1 where nothing is sampled",
    );
    refused(
        &["x", "--min-new-tokens", "9", "--max-new-tokens", "3"],
        2,
        "min_new_tokens is 9; it must be at most max_new_tokens, which is 3",
    );
    refused(&["x", "--num-beams", "2"], 2, "unexpected argument");
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
        ("{\"prompt\": \"a\", \"num_beams\": 2}", "num_beams"),
        ("{\"prompt\": \"a\", \"best_of\": 2}", "best_of is 2"),
        (
            "{\"prompt\": \"a\", \"logit_bias\": {\"99999\": 1}}",
            "logit_bias: token id 99999",
        ),
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
