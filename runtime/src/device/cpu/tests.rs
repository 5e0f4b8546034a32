//! The CPU device against a one-layer model computed plainly in f64.

use super::*;
use crate::device::{LogitRows, Tokens};
use crate::testing::manifest as fake_manifest;
use crate::{Completion, Engine, Event, Layers, LoadOptions, Prompt, Request};
use kiln_bundle::{
    Activation, Bounds, Buffer, BufferId, BundleWriter, Linear, Norm, Program, Residual, RowKind,
    Rows, Tap, TensorDecl, WriteError, packing,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

const V: usize = 40;
const E: usize = 6;
const C: usize = 8;
const H: usize = 2;
const F: usize = 16;
const MAX_SEQ_LEN: u32 = 48;
const OFFSET: u32 = 2;

/// Matrices and vectors, row-major, by name.
type Tensors = BTreeMap<&'static str, (Vec<usize>, Vec<f32>)>;

fn tensors() -> Tensors {
    let shapes: [(&str, Vec<usize>); 19] = [
        ("tokens", vec![V, E]),
        ("positions", vec![MAX_SEQ_LEN as usize + OFFSET as usize, C]),
        ("in.w", vec![C, E]),
        ("ln1.w", vec![C]),
        ("ln1.b", vec![C]),
        ("qkv.w", vec![3 * C, C]),
        ("qkv.b", vec![3 * C]),
        ("out.w", vec![C, C]),
        ("out.b", vec![C]),
        ("ln2.w", vec![C]),
        ("ln2.b", vec![C]),
        ("fc1.w", vec![F, C]),
        ("fc1.b", vec![F]),
        ("fc2.w", vec![C, F]),
        ("fc2.b", vec![C]),
        ("lnf.w", vec![C]),
        ("lnf.b", vec![C]),
        ("head.w", vec![V, C]),
        ("unused", vec![1]),
    ];
    let mut state = 1u64;
    let mut value = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 1.6
    };
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| value()).collect();
            (name, (shape, values))
        })
        .collect()
}

fn norm(name: &str) -> Option<Norm> {
    let part = |part: &str| Some(format!("{name}.{part}"));
    Some(Norm {
        weight: part("w"),
        bias: part("b"),
        eps: 1e-5,
    })
}

fn program() -> Program {
    let tokens = |width: usize| Buffer {
        rows: RowKind::Tokens,
        width: width as u32,
        dtype: DType::F32,
    };
    let linear = |name: &str, [input, out]: [u32; 2], [k, n]: [usize; 2]| Linear {
        input: BufferId(input),
        norm: None,
        rows: Rows::All,
        weight: format!("{name}.w"),
        bias: Some(format!("{name}.b")),
        activation: None,
        residual: None,
        in_features: k as u32,
        out_features: n as u32,
        out: BufferId(out),
    };
    // The second norm is applied to the residual as well, as post-norm models do.
    let residual = |buffer, norm| {
        Some(Residual {
            buffer: BufferId(buffer),
            norm,
        })
    };
    let logits = Buffer {
        rows: RowKind::Logits,
        ..tokens(V)
    };
    Program {
        name: "all".to_owned(),
        buffers: vec![
            tokens(E),
            tokens(C),
            tokens(C),
            tokens(3 * C),
            tokens(C),
            tokens(C),
            tokens(F),
            tokens(C),
            logits,
        ],
        kernels: vec![
            KernelSpec::Embed {
                tokens: Some("tokens".to_owned()),
                positions: None,
                position_offset: 0,
                out: BufferId(0),
            },
            KernelSpec::Embed {
                tokens: None,
                positions: Some("positions".to_owned()),
                position_offset: OFFSET,
                out: BufferId(1),
            },
            KernelSpec::Linear(Linear {
                bias: None,
                residual: residual(1, None),
                ..linear("in", [0, 2], [E, C])
            }),
            KernelSpec::Qkv {
                linear: Linear {
                    norm: norm("ln1"),
                    ..linear("qkv", [2, 3], [C, 3 * C])
                },
                layer: 0,
            },
            KernelSpec::Attention {
                q: BufferId(3),
                layer: 0,
                heads: H as u32,
                head_dim: (C / H) as u32,
                scale: 0.5,
                out: BufferId(4),
            },
            KernelSpec::Linear(Linear {
                residual: residual(2, None),
                ..linear("out", [4, 5], [C, C])
            }),
            KernelSpec::Linear(Linear {
                norm: norm("ln2"),
                activation: Some(Activation::Relu),
                ..linear("fc1", [5, 6], [C, F])
            }),
            KernelSpec::Linear(Linear {
                residual: residual(5, norm("ln2")),
                ..linear("fc2", [6, 7], [F, C])
            }),
            KernelSpec::Linear(Linear {
                norm: norm("lnf"),
                rows: Rows::Logits,
                bias: None,
                ..linear("head", [7, 8], [C, V])
            }),
            KernelSpec::Sample {
                logits: BufferId(8),
            },
        ],
        logits: BufferId(8),
        hidden_states: vec![
            Tap {
                after_kernel: 2,
                buffer: BufferId(2),
                norm: None,
            },
            Tap {
                after_kernel: 7,
                buffer: BufferId(7),
                norm: norm("lnf"),
            },
        ],
    }
}

fn write_bundle(path: &Path, target_name: &str) {
    let mut manifest = fake_manifest(20, 4, MAX_SEQ_LEN);
    manifest.model.vocab_size = V as u32;
    manifest.model.hidden_size = C as u32;
    manifest.model.heads = H as u32;
    manifest.model.head_dim = (C / H) as u32;
    manifest.model.layers = 1;
    manifest.self_test.token_ids = vec![1];
    manifest.self_test.top_logits = vec![(0, 1.0)];
    manifest.self_test.tolerance = 1e-3;
    let program = program();
    let target = &mut manifest.targets[0];
    target.name = target_name.to_owned();
    target.weights_file = "weights.safetensors".to_owned();
    for executable in &mut target.executables {
        let Bounds { max_tokens, .. } = executable.bounds;
        let sizes = program
            .buffers
            .iter()
            .map(|b| u64::from(b.width * max_tokens * 4).next_multiple_of(64));
        executable.offsets_bytes = sizes
            .scan(0, |end, size| {
                *end += size;
                Some(*end - size)
            })
            .collect();
    }
    target.programs = vec![program];
    let mut writer = BundleWriter::create(path).unwrap();
    let all = tensors();
    let packed = |name: &str| !matches!(name, "positions") && all[name].0.len() == 2;
    let mut declarations: Vec<_> = all
        .iter()
        .map(|(&name, (shape, _))| TensorDecl {
            name: name.to_owned(),
            dtype: DType::F32,
            shape: if packed(name) {
                packing::packed_shape(DType::F32, shape[0], shape[1]).to_vec()
            } else {
                shape.clone()
            },
        })
        .collect();
    // Matrices first: they are to be aligned, and their sizes are multiples of the alignment.
    declarations.sort_by_key(|declaration| !packed(&declaration.name));
    writer
        .add_tensors("weights.safetensors", &declarations, |declaration, sink| {
            let (shape, values) = &all[declaration.name.as_str()];
            let mut out = values.clone();
            if packed(&declaration.name) {
                out = vec![0.0; declaration.shape.iter().product()];
                for (i, &value) in values.iter().enumerate() {
                    out[packing::packed_index(DType::F32, i / shape[1], i % shape[1], shape[1])] =
                        value;
                }
            }
            sink.write(bytemuck::cast_slice(&out))?;
            Ok::<(), WriteError>(())
        })
        .unwrap();
    writer.finish(manifest).unwrap();
}

/// Logits after, and hidden states at, every position of `ids`.
fn reference(ids: &[u32]) -> (Vec<Vec<f64>>, [Vec<Vec<f64>>; 2]) {
    let all = tensors();
    let get = |name: &str, i: usize| f64::from(all[name].1[i]);
    let linear = |name: &str, bias: bool, x: &[f64]| -> Vec<f64> {
        let w = format!("{name}.w");
        let (n, k) = (all[w.as_str()].0[0], x.len());
        (0..n)
            .map(|n| {
                let sum: f64 = (0..k).map(|k_| get(&w, n * k + k_) * x[k_]).sum();
                sum + if bias {
                    get(&format!("{name}.b"), n)
                } else {
                    0.0
                }
            })
            .collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (variance + 1e-5).sqrt();
        let affine = |(i, x)| {
            (x - mean) * scale * get(&format!("{name}.w"), i) + get(&format!("{name}.b"), i)
        };
        x.iter().enumerate().map(affine).collect()
    };
    let add =
        |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let (mut cache, mut logits, mut hidden) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
    for (position, &id) in ids.iter().enumerate() {
        let token: Vec<f64> = (0..E).map(|i| get("tokens", id as usize * E + i)).collect();
        let row = (position + OFFSET as usize) * C;
        let place: Vec<f64> = (0..C).map(|i| get("positions", row + i)).collect();
        let x = add(linear("in", false, &token), &place);
        hidden[0].push(x.clone());
        let qkv = linear("qkv", true, &norm("ln1", &x));
        cache.push(qkv[C..].to_vec());
        let mut attended = vec![0.0; C];
        for head in 0..H {
            let part = head * C / H..(head + 1) * C / H;
            let score = |kv: &Vec<f64>| -> f64 {
                part.clone()
                    .map(|i| 0.5 * qkv[i] * kv[i])
                    .sum::<f64>()
                    .exp()
            };
            let total: f64 = cache.iter().map(score).sum();
            for kv in &cache {
                part.clone()
                    .for_each(|i| attended[i] += score(kv) / total * kv[C + i]);
            }
        }
        let x = add(linear("out", true, &attended), &x);
        let wide: Vec<f64> = linear("fc1", true, &norm("ln2", &x))
            .iter()
            .map(|x| x.max(0.0))
            .collect();
        let x = add(linear("fc2", true, &wide), &norm("ln2", &x));
        let x = norm("lnf", &x);
        hidden[1].push(x.clone());
        logits.push(linear("head", false, &x));
    }
    (logits, hidden)
}

fn load(path: &Path) -> Engine {
    let cpu = CpuOptions {
        threads: Some(2),
        ..CpuOptions::default()
    };
    let options = LoadOptions {
        cpu,
        ..LoadOptions::default()
    };
    Engine::load(&Bundle::open(path).unwrap(), &options).unwrap()
}

fn run(engine: &mut Engine) -> Vec<Completion> {
    let mut done = Vec::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Finished(completion) = event {
                done.push(*completion);
            }
        }
    }
    done.sort_by_key(|completion| completion.request);
    done
}

fn close(found: &[f32], expect: impl IntoIterator<Item = f64>) {
    let expect: Vec<f64> = expect.into_iter().collect();
    assert_eq!(found.len(), expect.len());
    for (i, (found, expect)) in found.iter().zip(expect).enumerate() {
        assert!(
            (f64::from(*found) - expect).abs() < 1e-4,
            "{i}: {found} for {expect}"
        );
    }
}

#[test]
fn computes_the_model_and_nothing_depends_on_company() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.kiln");
    write_bundle(&path, "cpu");
    let requests: Vec<Request> = [1, 7, 37, 20, 3]
        .iter()
        .map(|&len: &u32| {
            let ids = (0..len).map(|t| (t * 11 + len) % V as u32).collect();
            let mut request = Request::new(Prompt::Ids(ids));
            request.max_new_tokens = Some(9);
            request.ignore_eos = true;
            request.outputs.logits = true;
            request.outputs.hidden_states = Layers::All;
            request
        })
        .collect();
    let mut together = load(&path);
    for request in &requests {
        together.submit(request.clone()).unwrap();
    }
    let together = run(&mut together);
    for (request, found) in requests.iter().zip(&together) {
        let prompt_len = found.prompt_ids.len();
        let ids = [found.prompt_ids.as_slice(), &found.choices[0].ids].concat();
        let found = &found.choices[0];
        let (logits, hidden) = reference(&ids);
        close(&found.logits, logits.iter().flatten().copied());
        close(
            &found.hidden_states,
            hidden.iter().flatten().flatten().copied(),
        );
        for (step, &id) in found.ids.iter().enumerate() {
            let row = &logits[prompt_len + step - 1];
            let best = row.iter().copied().fold(f64::MIN, f64::max);
            assert!(row[id as usize] > best - 1e-4);
        }
        let mut alone = load(&path);
        alone.submit(request.clone()).unwrap();
        let alone = run(&mut alone).remove(0).choices.remove(0);
        assert_eq!(alone.ids, found.ids);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&alone.logits) == bits(&found.logits));
        assert!(bits(&alone.hidden_states) == bits(&found.hidden_states));
    }
}

#[test]
fn another_target_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.kiln");
    write_bundle(&path, "sm_90a");
    let bundle = Bundle::open(&path).unwrap();
    let error = CpuDevice::load(&bundle, &CpuOptions::default())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("no executables for `cpu`; it was compiled for sm_90a"),
        "{error}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn weights_are_locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.kiln");
    write_bundle(&path, "cpu");
    let options = CpuOptions {
        lock_weights: true,
        ..CpuOptions::default()
    };
    let locked_kib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmLck:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number.unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(locked_kib(), 0);
    match CpuDevice::load(&Bundle::open(&path).unwrap(), &options) {
        Ok(device) => {
            let weights = device.facts().memory.weight_bytes;
            assert!(weights > 0 && locked_kib() * 1024 >= weights);
            drop(device);
            assert_eq!(locked_kib(), 0);
        }
        // Where the limit is below the few kilobytes of this bundle.
        Err(error) => assert!(
            error.to_string().contains("refuses to lock the weights"),
            "{error}"
        ),
    }
}

#[test]
fn shares_are_the_panels_that_threads_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.kiln");
    write_bundle(&path, "cpu");
    let bundle = Bundle::open(&path).unwrap();
    let target = &bundle.manifest().targets[0];
    let file = bundle.weights(target).unwrap();
    let weights = Weights::new(bundle.weights(target).unwrap(), target).unwrap();
    let shares = weights.shares(target, 3);
    assert!(
        shares
            .windows(2)
            .all(|pair| pair[0].0.end <= pair[1].0.start)
    );
    let kernels = target.programs.iter().flat_map(|program| &program.kernels);
    let mut matrices = 0;
    let mut several = 0;
    for linear in kernels.filter_map(KernelSpec::linear) {
        let whole = file.range(&linear.weight).unwrap();
        let inside = |range: &std::ops::Range<usize>| {
            whole.start <= range.start && range.end <= whole.end && !range.is_empty()
        };
        let parts: Vec<_> = shares.iter().filter(|(range, _)| inside(range)).collect();
        let panels = packing::panels(linear.out_features as usize);
        let panel_bytes = whole.len() / panels;
        let mut end = whole.start;
        for (range, thread) in parts.iter().copied() {
            assert_eq!(range.start, end);
            end = range.end;
            let found = crate::cpu::partition(panels, 3, *thread).len();
            assert_eq!(range.len(), found * panel_bytes);
        }
        assert_eq!(end, whole.end);
        assert!(parts.is_sorted_by_key(|(_, thread)| *thread));
        matrices += 1;
        several += usize::from(parts.len() > 1);
    }
    assert!(several > 0 && several < matrices, "{several} of {matrices}");
}

#[test]
#[cfg(target_os = "linux")]
fn threads_keep_to_nodes_and_compute_the_same() {
    // In a thread of its own, which is bound, and the other tests are not.
    let test = std::thread::spawn(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.kiln");
        write_bundle(&path, "cpu");
        let cores = crate::cpu::physical_cores();
        if cores.len() < 2 {
            return;
        }
        for (node, core) in cores[..2].iter().enumerate() {
            let node = dir.path().join(format!("node{node}"));
            std::fs::create_dir(&node).unwrap();
            std::fs::write(node.join("cpulist"), format!("{core}\n")).unwrap();
        }
        let bundle = Bundle::open(&path).unwrap();
        let options = CpuOptions {
            threads: Some(2),
            ..CpuOptions::default()
        };
        let tokens = |device: CpuDevice| -> Vec<Vec<u32>> {
            let manifest = bundle.manifest();
            let mut engine = Engine::new(Box::new(device), manifest, None).unwrap();
            for first in 1..4 {
                let mut request = Request::new(Prompt::Ids(vec![first, 2]));
                request.max_new_tokens = Some(3);
                engine.submit(request).unwrap();
            }
            let done = run(&mut engine);
            done.iter()
                .map(|done| done.choices[0].ids.clone())
                .collect()
        };
        let plain = tokens(CpuDevice::load(&bundle, &options).unwrap());
        let nodes = Nodes::read(dir.path());
        let device = CpuDevice::load_on(Some(&nodes), &bundle, &options).unwrap();
        let found: Mutex<Vec<Vec<usize>>> = Mutex::new(vec![Vec::new(); 2]);
        device.cpu.pool().run(|thread| {
            // A thread that is bound to one CPU has no other.
            found.lock().unwrap()[thread] = crate::cpu::physical_cores();
        });
        let expected: Vec<Vec<usize>> = cores[..2].iter().map(|&core| vec![core]).collect();
        assert_eq!(found.into_inner().unwrap(), expected);
        assert_eq!(tokens(device), plain);
    });
    test.join().unwrap();
}

#[test]
fn steps_outside_the_plan_are_refused() {
    use crate::device::{SequenceStep, Step};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.kiln");
    write_bundle(&path, "cpu");
    let options = CpuOptions {
        threads: Some(1),
        ..CpuOptions::default()
    };
    let mut device = CpuDevice::load(&Bundle::open(&path).unwrap(), &options).unwrap();
    let sound = SequenceStep {
        slot: 0,
        tokens: Tokens::Ids(&[1, 2]),
        past_len: 0,
        block_table: &[0],
        logit_rows: LogitRows::None,
        draw: None,
    };
    let mut submit = |sequence: SequenceStep<'_>, executable| {
        let mut step = Step {
            executable,
            ..Step::default()
        };
        step.push(&sequence);
        device
            .submit(&step)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    assert_eq!(submit(sound, 0), Ok(()));
    let mut refused = |sequence, executable, expect: &str| {
        let error = submit(sequence, executable).unwrap_err();
        assert!(error.contains(expect), "{error:?} lacks {expect:?}");
    };
    refused(sound, 9, "executable 9 does not exist");
    refused(sound, 2, "exceeds decode-1");
    refused(
        SequenceStep { slot: 4, ..sound },
        0,
        "slot 4 does not exist",
    );
    refused(
        SequenceStep {
            tokens: Tokens::Ids(&[40]),
            ..sound
        },
        0,
        "outside the vocabulary",
    );
    refused(
        SequenceStep {
            tokens: Tokens::Ids(&[]),
            ..sound
        },
        0,
        "no tokens",
    );
    refused(
        SequenceStep {
            tokens: Tokens::LastSampled,
            ..sound
        },
        0,
        "sampled no token",
    );
    refused(
        SequenceStep {
            block_table: &[],
            ..sound
        },
        0,
        "no sound table",
    );
    refused(
        SequenceStep {
            block_table: &[99],
            ..sound
        },
        0,
        "no sound table",
    );
    refused(
        SequenceStep {
            past_len: 16,
            block_table: &[0],
            ..sound
        },
        0,
        "no sound table",
    );
}
