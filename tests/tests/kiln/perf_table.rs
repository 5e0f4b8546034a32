//! `kiln-perf table`, and the count of bytes and operations that it stands on.

use kiln_bundle::{
    Bundle, DType, Executable, Phase,
    work::{StepSize, step_work},
};
use kiln_compiler::{CompileOptions, TargetChoice, cuda::CudaTarget};
use kiln_tests::{TestBundle, failure, fixture, program, success};
use serde_json::Value;
use std::{fs, process::Output};

/// A model as its config.json has it.
struct Config {
    layers: f64,
    hidden: f64,
    ffn: f64,
    vocab: f64,
}

impl Config {
    fn read(name: &str, keys: [&str; 4]) -> Config {
        let text = fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        let [layers, hidden, ffn, vocab] = keys.map(|key| config[key].as_f64().unwrap());
        Config {
            layers,
            hidden,
            ffn,
            vocab,
        }
    }
}

fn compile(name: &str, weights: &str) -> TestBundle {
    let options = CompileOptions {
        weights: Some(weights.parse().unwrap()),
        // Other than activations, so that a wrong type shows.
        dtype: Some(DType::Bf16),
        max_batch: 4,
        decode_batch: vec![1, 4],
        ..CompileOptions::default()
    };
    TestBundle::compile(&fixture(name), &options)
}

/// Whole steps, against the sizes of the weight file's tensors and a formula of the configuration.
#[test]
fn bytes_and_operations_of_steps_are_those_of_the_model() {
    let opt = Config::read(
        "tiny-opt",
        ["num_hidden_layers", "hidden_size", "ffn_dim", "vocab_size"],
    );
    let gpt2 = Config::read("tiny-gpt2", ["n_layer", "n_embd", "n_inner", "vocab_size"]);
    for (name, config) in [("tiny-opt", opt), ("tiny-gpt2", gpt2)] {
        for weights in ["f32", "bf16", "int8", "int4"] {
            let bundle = compile(name, weights);
            let bundle = Bundle::open(&bundle.path()).unwrap();
            let target = &bundle.manifest().targets[0];
            let file = bundle.weights(target).unwrap();
            // The one table that is no matrix of a product is that of positions; the token table is the
            // LM head.
            let (tables, products): (Vec<&str>, Vec<&str>) = file
                .names()
                .into_iter()
                .partition(|name| name.contains("position"));
            assert_eq!(tables.len(), 1);
            let bytes = |name: &&str| file.tensor(name).unwrap().data.len() as f64;
            let weight_bytes: f64 = products.iter().map(bytes).sum();
            let head = target.programs[0].lm_head().unwrap();
            let padded_vocab = (config.vocab / 32.0).ceil() * 32.0;
            let token_row = bytes(&head.weight.as_str()) / padded_vocab;
            let position_row = config.hidden * target.tables.size_bytes() as f64;

            // Three prompts' ends, one decode step of two sequences.
            let prefill: &[(u64, u64)] = &[(0, 5), (7, 3), (30, 1)];
            let decode: &[(u64, u64)] = &[(16, 1), (40, 1)];
            let steps = [
                (Phase::Prefill, false, prefill),
                (Phase::Prefill, true, prefill),
                (Phase::Decode, true, decode),
            ];
            for (phase, hidden_states, sequences) in steps {
                let mut size = StepSize::default();
                let (mut tokens, mut rows, mut seen, mut cached) = (0.0, 0.0, 0.0, 0.0);
                for &(past, new) in sequences {
                    size.add(past, new, 1);
                    tokens += new as f64;
                    rows += 1.0;
                    cached += (past + new) as f64;
                    // Token by token: each sees itself and what is before it.
                    seen += (past..past + new).map(|at| at as f64 + 1.0).sum::<f64>();
                }
                let executables = &target.executables;
                let of_kind = |has: &&Executable| {
                    (has.phase, has.bounds.hidden_states) == (phase, hidden_states)
                };
                let executable = executables.iter().find(of_kind).unwrap();
                let program = &target.programs[executable.program as usize];
                let found = step_work(target, program, &size);

                let (c, f, v) = (config.hidden, config.ffn, config.vocab);
                // Behind its attention, the last layer computes rows whose logits are asked for, unless all are
                // to be seen.
                let last = if hidden_states { tokens } else { rows };
                let behind = tokens * (config.layers - 1.0) + last;
                let flops = 2.0 * tokens * config.layers * 3.0 * c * c
                    + 2.0 * behind * (c * c + 2.0 * c * f)
                    + 4.0 * seen * config.layers * c
                    + 2.0 * rows * c * v;
                assert_eq!(found.flops, flops, "{name} {weights}");
                assert_eq!(found.weight_bytes as f64, weight_bytes, "{name} {weights}");

                // In rows of C: qkv reads one and leaves q, attention reads q and gives one, the output
                // reads it and the residual, up reads one, down reads the residual; both add give one.
                let activations =
                    4.0 * (tokens * config.layers * 4.0 * c + behind * (6.0 * c + 2.0 * f));
                // Keys and values are of two bytes.
                let kv = 2.0 * 2.0 * c * config.layers * (tokens + cached);
                let embedding = tokens * (token_row + position_row + 4.0 * c);
                // Logits are written and read.
                let logits = rows * 4.0 * (c + 2.0 * v);
                let expected = weight_bytes + activations + kv + embedding + logits;
                assert!(
                    (found.bytes - expected).abs() < 1e-6 * expected,
                    "{name} {weights} {}: {} for {expected}",
                    phase.name(),
                    found.bytes
                );
            }
        }
    }
}

fn table(bundle: &TestBundle, flags: &[&str]) -> Output {
    let mut command = program("kiln-perf");
    command.arg("table").arg(bundle.path()).args(flags);
    command.output().unwrap()
}

fn steps(table: &Value) -> &Vec<Value> {
    table["models"][0]["steps"].as_array().unwrap()
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    assert!(found.is_some(), "{path} in {value}");
    found.unwrap()
}

#[test]
fn a_measured_table_adds_up() {
    let bundle = compile("tiny-opt", "int8");
    let file = bundle.beside("table.json");
    let path = file.to_string_lossy().into_owned();
    let flags = [
        "--threads",
        "1",
        "--repeat",
        "100",
        "--commit",
        "abc",
        "-o",
        &path,
        "--reference",
        "gemm",
    ];
    let text = success(&table(&bundle, &flags));
    let found: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(
        (&found["version"], &found["commit"]),
        (&1.into(), &"abc".into())
    );
    assert_eq!(found["machine"]["threads"], 1);
    let profile = found["machine"]["profile"].as_str();
    assert!(profile == Some("dev") || profile == Some("release"));
    assert_eq!(found["models"][0]["source"], "measured");
    let names: Vec<&str> = steps(&found)
        .iter()
        .map(|step| step["executable"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["prefill-t512", "decode-b1-kv128", "decode-b4-kv128"]
    );
    for step in steps(&found) {
        let rows = step["rows"].as_array().unwrap();
        // Embedding, qkv, attention, output, up, down, head, choice of tokens; in prefill, output, up and
        // down of the last layer are others.
        let counts: Vec<u64> = rows
            .iter()
            .map(|row| row["count"].as_u64().unwrap())
            .collect();
        match step["phase"] == "prefill" {
            true => assert_eq!(counts, [1, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1]),
            false => assert_eq!(counts, [1, 3, 3, 3, 3, 3, 1, 1]),
        }
        let remainder = number(step, "/remainder_us");
        let mut turns = vec![remainder; 100];
        for row in rows {
            let median = number(row, "/time/median_us");
            assert!(median > 0.0 && number(row, "/time/min_us") <= median);
            let samples = row["time"]["samples_us"].as_array().unwrap();
            assert_eq!(samples.len(), 100);
            for (turn, sample) in turns.iter_mut().zip(samples) {
                *turn += sample.as_f64().unwrap() * row["count"].as_f64().unwrap();
            }
            let linear = matches!(row["kernel"].as_str(), Some("linear" | "qkv"));
            assert_eq!(row.get("references").is_some(), linear);
        }
        let whole = number(step, "/time/median_us");
        assert!(remainder > 0.0 && remainder < whole);
        // Kernels and the steps that they are held against are timed in turn; the machine is busy.
        let steps = step["time"]["samples_us"].as_array().unwrap();
        let steps = steps.iter().map(|us| us.as_f64().unwrap());
        let mut shares: Vec<f64> = turns
            .iter()
            .zip(steps)
            .map(|(turn, us)| turn / us)
            .collect();
        shares.sort_unstable_by(f64::total_cmp);
        let explained = shares[shares.len() / 2];
        assert!((explained - 1.0).abs() < 0.15, "{explained} of {whole} us");
    }
    for part in [
        "layernorm + linear 64 -> 128 + bias + relu",
        "(4, 64) x (128, 64)",
        "remainder",
        "gemm f32",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

/// Attention's bytes grow with the positions that are there; 100 of them end within a block.
#[test]
fn a_sweep_gives_a_step_for_each_length() {
    let bundle = compile("tiny-opt", "f32");
    let flags = [
        "--executable",
        "decode-b4-kv128",
        // Once is enough.
        "--executable",
        "decode-b4-kv128",
        "--sweep-kv",
        "--kv-len",
        "100",
        "--repeat",
        "1",
        "--json",
    ];
    let found: Value = serde_json::from_str(&success(&table(&bundle, &flags))).unwrap();
    let lengths: Vec<u64> = steps(&found)
        .iter()
        .map(|step| step["kv_len"].as_u64().unwrap())
        .collect();
    assert_eq!(lengths, [16, 32, 64, 100, 128]);
    for step in steps(&found) {
        let rows = step["rows"].as_array().unwrap();
        let attention = rows
            .iter()
            .find(|row| row["kernel"] == "attention")
            .unwrap();
        let positions = 4.0 * number(step, "/kv_len");
        assert_eq!(
            number(attention, "/bytes"),
            4.0 * 2.0 * 64.0 * 4.0 + positions * 64.0 * 4.0
        );
        assert_eq!(number(attention, "/flops"), 4.0 * positions * 64.0);
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let bundle = compile("tiny-opt", "f32");
    let refused = |flags: &[&str], code: i32, expect: &str| {
        let message = failure(&table(&bundle, flags), code);
        assert!(message.contains(expect), "{message}");
    };
    refused(&["--threads", "0"], 2, "--threads");
    refused(&["--repeat", "0"], 2, "--repeat");
    refused(&["--repeat", "10001"], 2, "--repeat");
    refused(
        &["--device", "gpu"],
        2,
        "it must be auto, cpu, cuda or cuda:N",
    );
    refused(&["--gpu", "H100"], 1, "--gpu is not for cpu (");
    refused(
        &["--reference", "cublaslt"],
        1,
        "--reference cublaslt is not for cpu (",
    );
    refused(&["--reference", "blas"], 2, "cublaslt");
    refused(
        &["--executable", "decode-b9"],
        1,
        "has no executable `decode-b9`; it has prefill-t16",
    );
    refused(
        &["--kv-len", "129"],
        1,
        "decode-b1-kv128 takes 1 to 128 positions",
    );
    refused(&["--kv-len", "0"], 1, "not 0");
    refused(
        &["--tokens", "9999"],
        1,
        "prefill-t512 takes a prompt of 1 to 128 tokens",
    );
    refused(
        &["--executable", "decode-b1-kv128", "--tokens", "4"],
        1,
        "--tokens is for prefill, and there is none among decode-b1-kv128",
    );
    refused(
        &["--executable", "prefill-t16", "--sweep-kv"],
        1,
        "--sweep-kv is for decode, and there is none among prefill-t16",
    );
    refused(
        &["--target", "sm_90a"],
        1,
        "has no target `sm_90a`, only cpu",
    );
    refused(
        &["-o", "/no-such-folder/table.json", "--repeat", "1"],
        1,
        "cannot write",
    );
    refused(
        &[
            "--reference",
            "torch",
            "--python",
            "/no-such-python",
            "--repeat",
            "1",
        ],
        1,
        "cannot measure torch: /no-such-python",
    );
    if fs::metadata("/proc/driver/nvidia/version").is_err() {
        refused(&["--device", "cuda"], 1, "NVIDIA");
    }
}

/// As far as it goes without a CUDA compiler: what is refused.
#[test]
fn predictions_need_machine_code_and_a_gpu_of_the_target() {
    let options = CompileOptions {
        targets: vec![TargetChoice::Cuda(CudaTarget::Sm90a)],
        weights: Some("bf16".parse().unwrap()),
        emit_only: true,
        ..CompileOptions::default()
    };
    let bundle = TestBundle::compile(&fixture("tiny-gpt2"), &options);
    for (flags, expect) in [
        (
            vec!["--target", "sm_90a"],
            "has no machine code, only sources",
        ),
        (
            vec!["--target", "sm_90a", "--gpu", "A100"],
            "sm_90a cannot be predicted for A100; known GPUs that run it: H200, H100",
        ),
        (
            vec!["--target", "sm_90a", "--threads", "2"],
            "are for measurements",
        ),
        (vec!["--device", "cpu"], "has no target `cpu`, only sm_90a"),
        (vec!["--target", "cpu"], "has no target `cpu`, only sm_90a"),
    ] {
        let message = failure(&table(&bundle, &flags), 1);
        assert!(message.contains(expect), "{message}");
    }
}
