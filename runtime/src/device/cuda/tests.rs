//! The CUDA device over a driver that keeps the device's memory on the host.

mod bundle;
mod driver;

use super::*;
use crate::device::{LogitRows, Observe, SequenceStep, Tokens};
use crate::kv::BlockCopy;
use crate::sampling::{BeamDraw, Draw, DrawParams, Processors, Rules, SequenceBias};
use crate::{Engine, Event, Layers, Outputs, Prompt, Request};
use bundle::{C, IMAGES, LAYER_BYTES, LAYERS, MAX_SEQ_LEN, V, write_bundle};
use driver::{Call, FakeDriver, long};
use kiln_bundle::{
    Phase,
    trace::{Span, Trace},
};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

struct Rig {
    _dir: tempfile::TempDir,
    bundle: Bundle,
    driver: FakeDriver,
}

impl Rig {
    fn new(free_bytes: u64) -> Rig {
        Rig::changed(free_bytes, |_| {})
    }

    fn changed(free_bytes: u64, change: impl FnOnce(&mut Target)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let bundle = write_bundle(&dir.path().join("tiny.kiln"), change);
        Rig {
            _dir: dir,
            bundle,
            driver: FakeDriver::new(free_bytes),
        }
    }

    fn load(&self, options: &CudaOptions) -> Result<CudaDevice<FakeDriver>, DeviceError> {
        let target = &self.bundle.manifest().targets[0];
        CudaDevice::load(
            &self.bundle,
            target,
            self.driver.clone(),
            options,
            &mut |done, total| assert!(done <= total),
        )
    }

    fn device(&self) -> CudaDevice<FakeDriver> {
        self.load(&CudaOptions::default()).unwrap()
    }
}

fn sequence<'a>(slot: u32, tokens: Tokens<'a>, table: &'a [u32]) -> SequenceStep<'a> {
    SequenceStep {
        slot,
        tokens,
        past_len: 0,
        block_table: table,
        logit_rows: LogitRows::Last,
        draw: Some(Draw::GREEDY),
    }
}

fn decode_index(device: &impl Device) -> usize {
    let mut executables = device.executables().iter();
    executables.position(|e| e.phase == Phase::Decode).unwrap()
}

#[test]
fn too_little_memory_is_refused_before_anything_is_allocated() {
    let rig = Rig::new(1000);
    let error = rig.load(&CudaOptions::default()).err().unwrap().to_string();
    assert!(
        error.contains("not enough memory on cuda:0 (Fake GPU, sm_90a)"),
        "{error}"
    );
    assert!(
        error.contains("needed") && error.contains("available"),
        "{error}"
    );
    assert_eq!(rig.driver.calls(), []);

    let small = CudaOptions {
        kv_cache_bytes: Some(1),
        ..CudaOptions::default()
    };
    let error = Rig::new(100 * MIB).load(&small).err().unwrap().to_string();
    assert!(error.contains("KV cache"), "{error}");
}

#[test]
fn the_cache_is_as_large_as_asked_or_as_a_full_batch() {
    let rig = Rig::new(100 * MIB);
    let device = rig.device();
    let facts = device.facts();
    let block_bytes = u64::from(LAYERS) * LAYER_BYTES;
    assert_eq!(facts.kv_blocks, 4 * MAX_SEQ_LEN / 16);
    assert_eq!(
        facts.memory.kv_bytes,
        u64::from(facts.kv_blocks) * block_bytes
    );
    assert_eq!((facts.slots, device.pipeline_depth()), (4, 1));
    assert_eq!(facts.name, "cuda:0 (Fake GPU, sm_90a)");
    let allocated: u64 = rig
        .driver
        .calls()
        .iter()
        .map(|call| match call {
            Call::Allocate(bytes) => *bytes,
            _ => 0,
        })
        .sum();
    assert_eq!(allocated, facts.memory.total_bytes());

    let asked = CudaOptions {
        kv_cache_bytes: Some(9 * block_bytes + 1),
        ..CudaOptions::default()
    };
    assert_eq!(rig.load(&asked).unwrap().facts().kv_blocks, 9);
}

#[test]
fn other_targets_are_refused() {
    let layout = Rig::changed(100 * MIB, |target| {
        // The smallest of changes that leaves a sound manifest.
        target.images.clear();
        target.copy_blocks = None;
        target
            .executables
            .iter_mut()
            .for_each(|e| e.launches.clear());
    });
    let error = layout.load(&CudaOptions::default()).err().unwrap();
    let error = error.to_string();
    assert!(
        error.contains("`sm_90a`") && error.contains("launches nothing"),
        "{error}"
    );
}

#[test]
fn arguments_are_addresses() {
    let rig = Rig::new(100 * MIB);
    let device = rig.device();
    let loads = rig.driver.calls();
    let loads = loads.iter().filter(|call| matches!(call, Call::Load(_)));
    assert_eq!(loads.count(), IMAGES.len(), "each image once");

    let addresses = device.addresses;
    let executable = &device.target.executables[1];
    let launches = &device.chains[1].launches;
    assert_eq!(launches.len(), 6);
    assert_eq!(
        launches[0].place,
        format!("{}, kernel 0 (embed)", executable.name)
    );
    assert_eq!(launches[3].grid, [5, 2, 3]);

    // The step, whole.
    assert_eq!(
        launches[0].parameters[0].len(),
        size_of::<kiln_bundle::StepPointers>()
    );
    let step = |index| long(&launches[0].parameters[0], index);
    assert_eq!(step(0), addresses.step.0);
    assert_eq!(step(9), addresses.last_sampled.0);
    assert_eq!(step(10), addresses.chosen.0);

    // Tensors, where their bytes were copied to, apart from each other.
    let tokens = long(&launches[0].parameters[1], 0);
    let qkv = long(&launches[0].parameters[2], 0);
    let norm = long(&launches[5].parameters[1], 0);
    assert_eq!(long(&launches[5].parameters[2], 0), tokens);
    for address in [tokens, qkv, norm] {
        assert_eq!(address % 256, 0);
    }
    let mut state = rig.driver.state();
    assert_eq!(state.at(tokens, 5 * 8 * 32 * 2), [6; 5 * 8 * 32 * 2]);
    assert_eq!(state.at(qkv, 12 * 8 * 32 * 2), [3; 12 * 8 * 32 * 2]);
    assert_eq!(state.words(norm, C as usize), [2f32.to_bits(); C as usize]);

    // Buffers, layers, workspace and counters.
    let offsets = &executable.offsets_bytes;
    let arena = |id: usize| addresses.arena.0 + offsets[id];
    assert_eq!(long(&launches[0].parameters[3], 0), arena(0));
    assert_eq!(long(&launches[4].parameters[1], 0), arena(4));
    let layer = |launch: usize| long(&launches[launch].parameters[1], 0);
    assert_eq!(layer(1), addresses.kv_cache.0);
    assert_eq!(layer(3), addresses.kv_cache.0 + LAYER_BYTES);
    let workspace = long(&launches[1].parameters[2], 0);
    assert_eq!(workspace, addresses.workspace.0 + 64);
    assert_eq!(long(&launches[1].parameters[3], 0), addresses.counters.0);
}

#[test]
fn steps_upload_their_lists_and_feed_what_slots_hold() {
    let rig = Rig::new(100 * MIB);
    let mut device = rig.device();
    rig.driver.calls();
    let decode = decode_index(&device);

    let mut step = Step::default();
    step.push(&sequence(3, Tokens::Ids(&[7, 8, 9]), &[5]));
    step.push(&SequenceStep {
        draw: None,
        logit_rows: LogitRows::None,
        ..sequence(1, Tokens::Ids(&[20]), &[2])
    });
    let first = device.submit(&step).unwrap();
    let calls = rig.driver.calls();
    let (step_at, chosen_at) = (device.addresses.step.0, device.addresses.chosen.0);
    assert!(
        matches!(
            calls[..],
            [
                Call::Upload(at, _),
                Call::Record(6),
                Call::Replay(0),
                Call::Download(chosen, 4)
            ] if at == step_at && chosen == chosen_at
        ),
        "{calls:?}"
    );
    assert_eq!(rig.driver.state().words(step_at, 5), [4, 2, 1, 2, 1]);

    let mut step = Step {
        executable: decode,
        ..Step::default()
    };
    step.push(&SequenceStep {
        past_len: 3,
        ..sequence(3, Tokens::LastSampled, &[5])
    });
    let second = device.submit(&step).unwrap();
    let third = device.submit(&step).unwrap();
    let calls = rig.driver.calls();
    let [Call::Upload(_, bytes), Call::Record(6), Call::Replay(1), _] = calls[..4] else {
        panic!("{calls:?}")
    };
    assert!(bytes < 512, "a decode step uploads {bytes} bytes");
    // The graph of the second is replayed.
    assert!(matches!(calls[5], Call::Replay(1)), "{calls:?}");

    let error = device.collect(second).unwrap_err().to_string();
    assert!(error.contains("not the oldest"), "{error}");
    assert_eq!(device.collect(first).unwrap().tokens, [Some(10)]);
    assert_eq!(device.collect(second).unwrap().tokens, [Some(11)]);
    assert_eq!(device.collect(third).unwrap().tokens, [Some(12)]);

    // Nothing was ever chosen for this slot.
    let mut step = Step {
        executable: decode,
        ..Step::default()
    };
    step.push(&sequence(1, Tokens::LastSampled, &[2]));
    let error = device.submit(&step).unwrap_err().to_string();
    assert!(error.contains("slot 1 has sampled no token"), "{error}");
}

#[test]
fn blocks_are_copied_in_order_before_the_step() {
    let rig = Rig::new(100 * MIB);
    let mut device = rig.device();
    let bytes = (u64::from(LAYERS) * LAYER_BYTES) as usize;
    let kv_cache = device.addresses.kv_cache.0;
    let block = |index: u32| kv_cache + u64::from(index) * bytes as u64;
    for index in 0..10 {
        let held = vec![index as u8; bytes];
        rig.driver
            .state()
            .at(block(index), bytes)
            .copy_from_slice(&held);
    }
    rig.driver.calls();
    let mut step = Step::default();
    step.push(&sequence(0, Tokens::Ids(&[7]), &[5]));
    // Two blocks change places, one is copied twice, and one onto itself.
    let copies = [(1, 9), (2, 1), (6, 7), (9, 2), (6, 8), (4, 4)];
    step.copies = copies.map(|(from, to)| BlockCopy { from, to }).to_vec();
    let id = device.submit(&step).unwrap();
    let calls = rig.driver.calls();
    let place = "copies of blocks".to_owned();
    let launched = [(); 3].map(|()| Call::Launch(place.clone()));
    assert_eq!(calls[..3], launched);
    assert!(matches!(calls[3], Call::Upload(..)), "{calls:?}");
    assert_eq!(device.collect(id).unwrap().tokens, [Some(8)]);
    let held: Vec<u8> = (0..10)
        .map(|index| {
            let mut state = rig.driver.state();
            let held = state.at(block(index), bytes);
            assert!(held.iter().all(|&byte| byte == held[0]));
            held[0]
        })
        .collect();
    assert_eq!(held, [0, 2, 1, 3, 4, 5, 6, 6, 6, 1]);

    step.copies = vec![BlockCopy { from: 0, to: 24 }];
    let error = device.submit(&step).unwrap_err().to_string();
    assert!(error.contains("outside the KV cache"), "{error}");
}

#[test]
fn tokens_that_could_not_be_chosen_are_none() {
    let device = Rig::new(100 * MIB).device();
    let chosen = [1, NO_TOKEN, 9];
    let bytes: Vec<u8> = chosen
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect();
    let output = device.chosen(&bytes, &[0, 0]);
    assert_eq!(output.tokens, [Some(1), None]);
    assert!(output.continuations.is_empty());
}

#[test]
fn continuations_lie_behind_the_tokens() {
    let device = Rig::new(100 * MIB).device();
    let score = |score: f32| score.to_bits();
    // Room for the tokens of four draws.
    let tokens = [7, 0, 0, 8];
    let pairs = [5, score(-1.0), 6, score(-2.0), NO_TOKEN, 0];
    let words = tokens.iter().chain(&pairs);
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    let draws = [0, 2, 1, 0];
    assert_eq!(device.chosen_bytes(&draws), bytes.len());
    let output = device.chosen(&bytes, &draws);
    assert_eq!(output.tokens, [Some(7), Some(8)]);
    let found: Vec<Vec<(u32, f32)>> = output
        .continuations
        .iter()
        .map(|best| best.iter().map(|c| (c.id, c.score)).collect())
        .collect();
    assert_eq!(found, [vec![(5, -1.0), (6, -2.0)], vec![]]);
}

#[test]
fn without_graphs_each_kernel_is_launched() {
    let rig = Rig::new(100 * MIB);
    let options = CudaOptions {
        graphs: false,
        ..CudaOptions::default()
    };
    let mut device = rig.load(&options).unwrap();
    rig.driver.calls();
    let mut step = Step::default();
    step.push(&sequence(0, Tokens::Ids(&[4]), &[0]));
    let id = device.submit(&step).unwrap();
    let calls = rig.driver.calls();
    let launched = calls.iter().filter(|c| matches!(c, Call::Launch(_)));
    assert_eq!(launched.count(), 6);
    assert_eq!(device.collect(id).unwrap().tokens, [Some(5)]);
}

/// Embedding, two layers of which attention alone has launches, the head, and no kernel that samples.
#[test]
fn kernels_are_timed_by_a_graph_of_its_own() {
    let rig = Rig::new(100 * MIB);
    let mut device = rig.device();
    assert!(!device.times_in_passing());
    rig.driver.calls();
    let mut step = Step::default();
    step.push(&sequence(0, Tokens::Ids(&[4]), &[0]));
    let mut run = |kernel_times| {
        step.observe.kernel_times = kernel_times;
        let id = device.submit(&step).unwrap();
        let output = device.collect(id).unwrap();
        assert_eq!(output.tokens, [Some(5)]);
        let calls = rig.driver.calls().into_iter();
        let aside =
            |call: &Call| !matches!(call, Call::Upload(..) | Call::Download(..) | Call::Wait(_));
        (output.kernel_times, calls.filter(aside).collect::<Vec<_>>())
    };
    let (times, calls) = run(false);
    assert_eq!(times, []);
    assert_eq!(calls, [Call::Record(6), Call::Replay(0)]);
    let (times, calls) = run(true);
    assert_eq!(
        calls,
        [Call::RecordTimed(6), Call::Replay(1), Call::Times(1)]
    );
    let microseconds: Vec<[u128; 2]> = times
        .iter()
        .map(|time| [time.start, time.length].map(|time| time.as_micros()))
        .collect();
    // The launches take 1, 2, 4, 8, 16 and 32.
    let expect = [[0, 1], [1, 0], [1, 6], [7, 0], [7, 24], [31, 32], [63, 0]];
    assert_eq!(microseconds, expect);
    // Both graphs stay as they are.
    assert_eq!(run(true), (times, vec![Call::Replay(1), Call::Times(1)]));
    assert_eq!(run(false).1, [Call::Replay(0)]);
}

/// A step in flight is settled before one that is waited for, and keeps what it gives.
#[test]
fn timed_steps_follow_those_in_flight() {
    let rig = Rig::new(100 * MIB);
    let mut device = rig.device();
    let mut step = Step::default();
    step.push(&sequence(0, Tokens::Ids(&[4]), &[0]));
    let plain = device.submit(&step).unwrap();
    step.observe.kernel_times = true;
    let timed = device.submit(&step).unwrap();
    assert_eq!(device.collect(plain).unwrap().kernel_times, []);
    let output = device.collect(timed).unwrap();
    assert_eq!(
        (output.kernel_times.len(), &output.tokens[..]),
        (7, &[Some(5)][..])
    );

    // Hidden states are fetched between launches, which leaves no graph to time.
    step.observe.hidden_states = true;
    rig.driver.calls();
    let both = device.submit(&step).unwrap();
    let output = device.collect(both).unwrap();
    assert!(output.kernel_times.is_empty() && !output.hidden_states.is_empty());
    let timed = |call: &Call| matches!(call, Call::Times(_) | Call::Replay(_));
    assert!(!rig.driver.calls().iter().any(timed));
}

fn requests(outputs: &Outputs) -> Vec<Request> {
    let request = |(len, first): (u32, u32)| {
        let mut request = Request::new(Prompt::Ids((first..first + len).collect()));
        request.max_new_tokens = Some(5);
        request.ignore_eos = true;
        request.outputs = outputs.clone();
        request
    };
    [(3, 10), (21, 1)].into_iter().map(request).collect()
}

fn engine(rig: &Rig) -> Engine {
    Engine::new(Box::new(rig.device()), rig.bundle.manifest(), None).unwrap()
}

#[test]
fn the_next_step_is_enqueued_before_a_token_is_read() {
    let plain = requests(&Outputs::default()).remove(0);
    let mut by_history = plain.clone();
    by_history.processors.repetition_penalty = 1.2;
    by_history.processors.no_repeat_ngram_size = 3;
    for request in [plain, by_history] {
        runs_ahead(request.clone(), false);
        // Nor is another path taken while it is recorded.
        runs_ahead(request, true);
    }
}

fn runs_ahead(request: Request, recorded: bool) {
    let rig = Rig::new(100 * MIB);
    let mut engine = engine(&rig);
    if recorded {
        engine.record(Trace::new(), rig.bundle.manifest());
    }
    rig.driver.calls();
    engine.submit(request).unwrap();
    let mut ids = Vec::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Finished(completion) = event {
                ids = completion.choices[0].ids.clone();
            }
        }
    }
    assert_eq!(ids, [13, 14, 15, 16, 17]);
    let order: Vec<_> = rig
        .driver
        .calls()
        .into_iter()
        .filter(|call| matches!(call, Call::Replay(_) | Call::Wait(_)))
        .collect();
    let (prefill, decode) = (Call::Replay(0), Call::Replay(1));
    let expect = [
        prefill,
        decode.clone(),
        Call::Wait(1),
        decode.clone(),
        Call::Wait(2),
        decode.clone(),
        Call::Wait(3),
        decode,
        Call::Wait(4),
        Call::Wait(5),
    ];
    assert_eq!(order, expect);
}

#[test]
fn observed_rows_are_fetched_between_launches() {
    let rig = Rig::new(100 * MIB);
    let mut engine = engine(&rig);
    rig.driver.calls();
    let both = Outputs {
        logits: true,
        hidden_states: Layers::All,
        ..Outputs::default()
    };
    for request in requests(&both) {
        engine.submit(request).unwrap();
    }
    // One that observes nothing, so that steps of both kinds are in flight together.
    engine
        .submit(requests(&Outputs::default()).remove(0))
        .unwrap();
    let mut seen = 0;
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            let Event::Finished(done) = event else {
                continue;
            };
            seen += 1;
            let first = done.prompt_ids[0];
            let choice = &done.choices[0];
            let all = [done.prompt_ids.as_slice(), &choice.ids].concat();
            let counted: Vec<u32> = (first..).take(all.len()).collect();
            assert_eq!(all, counted);
            if choice.logits.is_empty() {
                continue;
            }
            let positions = all.len();
            for (row, &id) in choice.logits.chunks_exact(V as usize).zip(&all) {
                let ones: Vec<usize> = (0..V as usize).filter(|&v| row[v] == 1.0).collect();
                assert_eq!(ones, [((id + 1) % V) as usize]);
            }
            assert_eq!(choice.logits.len(), positions * V as usize);
            let rows: Vec<&[f32]> = choice.hidden_states.chunks_exact(C as usize).collect();
            assert_eq!(rows.len(), (LAYERS as usize + 1) * positions);
            for position in 0..positions {
                let c = || (0..C as usize).map(|c| c as f32);
                let embedded: Vec<f32> = c().map(|c| position as f32 + c).collect();
                assert_eq!(rows[position], embedded);
                let layer: Vec<f32> = c().map(|c| position as f32 * c).collect();
                assert_eq!(rows[positions + position], layer);
                // The last one is normalised, scaled by 2 and shifted by 0.5.
                let mean = rows[2 * positions + position].iter().sum::<f32>() / C as f32;
                assert!((mean - 0.5).abs() < 1e-4, "{mean}");
                if position > 0 {
                    let high = rows[2 * positions + position][C as usize - 1];
                    assert!((high - (0.5 + 2.0 * 1.678_96)).abs() < 1e-3, "{high}");
                }
            }
        }
    }
    assert_eq!(seen, 3);
}

#[test]
fn what_kernels_do_not_choose_the_host_does() {
    let rig = Rig::new(100 * MIB);
    let mut device = rig.device();
    let decode = decode_index(&device);
    // The kernel would choose 10, the one above the last token.
    let rules = Arc::new(Rules {
        processors: Processors {
            bad_words_ids: vec![vec![9, 10]],
            sequence_bias: vec![SequenceBias {
                ids: vec![25],
                bias: 3.0,
            }],
            ..Processors::NONE
        },
        prompt_len: 2,
        max_new_tokens: 9,
        ends: vec![],
    });
    let by_rules = Draw {
        params: DrawParams {
            epsilon_cutoff: 0.001,
            ..DrawParams::GREEDY
        },
        rules: Some(&rules),
        history: &[8, 9],
        ..Draw::GREEDY
    };
    let mut step = Step::default();
    step.push(&sequence(2, Tokens::Ids(&[20]), &[2]));
    step.push(&SequenceStep {
        draw: Some(by_rules),
        logit_rows: LogitRows::All,
        ..sequence(3, Tokens::Ids(&[8, 9]), &[5])
    });
    step.push(&sequence(0, Tokens::Ids(&[30]), &[6]));
    rig.driver.calls();
    let observed = Observe {
        logits: true,
        ..Observe::default()
    };
    for (observe, downloads) in [(Observe::default(), 2), (observed, 2)] {
        step.observe = observe;
        let id = device.submit(&step).unwrap();
        let calls = rig.driver.calls();
        let downloaded = calls.iter().filter(|c| matches!(c, Call::Download(..)));
        assert_eq!(downloaded.count(), downloads, "{calls:?}");
        let output = device.collect(id).unwrap();
        assert_eq!(output.tokens, [Some(21), Some(25), Some(31)]);
        assert_eq!(output.logits.is_empty(), !observe.logits);
    }

    // The slot holds the host's choice, in the order of steps.
    let mut step = Step {
        executable: decode,
        ..Step::default()
    };
    step.push(&SequenceStep {
        past_len: 2,
        ..sequence(3, Tokens::LastSampled, &[5])
    });
    let id = device.submit(&step).unwrap();
    assert_eq!(device.collect(id).unwrap().tokens, [Some(26)]);
}

#[test]
fn what_kernels_lack_is_the_hosts() {
    let rules = |processors, ends| {
        Arc::new(Rules {
            processors,
            prompt_len: 1,
            max_new_tokens: 1,
            ends,
        })
    };
    let many = [3; draws::MAX_DRAW_WORDS + 1];
    let params = |params| Draw {
        params,
        ..Draw::GREEDY
    };
    let greedy = DrawParams::GREEDY;
    let beam = |count| {
        Some(BeamDraw {
            beam: 0,
            score: 0.0,
            count,
            least_kept: 1,
        })
    };
    let free = DrawParams {
        temperature: 0.5,
        top_k: 3,
        top_p: 0.5,
        min_p: 0.1,
        ..greedy
    };
    let penalised = rules(
        Processors {
            repetition_penalty: 1.5,
            bad_words_ids: vec![vec![1, 2]],
            ..Processors::NONE
        },
        vec![4],
    );
    let forced = |id| {
        let processors = Processors {
            forced_eos_token_id: Some(id),
            ..Processors::NONE
        };
        rules(processors, vec![])
    };
    let (forced, forced_beyond) = (forced(V - 1), forced(V));
    let long = rules(
        Processors {
            bad_words_ids: vec![many.to_vec()],
            ..Processors::NONE
        },
        vec![],
    );
    let by = |rules| Draw {
        rules: Some(rules),
        ..Draw::GREEDY
    };
    let cut = |cut: fn(&mut DrawParams)| {
        let mut changed = greedy;
        cut(&mut changed);
        params(changed)
    };
    let suppressed = |suppressed_ids| Draw {
        suppressed_ids,
        ..Draw::GREEDY
    };
    let cases = [
        (Draw::GREEDY, true),
        (params(free), true),
        (cut(|p| p.typical_p = 0.9), false),
        (cut(|p| p.epsilon_cutoff = 0.1), false),
        (cut(|p| p.eta_cutoff = 0.1), false),
        (by(&penalised), true),
        (by(&forced), true),
        (by(&forced_beyond), false),
        (by(&long), false),
        (suppressed(&many[1..]), true),
        (suppressed(&many), false),
        (
            Draw {
                beam: beam(256),
                ..by(&penalised)
            },
            true,
        ),
        (
            Draw {
                beam: beam(257),
                ..Draw::GREEDY
            },
            false,
        ),
        (
            Draw {
                beam: beam(2),
                ..params(free)
            },
            false,
        ),
        (
            Draw {
                beam: beam(2),
                ..by(&forced)
            },
            false,
        ),
    ];
    for (draw, by_kernel) in cases {
        assert_eq!(is_made_by_kernel(&draw, V), by_kernel, "{draw:?}");
    }
}

#[test]
fn the_host_draws_by_what_slots_keep() {
    let rig = Rig::new(100 * MIB);
    let mut engine = engine(&rig);
    engine.record(Trace::new(), rig.bundle.manifest());
    // The kernel counts on; of what has been, nothing may come again.
    let mut unique = requests(&Outputs::default()).remove(0);
    unique.processors.no_repeat_ngram_size = 1;
    // The host draws, by what the slot keeps.
    unique.sampling.epsilon_cutoff = 0.001;
    unique.prompt = Prompt::Ids([0].into_iter().chain(5..V - 2).collect());
    let mut other = requests(&Outputs::default()).remove(0);
    other.max_new_tokens = Some(8);
    engine.submit(unique).unwrap();
    engine.submit(other).unwrap();
    let mut ids = Vec::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Finished(completion) = event {
                ids.push((completion.request.0, completion.choices[0].ids.clone()));
            }
        }
    }
    // Only a step with a draw of the host has that part.
    let trace = engine.take_trace().unwrap();
    let part = |part: StepPart| {
        let of = |span: &&Span| span.label.name == part.name();
        trace.spans().iter().filter(of).count()
    };
    let steps = engine.stats().prefill.steps + engine.stats().decode.steps;
    assert_eq!(part(StepPart::Launch) as u64, steps);
    let drawn_by_host = 5;
    assert_eq!(part(StepPart::Sampling), drawn_by_host);
    assert!(steps as usize > drawn_by_host);
    ids.sort_unstable();
    // Behind the last id would come 0, which the prompt has.
    assert_eq!(ids[0].1, [V - 2, V - 1, 1, 2, 3]);
    assert_eq!(ids[1].1, [13, 14, 15, 16, 17, 18, 19, 20]);
}

#[test]
fn failures_name_call_and_place() {
    let cases = [
        ("upload", "prefill-8, its lists"),
        ("replay", "prefill-8, its launches"),
        ("download", "prefill-8, its tokens"),
        ("wait", "prefill-8, waiting for its tokens"),
    ];
    for (broken, place) in cases {
        let rig = Rig::new(100 * MIB);
        let mut device = rig.device();
        rig.driver.state().broken = Some(broken);
        let mut step = Step::default();
        step.push(&sequence(0, Tokens::Ids(&[4]), &[0]));
        // A device that has failed keeps failing, and neither hangs nor panics.
        for _ in 0..3 {
            let result = device.submit(&step).and_then(|id| device.collect(id));
            let error = result.unwrap_err().to_string();
            assert_eq!(
                error,
                format!("{broken} failed ({place}): CUDA_ERROR_ILLEGAL_ADDRESS")
            );
        }
        // Such a step replays nothing.
        step.observe.hidden_states = true;
        assert_eq!(device.submit(&step).is_err(), broken != "replay");
    }

    for broken in ["record_timed", "replay", "launch_times"] {
        let rig = Rig::new(100 * MIB);
        let mut device = rig.device();
        rig.driver.state().broken = Some(broken);
        let mut step = Step::default();
        step.observe.kernel_times = true;
        step.push(&sequence(0, Tokens::Ids(&[4]), &[0]));
        let error = device.submit(&step).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{broken} failed (prefill-8, its kernel times): CUDA_ERROR_ILLEGAL_ADDRESS")
        );
    }

    let failing_load = |broken| {
        let rig = Rig::new(100 * MIB);
        rig.driver.state().broken = Some(broken);
        rig.load(&CudaOptions::default()).err().unwrap().to_string()
    };
    assert!(failing_load("load").contains("(embed)"));
    assert!(failing_load("upload").contains("(tensor tokens)"));
    assert!(failing_load("allocate").contains("bytes for weights)"));
}
