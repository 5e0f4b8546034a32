//! The conformance suite: what every device has to do, whatever it is made of.
//!
//! [`accuracy`] gives a device and the CPU the same steps and compares logits, hidden states and chosen
//! tokens: every head size, ragged prompts of odd lengths, chunks with a past, batches of 1 to 9, KV
//! lengths up to beyond one bucket, block tables out of order, blocks that are copied. [`crowd`] does so with as many sequences
//! as a step takes. [`invariance`] asks a device alone for the same rows in different
//! company and compares bytes. [`choices`] asks for tokens and continuations by all kinds of processors, and
//! judges them by the device's own logits.

use kiln_bundle::{Bundle, DType, Phase, WeightFormat};
use kiln_compiler::{CompileOptions, Model, Silent, TargetChoice, compile};
use kiln_models::{ModelConfig, builtin};
use kiln_runtime::{
    BeamDraw, BlockCopy, Continuation, Draw, DrawParams, Processors, Rules, Sampler, SequenceBias,
    Taken, blocks_for,
    device::{Device, DeviceError, LogitRows, Observe, SequenceStep, Step, StepOutput, Tokens},
};
use std::{path::Path, sync::Arc};

/// A small model that stands for a family of shapes.
pub struct Subject {
    /// For reports.
    pub name: &'static str,
    /// Its shape.
    pub config: ModelConfig,
    /// Most sequences in a step.
    pub max_batch: u32,
    /// How matrices and the LM head are stored: as numbers of the element type where absent.
    pub weights: Option<(&'static str, &'static str)>,
}

/// Positions of every subject.
const MAX_SEQ_LEN: u32 = 640;
/// Sequences in a step that [`accuracy`] needs.
const MAX_BATCH: u32 = 9;
/// More sequences in a step than kernels for few rows take.
pub const CROWD: u32 = 70;

/// The subjects: head sizes of 64, 80 and 128, OPT with norms before and behind the blocks, GPT-2, and
/// some of them as integers, whose widths are no multiples of a group.
pub fn subjects() -> Vec<Subject> {
    let subject = |name, model: &str, heads: usize, head_dim: usize, max_batch: u32| {
        let config = builtin(model)?;
        let hidden_size = heads * head_dim;
        // opt-350m embeds in half of its width.
        let embed_size = hidden_size * config.embed_size / config.hidden_size;
        Some(Subject {
            name,
            config: ModelConfig {
                vocab_size: 301,
                hidden_size,
                embed_size,
                layers: 2,
                heads,
                ffn_size: 2 * hidden_size,
                max_positions: MAX_SEQ_LEN as usize,
                attention_scale: 1.0 / (head_dim as f32).sqrt(),
                bos_token_id: None,
                eos_token_ids: vec![],
                pad_token_id: None,
                ..config
            },
            max_batch,
            weights: None,
        })
    };
    // Wide enough that a warp loads more weights than it has under way.
    let integers = |name, like: Option<Subject>, ffn_size, weights, lm_head| {
        let like = like?;
        Some(Subject {
            name,
            config: ModelConfig {
                ffn_size,
                ..like.config
            },
            weights: Some((weights, lm_head)),
            ..like
        })
    };
    [
        subject("opt-d64", "opt-125m", 3, 64, CROWD),
        subject("opt-d80", "opt-2.7b", 2, 80, MAX_BATCH),
        subject("opt-d128", "opt-6.7b", 2, 128, MAX_BATCH),
        subject("opt-post-d64", "opt-350m", 2, 64, MAX_BATCH),
        subject("gpt2-d64", "gpt2", 3, 64, MAX_BATCH),
        integers(
            "opt-int8",
            subject("", "opt-125m", 3, 64, CROWD),
            2200,
            "int8",
            "int8",
        ),
        integers(
            "opt-int4",
            subject("", "opt-2.7b", 2, 80, MAX_BATCH),
            1192,
            "int4:g64",
            "int8",
        ),
        integers(
            "opt-post-int8",
            subject("", "opt-350m", 2, 64, MAX_BATCH),
            2200,
            "int8:g96",
            "int8:g32",
        ),
        integers(
            "gpt2-int4",
            subject("", "gpt2", 3, 64, CROWD),
            4392,
            "int4:g160",
            "int4:g32",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl Subject {
    /// Compiles it with random weights.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile(
        &self,
        output: &Path,
        dtype: DType,
        targets: Vec<TargetChoice>,
        emit_only: bool,
    ) -> anyhow::Result<()> {
        let (weights, lm_head) = match self.weights {
            None => (WeightFormat::of(dtype), None),
            Some((weights, lm_head)) => (Some(weights.parse()?), Some(lm_head.parse()?)),
        };
        let options = CompileOptions {
            model_name: self.name.to_owned(),
            targets,
            dtype: Some(dtype),
            weights,
            lm_head,
            emit_only,
            max_batch: self.max_batch,
            max_seq_len: Some(MAX_SEQ_LEN),
            // No multiples of a kernel's tile, which then ends where its buffers end.
            prefill_buckets: vec![16, 63, 127, 310],
            decode_batch: vec![1, 4, 8],
            decode_kv: vec![256],
            ..CompileOptions::default()
        };
        let model = Model::dummy(self.config.clone(), 1, None);
        compile(model, output, &options, &Silent)?;
        Ok(())
    }
}

/// The outcome of a case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which case.
    pub case: String,
    /// Whether the device did what it has to.
    pub passed: bool,
    /// The figures.
    pub detail: String,
}

/// Largest deviation from the CPU that passes, as a share of the largest value. The CPU computes in
/// f32 with the same weights and KV cache type; a GPU rounds what its layers hand on.
pub const fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 | DType::I32 | DType::U8 => 1e-4,
        DType::F16 => 4e-3,
        DType::Bf16 => 3e-2,
    }
}

/// A sequence as steps are made for it.
#[derive(Clone)]
struct Sequence {
    slot: u32,
    ids: Vec<u32>,
    past: usize,
    block_table: Vec<u32>,
}

impl Sequence {
    /// Gives it other blocks in the place of those of its past: the first two change places through a
    /// new one, all others are copied to new ones.
    fn moved(&mut self, mut new: impl FnMut() -> u32) -> Vec<BlockCopy> {
        let past = blocks_for(self.past);
        let copy = |from, to| BlockCopy { from, to };
        match &mut self.block_table[..past] {
            [first, second, others @ ..] => {
                let between = new();
                let mut copies = vec![
                    copy(*first, between),
                    copy(*second, *first),
                    copy(between, *second),
                ];
                std::mem::swap(first, second);
                for block in others {
                    let to = new();
                    copies.push(copy(std::mem::replace(block, to), to));
                }
                copies
            }
            few => {
                let copies = few.iter_mut().map(|block| {
                    let to = new();
                    copy(std::mem::replace(block, to), to)
                });
                copies.collect()
            }
        }
    }
}

/// Blocks in an order that jumps about: 7 has no factor in common with most sizes, and where it has,
/// the walk still never takes a block twice within a table's length.
fn block(index: u32, kv_blocks: u32) -> u32 {
    let stride = if kv_blocks.is_multiple_of(7) { 11 } else { 7 };
    index * stride % kv_blocks
}

/// What a sequence does in a step.
struct Part {
    sequence: usize,
    tokens: usize,
    rows: LogitRows,
    draw: Option<(DrawParams, Vec<u32>)>,
    /// Whether its past is copied to other blocks first.
    moves: bool,
}

/// Sequences, and the blocks that are left for more.
struct World {
    vocab_size: u32,
    slots: u32,
    kv_blocks: u32,
    taken: u32,
    sequences: Vec<Sequence>,
}

impl World {
    fn new(device: &dyn Device, vocab_size: u32) -> World {
        World {
            vocab_size,
            slots: device.facts().slots,
            kv_blocks: device.facts().kv_blocks,
            taken: 0,
            sequences: vec![],
        }
    }

    /// Adds a sequence that will grow to `len`; `like` fixes its tokens.
    fn add(&mut self, len: usize, like: u32) -> usize {
        let slot = self.sequences.len() as u32 % self.slots;
        let ids = (0..len as u32).map(|i| (i * i * 31 + i * 7 + like * 53 + 5) % self.vocab_size);
        let blocks = blocks_for(len) as u32;
        let block_table = (self.taken..self.taken + blocks)
            .map(|index| block(index, self.kv_blocks))
            .collect();
        self.taken += blocks;
        self.sequences.push(Sequence {
            slot,
            ids: ids.collect(),
            past: 0,
            block_table,
        });
        self.sequences.len() - 1
    }

    /// Makes a step of these parts; the sequences move on.
    fn step(&mut self, device: &dyn Device, phase: Phase, parts: &[Part]) -> Step {
        let mut step = Step::default();
        for part in parts {
            let (kv_blocks, taken) = (self.kv_blocks, &mut self.taken);
            let sequence = &mut self.sequences[part.sequence];
            let end = sequence.past + part.tokens;
            if part.moves {
                step.copies.extend(sequence.moved(|| {
                    *taken += 1;
                    block(*taken - 1, kv_blocks)
                }));
            }
            step.push(&SequenceStep {
                slot: sequence.slot,
                tokens: Tokens::Ids(&sequence.ids[sequence.past..end]),
                past_len: sequence.past as u32,
                block_table: &sequence.block_table[..blocks_for(end)],
                logit_rows: part.rows,
                draw: part.draw.as_ref().map(|(params, suppressed_ids)| Draw {
                    params: *params,
                    index: end as u32,
                    suppressed_ids,
                    ..Draw::GREEDY
                }),
            });
            sequence.past = end;
        }
        step.observe = Observe {
            logits: true,
            hidden_states: true,
            ..Observe::default()
        };
        step.executable = executable(device, phase, &step);
        step
    }
}

/// The smallest executable for a step.
fn executable(device: &dyn Device, phase: Phase, step: &Step) -> usize {
    let extent = step.extent();
    let fits = |e: &&kiln_bundle::Executable| e.phase == phase && extent.fits(&e.bounds);
    let smallest = device
        .executables()
        .iter()
        .enumerate()
        .filter(|(_, e)| fits(e))
        .min_by_key(|(_, e)| (e.bounds.max_tokens, e.bounds.max_kv_len));
    smallest.map_or(usize::MAX, |(index, _)| index)
}

fn bits(rows: &[f32]) -> Vec<u32> {
    rows.iter().map(|x| x.to_bits()).collect()
}

fn run(device: &mut dyn Device, step: &Step) -> Result<StepOutput, DeviceError> {
    let id = device.submit(step)?;
    device.collect(id)
}

fn part(sequence: usize, tokens: usize, rows: LogitRows) -> Part {
    Part {
        sequence,
        tokens,
        rows,
        draw: None,
        moves: false,
    }
}

/// Largest difference, as a share of the largest expected value.
fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    match (found.len() == expected.len(), expected.is_empty()) {
        (true, true) => 0.0,
        (true, false) => crate::deviation(found, expected),
        (false, _) => f32::INFINITY,
    }
}

/// Ways to choose a token, one a step in turn.
fn draws() -> Vec<(DrawParams, Vec<u32>)> {
    let free = DrawParams {
        temperature: 1.0,
        seed: 0x1234_5678_9abc_def0,
        ..DrawParams::GREEDY
    };
    vec![
        (DrawParams::GREEDY, vec![]),
        (DrawParams::GREEDY, vec![3, 250, 7]),
        (free, vec![]),
        (
            DrawParams {
                temperature: 0.7,
                top_k: 20,
                ..free
            },
            vec![1],
        ),
        (DrawParams { top_p: 0.8, ..free }, vec![]),
        (DrawParams { min_p: 0.4, ..free }, vec![]),
        (
            DrawParams {
                temperature: 1.7,
                top_k: 50,
                top_p: 0.5,
                min_p: 0.01,
                seed: 7,
                ..free
            },
            vec![2, 9],
        ),
        // Beyond what the CUDA kernel chooses.
        (
            DrawParams {
                typical_p: 0.6,
                epsilon_cutoff: 0.001,
                eta_cutoff: 0.002,
                ..free
            },
            vec![2, 9],
        ),
        (DrawParams { top_k: 1, ..free }, vec![]),
    ]
}

/// Holds a device against the CPU, step by step.
///
/// # Errors
/// A device that cannot run a step.
pub fn accuracy(
    reference: &mut dyn Device,
    device: &mut dyn Device,
    bundle: &Bundle,
    dtype: DType,
) -> Result<Vec<Outcome>, DeviceError> {
    let mut world = World::new(device, bundle.manifest().model.vocab_size);
    let lens = [1, 13, 17, 33, 201, 300, 5, 64, 63];
    let sequences: Vec<usize> = (0..)
        .zip(lens)
        .map(|(i, len)| world.add(len + 12, i))
        .collect();
    let all = |s: usize| part(sequences[s], lens[s], LogitRows::All);
    let chunk = |tokens, rows| vec![part(sequences[4], tokens, rows)];
    let mut script: Script = vec![
        ("prefill of one token".into(), Phase::Prefill, vec![all(0)]),
        (
            "prefill of 13, 17 and 33 tokens".into(),
            Phase::Prefill,
            vec![all(1), all(2), all(3)],
        ),
        (
            "first chunk of 100".into(),
            Phase::Prefill,
            chunk(100, LogitRows::Last),
        ),
        (
            "next chunk of 30".into(),
            Phase::Prefill,
            chunk(30, LogitRows::All),
        ),
        (
            "next chunk of 1".into(),
            Phase::Prefill,
            chunk(1, LogitRows::None),
        ),
        (
            "last chunk of 70".into(),
            Phase::Prefill,
            chunk(70, LogitRows::Last),
        ),
        (
            "prefill of 300 and 5 tokens".into(),
            Phase::Prefill,
            vec![part(sequences[5], 300, LogitRows::Last), all(6)],
        ),
        (
            "prefill of 64 and 63 tokens".into(),
            Phase::Prefill,
            vec![
                part(sequences[7], 64, LogitRows::Last),
                part(sequences[8], 63, LogitRows::All),
            ],
        ),
    ];
    // Longer ones join as the batch grows, so that every KV bucket is met.
    let order = [0, 1, 6, 3, 8, 7, 4, 2, 5];
    let draws = draws();
    for batch in 1..=order.len() {
        let parts = order[..batch].iter().enumerate().map(|(at, &s)| Part {
            draw: Some(draws[(batch + at) % draws.len()].clone()),
            moves: (batch + at) % 3 == 0,
            ..part(sequences[s], 1, LogitRows::Last)
        });
        script.push((format!("decode of {batch}"), Phase::Decode, parts.collect()));
    }
    compare(reference, device, dtype, world, &script)
}

/// As [`accuracy`], with as many sequences as a step takes: from [`CROWD`] on, the LM head too is a
/// product of many rows.
///
/// # Errors
/// A device that cannot run a step.
pub fn crowd(
    reference: &mut dyn Device,
    device: &mut dyn Device,
    bundle: &Bundle,
    dtype: DType,
) -> Result<Vec<Outcome>, DeviceError> {
    let mut world = World::new(device, bundle.manifest().model.vocab_size);
    let all: Vec<usize> = (0..world.slots).map(|i| world.add(8, i)).collect();
    let draws = draws();
    let parts = || {
        let parts = all.iter().map(|&s| Part {
            draw: Some(draws[s % draws.len()].clone()),
            ..part(s, 1, LogitRows::Last)
        });
        parts.collect::<Vec<Part>>()
    };
    let script: Script = vec![
        (
            format!("prefill of {} prompts", all.len()),
            Phase::Prefill,
            parts(),
        ),
        (format!("decode of {}", all.len()), Phase::Decode, parts()),
    ];
    compare(reference, device, dtype, world, &script)
}

/// The same step, made once more, of which no hidden states are to be seen.
fn unobserved(device: &dyn Device, phase: Phase, step: &Step) -> Step {
    let mut step = step.clone();
    step.observe.hidden_states = false;
    // These blocks have moved.
    step.copies.clear();
    step.executable = executable(device, phase, &step);
    step
}

/// Steps: what each is, and its parts.
type Script = Vec<(String, Phase, Vec<Part>)>;

fn compare(
    reference: &mut dyn Device,
    device: &mut dyn Device,
    dtype: DType,
    mut world: World,
    script: &Script,
) -> Result<Vec<Outcome>, DeviceError> {
    let vocab_size = world.vocab_size;
    let mut outcomes = vec![];
    let mut sampler = Sampler::default();
    for (case, phase, parts) in script {
        let step = world.step(device, *phase, parts);
        let expected = run(reference, &step)?;
        let found = run(device, &step)?;
        let logits = deviation(&found.logits, &expected.logits);
        let hidden = deviation(&found.hidden_states, &expected.hidden_states);
        // The choice is judged by the device's own logits.
        let mut rows = found.logits.chunks_exact(vocab_size as usize);
        let chosen: Vec<Option<u32>> = step
            .sequences()
            .filter_map(|sequence| {
                let count = sequence.logit_rows.count(sequence.tokens.len());
                let row = count.checked_sub(1).and_then(|last| rows.nth(last));
                sequence.draw.map(|draw| sampler.sample(row?, &draw))
            })
            .collect();
        let tokens = chosen == found.tokens;
        let unobserved = unobserved(device, *phase, &step);
        let alike = unobserved.executable == step.executable
            || bits(&run(device, &unobserved)?.logits) == bits(&found.logits);
        let most = tolerance(dtype);
        outcomes.push(Outcome {
            case: case.clone(),
            passed: logits <= most && hidden <= most && tokens && alike,
            detail: if !tokens {
                format!(
                    "chose {:?} where its logits ask for {chosen:?}",
                    found.tokens
                )
            } else if !alike {
                "has other logits when its hidden states are not to be seen".to_owned()
            } else {
                format!(
                    "logits deviate by {logits:.1e}, hidden states by {hidden:.1e} of {most:.0e}"
                )
            },
        });
    }
    Ok(outcomes)
}

/// Cases of [`choices`] that between them ask for everything.
pub const CHOICES: u32 = 10;
/// Tokens of every prompt of [`choices`], and tokens chosen after each.
const CHOICE_PROMPT: usize = 20;
const CHOICE_ROUNDS: usize = 8;

/// What processors ask of a sequence: a choice of them by the bits of `case`, about the tokens that it
/// has.
fn rules(case: u32, prompt: &[u32]) -> Rules {
    let on = |bit: u32| case >> bit & 1 == 1;
    let ids = |some: &[u32]| some.to_vec();
    let bias = |ids: Vec<u32>, bias| SequenceBias { ids, bias };
    let last = prompt.len() - 1;
    let mut processors = Processors::NONE;
    if on(0) {
        processors.repetition_penalty = if on(1) { 1.3 } else { 0.7 };
    }
    if on(1) {
        processors.frequency_penalty = 0.07;
    }
    if on(2) {
        processors.presence_penalty = if on(0) { -0.2 } else { 0.3 };
    }
    if on(3) {
        processors.sequence_bias = vec![
            bias(ids(&[9]), 0.11),
            bias(ids(&[prompt[last - 1], prompt[last], 70]), 0.3),
            bias(ids(&[5]), -0.07),
            bias(ids(&[9]), 0.013),
            // Never completed.
            bias(ids(&[299, 299, 9]), 5.0),
            bias(ids(&[prompt[0], 9]), -0.021),
        ];
        if on(6) {
            // Their sum is no number.
            let largest = [1e38, f32::MAX].map(|largest| bias(ids(&[300]), largest));
            processors.sequence_bias.extend(largest);
        }
    }
    if on(4) {
        processors.no_repeat_ngram_size = if on(0) { 1 } else { 2 };
    }
    if on(5) {
        processors.bad_words_ids = vec![
            ids(&[17]),
            ids(&[2]),
            ids(&[prompt[last], 33]),
            ids(&[prompt[3], prompt[4], prompt[5]]),
        ];
    }
    if on(6) {
        processors.exponential_decay_length_penalty = Some((2, 1.7));
    }
    Rules {
        processors,
        prompt_len: prompt.len(),
        max_new_tokens: CHOICE_ROUNDS as u32,
        ends: vec![2, 50],
    }
}

/// Whether two rankings agree: in their scores up to rounding, and in whose those are. Equals, which
/// tokens that cannot be chosen are, stand in their order.
fn same_ranking(found: &[Continuation], expected: &[Continuation]) -> bool {
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 2e-6 * a.abs().max(1.0);
    let last = expected.last().map_or(0.0, |last| last.score);
    let score_of = |id: u32| {
        let own = expected.iter().find(|continuation| continuation.id == id);
        own.map_or(last, |continuation| continuation.score)
    };
    found.len() == expected.len()
        && found.iter().zip(expected).all(|(found, expected)| {
            let in_place = found.id == expected.id || found.score > f32::NEG_INFINITY;
            in_place && close(found.score, expected.score) && close(found.score, score_of(found.id))
        })
}

/// Holds what a device chooses by processors, and the continuations that it ranks, against the choices
/// of the CPU by the same logits. Sequences go on with what was chosen, which some are fed by value and
/// some by their slots. `case` chooses among processors.
///
/// # Errors
/// A device that cannot run a step.
pub fn choices(
    device: &mut dyn Device,
    bundle: &Bundle,
    case: u32,
) -> Result<Vec<Outcome>, DeviceError> {
    let vocab_size = bundle.manifest().model.vocab_size;
    let mut world = World::new(device, vocab_size);
    let all: Vec<usize> = (0..world.slots.min(MAX_BATCH))
        .map(|like| world.add(CHOICE_PROMPT + CHOICE_ROUNDS, like))
        .collect();
    let sequences: Vec<Sequence> = all.iter().map(|&s| world.sequences[s].clone()).collect();
    // Few different tokens, so that they repeat.
    let prompt = |s: &Sequence| s.ids[..CHOICE_PROMPT].iter().map(|id| id % 11).collect();
    let mut histories: Vec<Vec<u32>> = sequences.iter().map(prompt).collect();
    let rules: Vec<Arc<Rules>> = (0..)
        .zip(&histories)
        .map(|(i, history)| Arc::new(rules(case * 37 + i * 13 + 1, history)))
        .collect();
    // So many that some are among the best of a beam, and one that is no token.
    let suppressed: Vec<u32> = (100..160).chain([8, 50, 400]).collect();
    let mut sampler = Sampler::default();
    let mut outcomes = vec![];
    for round in 0..CHOICE_ROUNDS {
        let draw = |i: usize| Draw {
            params: DrawParams {
                temperature: [0.0, 0.0, 0.9][i % 3],
                top_k: [0, 40][i % 2],
                seed: 5,
                // One that a kernel does not make, between others that it does.
                epsilon_cutoff: if i == 2 && round == 3 { 1e-4 } else { 0.0 },
                ..DrawParams::GREEDY
            },
            index: round as u32,
            suppressed_ids: [&[][..], &suppressed][(i + round) % 2],
            rules: Some(&rules[i]),
            history: &histories[i],
            // Every third sequence is a beam, which is not sampled.
            beam: (i % 3 == 1).then(|| BeamDraw {
                beam: 0,
                score: -0.5 * round as f32,
                count: [1, 7, 256][(i + round) % 3],
                least_kept: 1,
            }),
        };
        let phase = match round {
            0 => Phase::Prefill,
            _ => Phase::Decode,
        };
        let mut step = Step::default();
        for (i, sequence) in sequences.iter().enumerate() {
            let past = match round {
                0 => 0,
                _ => histories[i].len() - 1,
            };
            let draw = draw(i);
            let by_value = round == 0 || draw.beam.is_some();
            let keeps = !by_value && device.keeps_histories();
            step.push(&SequenceStep {
                slot: sequence.slot,
                tokens: match by_value {
                    true => Tokens::Ids(&histories[i][past..]),
                    false => Tokens::LastSampled,
                },
                past_len: past as u32,
                block_table: &sequence.block_table[..blocks_for(histories[i].len())],
                logit_rows: LogitRows::Last,
                draw: Some(Draw {
                    history: if keeps { &[] } else { draw.history },
                    ..draw
                }),
            });
        }
        step.observe.logits = true;
        step.executable = executable(device, phase, &step);
        let found = run(device, &step)?;
        let (mut tokens, mut ranked) = (found.tokens.iter(), found.continuations.iter());
        let mut wrong = None;
        let mut next = vec![];
        for (i, row) in found.logits.chunks_exact(vocab_size as usize).enumerate() {
            let draw = draw(i);
            let right = match &draw.beam {
                None => {
                    let expected = sampler.sample(row, &draw);
                    next.push(expected.unwrap_or(0));
                    tokens.next() == Some(&expected)
                }
                Some(beam) => {
                    let expected = sampler.continuations(row, &draw, beam, &Taken::default());
                    next.push(expected[0].id);
                    ranked
                        .next()
                        .is_some_and(|found| same_ranking(found, &expected))
                }
            };
            if !right {
                wrong.get_or_insert(format!("sequence {i}, {:?}", rules[i].processors));
            }
        }
        for (history, id) in histories.iter_mut().zip(next) {
            history.push(id);
        }
        outcomes.push(Outcome {
            case: format!("choices {case}, token {round}"),
            passed: wrong.is_none(),
            detail: wrong.unwrap_or_else(|| format!("{} draws", sequences.len())),
        });
    }
    Ok(outcomes)
}

/// Asks a device for the same rows in different company.
///
/// # Errors
/// A device that cannot run a step.
pub fn invariance(device: &mut dyn Device, bundle: &Bundle) -> Result<Vec<Outcome>, DeviceError> {
    let vocab_size = bundle.manifest().model.vocab_size;
    let mut outcomes = vec![];
    let mut same = |case: &str, rows: [&[f32]; 2]| {
        let passed = !rows[0].is_empty() && bits(rows[0]) == bits(rows[1]);
        outcomes.push(Outcome {
            case: case.to_owned(),
            passed,
            detail: if passed {
                format!("{} values, equal bytes", rows[0].len())
            } else {
                format!("they deviate by {:.1e}", deviation(rows[0], rows[1]))
            },
        });
    };
    let lens = [7, 20, 33];

    // Together in one step, then each alone, in other slots and blocks.
    let mut world = World::new(device, vocab_size);
    let together: Vec<usize> = (0..)
        .zip(lens)
        .map(|(i, len)| world.add(len + 4, i))
        .collect();
    let parts: Vec<Part> = together
        .iter()
        .zip(lens)
        .map(|(&s, len)| part(s, len, LogitRows::Last))
        .collect();
    let step = world.step(device, Phase::Prefill, &parts);
    let prefilled = run(device, &step)?;
    let parts: Vec<Part> = together
        .iter()
        .map(|&s| part(s, 1, LogitRows::Last))
        .collect();
    let step = world.step(device, Phase::Decode, &parts);
    let decoded = run(device, &step)?;
    let v = vocab_size as usize;
    for (i, len) in lens.into_iter().enumerate().rev() {
        let alone = world.add(len + 4, i as u32);
        let step = world.step(device, Phase::Prefill, &[part(alone, len, LogitRows::Last)]);
        let output = run(device, &step)?;
        let case = format!("prompt of {len}: alone and with others");
        same(&case, [&output.logits, &prefilled.logits[i * v..][..v]]);
        let step = world.step(device, Phase::Decode, &[part(alone, 1, LogitRows::Last)]);
        let output = run(device, &step)?;
        let case = format!("decode after {len}: alone and with others");
        same(&case, [&output.logits, &decoded.logits[i * v..][..v]]);
    }

    // One prompt whole, and in chunks that go through other buckets.
    let whole = world.add(110, 9);
    let step = world.step(device, Phase::Prefill, &[part(whole, 101, LogitRows::Last)]);
    let expected = run(device, &step)?;
    let pieces = world.add(110, 9);
    let mut last = StepOutput::default();
    for tokens in [7, 64, 29, 1] {
        let step = world.step(
            device,
            Phase::Prefill,
            &[part(pieces, tokens, LogitRows::Last)],
        );
        last = run(device, &step)?;
    }
    same(
        "a prompt of 101: whole and in chunks",
        [&last.logits, &expected.logits],
    );

    // The next tokens decoded, and as a chunk of a prompt.
    let mut decoded = vec![];
    for _ in 0..5 {
        let step = world.step(device, Phase::Decode, &[part(whole, 1, LogitRows::Last)]);
        decoded.extend(run(device, &step)?.logits);
    }
    let step = world.step(device, Phase::Prefill, &[part(pieces, 5, LogitRows::All)]);
    let chunk = run(device, &step)?;
    same(
        "five tokens: decoded and prefilled",
        [&decoded, &chunk.logits],
    );

    // The next one decoded where it is, and after its past has been copied.
    let stays = part(whole, 1, LogitRows::Last);
    let moves = Part {
        moves: true,
        ..part(pieces, 1, LogitRows::Last)
    };
    let rows: Result<Vec<Vec<f32>>, DeviceError> = [stays, moves]
        .into_iter()
        .map(|part| {
            let step = world.step(device, Phase::Decode, &[part]);
            Ok(run(device, &step)?.logits)
        })
        .collect();
    let rows = rows?;
    same("a past: where it is and copied", [&rows[0], &rows[1]]);
    Ok(outcomes)
}
