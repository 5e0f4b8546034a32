//! `kiln generate` on the demo model: text in, text out, and requests that must be refused.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, fixture, interrupt, program, repository, success, tensors};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Output, Stdio},
    sync::OnceLock,
};

/// The demo model, compiled once.
fn demo() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE
        .get_or_init(|| TestBundle::compile(&repository("models/demo"), &CompileOptions::default()))
}

/// A model with random weights, which has expectations of every kind.
fn tiny() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE.get_or_init(|| TestBundle::compile(&fixture("tiny-opt"), &CompileOptions::default()))
}

fn kiln(flags: &[&str]) -> Output {
    kiln_on(demo(), flags)
}

fn kiln_on(bundle: &TestBundle, flags: &[&str]) -> Output {
    let mut command = program("kiln");
    command
        .arg("generate")
        .arg(bundle.path())
        .args(flags)
        .output()
        .unwrap()
}

fn json_line(output: &Output) -> Value {
    serde_json::from_str(&success(output)).unwrap()
}

fn json_lines(output: &Output) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap();
    success(output).lines().map(parse).collect()
}

/// Runs requests, a line each.
fn lines_on(bundle: &TestBundle, name: &str, lines: &[Value], flags: &[&str]) -> Output {
    let path = bundle.beside(name);
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(&path, lines.join("\n")).unwrap();
    let path = path.to_string_lossy().into_owned();
    kiln_on(bundle, &[&["--input", &path], flags].concat())
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
        let plain = success(&kiln(&[prompt, "--max-new-tokens", "64", "--ignore-eos"]));
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
        success(&kiln(&flags)).trim_end_matches('\n'),
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
        success(&kiln(&[
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
    let lines = [
        json!({"prompt": "ROMEO:", "max_new_tokens": 30, "ignore_eos": true}),
        json!({"prompt": "JULIET:", "max_new_tokens": 1}),
        json!({"prompt_ids": [2, 40, 41], "max_new_tokens": 5, "ignore_eos": true}),
    ];
    let results = json_lines(&lines_on(demo(), "order.jsonl", &lines, &["--json"]));
    let counts: Vec<&Value> = results
        .iter()
        .map(|result| &result["usage"]["completion_tokens"])
        .collect();
    assert_eq!(counts, [30, 1, 5]);
}

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

/// The committed search of tiny-opt with four beams, a length penalty of 0.6 and `early_stopping`
/// "never".
fn searched() -> Value {
    let path = fixture("expected/generation/tiny-opt.json");
    let cases: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let wanted = json!({
        "prompt_ids": [2], "max_new_tokens": 12, "num_beams": 4, "length_penalty": 0.6,
        "early_stopping": "never", "ignore_eos": true, "stop_token_ids": [59],
        "num_return_sequences": 4,
    });
    let mut cases = cases["cases"].as_array().unwrap().iter();
    cases
        .find(|case| case["request"] == wanted)
        .unwrap()
        .clone()
}

/// The choices are the best `count` of the search, in their order.
fn check_searched(found: &Value, count: usize) {
    let expected = searched();
    let choices = found["choices"].as_array().unwrap();
    assert_eq!(choices.len(), count);
    for (choice, (ids, score)) in choices.iter().zip(
        expected["ids"]
            .as_array()
            .unwrap()
            .iter()
            .zip(expected["scores"].as_array().unwrap()),
    ) {
        assert_eq!(&choice["ids"], ids);
        let (found, expected) = (choice["score"].as_f64().unwrap(), score.as_f64().unwrap());
        assert!((found - expected).abs() < 1e-4 * expected.abs(), "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let scores = choices.iter().map(|choice| choice["score"].as_f64());
    assert!(scores.is_sorted_by(|a, b| a >= b), "{choices:?}");
}

#[test]
fn a_search_by_flags_is_that_of_transformers() {
    let flags = [
        "--prompt-ids",
        "2",
        "--max-new-tokens",
        "12",
        "--ignore-eos",
        "--stop-token-ids",
        "59",
        "--num-beams",
        "4",
        "--num-return-sequences",
        "2",
        "--length-penalty",
        "0.6",
        "--early-stopping",
        "never",
    ];
    let found = json_line(&kiln_on(tiny(), &[&flags[..], &["--json"]].concat()));
    check_searched(&found, 2);
    let tokens = found["choices"].as_array().unwrap().iter();
    let tokens: usize = tokens.map(|c| c["ids"].as_array().unwrap().len()).sum();
    assert_eq!(found["usage"]["completion_tokens"], tokens);
    // As text, a line each.
    let lines = success(&kiln_on(tiny(), &flags));
    let texts = found["choices"].as_array().unwrap().iter();
    let texts: Vec<&str> = texts.map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(lines, format!("{}\n{}\n", texts[0], texts[1]));
}

#[test]
fn searches_samples_and_greedy_lines_run_together() {
    let search = searched()["request"].clone();
    let mut two = search.clone();
    two["num_return_sequences"] = json!(2);
    let greedy = json!({"prompt_ids": [2, 30, 7], "max_new_tokens": 9, "ignore_eos": true});
    let samples = json!({"prompt_ids": [2, 30, 7, 11], "max_new_tokens": 9, "temperature": 0.9,
        "seed": 3, "num_return_sequences": 3, "ignore_eos": true});
    let groups = json!({"prompt_ids": [2, 5], "max_new_tokens": 6, "num_beams": 4, "ignore_eos": true,
        "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 4});
    let lines = [greedy, search, samples, two, groups];
    let run = |name: &str, lines: &[Value]| json_lines(&lines_on(tiny(), name, lines, &["--json"]));
    let together = run("mixed.jsonl", &lines);
    check_searched(&together[1], 4);
    check_searched(&together[3], 2);
    assert_eq!(together.len(), lines.len());
    for (index, line) in lines.iter().enumerate() {
        let alone = run("alone.jsonl", std::slice::from_ref(line));
        assert_eq!(alone[0]["choices"], together[index]["choices"], "{line}");
    }
}

#[test]
fn several_samples_are_a_line_each() {
    let flags = ["JULIET:", "--max-new-tokens", "12", "--seed", "5"];
    let several = [&flags[..], &["--num-return-sequences", "3", "--echo"]].concat();
    let found = json_line(&kiln(&[&several[..], &["--json"]].concat()));
    let texts = found["choices"].as_array().unwrap().iter();
    let texts: Vec<&str> = texts.map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 3);
    assert!(texts.iter().all(|text| text.starts_with("JULIET:")));
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    assert_eq!(success(&kiln(&several)), format!("{}\n", texts.join("\n")));
}

#[test]
fn scores_are_the_logits_that_tokens_are_chosen_by() {
    let [logits, scores] =
        ["for-scores.logits", "for-scores.scores"].map(|name| demo().beside(name));
    let (logits, scores) = (logits.to_string_lossy(), scores.to_string_lossy());
    let run = |more: &[&str]| {
        let flags = ["ROMEO:", "--max-new-tokens", "6", "--ignore-eos", "--json"];
        let files = ["--output-logits", &logits, "--output-scores", &scores];
        let found = json_line(&kiln(&[&flags[..], &files, more].concat()));
        let ids: Vec<usize> = serde_json::from_value(found["choices"][0]["ids"].clone()).unwrap();
        let file = |path: &str, name: &str| tensors(Path::new(path)).remove(name).unwrap();
        (ids, file(&logits, "logits.0"), file(&scores, "scores.0"))
    };
    let (_, logits, scores) = run(&[]);
    let vocab = logits.shape[1];
    assert_eq!(scores.shape, [6, vocab]);
    // The row after the prompt chooses the first token; the row after the last one chooses none.
    let positions = logits.shape[0];
    assert_eq!(
        scores.data,
        logits.data[(positions - 7) * vocab..][..6 * vocab]
    );

    let (ids, _, scores) = run(&["--temperature", "0.5", "--top-k", "3", "--seed", "1"]);
    for (row, id) in scores.data.chunks_exact(vocab).zip(ids) {
        assert_eq!(row.iter().filter(|score| score.is_finite()).count(), 3);
        assert!(row[id].is_finite());
    }
}

#[test]
fn hidden_states_of_chosen_layers() {
    let run = |name: &str, more: &[&str]| {
        let path = tiny().beside(name);
        let file = path.to_string_lossy();
        let flags = [
            "--prompt-ids",
            "2,30,7",
            "--max-new-tokens",
            "3",
            "--ignore-eos",
        ];
        let output = ["--output-hidden-states", &file];
        success(&kiln_on(tiny(), &[&flags[..], &output, more].concat()));
        tensors(&path).remove("hidden.0").unwrap()
    };
    let all = run("hidden-all", &[]);
    let chosen = run("hidden-chosen", &["--hidden-layers", "3,0"]);
    let (layers, positions, width) = (all.shape[0], all.shape[1], all.shape[2]);
    assert_eq!((layers, positions), (4, 6));
    assert_eq!(chosen.shape, [2, positions, width]);
    let layer = |layer: usize| &all.data[layer * positions * width..][..positions * width];
    assert_eq!(chosen.data, [layer(3), layer(0)].concat());
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
    refused(
        &["x", "--num-beams", "4", "--num-beam-groups", "3"],
        2,
        "num_beam_groups is 3; it must be a divisor of num_beams, which is 4",
    );
    refused(
        &["x", "--num-beams", "4", "--num-return-sequences", "5"],
        2,
        "num_return_sequences is 5; it must be at most num_beams, which is 4",
    );
    refused(
        &["x", "--num-beams", "2", "--stop", "x"],
        2,
        "stop is \"x\"; it must be absent with num_beams",
    );
    refused(
        &["x", "--num-beams", "2", "--early-stopping", "sometimes"],
        2,
        "invalid value 'sometimes' for '--early-stopping <WHEN>'\n  [possible values: true, false, never]",
    );
    refused(&["x", "--num-beams", "129"], 2, "129 is not in 1..=128");
    refused(&["x", "--hidden-layers", "1"], 2, "--output-hidden-states");
    refused(
        &["x", "--num-beams", "2", "--output-scores", "unwritten"],
        2,
        "num_beams is 2; it must be 1 where scores are written",
    );
}

#[test]
fn what_the_bundle_has_no_room_for_is_refused() {
    refused(
        &["x", "--num-beams", "99"],
        1,
        "num_beams is 99; it must be at most 16, the largest batch of this bundle",
    );
    let file = demo().beside("unwritten").to_string_lossy().into_owned();
    let hidden = ["x", "--output-hidden-states", &file, "--hidden-layers"];
    let layers = demo_layers();
    refused(
        &[&hidden[..], &["0,99"]].concat(),
        1,
        &format!("hidden_layers is 99; it must be from 0 to {layers}"),
    );
    assert!(!Path::new(&file).exists());
}

fn demo_layers() -> u64 {
    let config = fs::read_to_string(repository("models/demo/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"].as_u64().unwrap()
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
        (
            "{\"prompt\": \"a\", \"num_beams\": 99}",
            "line 1: num_beams is 99; it must be at most 16",
        ),
        (
            "{\"prompt\": \"a\", \"num_beams\": 2, \"stop\": \"x\"}",
            "line 1: stop is \"x\"",
        ),
        (
            "{\"prompt\": \"a\", \"early_stopping\": \"sometimes\"}",
            "line 1: field \"early_stopping\": expected true, false or \"never\"",
        ),
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
    let piped = success(&child.wait_with_output().unwrap());
    assert_eq!(
        piped,
        success(&kiln(&["ROMEO:", "--max-new-tokens", "8", "--ignore-eos"]))
    );
}
