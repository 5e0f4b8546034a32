//! What beams cost beside as many greedy sequences, and what they hold of the KV cache:
//! `cargo bench -p kiln-benches --bench beams -- BUNDLE`, for a bundle of batch 8 and more than a thousand
//! positions.
//!
//! The two are measured in turn, the medians of several rounds compared. Prompts are in the cache when a
//! round begins, so that all eight sequences decode together from the first step on.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark stops where a program would report"
)]

use kiln_bundle::{BLOCK_TOKENS, Bundle};
use kiln_runtime::{BeamParams, Engine, Event, LoadOptions, Prompt, Request, blocks_for};
use std::path::Path;

const BEAMS: u32 = 8;
const PROMPT_LEN: u32 = 1000;
const NEW_TOKENS: u32 = 25;
const ROUNDS: usize = 5;

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let path = arguments.next().expect("the path of a bundle");
    let bundle = Bundle::open(Path::new(&path)).expect("a bundle");
    let load = || Engine::load(&bundle, &LoadOptions::default()).expect("an engine");

    let mut engine = load();
    run(&mut engine, vec![searched()]);
    let held = engine.stats().most_kv_blocks;
    let one = blocks_for(PROMPT_LEN as usize);
    let whole = PROMPT_LEN as usize / BLOCK_TOKENS;
    let generated = BEAMS as usize * (blocks_for((PROMPT_LEN + NEW_TOKENS) as usize) - whole);
    println!("KV cache, {BEAMS} beams after {PROMPT_LEN} tokens, {NEW_TOKENS} new ones");
    println!("  blocks held at most            {held}");
    println!("  one sequence's prompt          {one}");
    println!("  the beams' own at most         {generated}");
    let bound = 1.2 * one as f64 + generated as f64;
    println!("  1.2 prompts and the beams' own {bound:.1}");

    // Prefilled once, and cached from then on.
    run(&mut engine, greedy());
    let (mut beam_ms, mut greedy_ms) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        greedy_ms.push(run(&mut engine, greedy()));
        beam_ms.push(run(&mut engine, vec![searched()]));
    }
    let (beams, greedy) = (median(&mut beam_ms), median(&mut greedy_ms));
    println!("decode step, median of {ROUNDS} rounds");
    println!("  {BEAMS} greedy sequences            {greedy:.3} ms");
    println!("  {BEAMS} beams                       {beams:.3} ms");
    println!("  beams over greedy              {:.3}", beams / greedy);
}

fn prompt(salt: u32) -> Prompt {
    Prompt::Ids(
        (0..PROMPT_LEN)
            .map(|t| 3 + (t * 31 + salt * 17) % 200)
            .collect(),
    )
}

fn greedy() -> Vec<Request> {
    let request = |salt| Request {
        max_new_tokens: Some(NEW_TOKENS),
        ignore_eos: true,
        ..Request::new(prompt(salt))
    };
    (0..BEAMS).map(request).collect()
}

fn searched() -> Request {
    Request {
        beams: Some(BeamParams::new(BEAMS)),
        max_new_tokens: Some(NEW_TOKENS),
        ignore_eos: true,
        ..Request::new(prompt(0))
    }
}

/// Milliseconds of a decode step.
fn run(engine: &mut Engine, requests: Vec<Request>) -> f64 {
    let before = engine.stats().decode;
    for request in requests {
        engine.submit(request).expect("a sound request");
    }
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            assert!(!matches!(event, Event::Failed { .. }), "{event:?}");
        }
    }
    let after = engine.stats().decode;
    (after.time - before.time).as_secs_f64() * 1e3 / (after.steps - before.steps) as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
