//! Checkpoints of GPTQ: what is read, what is refused, and in which words.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use common::safetensors;
use kiln_models::{
    Checkpoint, GptqConfig, ModelConfig, builtin,
    checkpoint::{self, dequantised},
};
use proptest::prelude::*;
use serde_json::{Map, json};
use std::{collections::BTreeMap, fs};

/// Name to element type, shape and bytes.
type Tensors = BTreeMap<&'static str, (&'static str, Vec<usize>, Vec<u8>)>;

const BITS: u32 = 4;
/// Of the linear below.
const N: usize = 8;
const K: usize = 24;

fn words(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn code(output: usize, input: usize) -> u32 {
    ((output * 5 + input * 3) % 16) as u32
}

/// A word of eight numbers of four bits.
fn word(number: impl Fn(usize) -> u32) -> u32 {
    (0..8).map(|at| number(at) << (4 * at)).sum()
}

/// A linear of two groups of inputs, the second of which is shorter: scales 0.5 and 0.25, zero points
/// 8 and, of output n, n + 1.
fn linear() -> Tensors {
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    let qweight = (0..K / 8).flat_map(|at| (0..N).map(move |n| word(|i| code(n, at * 8 + i))));
    BTreeMap::from([
        ("a.qweight", ("I32", vec![K / 8, N], words(qweight))),
        (
            "a.qzeros",
            ("I32", vec![2, 1], words([word(|_| 7), word(|n| n as u32)])),
        ),
        (
            "a.scales",
            (
                "F16",
                vec![2, N],
                [[half(0.5); N], [half(0.25); N]].concat().concat(),
            ),
        ),
        (
            "a.g_idx",
            ("I32", vec![K], words((0..K).map(|k| (k / 16) as u32))),
        ),
        ("a.bias", ("F16", vec![N], [half(1.0); N].concat())),
    ])
}

fn file(tensors: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), vec![]);
    for (name, (dtype, shape, bytes)) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    safetensors(&serde_json::Value::Object(header).to_string(), &data)
}

fn config(model: &str, zeros_less_one: bool) -> ModelConfig {
    ModelConfig {
        quantisation: Some(GptqConfig {
            bits: BITS,
            group_size: Some(16),
            zeros_less_one,
        }),
        ..builtin(model).unwrap()
    }
}

/// Opens a file as the checkpoint of a model; else the message, in which the file's path is `FILE`.
fn open(bytes: &[u8], config: &ModelConfig) -> Result<Box<dyn Checkpoint>, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let file = dir.path().join("model.safetensors").display().to_string();
    checkpoint::open(dir.path())
        .and_then(|checkpoint| dequantised(checkpoint, config))
        .map_err(|error| error.to_string().replace(&file, "FILE"))
}

fn value(output: usize, input: usize, zeros_less_one: bool) -> f32 {
    let less_one = if zeros_less_one { 0.0 } else { 1.0 };
    let (scale, zero) = match input < 16 {
        true => (0.5, 8.0),
        false => (0.25, output as f32 + 1.0),
    };
    scale * (code(output, input) as f32 - (zero - less_one))
}

#[test]
fn weights_are_what_integers_stand_for() {
    for zeros_less_one in [true, false] {
        let file = open(&file(&linear()), &config("opt-125m", zeros_less_one)).unwrap();
        assert_eq!(
            file.tensors().keys().collect::<Vec<_>>(),
            ["a.bias", "a.weight"]
        );
        let weight = file.read("a.weight").unwrap();
        assert_eq!(weight.info.shape, [N, K]);
        let needed: Vec<f32> = (0..N * K)
            .map(|at| value(at / K, at % K, zeros_less_one))
            .collect();
        assert_eq!(weight.to_f32().unwrap(), needed);
        let part = file.read_rows("a.weight", 3..5).unwrap().to_f32().unwrap();
        assert_eq!(part, needed[3 * K..5 * K]);
        assert_eq!(file.read("a.bias").unwrap().to_f32().unwrap(), [1.0; N]);
    }
    // GPT-2 has its weights as (K, N).
    let file = open(&file(&linear()), &config("gpt2", true)).unwrap();
    let weight = file.read("a.weight").unwrap();
    assert_eq!(weight.info.shape, [K, N]);
    let needed: Vec<f32> = (0..N * K).map(|at| value(at % N, at / N, true)).collect();
    assert_eq!(weight.to_f32().unwrap(), needed);
}

#[test]
fn what_is_known_of_a_matrix() {
    let file = open(&file(&linear()), &config("opt-125m", true)).unwrap();
    let gptq = file.quantised().unwrap();
    let matrix = gptq.matrix("a.weight").unwrap();
    assert_eq!(matrix.bits, BITS);
    assert!(!matrix.symmetric);
    let group_of: Vec<u32> = (0..K).map(|k| (k / 16) as u32).collect();
    assert_eq!(matrix.group_of, group_of);
    let codes = gptq.codes("a.weight").unwrap();
    assert_eq!(u32::from(codes.codes[5 * N + 3]), code(3, 5));
    assert_eq!(codes.zeros[N..], [1, 2, 3, 4, 5, 6, 7, 8]);
    // One is taken from words, where 0 borrows from the next zero point.
    let zeros = [8, 0, 8, 3, 0, 0, 5, 0];
    let mut tensors = linear();
    let borrowed = word(|at| zeros[at]).wrapping_sub(0x1111_1111);
    tensors.get_mut("a.qzeros").unwrap().2 = words([borrowed, 0]);
    let borrowing = open(&self::file(&tensors), &config("opt-125m", true)).unwrap();
    let codes = borrowing.quantised().unwrap().codes("a.weight").unwrap();
    assert_eq!(codes.zeros[..N], zeros.map(|zero| zero as u8));
    assert!(gptq.matrix("a.bias").is_none() && gptq.codes("a.bias").is_err());
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Tensors), message: &str) {
    let mut tensors = linear();
    change(&mut tensors);
    let found = open(&file(&tensors), &config("opt-125m", true)).err();
    assert_eq!(found.as_deref(), Some(message));
}

#[test]
fn what_is_missing_or_does_not_fit_is_refused() {
    for part in ["a.qzeros", "a.scales", "a.g_idx"] {
        refused(
            |tensors| drop(tensors.remove(part)),
            &format!(
                "FILE: tensor \"a.qweight\": found no tensor {part:?} beside it; needed all of qweight, \
                 qzeros, scales and g_idx"
            ),
        );
    }
    refused(
        |tensors| drop(tensors.remove("a.qweight")),
        "FILE: found no tensor that ends in .qweight; needed those of a GPTQ checkpoint, which config.json \
         says that it is (quantization_config); download the file again",
    );
    refused(
        |tensors| drop(tensors.insert("a.weight", ("F32", vec![1], vec![0; 4]))),
        "FILE: tensor \"a.weight\": found \"a.qweight\" beside it; needed one of the two",
    );
    refused(
        |tensors| tensors.get_mut("a.qweight").unwrap().0 = "F32",
        "FILE: tensor \"a.qweight\": found F32 of shape [3, 8]; needed I32 of 2 dimensions",
    );
    refused(
        |tensors| tensors.get_mut("a.g_idx").unwrap().1 = vec![2, 12],
        "FILE: tensor \"a.g_idx\": found I32 of shape [2, 12]; needed I32 of 1 dimensions",
    );
    refused(
        |tensors| drop(tensors.insert("a.qweight", ("I32", vec![4, 6], vec![0; 96]))),
        "FILE: tensor \"a.qweight\": found shape [4, 6]; needed outputs in a multiple of 8",
    );
    refused(
        |tensors| drop(tensors.insert("a.qweight", ("I32", vec![0, 8], vec![]))),
        "FILE: tensor \"a.qweight\": found shape [0, 8]; needed a row for each word of inputs",
    );
    refused(
        |tensors| drop(tensors.insert("a.qweight", ("I32", vec![1 << 61, 0], vec![]))),
        "FILE: tensor \"a.qweight\": found shape [2305843009213693952, 0]; needed a row for each word of \
         inputs",
    );
    refused(
        |tensors| tensors.get_mut("a.qzeros").unwrap().1 = vec![1, 2],
        "FILE: tensor \"a.qzeros\": found shape [1, 2]; needed [2, 1], for 8 outputs, 24 inputs and 2 \
         groups by quantization_config",
    );
    refused(
        |tensors| drop(tensors.insert("a.scales", ("F16", vec![3, 8], vec![0; 48]))),
        "FILE: tensor \"a.scales\": found shape [3, 8]; needed [2, 8], for 8 outputs, 24 inputs and 2 \
         groups by quantization_config",
    );
    for (group, text) in [(2, "2"), (u32::MAX, "-1")] {
        refused(
            |tensors| {
                tensors.get_mut("a.g_idx").unwrap().2[..4].copy_from_slice(&group.to_le_bytes())
            },
            &format!("FILE: tensor \"a.g_idx\": found group {text}; needed from 0 to 1"),
        );
    }
    for (bits, text) in [(0x7c00u16, "inf"), (0xfe00, "NaN"), (0xbc00, "-1")] {
        refused(
            |tensors| {
                tensors.get_mut("a.scales").unwrap().2[..2].copy_from_slice(&bits.to_le_bytes())
            },
            &format!("FILE: tensor \"a.scales\": found the scale {text}; needed from 0 to 1e30"),
        );
    }
    refused(
        |tensors| tensors.get_mut("a.qzeros").unwrap().2[3] = 0xff,
        "FILE: tensor \"a.qzeros\": found zero points stored as 15 up to the end of a word; needed others in \
         the format \"gptq\", some of whose writers lose what follows a zero point of 0; quantise \
         symmetrically, or save as \"gptq_v2\"",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn mutated_checkpoints_are_refused_or_read(
        edits in prop::collection::vec((0..900usize, any::<u8>()), 0..6),
        opt in any::<bool>(),
    ) {
        let mut bytes = file(&linear());
        let len = bytes.len();
        for (at, byte) in edits {
            bytes[at % len] = byte;
        }
        let config = config(if opt { "opt-125m" } else { "gpt2" }, true);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
        let opened = checkpoint::open(dir.path()).and_then(|file| dequantised(file, &config));
        if let Ok(file) = opened {
            for tensor in file.tensors().keys() {
                let _ = file.read(tensor).unwrap();
            }
        }
    }
}
