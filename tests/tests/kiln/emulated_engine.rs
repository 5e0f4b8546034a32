//! Whole requests on emulated CUDA: the tokens are those of the CPU, and those of a request alone.

use kiln_bundle::{Bundle, DType, WeightFormat, kv_layer_bytes};
use kiln_compiler::{CompileOptions, TargetChoice, cuda::CudaTarget};
use kiln_runtime::{
    BeamParams, Choices, Completion, Engine, Event, Processors, Prompt, Request, SamplingParams,
    SequenceBias,
    device::{CpuDevice, CpuOptions, CudaDevice, CudaOptions, Device},
};
use kiln_tests::{
    TestBundle,
    conformance::tolerance,
    emulation::{EmulatedDriver, EmulationOptions},
    fixture, repository,
};
use std::path::Path;

const NEW_TOKENS: u32 = 32;

fn compiled(model: &Path) -> TestBundle {
    compiled_for(model, 4)
}

fn compiled_for(model: &Path, max_batch: u32) -> TestBundle {
    let options = CompileOptions {
        targets: vec![TargetChoice::Cpu, TargetChoice::Cuda(CudaTarget::Sm90a)],
        emit_only: true,
        dtype: Some(DType::F16),
        weights: Some(WeightFormat::F16),
        max_batch,
        max_seq_len: Some(64),
        prefill_buckets: vec![32],
        decode_batch: vec![1],
        decode_kv: vec![64],
        ..CompileOptions::default()
    };
    TestBundle::compile(model, &options)
}

fn cpu(bundle: &Bundle) -> Engine {
    let options = CpuOptions {
        threads: Some(1),
        ..CpuOptions::default()
    };
    let device = CpuDevice::load(bundle, &options).unwrap();
    Engine::new(Box::new(device), bundle.manifest(), None).unwrap()
}

fn emulated(bundle: &Bundle, graphs: bool) -> Engine {
    emulated_with(
        bundle,
        CudaOptions {
            graphs,
            ..CudaOptions::default()
        },
    )
}

fn emulated_with(bundle: &Bundle, options: CudaOptions) -> Engine {
    let driver = EmulatedDriver::new(EmulationOptions::default());
    let target = &bundle.manifest().targets[1];
    let device = CudaDevice::load(bundle, target, driver, &options, &mut |_, _| {}).unwrap();
    // A step is submitted before the tokens of the last one are known.
    assert_eq!(device.pipeline_depth(), 1);
    Engine::new(Box::new(device), bundle.manifest(), None).unwrap()
}

fn greedy(prompt: &[u32]) -> Request {
    Request {
        max_new_tokens: Some(NEW_TOKENS),
        ignore_eos: true,
        ..Request::new(Prompt::Ids(prompt.to_vec()))
    }
}

/// All requests at once, in their order.
fn run(engine: &mut Engine, requests: &[Request]) -> Vec<Completion> {
    for request in requests {
        engine.submit(request.clone()).unwrap();
    }
    let mut done: Vec<Completion> = vec![];
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            match event {
                Event::Finished(completion) => done.push(*completion),
                other => assert!(matches!(other, Event::Token(_)), "{other:?}"),
            }
        }
    }
    done.sort_by_key(|completion| completion.request);
    done
}

/// Prompts of 5, 1 and 17 tokens.
fn prompts(vocab_size: u32) -> Vec<Vec<u32>> {
    let id = |i: u32, like: u32| (i * i * 31 + i * 7 + like * 53 + 5) % vocab_size;
    let prompt = |(like, len)| (0..len).map(|i| id(i, like)).collect();
    (0..).zip([5, 1, 17]).map(prompt).collect()
}

/// Where the devices chose different tokens of a greedy request after the same ones, the CPU's scores of
/// both must be nearer to each other than the devices may differ. Says how near they are.
fn near_tie(
    bundle: &Bundle,
    request: &Request,
    [on_cpu, found]: [&Completion; 2],
    at: usize,
) -> Result<String, String> {
    let mut request = request.clone();
    request.outputs.scores = true;
    let observed = run(&mut cpu(bundle), &[request]).remove(0);
    assert_eq!(observed.choices[0].ids, on_cpu.choices[0].ids);
    let vocab_size = bundle.manifest().model.vocab_size as usize;
    let prompt = on_cpu.prompt_ids.len();
    let row = &observed.choices[0].scores[at * vocab_size..][..vocab_size];
    let finite = row.iter().filter(|x| x.is_finite());
    let largest = finite.fold(0.0f32, |largest, x| largest.max(x.abs()));
    let [expected, chosen] = [on_cpu, found].map(|completion| completion.choices[0].ids[at]);
    let gap = (row[expected as usize] - row[chosen as usize]) / largest;
    let text = format!(
        "prompt of {prompt}, token {at}: {chosen}, and {expected} on the CPU, which has {gap:.1e} of \
         the largest score between them"
    );
    if gap <= tolerance(DType::F16) {
        Ok(text)
    } else {
        Err(text)
    }
}

/// The near ties at which greedy requests went another way than on the CPU.
fn near_ties(
    bundle: &Bundle,
    requests: &[Request],
    expected: &[Completion],
    found: &[Completion],
) -> Vec<String> {
    let mut ties = vec![];
    for ((request, expected), found) in requests.iter().zip(expected).zip(found) {
        let [on_cpu, on_gpu] = [expected, found].map(|completion| &completion.choices[0].ids);
        assert_eq!(on_gpu.len(), on_cpu.len());
        if let Some(at) = (0..on_cpu.len()).find(|&at| on_gpu[at] != on_cpu[at]) {
            ties.push(near_tie(bundle, request, [expected, found], at).unwrap());
        }
    }
    ties
}

/// Of three prompts in a batch, all but `ties` get the CPU's tokens, and those differ at a near tie.
fn same_tokens_as_the_cpu(model: &Path, ties: usize) {
    let compiled = compiled(model);
    let bundle = Bundle::open(&compiled.path()).unwrap();
    let prompts = prompts(bundle.manifest().model.vocab_size);
    let requests: Vec<Request> = prompts.iter().map(|prompt| greedy(prompt)).collect();
    let expected = run(&mut cpu(&bundle), &requests);
    let found = run(&mut emulated(&bundle, true), &requests);
    let differ = near_ties(&bundle, &requests, &expected, &found);
    println!("{}: {differ:?}", model.display());
    assert!(differ.len() <= ties, "{differ:?}");
}

#[test]
fn tiny_opt() {
    // The second token of the first prompt: its logits are 3e-4 of the largest apart.
    same_tokens_as_the_cpu(&fixture("tiny-opt"), 1);
}

#[test]
fn tiny_opt_post() {
    same_tokens_as_the_cpu(&fixture("tiny-opt-post"), 0);
}

#[test]
fn tiny_opt_d80() {
    same_tokens_as_the_cpu(&fixture("tiny-opt-d80"), 0);
}

#[test]
fn tiny_gpt2() {
    same_tokens_as_the_cpu(&fixture("tiny-gpt2"), 0);
}

#[test]
fn demo() {
    same_tokens_as_the_cpu(&repository("models/demo"), 0);
}

#[test]
fn a_request_gets_the_same_tokens_in_any_batch() {
    let compiled = compiled(&fixture("tiny-gpt2"));
    let bundle = Bundle::open(&compiled.path()).unwrap();
    let prompts = prompts(bundle.manifest().model.vocab_size);
    let free = SamplingParams {
        temperature: 1.3,
        seed: Some(7),
        ..SamplingParams::GREEDY
    };
    let sampled = |prompt: usize, sampling: SamplingParams| Request {
        sampling,
        ..greedy(&prompts[prompt])
    };
    // More than there are slots, so that some wait for others to end.
    let requests = [
        sampled(0, free),
        greedy(&prompts[1]),
        sampled(2, SamplingParams { top_k: 20, ..free }),
        sampled(0, SamplingParams { top_p: 0.8, ..free }),
        // Ends early, while its next step is in flight, but not before its fourth token.
        Request {
            stop_token_ids: vec![22, 116],
            min_new_tokens: 4,
            ..greedy(&prompts[1])
        },
        sampled(
            2,
            SamplingParams {
                min_p: 0.3,
                seed: Some(8),
                ..free
            },
        ),
    ];
    let together = run(&mut emulated(&bundle, true), &requests);
    // One after the other, on a device that launches kernels one by one.
    let mut engine = emulated(&bundle, false);
    for (request, expected) in requests.iter().zip(&together) {
        let alone = run(&mut engine, std::slice::from_ref(request)).remove(0);
        assert_eq!(alone.choices[0].ids, expected.choices[0].ids, "{request:?}");
        assert_eq!(
            alone.choices[0].finish_reason,
            expected.choices[0].finish_reason
        );
    }
    let lens: Vec<usize> = together
        .iter()
        .map(|done| done.choices[0].ids.len())
        .collect();
    assert!((4..32).contains(&lens[4]), "{lens:?}");
    // The parameters make a difference.
    assert_ne!(together[0].choices[0].ids, together[3].choices[0].ids);
    assert_ne!(together[2].choices[0].ids, together[5].choices[0].ids);
}

const SAMPLED: SamplingParams = SamplingParams {
    temperature: 0.8,
    seed: Some(3),
    ..SamplingParams::GREEDY
};

/// Beams of several kinds, samples of one prompt, and a greedy request.
fn searches(vocab_size: u32) -> Vec<Request> {
    let prompts = prompts(vocab_size);
    let request = |prompt: usize| Request {
        max_new_tokens: Some(20),
        ..greedy(&prompts[prompt])
    };
    let beams = |prompt: usize, num_beams: u32, returned: u32| Request {
        beams: Some(BeamParams::new(num_beams)),
        choices: Choices {
            returned,
            generated: returned,
        },
        ..request(prompt)
    };
    let samples = Choices {
        returned: 4,
        generated: 4,
    };
    vec![
        beams(0, 2, 1),
        beams(2, 4, 4),
        request(1),
        Request {
            sampling: SAMPLED,
            choices: samples,
            ..request(2)
        },
        Request {
            sampling: SamplingParams {
                top_k: 30,
                ..SAMPLED
            },
            ..beams(1, 3, 2)
        },
        Request {
            beams: Some(BeamParams {
                num_beam_groups: 2,
                diversity_penalty: 0.7,
                ..BeamParams::new(4)
            }),
            ..request(0)
        },
    ]
}

/// Whether two devices gave the same tokens, and scores that differ by no more than they may.
fn check_searches(found: &[Completion], expected: &[Completion]) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let ids = |completion: &Completion| -> Vec<Vec<u32>> {
            let choices = completion.choices.iter();
            choices.map(|choice| choice.ids.clone()).collect()
        };
        assert_eq!(ids(found), ids(expected), "request {index}");
        for (found, expected) in found.choices.iter().zip(&expected.choices) {
            let (Some(found), Some(expected)) = (found.score, expected.score) else {
                assert_eq!(found.score, expected.score, "request {index}");
                continue;
            };
            let difference = (found - expected).abs();
            assert!(
                difference <= tolerance(DType::F16) * expected.abs(),
                "request {index}: {found}, and {expected} on the CPU"
            );
        }
    }
}

/// Requests whose draws read what their sequences hold.
fn with_processors(vocab_size: u32) -> Vec<Request> {
    let prompts = prompts(vocab_size);
    let request = |prompt: usize, processors: Processors| Request {
        processors,
        ..greedy(&prompts[prompt])
    };
    let bias = |ids: &[u32], bias| SequenceBias {
        ids: ids.to_vec(),
        bias,
    };
    let penalised = Processors {
        repetition_penalty: 1.3,
        no_repeat_ngram_size: 3,
        ..Processors::NONE
    };
    let biased = Processors {
        presence_penalty: 0.6,
        frequency_penalty: 0.4,
        sequence_bias: vec![bias(&[7], 1.5), bias(&[7, 12], 2.0), bias(&[30], -1.0)],
        bad_words_ids: vec![vec![9], vec![7, 11]],
        ..Processors::NONE
    };
    vec![
        request(0, penalised.clone()),
        Request {
            beams: Some(BeamParams::new(3)),
            ..request(0, penalised.clone())
        },
        Request {
            sampling: SAMPLED,
            ..request(2, biased.clone())
        },
        request(1, biased),
        // The host draws.
        Request {
            sampling: SamplingParams {
                typical_p: 0.9,
                ..SAMPLED
            },
            ..request(1, penalised)
        },
    ]
}

#[test]
fn processors_choose_what_the_cpu_chooses() {
    let compiled = compiled_for(&repository("models/demo"), 6);
    let bundle = Bundle::open(&compiled.path()).unwrap();
    let requests = with_processors(bundle.manifest().model.vocab_size);
    let expected = run(&mut cpu(&bundle), &requests);
    let check = |found: &[Completion]| {
        // The first, at its twentieth token.
        let ties = near_ties(&bundle, &requests[..1], &expected[..1], &found[..1]);
        assert!(ties.len() <= 1, "{ties:?}");
        check_searches(&found[1..], &expected[1..]);
    };
    let mut engine = emulated(&bundle, true);
    check(&run(&mut engine, &requests));
    let fed = engine.stats().prefill.tokens;
    // Without them, the tokens are others.
    let plain = |request: &Request| Request {
        processors: Processors::NONE,
        ..request.clone()
    };
    let plain: Vec<Request> = requests.iter().map(plain).collect();
    for (plain, expected) in run(&mut cpu(&bundle), &plain).iter().zip(&expected) {
        assert_ne!(plain.choices[0].ids, expected.choices[0].ids);
    }

    // What goes back to the queue brings its history to another slot.
    let model = &bundle.manifest().model;
    let block_bytes = u64::from(model.layers) * kv_layer_bytes(u64::from(model.hidden_size), 2);
    let options = CudaOptions {
        kv_cache_bytes: Some(9 * block_bytes),
        ..CudaOptions::default()
    };
    let mut engine = emulated_with(&bundle, options);
    check(&run(&mut engine, &requests));
    let again = engine.stats().prefill.tokens;
    assert!(again > fed, "nothing was computed again: {again} tokens");
}

#[test]
fn searches_find_what_the_cpu_finds() {
    let compiled = compiled_for(&repository("models/demo"), 12);
    let bundle = Bundle::open(&compiled.path()).unwrap();
    let model = &bundle.manifest().model;
    let requests = searches(model.vocab_size);
    let expected = run(&mut cpu(&bundle), &requests);
    for (completion, request) in expected.iter().zip(&requests) {
        assert_eq!(completion.choices.len(), request.choices.returned as usize);
    }
    let mut engine = emulated(&bundle, true);
    check_searches(&run(&mut engine, &requests), &expected);
    let fed = engine.stats().prefill.tokens;

    // Room for the largest search, and not for the others beside it.
    let block_bytes = u64::from(model.layers) * kv_layer_bytes(u64::from(model.hidden_size), 2);
    let options = CudaOptions {
        kv_cache_bytes: Some(13 * block_bytes),
        ..CudaOptions::default()
    };
    let mut engine = emulated_with(&bundle, options);
    check_searches(&run(&mut engine, &requests), &expected);
    let again = engine.stats().prefill.tokens;
    assert!(again > fed, "nothing was computed again: {again} tokens");
}
