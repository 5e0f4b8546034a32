//! Generation against what transformers gave: ids and scores of greedy decoding, of beam search and of
//! diverse beam search, with every processor, and what is left of a row before a draw.
//!
//! The plain reference of `kiln_tests::generation` runs over kiln's own logits here, and reproduces
//! every committed case. Random requests then compare kiln's engine with that reference.

use kiln_compiler::CompileOptions;
use kiln_runtime::{
    BeamParams, Choices, Completion, Engine, Event, LoadOptions, Outputs, Processors, Prompt,
    Request, SequenceBias,
    device::{CpuOptions, DeviceChoice},
};
use kiln_tests::{
    TestBundle, fixture,
    generation::{
        EarlyStopping, Parameters, Position, Rules, Sequence, generate, generate_by, process, warp,
    },
    repository,
};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use serde::Deserialize;
use serde_json::Value;
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs,
};

/// Largest deviation of a score, as a share of it.
const TOLERANCE: f32 = 1e-4;

/// What a score may deviate by in any case: biases can bring sums near to 0.
const SMALLEST_DEVIATION: f32 = 5e-6;

/// Distances of scores below which another implementation in f32 may choose otherwise.
const NEAR_TIE: f32 = 1e-4;

/// Cases of a file that may be other than expected, near-ties all of them.
const MOST_NEAR_TIES: usize = 6;

// ---- the model ----

/// A model as kiln computes it, which remembers the logits of every prefix that it has seen.
struct Oracle {
    engine: Engine,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
    rows: HashMap<Vec<u32>, Vec<f32>>,
    /// Outlives the engine, which maps its files.
    _bundle: TestBundle,
}

impl Oracle {
    fn new(model: &str) -> Oracle {
        let path = match model {
            "demo" => repository("models/demo"),
            tiny => fixture(tiny),
        };
        let bundle = TestBundle::compile(&path, &CompileOptions::default());
        let opened = kiln_bundle::Bundle::open(&bundle.path()).unwrap();
        let model = &opened.manifest().model;
        let options = LoadOptions {
            device: DeviceChoice::Cpu,
            cpu: CpuOptions {
                threads: Some(1),
                ..CpuOptions::default()
            },
            ..LoadOptions::default()
        };
        Oracle {
            vocab_size: model.vocab_size as usize,
            eos_token_ids: model.eos_token_ids.clone(),
            engine: Engine::load(&opened, &options).unwrap(),
            rows: HashMap::new(),
            _bundle: bundle,
        }
    }

    /// The logits after `ids`.
    fn logits(&mut self, ids: &[u32]) -> Vec<f32> {
        if let Some(row) = self.rows.get(ids) {
            return row.clone();
        }
        let found = self.complete(Request {
            max_new_tokens: Some(0),
            outputs: Outputs {
                logits: true,
                ..Outputs::default()
            },
            ..Request::new(Prompt::Ids(ids.to_vec()))
        });
        // One for every prefix.
        for (last, row) in found.choices[0]
            .logits
            .chunks_exact(self.vocab_size)
            .enumerate()
        {
            self.rows
                .entry(ids[..=last].to_vec())
                .or_insert_with(|| row.to_vec());
        }
        self.rows[ids].clone()
    }

    fn generate(&mut self, prompt: &[u32], parameters: &Parameters) -> Vec<Sequence> {
        generate(&mut |ids| self.logits(ids), prompt, parameters)
    }

    fn complete(&mut self, request: Request) -> Completion {
        self.engine.submit(request).unwrap();
        loop {
            for event in self.engine.step().unwrap() {
                match event {
                    Event::Finished(completion) => return *completion,
                    other => assert!(matches!(other, Event::Token(_)), "{other:?}"),
                }
            }
        }
    }
}

// ---- committed cases ----

#[derive(Deserialize)]
struct Case {
    name: String,
    /// Of a file that has cases of several models.
    #[serde(default)]
    model: String,
    request: Value,
    ids: Vec<Vec<u32>>,
    scores: Option<Vec<f32>>,
    #[serde(default = "unbounded")]
    min_gap: f32,
}

fn unbounded() -> f32 {
    f32::INFINITY
}

fn cases(file: &str) -> Vec<Case> {
    serde_json::from_value(expected(file)["cases"].take()).unwrap()
}

fn expected(file: &str) -> Value {
    let text = fs::read_to_string(fixture(&format!("expected/generation/{file}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

impl Case {
    /// What is other than expected, if anything.
    fn difference(&self, found: &[Sequence]) -> Option<String> {
        let ids: Vec<_> = found.iter().map(|sequence| &sequence.ids).collect();
        if ids != self.ids.iter().collect::<Vec<_>>() {
            return Some(format!("ids {ids:?} for {:?}", self.ids));
        }
        let Some(expected) = &self.scores else {
            return None;
        };
        let close = |(found, expected): (&Sequence, &f32)| {
            found.score.is_some_and(|score| {
                (score - expected).abs() <= TOLERANCE * expected.abs() + SMALLEST_DEVIATION
            })
        };
        let found_scores: Vec<_> = found.iter().map(|sequence| sequence.score).collect();
        let all_close = found.iter().zip(expected).all(close);
        (!all_close).then(|| format!("scores {found_scores:?} for {expected:?}"))
    }
}

/// Holds an implementation to cases. Where one may differ, being a near-tie, it is named.
fn check(cases: &[Case], mut generate: impl FnMut(&Case) -> Vec<Sequence>) {
    let mut near_ties = Vec::new();
    let mut wrong = Vec::new();
    for case in cases {
        if let Some(difference) = case.difference(&generate(case)) {
            let list = if case.min_gap < NEAR_TIE {
                &mut near_ties
            } else {
                &mut wrong
            };
            list.push(format!("{}, {}: {difference}", case.name, case.request));
        }
    }
    println!("{} of {} cases are near-ties", near_ties.len(), cases.len());
    for near_tie in &near_ties {
        println!("near-tie: {near_tie}");
    }
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
    assert!(near_ties.len() <= MOST_NEAR_TIES, "too many near-ties");
}

fn reference(oracle: &mut Oracle, case: &Case) -> Vec<Sequence> {
    let (prompt, parameters) =
        Parameters::of_request(&case.request, &oracle.eos_token_ids).unwrap();
    oracle.generate(&prompt, &parameters)
}

fn check_model(model: &str) {
    let mut oracle = Oracle::new(model);
    check(&cases(model), |case| reference(&mut oracle, case));
}

#[test]
fn opt() {
    check_model("tiny-opt");
}

#[test]
fn opt_post_norm() {
    check_model("tiny-opt-post");
}

#[test]
fn gpt2() {
    check_model("tiny-gpt2");
}

#[test]
fn demo() {
    check_model("demo");
}

#[test]
fn diverse_beams() {
    let mut oracles: HashMap<String, Oracle> = HashMap::new();
    check(&cases("groups"), |case| {
        let oracle = oracles
            .entry(case.model.clone())
            .or_insert_with(|| Oracle::new(&case.model));
        reference(oracle, case)
    });
}

/// The cases of tiny-opt that a reference by these rules gets wrong, near-ties aside.
fn caught(rules: Rules) -> Vec<String> {
    let mut oracle = Oracle::new("tiny-opt");
    let mut caught = Vec::new();
    for case in cases("tiny-opt") {
        let (prompt, parameters) =
            Parameters::of_request(&case.request, &oracle.eos_token_ids).unwrap();
        let found = generate_by(rules, &mut |ids| oracle.logits(ids), &prompt, &parameters);
        if case.difference(&found).is_some() && case.min_gap >= NEAR_TIE {
            caught.push(case.name);
        }
    }
    println!("{rules:?}: {} cases", caught.len());
    caught
}

#[test]
fn a_length_that_counts_the_prompt_is_caught() {
    let caught = caught(Rules {
        prompt_has_length: true,
        ..Rules::default()
    });
    assert!(caught.len() > 100, "{} cases", caught.len());
    assert!(caught.iter().all(|name| name.contains("beams")));
}

#[test]
fn too_few_candidates_for_two_ends_are_caught() {
    let caught = caught(Rules {
        candidates_per_beam: Some(2),
        ..Rules::default()
    });
    assert!(!caught.is_empty());
    assert!(
        caught
            .iter()
            .all(|name| name.contains("two") || name.contains("many")),
        "{caught:?}"
    );
}

// ---- rows before a draw ----

#[derive(Deserialize)]
struct Row {
    ids: Vec<u32>,
    prompt: usize,
    logits: Vec<f32>,
}

#[derive(Deserialize)]
struct Cut {
    row: usize,
    parameters: Value,
    kept: Vec<u32>,
    scores: Option<Vec<f32>>,
}

#[test]
fn cuts_before_a_draw() {
    let mut expected = expected("warpers");
    let rows: Vec<Row> = serde_json::from_value(expected["rows"].take()).unwrap();
    let cuts: Vec<Cut> = serde_json::from_value(expected["cases"].take()).unwrap();
    for Cut {
        row,
        parameters: text,
        kept,
        scores,
    } in cuts
    {
        let Row {
            ids,
            prompt,
            logits,
        } = &rows[row];
        let parameters: Parameters = serde_json::from_value(text.clone()).unwrap();
        let mut found = logits.clone();
        let (prompt, output) = ids.split_at(*prompt);
        process(&mut found, &Position::new(prompt, output), &parameters);
        warp(&mut found, &parameters);
        let found_kept: Vec<u32> = (0..)
            .zip(&found)
            .filter(|(_, score)| score.is_finite())
            .map(|(id, _)| id)
            .collect();
        assert_eq!(found_kept, kept, "row {row}, {text}");
        let scores = scores.unwrap_or_else(|| kept.iter().map(|&id| logits[id as usize]).collect());
        for (id, expected) in kept.into_iter().zip(scores) {
            let score = found[id as usize];
            assert!(
                (score - expected).abs() <= 1e-5 * expected.abs().max(1.0),
                "row {row}, {text}, id {id}: {score} for {expected}"
            );
        }
    }
}

/// kiln's own engine, on every case.
#[test]
fn the_engine_chooses_as_transformers_does() {
    for file in ["tiny-opt", "tiny-opt-post", "tiny-gpt2", "demo", "groups"] {
        let mut oracles: HashMap<String, Oracle> = HashMap::new();
        check(&cases(file), |case| {
            let model = if case.model.is_empty() {
                file
            } else {
                &case.model
            };
            let oracle = oracles
                .entry(model.to_owned())
                .or_insert_with(|| Oracle::new(model));
            let (prompt, parameters) =
                Parameters::of_request(&case.request, &oracle.eos_token_ids).unwrap();
            kiln_generate(oracle, &prompt, &parameters)
        });
    }
}

// ---- random requests ----

/// Runs a request on kiln's engine.
fn kiln_generate(oracle: &mut Oracle, prompt: &[u32], parameters: &Parameters) -> Vec<Sequence> {
    let completion = oracle.complete(engine_request(prompt, parameters));
    sequences(completion, parameters)
}

fn sequences(completion: Completion, parameters: &Parameters) -> Vec<Sequence> {
    let sequence = |choice: kiln_runtime::Choice| Sequence {
        ids: choice.ids,
        score: choice.score.filter(|_| parameters.num_beams > 1),
    };
    completion.choices.into_iter().map(sequence).collect()
}

/// The engine's request for a prompt.
fn engine_request(prompt: &[u32], parameters: &Parameters) -> Request {
    let bias = |(ids, bias): (Vec<u32>, f32)| SequenceBias { ids, bias };
    let single = parameters.logit_bias.iter().map(|(&id, &b)| (vec![id], b));
    // In transformers the last of equal sequences counts, in the engine they add up.
    let several: BTreeMap<_, _> = parameters.sequence_bias.iter().cloned().collect();
    let returned = parameters.num_return_sequences as u32;
    Request {
        beams: (parameters.num_beams > 1).then_some(BeamParams {
            num_beams: parameters.num_beams as u32,
            length_penalty: parameters.length_penalty,
            early_stopping: match parameters.early_stopping {
                EarlyStopping::Yes => kiln_runtime::EarlyStopping::Yes,
                EarlyStopping::No => kiln_runtime::EarlyStopping::No,
                EarlyStopping::Never => kiln_runtime::EarlyStopping::Never,
            },
            num_beam_groups: parameters.num_beam_groups as u32,
            diversity_penalty: parameters.diversity_penalty,
        }),
        choices: Choices {
            returned,
            generated: returned,
        },
        max_new_tokens: Some(parameters.max_new_tokens as u32),
        min_new_tokens: parameters.min_new_tokens as u32,
        min_length: parameters.min_length as u32,
        stop_token_ids: parameters.stop_token_ids.clone(),
        ignore_eos: parameters.ignore_eos,
        processors: Processors {
            sequence_bias: single.chain(several).map(bias).collect(),
            repetition_penalty: parameters.repetition_penalty,
            presence_penalty: parameters.presence_penalty,
            frequency_penalty: parameters.frequency_penalty,
            no_repeat_ngram_size: parameters.no_repeat_ngram_size as u32,
            bad_words_ids: parameters.bad_words_ids.clone(),
            suppress_tokens: parameters.suppress_tokens.clone(),
            renormalize_logits: parameters.renormalize_logits,
            forced_bos_token_id: parameters.forced_bos_token_id,
            forced_eos_token_id: parameters.forced_eos_token_id,
            exponential_decay_length_penalty: parameters
                .exponential_decay_length_penalty
                .map(|(start, factor)| (start as u32, factor)),
            ..Processors::NONE
        },
        ..Request::new(Prompt::Ids(prompt.to_vec()))
    }
}

/// Ids of the tiny models. The few lowest are frequent, so that processors find what they look for.
fn token() -> impl Strategy<Value = u32> + Clone {
    prop_oneof![4u32..12, 4u32..257]
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    vec(token(), 1..12)
}

/// How long sequences get.
fn lengths() -> impl Strategy<Value = Parameters> {
    (1usize..14, 0usize..8, vec(token(), 0..60), any::<bool>()).prop_map(
        |(max_new_tokens, min_new_tokens, stop_token_ids, ignore_eos)| Parameters {
            max_new_tokens,
            min_new_tokens: min_new_tokens.min(max_new_tokens),
            stop_token_ids,
            ignore_eos,
            ..Parameters::default()
        },
    )
}

/// Everything that decides without a draw.
fn any_parameters() -> impl Strategy<Value = Parameters> {
    let search = (
        1usize..5,
        0usize..4,
        prop_oneof![Just(0.0f32), 0.1f32..2.5],
        prop_oneof![
            Just(EarlyStopping::Yes),
            Just(EarlyStopping::No),
            Just(EarlyStopping::Never)
        ],
        1usize..3,
        0.1f32..1.5,
    );
    let penalties = (
        prop_oneof![Just(1.0f32), 0.6f32..2.0],
        prop_oneof![Just(0.0f32), -1.0f32..2.0],
        prop_oneof![Just(0.0f32), -1.0f32..2.0],
        proptest::collection::btree_map(token(), -5.0f32..5.0, 0..4),
    );
    let words = (
        0usize..4,
        vec((vec(token(), 1..4), -4.0f32..4.0), 0..4),
        vec(vec(token(), 1..3), 0..4),
        vec(token(), 0..4),
    );
    let ends = (
        0usize..12,
        proptest::option::of(token()),
        proptest::option::of((0usize..6, 0.8f32..1.6)),
        any::<bool>(),
    );
    (lengths(), search, penalties, words, ends).prop_map(
        |(base, search, penalties, words, ends)| {
            let num_beams = search.0;
            let in_groups = num_beams > 1 && num_beams % search.4 == 0;
            let num_beam_groups = if in_groups { search.4 } else { 1 };
            Parameters {
                num_beams,
                num_beam_groups,
                diversity_penalty: if num_beam_groups > 1 { search.5 } else { 0.0 },
                num_return_sequences: num_beams.saturating_sub(search.1).max(1),
                length_penalty: search.2,
                early_stopping: search.3,
                repetition_penalty: penalties.0,
                presence_penalty: penalties.1,
                frequency_penalty: penalties.2,
                logit_bias: penalties.3,
                no_repeat_ngram_size: words.0,
                sequence_bias: words.1,
                bad_words_ids: words.2,
                suppress_tokens: words.3,
                min_length: ends.0,
                forced_bos_token_id: ends.1,
                exponential_decay_length_penalty: ends.2,
                renormalize_logits: ends.3,
                ..base
            }
        },
    )
}

/// Runs `check` on the same random requests every time: a near-tie must not come and go.
fn for_requests(
    cases: u32,
    parameters: impl Strategy<Value = Parameters>,
    check: impl Fn(&mut Oracle, &[u32], Parameters) -> Result<(), TestCaseError>,
) {
    let oracle = RefCell::new(Oracle::new("tiny-opt"));
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&(prompt(), parameters), |(prompt, mut parameters)| {
        let mut oracle = oracle.borrow_mut();
        parameters.eos_token_ids = oracle.eos_token_ids.clone();
        check(&mut oracle, &prompt, parameters)
    });
    assert!(result.is_ok(), "{}", result.unwrap_err());
}

/// A beam search's choices hang on sums of many terms; those of engine and reference differ in their
/// last bits.
#[test]
fn the_engine_does_what_the_reference_does() {
    for_requests(400, any_parameters(), |oracle, prompt, mut parameters| {
        // What the engine refuses to be asked.
        let longest = prompt.len() + parameters.max_new_tokens;
        parameters.min_length = parameters.min_length.min(longest);
        let forced = parameters.forced_bos_token_id;
        parameters.suppress_tokens.retain(|&id| Some(id) != forced);
        let expected = oracle.generate(prompt, &parameters);
        let found = kiln_generate(oracle, prompt, &parameters);
        let ids = |sequences: &[Sequence]| -> Vec<Vec<u32>> {
            sequences
                .iter()
                .map(|sequence| sequence.ids.clone())
                .collect()
        };
        prop_assert_eq!(ids(&found), ids(&expected));
        for (found, expected) in found.iter().zip(&expected) {
            let (Some(found), Some(expected)) = (found.score, expected.score) else {
                prop_assert_eq!(found.score, expected.score);
                continue;
            };
            let deviation = (found - expected).abs();
            prop_assert!(
                deviation <= TOLERANCE * expected.abs() + SMALLEST_DEVIATION,
                "{found} for {expected}"
            );
        }
        Ok(())
    });
}

/// What holds of every request's sequences, whatever the parameters.
#[test]
fn sequences_keep_what_was_asked_for() {
    for_requests(64, any_parameters(), |oracle, prompt, parameters| {
        let sequences = oracle.generate(prompt, &parameters);
        prop_assert_eq!(sequences.len(), parameters.num_return_sequences);
        let ends = parameters.ends();
        // Beams that only fill a place, or go on from what has ended, have scores of -1e9.
        let is_sound = |sequence: &&Sequence| sequence.score.is_none_or(|score| score > -1e6);
        for Sequence { ids, score } in sequences.iter().filter(is_sound) {
            let (last, before) = ids.split_last().unwrap();
            prop_assert!(!before.iter().any(|id| ends.contains(id)));
            prop_assert!(
                ids.len() == parameters.max_new_tokens || ends.contains(last),
                "{:?} stops early",
                ids
            );
            // The score follows from the ids, but for what other groups take.
            let Some(score) = score.filter(|_| parameters.num_beam_groups == 1) else {
                continue;
            };
            let mut sum = 0.0;
            for (length, &id) in ids.iter().enumerate() {
                let position = Position::new(prompt, &ids[..length]);
                let mut row = oracle.logits(&[prompt, &ids[..length]].concat());
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = row.iter().map(|logit| (logit - max).exp()).sum();
                row.iter_mut().for_each(|logit| *logit -= max + total.ln());
                process(&mut row, &position, &parameters);
                if parameters.renormalize_logits {
                    let total: f32 = row.iter().map(|score| score.exp()).sum();
                    row.iter_mut().for_each(|score| *score -= total.ln());
                }
                sum += row[id as usize];
            }
            let expected = sum / (ids.len() as f32).powf(parameters.length_penalty);
            prop_assert!(
                (score - expected).abs() <= 1e-4 * expected.abs().max(1.0),
                "{score} for {expected}"
            );
        }
        let scores: Vec<_> = sequences.iter().map(|sequence| sequence.score).collect();
        prop_assert!(scores.is_sorted_by(|a, b| a >= b), "{:?}", scores);
        Ok(())
    });
}
