//! A sequence's logits do not depend on what else is in the batch, bit for bit: not on the other
//! prompts, their order, the chunks of the prefill or the number of threads.

use kiln_bundle::{Activations, DType, WeightFormat};
use kiln_compiler::CompileOptions;
use kiln_tests::{Generated, TestBundle};
use serde_json::{Value, json};
use std::{fs, process::Command};
use tempfile::TempDir;

const LENGTHS: [usize; 8] = [1, 300, 2, 17, 100, 64, 255, 33];
const NEW_TOKENS: usize = 6;

/// A model with room for 300 tokens, of odd sizes.
fn model() -> TempDir {
    let dir = TempDir::new().unwrap();
    let config = json!({
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 211,
        "hidden_size": 96, "word_embed_proj_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 3, "ffn_dim": 200, "max_position_embeddings": 320,
        "do_layer_norm_before": true, "activation_function": "relu", "torch_dtype": "float32",
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    });
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn bundle(prefill_buckets: Vec<u32>, decode_batch: Vec<u32>, dtype: DType) -> TestBundle {
    stored(
        prefill_buckets,
        decode_batch,
        dtype,
        WeightFormat::F32,
        None,
    )
}

fn stored(
    prefill_buckets: Vec<u32>,
    decode_batch: Vec<u32>,
    dtype: DType,
    weights: WeightFormat,
    activations: Option<Activations>,
) -> TestBundle {
    let dir = model();
    let options = CompileOptions {
        prefill_buckets,
        decode_batch,
        dtype: Some(dtype),
        weights: Some(weights),
        activations,
        max_batch: 8,
        ..CompileOptions::default()
    };
    TestBundle::compile_dummy(dir.path(), &options)
}

fn request(index: usize) -> Value {
    let ids: Vec<usize> = (0..LENGTHS[index])
        .map(|at| (at * 37 + index * 11 + 5) % 211)
        .collect();
    json!({"prompt_ids": ids, "max_new_tokens": NEW_TOKENS, "ignore_eos": true})
}

/// Logits of a request as bytes, all positions.
fn bits(run: &Generated, request: usize) -> Vec<u32> {
    let tensor = &run.logits[&format!("logits.{request}")];
    tensor.data.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn together_alone_in_any_order_and_chunking() {
    let (bf16, int8) = (Some(Activations::Bf16), Some(Activations::Int8));
    for (dtype, weights, activations) in [
        (DType::F32, "f32", None),
        (DType::Bf16, "f32", None),
        (DType::F32, "int8", None),
        (DType::F32, "int8:g32", None),
        (DType::F32, "int4:g64", None),
        (DType::F32, "bf16", bf16),
        (DType::Bf16, "bf16", bf16),
        (DType::Bf16, "int8", int8),
        (DType::F32, "int4:g64", int8),
    ] {
        let weights = weights.parse().unwrap();
        let whole = stored(vec![512], vec![8], dtype, weights, activations);
        let all: Vec<Value> = (0..LENGTHS.len()).map(request).collect();
        let reference = whole.generate(&all, &[], None);
        let expected: Vec<Vec<u32>> = (0..LENGTHS.len())
            .map(|index| bits(&reference, index))
            .collect();
        let lengths: Vec<usize> = expected.iter().map(|bits| bits.len() / 211).collect();
        assert_eq!(lengths, LENGTHS.map(|length| length + NEW_TOKENS));

        for index in 0..LENGTHS.len() {
            let alone = whole.generate(&[request(index)], &[], None);
            assert_eq!(
                bits(&alone, 0),
                expected[index],
                "prompt of {} tokens alone",
                LENGTHS[index]
            );
        }

        let order = [5, 2, 7, 0, 3, 6, 1, 4];
        let chunked = stored(vec![7, 33], vec![1, 3], dtype, weights, activations);
        let permuted: Vec<Value> = order.into_iter().map(request).collect();
        for threads in ["1", "2", "3"] {
            let run = chunked.generate(&permuted, &["--threads", threads], None);
            for (position, index) in order.into_iter().enumerate() {
                assert_eq!(
                    bits(&run, position),
                    expected[index],
                    "{threads} threads, prompt of {} tokens",
                    LENGTHS[index]
                );
                assert_eq!(run.ids(position), reference.ids(index));
            }
        }
    }
}

#[test]
fn a_sampled_request_gets_the_same_tokens_in_any_batch() {
    let bundle = bundle(vec![64], vec![1, 4], DType::F32);
    let sampled = |index: usize, seed: u64| {
        let mut request = request(index);
        request["temperature"] = json!(1.5);
        request["top_k"] = json!(40);
        request["top_p"] = json!(0.9);
        request["seed"] = json!(seed);
        request
    };
    let alone = bundle.generate(&[sampled(3, 7)], &[], None).ids(0);
    let batch = bundle.generate(
        &[sampled(1, 1), request(2), sampled(3, 7), sampled(3, 8)],
        &[],
        None,
    );
    assert_eq!(batch.ids(2), alone);
    assert_ne!(batch.ids(3), alone);
}

#[test]
fn a_small_cache_changes_nothing_but_the_time() {
    // Room for one sequence at its longest: sequences wait, or give way and are computed again.
    let bundle = bundle(vec![64], vec![1, 4, 8], DType::F32);
    let all: Vec<Value> = (0..LENGTHS.len()).map(request).collect();
    let ample = bundle.generate(&all, &[], None);
    let scarce = bundle.generate(&all, &["--kv-cache-mb", "1"], None);
    for (index, length) in LENGTHS.iter().enumerate() {
        assert_eq!(
            bits(&scarce, index),
            bits(&ample, index),
            "prompt of {length} tokens"
        );
    }
}

#[test]
fn the_portable_path_keeps_the_rule_as_well() {
    for weights in ["f32", "int8", "int4"] {
        let weights = weights.parse().unwrap();
        let whole = stored(vec![512], vec![8], DType::F32, weights, None);
        let chunked = stored(vec![7, 33], vec![1, 3], DType::F32, weights, None);
        let run =
            |bundle: &TestBundle| bundle.generate(&[request(1), request(4)], &[], Some("portable"));
        let [a, b] = [run(&whole), run(&chunked)];
        for index in 0..2 {
            assert_eq!(bits(&a, index), bits(&b, index), "{weights}");
        }
    }
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    let bundle = bundle(vec![64], vec![1], DType::F32);
    let mut kiln: Command = kiln_tests::program("kiln");
    let output = kiln
        .arg("generate")
        .arg(bundle.path())
        .args(["--prompt-ids", "2"])
        .env("KILN_ISA", "mmx")
        .output()
        .unwrap();
    let message = kiln_tests::failure(&output, 1);
    assert!(message.contains("mmx"), "{message}");
}
