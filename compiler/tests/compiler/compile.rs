//! Whole compilations: determinism, and checkpoints, choices and outputs that must be refused with
//! nothing left behind.

use crate::fixture;
use kiln_bundle::{Bundle, BundleError, DType, FORMAT_VERSION, WeightFormat};
use kiln_compiler::{CompileOptions, Model, Silent, TargetChoice, compile, cuda::CudaTarget};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

fn compile_to(model: &Path, output: &Path, options: &CompileOptions) -> Result<(), String> {
    let model = Model::open(model).map_err(|error| error.to_string())?;
    compile(model, output, options, &Silent)
        .map(|_| ())
        .map_err(|error| error.to_string())
}

/// Compiles into a fresh directory, expects the error, and that nothing is left in the directory.
fn refuses(model: &Path, options: &CompileOptions, message: &str) {
    let dir = TempDir::new().unwrap();
    let error = compile_to(model, &dir.path().join("out.kiln"), options).unwrap_err();
    assert!(error.contains(message), "found: {error}\nneeded: {message}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A copy of a fixture whose tensors and config.json were changed.
fn changed(
    name: &str,
    tensors: impl FnOnce(&mut Tensors),
    config: impl FnOnce(String) -> String,
) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut map: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            (
                name.to_owned(),
                (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect();
    tensors(&mut map);
    let views = map.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let path = dir.path().join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, config(text)).unwrap();
    dir
}

fn with_tensors(change: impl FnOnce(&mut Tensors)) -> TempDir {
    changed("tiny-opt", change, |text| text)
}

const FC1: &str = "model.decoder.layers.1.fc1.weight";

#[test]
fn the_same_input_gives_the_same_bytes() {
    for model in ["tiny-opt", "tiny-gpt2"] {
        let dir = TempDir::new().unwrap();
        let outputs = ["a.kiln", "b.kiln"].map(|name| dir.path().join(name));
        for output in &outputs {
            compile_to(&fixture(model), output, &CompileOptions::default()).unwrap();
        }
        let [a, b] = outputs.map(|output| files(&output));
        assert!(a.contains_key("bundle.json") && a.contains_key("tokenizer.json"));
        assert_eq!(a, b);
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(&path).unwrap(),
            )
        })
        .collect()
}

#[test]
fn formats_of_one_checkpoint_give_one_bundle() {
    // tiny-opt-bin holds the f16 rounding of tiny-opt, under names with another prefix.
    let options = CompileOptions {
        weights: Some(WeightFormat::F16),
        ..CompileOptions::default()
    };
    let dir = TempDir::new().unwrap();
    let [a, b] = ["tiny-opt", "tiny-opt-bin"].map(|model| {
        let output = dir.path().join(model);
        compile_to(&fixture(model), &output, &options).unwrap();
        output
    });
    let matrices = |path: PathBuf| {
        let bytes = fs::read(path.join("weights-cpu.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let matrices = tensors
            .iter()
            .filter(|(_, view)| view.dtype() == Dtype::F16);
        matrices
            .map(|(name, view)| (name.to_owned(), view.data().to_vec()))
            .collect::<BTreeMap<_, _>>()
    };
    let [a, b] = [matrices(a), matrices(b)];
    assert!(!a.is_empty());
    assert_eq!(a, b);
}

#[test]
fn a_bundle_is_replaced_and_anything_else_is_not() {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("out.kiln");
    let options = CompileOptions::default();
    compile_to(&fixture("tiny-opt"), &output, &options).unwrap();
    compile_to(&fixture("tiny-gpt2"), &output, &options).unwrap();
    assert_eq!(
        Bundle::open(&output).unwrap().manifest().model.architecture,
        "gpt2"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let precious = dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.txt"), "chapter one").unwrap();
    let error = compile_to(&fixture("tiny-opt"), &precious, &options).unwrap_err();
    assert!(
        error.contains("exists and is not a kiln bundle; choose another output or remove it"),
        "{error}"
    );
    assert!(precious.join("thesis.txt").exists());
}

#[test]
fn tensors_that_do_not_fit_the_model() {
    let options = CompileOptions::default();
    let missing = with_tensors(|tensors| {
        tensors.remove(FC1);
    });
    refuses(
        missing.path(),
        &options,
        "tensor \"layers.1.fc1.weight\" is missing (for the weight layers.1.ffn.up.weight)",
    );
    let extra = with_tensors(|tensors| {
        tensors.insert(
            "model.decoder.layers.1.gate.weight".to_owned(),
            (Dtype::F32, vec![1], vec![0; 4]),
        );
    });
    refuses(
        extra.path(),
        &options,
        "tensor \"model.decoder.layers.1.gate.weight\" has no place in the model that config.json describes",
    );
    let reshaped = with_tensors(|tensors| {
        if let Some((_, shape, _)) = tensors.get_mut(FC1) {
            shape.reverse();
        }
    });
    refuses(
        reshaped.path(),
        &options,
        "has shape [64, 128], config.json asks for [128, 64]",
    );
    let poisoned = with_tensors(|tensors| {
        if let Some((_, _, data)) = tensors.get_mut(FC1) {
            data[3 * 64 * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
    });
    refuses(
        poisoned.path(),
        &options,
        "tensor \"model.decoder.layers.1.fc1.weight\" holds NaN in row 3; weights must be finite",
    );
}

#[test]
fn values_that_the_element_type_cannot_hold() {
    let large = with_tensors(|tensors| {
        if let Some((_, _, data)) = tensors.get_mut(FC1) {
            data[..4].copy_from_slice(&1e6f32.to_le_bytes());
        }
    });
    let options = CompileOptions {
        weights: Some(WeightFormat::F16),
        ..CompileOptions::default()
    };
    refuses(
        large.path(),
        &options,
        "weight layers.1.ffn.up.weight holds 1000000, which overflows f16; choose --weights bf16 or f32",
    );
}

#[test]
fn damaged_and_unknown_checkpoints() {
    let options = CompileOptions::default();
    let truncated = with_tensors(|_| {});
    let path = truncated.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    refuses(truncated.path(), &options, "model.safetensors");
    let other = changed(
        "tiny-opt",
        |_| {},
        |text| text.replace("\"opt\"", "\"llama\""),
    );
    refuses(other.path(), &options, "llama");
    let activation = changed(
        "tiny-opt",
        |_| {},
        |text| text.replace("\"relu\"", "\"silu\""),
    );
    refuses(activation.path(), &options, "activation_function");
    let empty = TempDir::new().unwrap();
    refuses(empty.path(), &options, "config.json");
}

#[test]
fn choices_that_cannot_be_honoured() {
    let refused =
        |options: CompileOptions, message: &str| refuses(&fixture("tiny-opt"), &options, message);
    let default = CompileOptions::default;
    refused(
        CompileOptions {
            max_batch: 0,
            ..default()
        },
        "--max-batch is 0; it must be from 1 to 4096",
    );
    refused(
        CompileOptions {
            max_seq_len: Some(129),
            ..default()
        },
        "--max-seq-len is 129; it must be from 1 to 128, the positions of the model",
    );
    refused(
        CompileOptions {
            prefill_buckets: vec![],
            ..default()
        },
        "--prefill-buckets is empty; give at least one number",
    );
    refused(
        CompileOptions {
            decode_kv: vec![64, 0],
            ..default()
        },
        "--decode-kv is 0",
    );
}

#[test]
fn an_output_that_cannot_be_written() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = compile_to(
        &fixture("tiny-opt"),
        &file.join("out.kiln"),
        &CompileOptions::default(),
    )
    .unwrap_err();
    assert!(error.contains("cannot create"), "{error}");
    let full = Path::new("/dev/full");
    if full.exists() {
        let error = compile_to(
            &fixture("tiny-opt"),
            &full.join("out.kiln"),
            &CompileOptions::default(),
        )
        .unwrap_err();
        assert!(error.contains("cannot create"), "{error}");
    }
}

#[test]
fn limits_become_buckets() {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("out.kiln");
    let options = CompileOptions {
        max_batch: 3,
        max_seq_len: Some(100),
        prefill_buckets: vec![64, 16, 1024],
        decode_batch: vec![1, 2, 8],
        decode_kv: vec![32, 4096],
        ..CompileOptions::default()
    };
    compile_to(&fixture("tiny-opt"), &output, &options).unwrap();
    let bundle = Bundle::open(&output).unwrap();
    let names: Vec<&str> = bundle.manifest().targets[0]
        .executables
        .iter()
        .map(|e| e.name.as_str())
        .collect();
    let expected = [
        "prefill-t16",
        "prefill-t64",
        "prefill-t300",
        "prefill-t300-hidden",
        "decode-b1-kv32",
        "decode-b1-kv100",
        "decode-b2-kv32",
        "decode-b2-kv100",
        "decode-b3-kv32",
        "decode-b3-kv100",
    ];
    assert_eq!(names, expected);
}

/// Applies a change to bundle.json's text and opens the bundle.
fn opened(change: impl FnOnce(String) -> String) -> BundleError {
    opened_of(&CompileOptions::default(), change)
}

fn opened_of(options: &CompileOptions, change: impl FnOnce(String) -> String) -> BundleError {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("out.kiln");
    compile_to(&fixture("tiny-opt"), &output, options).unwrap();
    let path = output.join("bundle.json");
    let text = fs::read_to_string(&path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed, "the change changes nothing");
    fs::write(&path, changed).unwrap();
    match Bundle::open(&output) {
        Err(error) => error,
        Ok(bundle) => bundle
            .weights(&bundle.manifest().targets[0])
            .map(|_| ())
            .unwrap_err(),
    }
}

#[test]
fn manifests_that_lie_are_refused() {
    let refused = |old: &str, new: &str, message: &str| {
        let error = opened(|text| text.replacen(old, new, 1)).to_string();
        assert!(error.contains(message), "found: {error}\nneeded: {message}");
    };
    let (this, next) = (FORMAT_VERSION, FORMAT_VERSION + 1);
    refused(
        &format!("\"format_version\": {this}"),
        &format!("\"format_version\": {next}"),
        &format!(
            "has bundle format {next} (written by kiln 0.1.0); this kiln reads format {this}: use a newer kiln"
        ),
    );
    refused(
        "\"layers\": 3",
        "\"layers\": 0",
        "layers is 0; it must be from 1",
    );
    refused(
        "\"hidden_states\": false",
        "\"hidden_states\": true",
        "its program and its bounds disagree on hidden states",
    );
    refused(
        "\"layers\": 3",
        "\"layers\": 2",
        "layer 2 of 2 does not exist",
    );
    refused(
        "\"heads\": 4",
        "\"heads\": 5",
        "hidden_size is 64, but heads * head_dim is 5 * 16",
    );
    refused(
        "\"vocab_size\": 300",
        "\"vocab_size\": 301",
        "buffer b16 is (Logits, 300), needed is (Logits, 301)",
    );
    refused(
        "\"max_seq_len\": 128",
        "\"max_seq_len\": 129",
        "max_seq_len is 129, above the model's 128 positions",
    );
    refused(
        "\"in_features\": 64",
        "\"in_features\": 63",
        "needed is (Tokens, 63)",
    );
    refused(
        "\"width\": 192",
        "\"width\": 4294967295",
        "width is 4294967295",
    );
    refused(
        "\"arena_bytes\": ",
        "\"arena_bytes\": 1, \"was\": ",
        "outside the arena of 1 bytes",
    );
    refused(
        "\"max_tokens\": 16",
        "\"max_tokens\": 16000000",
        "outside the arena",
    );
    refused(
        "weights-cpu.safetensors\": {",
        "../weights-cpu.safetensors\": {",
        "is not listed in files",
    );
    refused(
        "\"tokenizer.json\": {",
        "\"../tokenizer.json\": {",
        "which is not inside the bundle",
    );
    refused(
        "\"weight\": \"layers.0.attention.out.weight\"",
        "\"weight\": \"layers.9.weight\"",
        "tensor \"layers.9.weight\" is missing",
    );
    refused(
        "\"weights\": \"f32\"",
        "\"weights\": \"f16\"",
        "needed is f16",
    );
    let overlap = opened(|text| {
        // Every buffer at the start of the arena: kernels would write over their inputs.
        let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        for offset in manifest["targets"][0]["executables"][0]["offsets_bytes"]
            .as_array_mut()
            .unwrap()
        {
            *offset = 0.into();
        }
        manifest.to_string()
    });
    assert!(
        overlap.to_string().contains("writes b1 over its input b0"),
        "{overlap}"
    );
}

fn for_gpus(targets: &[CudaTarget]) -> CompileOptions {
    CompileOptions {
        targets: targets.iter().copied().map(TargetChoice::Cuda).collect(),
        emit_only: true,
        prefill_buckets: vec![16, 128],
        decode_batch: vec![1],
        max_batch: 2,
        ..CompileOptions::default()
    }
}

#[test]
fn one_bundle_serves_the_cpu_and_several_gpus() {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("out.kiln");
    let mut options = for_gpus(&[CudaTarget::Sm90a, CudaTarget::Sm80, CudaTarget::Sm90a]);
    options.targets.push(TargetChoice::Cpu);
    compile_to(&fixture("tiny-opt"), &output, &options).unwrap();
    let bundle = Bundle::open(&output).unwrap();
    let manifest = bundle.manifest();
    let names: Vec<&str> = manifest.targets.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["cpu", "sm_80", "sm_90a"]);
    let [cpu, sm_80, sm_90a] = &manifest.targets[..] else {
        panic!("three targets");
    };
    // The checkpoint is f32; tensor cores are not, and a bundle has one type of weights.
    assert_eq!((cpu.weights, cpu.dtype), (WeightFormat::F16, DType::F16));
    assert_eq!(sm_80.weights_file, sm_90a.weights_file);
    assert_eq!(sm_80.executables, sm_90a.executables);
    assert!(cpu.executables.iter().all(|e| e.launches.is_empty()));
    for target in &manifest.targets {
        bundle.weights(target).unwrap();
    }
    assert!(manifest.files.contains_key("cuda/kiln/ptx.cuh"));
    for image in &sm_80.images {
        assert_eq!(image.cubin, None);
        assert!(manifest.files.contains_key(&image.source));
        let source = fs::read_to_string(output.join(&image.source)).unwrap();
        assert!(source.contains(&format!("\n{}(", image.entry)));
    }
    // The self-test's tolerance allows for 16-bit activations.
    assert!(manifest.self_test.tolerance >= 1e-3);
}

#[test]
fn a_gpu_bundle_is_deterministic() {
    let dir = TempDir::new().unwrap();
    let outputs = ["a.kiln", "b.kiln"].map(|name| dir.path().join(name));
    for output in &outputs {
        let options = for_gpus(&[CudaTarget::Sm89]);
        compile_to(&fixture("tiny-gpt2"), output, &options).unwrap();
    }
    let [a, b] = outputs.map(|output| fs::read(output.join("bundle.json")).unwrap());
    // It lists the hash of every other file.
    assert!(a == b);
}

#[test]
fn gpus_take_16_bits() {
    let options = CompileOptions {
        dtype: Some(DType::F32),
        ..for_gpus(&[CudaTarget::Sm80])
    };
    refuses(
        &fixture("tiny-opt"),
        &options,
        "--dtype is f32; a CUDA target takes f16 or bf16, the same for --dtype, --weights and --lm-head",
    );
    let options = CompileOptions {
        dtype: Some(DType::Bf16),
        weights: Some(WeightFormat::F16),
        ..for_gpus(&[CudaTarget::Sm80])
    };
    refuses(&fixture("tiny-opt"), &options, "--weights is f16");
}

#[test]
fn launches_that_lie_are_refused() {
    let refused = |change: &dyn Fn(&mut serde_json::Value), message: &str| {
        let error = opened_of(&for_gpus(&[CudaTarget::Sm80]), |text| {
            let mut manifest = serde_json::from_str(&text).unwrap();
            change(&mut manifest);
            manifest.to_string()
        });
        let error = error.to_string();
        assert!(error.contains(message), "found: {error}\nneeded: {message}");
    };
    let launch = |manifest: &mut serde_json::Value, key: &str, value: serde_json::Value| {
        manifest["targets"][0]["executables"][0]["launches"][1][key] = value;
    };
    refused(
        &|m| launch(m, "image", 999.into()),
        "launch 1: image 999 does not exist",
    );
    refused(
        &|m| launch(m, "kernel", 999.into()),
        "launch 1: kernel 999 does not exist or comes too late",
    );
    refused(
        &|m| launch(m, "grid", vec![1, 0, 1].into()),
        "launch 1: grid is 1 x 0 x 1",
    );
    let argument = |value: serde_json::Value| serde_json::Value::from(vec![value]);
    refused(
        &|m| launch(m, "arguments", argument(serde_json::json!({"buffer": 999}))),
        "buffer b999 does not exist",
    );
    refused(
        &|m| launch(m, "arguments", argument(serde_json::json!({"weight": "w"}))),
        "no kernel of the program uses \"w\"",
    );
    refused(
        &|m| launch(m, "arguments", argument(serde_json::json!({"kv_layer": 3}))),
        "layer 3 of 3 does not exist",
    );
    refused(
        &|m| {
            let workspace = serde_json::json!({"workspace": {"offset_bytes": 1u64 << 60}});
            launch(m, "arguments", argument(workspace));
        },
        "workspace has no byte",
    );
    refused(
        &|m| m["targets"][0]["copy_blocks"]["image"] = 999.into(),
        "copy_blocks: image 999 does not exist",
    );
    refused(
        &|m| m["targets"][0]["copy_blocks"]["grid_x"] = 0.into(),
        "copy_blocks: grid_x is 0",
    );
    refused(
        &|m| m["targets"][0]["copy_blocks"] = serde_json::Value::Null,
        "copy_blocks: a target with images has one",
    );
    refused(
        &|m| m["targets"][0]["images"][0]["entry"] = "a b".into(),
        "entry \"a b\" is no identifier",
    );
    refused(
        &|m| m["targets"][0]["images"][0]["cubin"] = "../x".into(),
        "\"../x\" is not listed in files",
    );
    refused(
        &|m| m["targets"][0]["images"][0]["block_threads"] = 2048.into(),
        "block_threads is 2048",
    );
}
