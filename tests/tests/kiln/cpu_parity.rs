//! The CPU device against transformers in f32, for every form of model and every instruction set
//! of this machine.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, deviation, fixture, program, tensors};
use serde_json::{Value, json};
use std::fs;

/// Largest deviation of logits and hidden states, as a share of the largest value.
const TOLERANCE: f32 = 1e-4;

/// Instruction sets that run here; the portable one always does.
fn instruction_sets(bundle: &TestBundle) -> Vec<&'static str> {
    let runs = |isa: &&str| {
        let mut command = program("kiln");
        command.args([
            "generate",
            "--prompt-ids",
            "2",
            "--max-new-tokens",
            "1",
            "--json",
        ]);
        command
            .arg(bundle.path())
            .env("KILN_ISA", isa)
            .output()
            .unwrap()
            .status
            .success()
    };
    let sets: Vec<_> = ["portable", "avx2", "avx512", "amx", "neon"]
        .into_iter()
        .filter(runs)
        .collect();
    assert!(sets.contains(&"portable"));
    sets
}

fn check(model: &str) {
    let expected = tensors(&fixture(&format!("expected/{model}.safetensors")));
    let text = fs::read_to_string(fixture(&format!("expected/{model}.json"))).unwrap();
    let cases: Value = serde_json::from_str(&text).unwrap();
    let prompts = cases["prompts"].as_array().unwrap();
    let requests: Vec<Value> = prompts
        .iter()
        .map(|prompt| {
            json!({
                "prompt_ids": prompt["prompt_ids"],
                "max_new_tokens": prompt["greedy_ids"].as_array().unwrap().len(),
                "ignore_eos": true,
            })
        })
        .collect();
    let bundle = TestBundle::compile(&fixture(model), &CompileOptions::default());
    for isa in instruction_sets(&bundle) {
        let found = bundle.generate(&requests, &[], Some(isa));
        for (index, prompt) in prompts.iter().enumerate() {
            let case = format!("{model} on {isa}, prompt {index}");
            let greedy: Vec<u32> = serde_json::from_value(prompt["greedy_ids"].clone()).unwrap();
            assert_eq!(found.ids(index), greedy, "{case}");
            // Rows of the prompt; those of generated tokens follow.
            let positions = prompt["prompt_ids"].as_array().unwrap().len();
            for (name, found) in [
                (format!("logits.{index}"), &found.logits),
                (format!("hidden.{index}"), &found.hidden_states),
            ] {
                let (found, expected) = (&found[&name], &expected[&name]);
                assert_eq!(found.shape.len(), expected.shape.len(), "{case}: {name}");
                let parts = found.first_rows(positions);
                let needed = expected.first_rows(positions);
                assert_eq!(parts.len(), needed.len(), "{case}: {name}");
                for (part, (found, expected)) in parts.iter().zip(needed).enumerate() {
                    let off = deviation(found, expected);
                    assert!(
                        off < TOLERANCE,
                        "{case}: {name}, part {part} deviates by {off}"
                    );
                }
            }
        }
    }
}

#[test]
fn opt() {
    check("tiny-opt");
}

#[test]
fn opt_with_a_head_size_of_80() {
    check("tiny-opt-d80");
}

#[test]
fn opt_post_norm_with_projections() {
    check("tiny-opt-post");
}

#[test]
fn gpt2() {
    check("tiny-gpt2");
}
