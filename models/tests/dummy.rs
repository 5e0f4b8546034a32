//! Generated weights: complete, reproducible by range, and of the promised scale.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use kiln_ir::DType;
use kiln_models::{
    builtin::{builtin, builtin_names, parameters},
    checkpoint::{self, Checkpoint, export_hf},
    config::ModelConfig,
    dummy::DummyCheckpoint,
};

fn tiny(base: &str, dtype: DType) -> ModelConfig {
    let mut config = builtin(base).unwrap();
    (config.vocab_size, config.layers, config.heads) = (301, 2, 3);
    (config.hidden_size, config.ffn_size, config.max_positions) = (33, 65, 40);
    config.embed_size = if base == "opt-350m" { 17 } else { 33 };
    config.attention_scale = (1.0 / 11f64.sqrt()) as f32;
    ModelConfig { dtype, ..config }
}

#[test]
fn every_parameter_is_there() {
    for name in builtin_names() {
        let mut config = builtin(name).unwrap();
        for tied in [true, false] {
            config.tied_head = tied;
            let dummy = DummyCheckpoint::new(&config, 0);
            let elements: u64 = dummy.tensors().values().map(|t| t.elements() as u64).sum();
            assert_eq!(elements, parameters(&config), "{name}");
        }
    }
}

#[test]
fn any_range_of_rows_is_the_same_bytes() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let dummy = DummyCheckpoint::new(&tiny("opt-350m", dtype), 3);
        for (name, info) in dummy.tensors() {
            let whole = dummy.read(name).unwrap();
            let rows = info.rows();
            for range in [0..0, 0..1, 1..2, rows / 3..rows - 1, rows - 1..rows] {
                let part = dummy.read_rows(name, range.clone()).unwrap();
                let bytes = range.start * info.row_bytes()..range.end * info.row_bytes();
                assert_eq!(part.bytes, whole.bytes[bytes], "{name} {range:?}");
            }
        }
    }
}

#[test]
fn seeds_and_names_give_different_values() {
    let config = tiny("opt-125m", DType::F32);
    let (a, b) = (
        DummyCheckpoint::new(&config, 1),
        DummyCheckpoint::new(&config, 2),
    );
    let name = |layer, part| format!("model.decoder.layers.{layer}.self_attn.{part}_proj.weight");
    let q = a.read(&name(0, "q")).unwrap().bytes;
    assert_ne!(q, b.read(&name(0, "q")).unwrap().bytes);
    assert_ne!(q, a.read(&name(0, "k")).unwrap().bytes);
    assert_ne!(q, a.read(&name(1, "q")).unwrap().bytes);
    assert_eq!(
        q,
        DummyCheckpoint::new(&config, 1)
            .read(&name(0, "q"))
            .unwrap()
            .bytes
    );
}

#[test]
fn values_have_the_scale_of_their_tensor() {
    let dummy = DummyCheckpoint::new(&builtin("opt-125m").unwrap(), 5);
    let moments = |name: &str| {
        let rows = dummy.info(name).unwrap().rows().min(512);
        let values = dummy.read_rows(name, 0..rows).unwrap().to_f32().unwrap();
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        (mean, var.sqrt())
    };
    let (mean, std) = moments("model.decoder.embed_tokens.weight");
    assert!(
        mean.abs() < 1e-3 && (std * 768f32.sqrt() - 1.0).abs() < 0.02,
        "{mean} {std}"
    );
    let (mean, std) = moments("model.decoder.layers.11.self_attn_layer_norm.weight");
    assert!(
        (mean - 1.0).abs() < 0.01 && (std - 0.05).abs() < 0.01,
        "{mean} {std}"
    );
    let (mean, _) = moments("model.decoder.layers.0.fc1.bias");
    assert!(mean < -0.9, "{mean}");
}

#[test]
fn exported_weights_read_back() {
    let dir = tempfile::tempdir().unwrap();
    for (base, dtype) in [
        ("opt-125m", DType::F16),
        ("gpt2", DType::F32),
        ("opt-350m", DType::Bf16),
    ] {
        let config = tiny(base, dtype);
        let dummy = DummyCheckpoint::new(&config, 11);
        let path = dir.path().join(base);
        export_hf(&path, &config, &dummy).unwrap();
        assert_eq!(ModelConfig::load(&path).unwrap(), config);
        let read = checkpoint::open(&path).unwrap();
        assert_eq!(read.tensors(), dummy.tensors());
        for name in read.tensors().keys() {
            assert_eq!(read.read(name).unwrap(), dummy.read(name).unwrap());
        }
        let mut names: Vec<_> = path
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors"]);
    }
}
