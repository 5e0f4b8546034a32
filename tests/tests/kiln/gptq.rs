//! Checkpoints that GPTQ has rounded, as they are: `tests/fixtures/make_gptq.py` makes them.

use kiln_bundle::{Bundle, IntFormat, WeightFormat, packing::PANEL};
use kiln_compiler::{
    CompileOptions, Compiled, Model, Silent, TargetChoice, compile, cuda::CudaTarget,
};
use kiln_tests::{TestBundle, deviation, failure, fixture, program, success, tensors};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::{fs, path::Path};
use tempfile::TempDir;

/// Sums in f32, as everywhere.
const EXACT: f32 = 1e-4;
/// Scales and minima in bf16, which is the only difference: a scale is off by up to 2^-9 of itself, and
/// a minimum by up to 2^-9 of some eight steps, so a weight by about a hundredth of its step. Through three
/// layers of random weights that was at most 0.019 of the largest logit with 4 bits and zero points of
/// any size (OPT), 0.007 with those of 8 (GPT-2), 0.006 with 8 bits; against 1e-6 without.
const SCALES: f32 = 0.025;
/// Weights in f16, 2^-11 of themselves off.
const HALVES: f32 = 2e-3;

fn options(weights: Option<&str>) -> CompileOptions {
    CompileOptions {
        weights: weights.map(|weights| weights.parse().unwrap()),
        ..CompileOptions::default()
    }
}

/// The manifest and notes of a compilation.
fn compiled(model: &str, options: &CompileOptions) -> Compiled {
    let dir = TempDir::new().unwrap();
    let model = Model::open(&fixture(model)).unwrap();
    compile(model, &dir.path().join("bundle"), options, &Silent).unwrap()
}

/// Compares the logits of a bundle with the expected ones of a fixture.
fn check_logits(bundle: &TestBundle, model: &str, tolerance: f32) {
    let expected = tensors(&fixture(&format!("expected/{model}.safetensors")));
    let text = fs::read_to_string(fixture(&format!("expected/{model}.json"))).unwrap();
    let cases: Value = serde_json::from_str(&text).unwrap();
    let prompts = cases["prompts"].as_array().unwrap();
    let requests: Vec<Value> = prompts
        .iter()
        .map(|prompt| json!({"prompt_ids": prompt["prompt_ids"], "max_new_tokens": 1}))
        .collect();
    let found = bundle.generate(&requests, &[], None);
    for (name, expected) in &expected {
        let rows = expected.shape[0];
        let off = deviation(found.logits[name].first_rows(rows)[0], &expected.data);
        assert!(
            off < tolerance,
            "{model}, {name}: off by {off} of {tolerance}"
        );
    }
}

#[test]
fn integers_compute_what_they_stand_for() {
    for (model, weights, tolerance) in [
        ("tiny-opt-gptq", None, SCALES),
        ("tiny-opt-gptq8", None, SCALES),
        ("tiny-gpt2-gptq", None, SCALES),
        ("tiny-opt-gptq-act", None, HALVES),
        ("tiny-opt-gptq", Some("f32"), EXACT),
        ("tiny-opt-gptq8", Some("f32"), EXACT),
        ("tiny-gpt2-gptq", Some("f32"), EXACT),
        ("tiny-opt-gptq-act", Some("f32"), EXACT),
    ] {
        let bundle = TestBundle::compile(&fixture(model), &options(weights));
        check_logits(&bundle, model, tolerance);
    }
}

#[test]
fn a_checkpoint_keeps_its_own_format() {
    for (model, weights, kept) in [
        ("tiny-opt-gptq", "int4:g32", true),
        ("tiny-opt-gptq8", "int8", true),
        ("tiny-gpt2-gptq", "int4:g32", true),
        ("tiny-opt-gptq-act", "f16", false),
    ] {
        let Compiled {
            manifest, notes, ..
        } = compiled(model, &options(None));
        let target = &manifest.targets[0];
        assert_eq!(target.weights.to_string(), weights);
        // The checkpoint has no integers for it.
        assert_eq!(target.lm_head(), Some(WeightFormat::F16));
        assert_eq!(notes.is_empty(), kept, "{notes:?}");
        if !kept {
            assert!(
                notes[0].contains("desc_act") && notes[0].contains("floating-point"),
                "{notes:?}"
            );
        }
    }
    // GPUs get the same integers, and 16 bits for what is none.
    let options_for_both = CompileOptions {
        targets: vec![TargetChoice::Cpu, TargetChoice::Cuda(CudaTarget::Sm90a)],
        emit_only: true,
        ..options(None)
    };
    let Compiled {
        manifest, notes, ..
    } = compiled("tiny-opt-gptq", &options_for_both);
    assert!(notes.is_empty(), "{notes:?}");
    for target in &manifest.targets {
        assert_eq!(target.weights.to_string(), "int4:g32");
        assert_eq!(target.lm_head(), Some(WeightFormat::F16));
    }
    // 18 linears of OPT that another format does not hold.
    let notes = compiled("tiny-opt-gptq", &options(Some("int4:g64"))).notes;
    assert!(
        notes[0].starts_with("18 matrices") && notes[0].contains("rounded again"),
        "{notes:?}"
    );
}

/// Codes of a packed matrix, (rows, K), missing rows included.
fn unpack(format: IntFormat, k: usize, packed: &[u8]) -> Vec<Vec<u8>> {
    let panel_bytes = format.panel_bytes(k);
    let mut rows = vec![];
    for panel in packed.chunks(panel_bytes) {
        for lane in 0..PANEL {
            let code = |input: usize| {
                let group = format.group(k);
                let start = input / group * format.group_bytes(group) + format.header_bytes();
                let input = input % group;
                match format {
                    IntFormat::Int8 { .. } => {
                        panel[start + 4 * (input / 4 * PANEL + lane) + input % 4] ^ 128
                    }
                    IntFormat::Int4 { .. } => {
                        let byte = start + 4 * (input / 8 * PANEL + lane) + input % 8 / 2;
                        (panel[byte] >> (4 * (input % 2))) & 15
                    }
                }
            };
            rows.push((0..k).map(code).collect());
        }
    }
    rows
}

/// Codes of a checkpoint's linear, (N, K).
fn codes(checkpoint: &SafeTensors<'_>, linear: &str, bits: usize) -> Vec<Vec<u8>> {
    let tensor = checkpoint.tensor(&format!("{linear}.qweight")).unwrap();
    let outputs = tensor.shape()[1];
    let per_word = 32 / bits;
    let code = |output: usize, input: usize| {
        let at = 4 * (input / per_word * outputs + output);
        let word = u32::from_le_bytes(tensor.data()[at..at + 4].try_into().unwrap());
        (word >> (input % per_word * bits)) as u8 & (u8::MAX >> (8 - bits))
    };
    let inputs = tensor.shape()[0] * per_word;
    (0..outputs)
        .map(|output| (0..inputs).map(|input| code(output, input)).collect())
        .collect()
}

#[test]
fn codes_are_not_rounded_again() {
    let opt = [
        (
            "attention.qkv",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        ),
        ("attention.out", "self_attn.out_proj"),
        ("ffn.up", "fc1"),
        ("ffn.down", "fc2"),
    ];
    let gpt2 = [
        ("attention.qkv", "attn.c_attn"),
        ("attention.out", "attn.c_proj"),
        ("ffn.up", "mlp.c_fc"),
        ("ffn.down", "mlp.c_proj"),
    ];
    for (model, bits, layers, linears) in [
        ("tiny-opt-gptq", 4, "model.decoder.layers", opt),
        ("tiny-opt-gptq8", 8, "model.decoder.layers", opt),
        ("tiny-gpt2-gptq", 4, "h", gpt2),
    ] {
        let bundle = TestBundle::compile(&fixture(model), &options(None));
        let manifest = Bundle::open(&bundle.path()).unwrap().manifest().clone();
        let target = &manifest.targets[0];
        let format = target.weights.int().unwrap();
        let read = |path| fs::read(path).unwrap();
        let packed = read(bundle.path().join(&target.weights_file));
        let checkpoint = read(fixture(model).join("model.safetensors"));
        let packed = SafeTensors::deserialize(&packed).unwrap();
        let checkpoint = SafeTensors::deserialize(&checkpoint).unwrap();
        for layer in 0..manifest.model.layers {
            for (name, parts) in linears {
                let needed: Vec<Vec<u8>> = parts
                    .split(' ')
                    .flat_map(|part| codes(&checkpoint, &format!("{layers}.{layer}.{part}"), bits))
                    .collect();
                let tensor = format!("layers.{layer}.{name}.weight");
                let found = unpack(
                    format,
                    needed[0].len(),
                    packed.tensor(&tensor).unwrap().data(),
                );
                assert_eq!(found[..needed.len()], needed[..], "{model}: {tensor}");
            }
        }
    }
}

#[test]
fn bundles_verify_and_evaluate() {
    let dir = TempDir::new().unwrap();
    let bundle = dir.path().join("out.kiln");
    for model in [
        "tiny-opt-gptq",
        "tiny-opt-gptq8",
        "tiny-opt-gptq-act",
        "tiny-gpt2-gptq",
    ] {
        let output = program("kilnc")
            .arg("compile")
            .arg(fixture(model))
            .arg("--json")
            .arg("--eval")
            .arg(fixture("calibration.txt"))
            .args(["--eval-tokens", "200", "-o"])
            .arg(&bundle)
            .output()
            .unwrap();
        let report: Value = serde_json::from_str(&success(&output)).unwrap();
        let [before, after] = ["perplexity_before", "perplexity_after"]
            .map(|field| report["eval"][field].as_f64().unwrap());
        assert!(
            (after / before - 1.0).abs() < 0.01,
            "{model}: {after} for {before}"
        );
        success(&program("kiln").arg("verify").arg(&bundle).output().unwrap());
    }
}

/// Writes what a checkpoint's integers stand for.
fn export(model: &str, dir: &Path) {
    let mut command = program("kilnc");
    command.arg("export").arg(fixture(model)).arg("-o").arg(dir);
    assert!(command.status().unwrap().success());
}

#[test]
fn what_is_not_of_integers_keeps_its_type() {
    let dir = TempDir::new().unwrap();
    export("tiny-opt-gptq", dir.path());
    let weights = dir.path().join("model.safetensors");
    let [own, exported] = [fixture("tiny-opt-gptq/model.safetensors"), weights.clone()];
    let [own, exported] = [own, exported].map(|path| fs::read(path).unwrap());
    let [own, exported] = [&own, &exported].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let is_attention = |name: &str| name.contains("self_attn.");
    let own = own.iter().filter(|(name, _)| !is_attention(name));
    let exported = exported.iter().filter(|(name, _)| is_attention(name));
    let mixed = safetensors::serialize(own.chain(exported), None).unwrap();
    fs::write(&weights, mixed).unwrap();
    fs::copy(
        fixture("tiny-opt-gptq/config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();

    let bundle = TestBundle::compile(dir.path(), &options(None));
    let manifest = Bundle::open(&bundle.path()).unwrap().manifest().clone();
    let target = &manifest.targets[0];
    let format = |matrix: &str| {
        target
            .format(&format!("layers.1.{matrix}.weight"))
            .to_string()
    };
    let found = ["attention.qkv", "attention.out", "ffn.up", "ffn.down"].map(format);
    assert_eq!(found, ["f16", "f16", "int4:g32", "int4:g32"]);
    check_logits(&bundle, "tiny-opt-gptq", SCALES);
}

#[test]
fn exported_checkpoints_hold_what_integers_stand_for() {
    let dir = TempDir::new().unwrap();
    export("tiny-opt-gptq", dir.path());
    let [own, exported] = [&fixture("tiny-opt-gptq"), dir.path()].map(|model| {
        let model = Model::open(model).unwrap();
        let bundle = dir.path().join("bundle");
        compile(model, &bundle, &options(Some("f32")), &Silent)
            .unwrap()
            .manifest
    });
    assert_eq!(own.self_test, exported.self_test);
    assert_eq!(
        own.files["weights-cpu.safetensors"],
        exported.files["weights-cpu.safetensors"]
    );
}

#[test]
fn nothing_is_calibrated_where_codes_are_kept() {
    let output = program("kilnc")
        .arg("compile")
        .arg(fixture("tiny-opt-gptq"))
        .args([
            "-o",
            "unwritten.kiln",
            "--weights",
            "int4:g32",
            "--calibrate",
        ])
        .arg(fixture("calibration.txt"))
        .output()
        .unwrap();
    let found = failure(&output, 1);
    assert!(found.contains("own integers are kept"), "{found}");
}
