//! `kilnc compile --eval`: the perplexities that `kiln eval` finds, before there is a bundle.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, fixture, program, repository, success};
use serde_json::Value;
use std::{fs, path::Path};
use tempfile::TempDir;

/// Compiler and runtime sum in f32 in different orders; weights, windows and tokens are the same. Each
/// logit is off by some 1e-6 of the largest, and a mean over tokens by less.
const TOLERANCE: f64 = 1e-5;

const LIMITS: [&str; 2] = ["--max-seq-len", "96"];

fn output(program_name: &str, arguments: &[&str]) -> Value {
    let mut command = program(program_name);
    let output = command.args(arguments).arg("--json").output().unwrap();
    serde_json::from_str(&success(&output)).unwrap()
}

/// The text's perplexity by a bundle of the demo model.
fn perplexity(weights: &str, text: &str) -> f64 {
    let options = CompileOptions {
        weights: Some(weights.parse().unwrap()),
        max_seq_len: Some(96),
        ..CompileOptions::default()
    };
    let bundle = TestBundle::compile(&repository("models/demo"), &options);
    let bundle = bundle.path().to_string_lossy().into_owned();
    let report = output("kiln", &["eval", &bundle, "--file", text]);
    report["perplexity"].as_f64().unwrap()
}

#[test]
fn both_perplexities_are_those_of_kiln_eval() {
    let dir = TempDir::new().unwrap();
    let model = repository("models/demo");
    let [text, bundle] = ["text.txt", "out.kiln"].map(|name| dir.path().join(name));
    let whole = fs::read_to_string(fixture("held-out.txt")).unwrap();
    fs::write(&text, &whole[..700]).unwrap();
    let [model, text, bundle] = [&model, &text, &bundle].map(|path| path.to_str().unwrap());
    let exact = perplexity("f32", text);
    for weights in ["int4", "int8", "bf16"] {
        let mut arguments = vec!["compile", model, "-o", bundle, "--weights", weights];
        arguments.extend(["--eval", text].into_iter().chain(LIMITS));
        let report = &output("kilnc", &arguments)["eval"];
        assert!(report["scored"].as_u64().unwrap() > 192, "several windows");
        let stored = perplexity(weights, text);
        for (field, needed) in [("perplexity_before", exact), ("perplexity_after", stored)] {
            let found = report[field].as_f64().unwrap();
            let off = (found / needed - 1.0).abs();
            assert!(off < TOLERANCE, "{weights}, {field}: {found} for {needed}");
        }
        assert_ne!(report["perplexity_before"], report["perplexity_after"]);
    }
}

#[test]
fn no_more_tokens_are_read_than_asked_for() {
    let dir = TempDir::new().unwrap();
    let model = repository("models/demo");
    let [text, bundle] = [fixture("held-out.txt"), dir.path().join("out.kiln")];
    let paths = [&model, &text, &bundle].map(|path| path.to_str().unwrap());
    let mut arguments = vec!["compile", paths[0], "-o", paths[2], "--eval", paths[1]];
    arguments.extend(["--eval-tokens", "50"].into_iter().chain(LIMITS));
    let report = &output("kilnc", &arguments)["eval"];
    assert_eq!(
        (&report["tokens"], &report["scored"]),
        (&50.into(), &49.into())
    );
    assert!(report["text_tokens"].as_u64().unwrap() > 1000);
    assert_eq!(
        (&report["window"], &report["stride"]),
        (&96.into(), &48.into())
    );
}

#[test]
fn texts_of_no_use_are_refused_before_anything_is_written() {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    write("empty.txt", b"");
    write("bytes.txt", b"\xff\xfe");
    let compile = |model: &[&str], file: &str| {
        let output = program("kilnc")
            .arg("compile")
            .args(model)
            .arg("--eval")
            .arg(dir.path().join(file))
            .arg("-o")
            .arg(dir.path().join("out.kiln"))
            .output()
            .unwrap();
        let found = failure(&output, 1);
        assert!(found.contains("cannot evaluate on"), "{found}");
        assert!(!Path::new(&dir.path().join("out.kiln")).exists());
        found
    };
    let demo = repository("models/demo");
    let demo = [demo.to_str().unwrap()];
    for (file, message) in [
        ("no-such.txt", "No such file"),
        ("empty.txt", "it has fewer than two tokens"),
        ("bytes.txt", "valid UTF-8"),
    ] {
        let found = compile(&demo, file);
        assert!(found.contains(message), "{found}");
    }
    let found = compile(&["gpt2", "--dummy-weights"], "empty.txt");
    assert!(found.contains("the model has no tokenizer"), "{found}");
}
