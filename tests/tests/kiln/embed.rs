//! `kiln embed`: the vectors are those of the hidden states that `kiln generate` writes.

use kiln_compiler::CompileOptions;
use kiln_tests::{Tensor, TestBundle, deviation, failure, fixture, program, success, tensors};
use serde_json::{Value, json};
use std::{fs, process::Output, sync::OnceLock};

fn tiny() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE.get_or_init(|| TestBundle::compile(&fixture("tiny-opt"), &CompileOptions::default()))
}

fn embed(flags: &[&str]) -> Output {
    let mut command = program("kiln");
    let command = command.arg("embed").arg(tiny().path()).args(flags);
    command.output().unwrap()
}

/// Ids and vector of each line.
fn vectors(flags: &[&str]) -> Vec<(Value, Vec<f32>)> {
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let vector = serde_json::from_value(line["embedding"].take()).unwrap();
        (line["prompt_ids"].take(), vector)
    };
    success(&embed(flags)).lines().map(line).collect()
}

/// Texts and ids of several lengths, more of them than run at a time.
fn prompts() -> Vec<Value> {
    let texts = [
        "the",
        "a longer text than the others, of several tokens",
        "x y z",
    ];
    let texts = texts.iter().map(|text| json!({ "prompt": text }));
    let ids = (1..10u32).map(|len| {
        let ids: Vec<u32> = (0..len * len).map(|i| (i * 37 + len) % 300).collect();
        json!({ "prompt_ids": ids })
    });
    texts.chain(ids).collect()
}

/// The prompts' rows (T, C) of a layer.
fn rows(hidden: &Tensor, layer: usize) -> Vec<&[f32]> {
    let (positions, width) = (hidden.shape[1], hidden.shape[2]);
    let rows = hidden.data.chunks_exact(width);
    rows.skip(layer * positions).take(positions).collect()
}

fn mean(rows: &[&[f32]]) -> Vec<f32> {
    let column = |i: usize| rows.iter().map(|row| f64::from(row[i])).sum::<f64>();
    let columns = 0..rows[0].len();
    columns
        .map(|i| (column(i) / rows.len() as f64) as f32)
        .collect()
}

#[test]
fn vectors_are_pooled_hidden_states() {
    let prompts = prompts();
    let zero: Vec<Value> = prompts
        .iter()
        .map(|prompt| {
            let mut request = prompt.clone();
            request["max_new_tokens"] = json!(0);
            request
        })
        .collect();
    let generated = tiny().generate(&zero, &[], None);
    let input = tiny().beside("texts.jsonl");
    let lines: Vec<String> = prompts.iter().map(Value::to_string).collect();
    fs::write(&input, lines.join("\n")).unwrap();
    let input = input.to_string_lossy();
    for (flags, layer) in [(&[][..], 3), (&["--layer", "0"], 0), (&["--layer", "2"], 2)] {
        let run = |more: &[&str]| vectors(&[&["--input", &input], flags, more].concat());
        let (means, lasts) = (run(&[]), run(&["--pooling", "last"]));
        let scaled = run(&["--pooling", "last", "--normalize"]);
        assert_eq!(means.len(), prompts.len());
        for index in 0..prompts.len() {
            let rows = rows(&generated.hidden_states[&format!("hidden.{index}")], layer);
            let ids = &generated.results[index]["prompt_ids"];
            assert!([&means, &lasts].iter().all(|found| &found[index].0 == ids));
            assert!(deviation(&means[index].1, &mean(&rows)) < 1e-5, "{index}");
            let last = *rows.last().unwrap();
            assert_eq!(lasts[index].1, last);
            let length = last.iter().map(|x| x * x).sum::<f32>().sqrt();
            let expected: Vec<f32> = last.iter().map(|x| x / length).collect();
            assert!(deviation(&scaled[index].1, &expected) < 1e-5, "{index}");
        }
    }
}

#[test]
fn prompts_may_be_arguments() {
    let texts = vectors(&["the", "x y z"]);
    let ids = |index: usize| {
        let ids: Vec<u32> = serde_json::from_value(texts[index].0.clone()).unwrap();
        ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
    };
    let as_ids = vectors(&["--prompt-ids", &ids(0), "--prompt-ids", &ids(1)]);
    assert_eq!(texts, as_ids);
    assert_ne!(texts[0].1, texts[1].1);
}

#[test]
fn vectors_are_rows_of_a_file() {
    let path = tiny().beside("embeddings.safetensors");
    let flags = ["the", "x y z", "the", "--output", &path.to_string_lossy()];
    assert_eq!(vectors(&flags), []);
    let printed = vectors(&[&flags[..], &["--json"]].concat());
    let file = &tensors(&path)["embeddings"];
    assert_eq!(file.shape, [3, printed[0].1.len()]);
    let rows: Vec<f32> = printed.into_iter().flat_map(|(_, vector)| vector).collect();
    assert_eq!(file.data, rows);
}

#[test]
fn mistakes_are_named() {
    let refused = |flags: &[&str], code, message: &str| {
        let error = failure(&embed(flags), code);
        assert!(error.contains(message), "found: {error}\nneeded: {message}");
    };
    refused(&[], 2, "required");
    refused(
        &["x", "--pooling", "max"],
        2,
        "[possible values: mean, last]",
    );
    refused(&["x", "--prompt-ids", "2"], 2, "cannot be used with");
    refused(&["--prompt-ids", "2,x"], 2, "token ids with commas");
    refused(
        &["x", "--layer", "99"],
        1,
        "layer is 99; it must be from 0 to 3",
    );
    refused(&["x", ""], 1, "prompt 2: the prompt is empty");
    refused(
        &["x", "--output", "/nonexistent/vectors"],
        1,
        "/nonexistent/vectors",
    );
    let input = tiny().beside("generation.jsonl");
    fs::write(
        &input,
        "{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"top_k\": 2}",
    )
    .unwrap();
    refused(
        &["--input", &input.to_string_lossy()],
        1,
        "line 2: field \"top_k\": unknown; known are prompt, prompt_ids",
    );
}
