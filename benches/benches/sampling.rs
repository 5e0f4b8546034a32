//! The choice of a token on the CPU, for V of OPT: `cargo bench -p kiln-benches --bench sampling`.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark stops where a program would report"
)]

use criterion::{Criterion, criterion_group, criterion_main};
use kiln_runtime::{Draw, DrawParams, Processors, Rules, Sampler, SequenceBias};
use std::hint::black_box;
use std::sync::Arc;

const V: u32 = 50272;
const PROMPT_LEN: usize = 128;
const HISTORY_LEN: u32 = 1024;

/// A number from 0 to 1 that looks random.
fn noise(index: u32) -> f32 {
    let hash = u64::from(index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (hash >> 40) as f32 / (1u64 << 24) as f32
}

/// A row with a few likely tokens and a long tail.
fn logits() -> Vec<f32> {
    (0..V)
        .map(|id| -noise(id).ln().abs().sqrt() * 4.0 + noise(id ^ 77).powi(40) * 12.0)
        .collect()
}

fn choices(criterion: &mut Criterion) {
    let logits = logits();
    let history: Vec<u32> = (0..HISTORY_LEN)
        .map(|i| (noise(i) * 3000.0) as u32)
        .collect();
    let rules = Arc::new(Rules {
        processors: Processors {
            sequence_bias: vec![SequenceBias {
                ids: vec![50],
                bias: -1.0,
            }],
            repetition_penalty: 1.1,
            presence_penalty: 0.1,
            frequency_penalty: 0.1,
            no_repeat_ngram_size: 3,
            bad_words_ids: vec![vec![7, 8], vec![9]],
            ..Processors::NONE
        },
        prompt_len: PROMPT_LEN,
        max_new_tokens: HISTORY_LEN,
        ends: vec![2],
    });
    let sampled = DrawParams {
        temperature: 0.8,
        seed: 1,
        ..DrawParams::GREEDY
    };
    let nucleus = DrawParams {
        top_k: 50,
        top_p: 0.95,
        ..sampled
    };
    let plain = |params| Draw {
        params,
        ..Draw::GREEDY
    };
    let processed = |params| Draw {
        index: HISTORY_LEN - PROMPT_LEN as u32,
        suppressed_ids: &[2],
        rules: Some(&rules),
        history: &history,
        ..plain(params)
    };
    let typical = DrawParams {
        typical_p: 0.9,
        epsilon_cutoff: 3e-4,
        ..sampled
    };
    let mut group = criterion.benchmark_group("sample");
    for (name, draw) in [
        ("greedy", plain(DrawParams::GREEDY)),
        ("greedy, processors", processed(DrawParams::GREEDY)),
        ("temperature", plain(sampled)),
        ("top-k, top-p", plain(nucleus)),
        ("top-k, top-p, processors", processed(nucleus)),
        ("typical-p, epsilon", plain(typical)),
    ] {
        let mut sampler = Sampler::default();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let token = sampler.sample(black_box(&logits), black_box(&draw));
                token.expect("a finite row")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, choices);
criterion_main!(benches);
