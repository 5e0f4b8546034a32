//! The reference interpreter against transformers, before and after fusion.

use crate::fixture;
use kiln_bundle::WeightFormat;
use kiln_compiler::{
    Calibrated, ElementTypes, LogitRows, Model, Silent, Stored, interpret, passes::fuse,
};
use kiln_ir::{DType, Graph};
use kiln_models::{Weights, build};
use safetensors::SafeTensors;
use std::fs;

fn expected(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = tensors.tensor(name).unwrap().data().to_vec();
    bytes
        .chunks_exact(4)
        .map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap()))
        .collect()
}

/// Largest difference as a share of the largest expected value.
fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected
        .iter()
        .fold(0.0f32, |largest, x| largest.max(x.abs()));
    let difference = found
        .iter()
        .zip(expected)
        .fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
    difference / largest
}

fn check(model: &str) {
    let bytes = fs::read(fixture(&format!("expected/{model}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let text = fs::read_to_string(fixture(&format!("expected/{model}.json"))).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let unfused = build(&Model::open(&fixture(model)).unwrap().config);
    for graph in [fuse(unfused.clone()), unfused] {
        check_graph(model, &graph, &tensors, &cases);
    }
}

fn check_graph(model: &str, graph: &Graph, tensors: &SafeTensors<'_>, cases: &serde_json::Value) {
    let Model {
        config, checkpoint, ..
    } = Model::open(&fixture(model)).unwrap();
    let weights = Weights::bind(graph, config.architecture, checkpoint).unwrap();
    let prompts = cases["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty());
    for (index, prompt) in prompts.iter().enumerate() {
        let ids: Vec<u32> = serde_json::from_value(prompt["prompt_ids"].clone()).unwrap();
        let types = ElementTypes::of(DType::F32, WeightFormat::F32);
        let stored = Stored::new(graph, &weights, &types, Calibrated::new());
        let found = interpret(graph, &stored, &ids, LogitRows::All, &Silent).unwrap();
        let off = deviation(
            &found.logits,
            &expected(tensors, &format!("logits.{index}")),
        );
        assert!(
            off < 2e-5,
            "{model}, prompt {index}: logits deviate by {off}"
        );
        let hidden = found.hidden_states.concat();
        let off = deviation(&hidden, &expected(tensors, &format!("hidden.{index}")));
        assert!(
            off < 2e-5,
            "{model}, prompt {index}: hidden states deviate by {off}"
        );
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
