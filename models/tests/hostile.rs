//! Mutated and random files: refused or read, without a panic and without memory to match their
//! claims.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;

use common::{f32s, pickle, safetensors, torch};
use kiln_models::checkpoint::{self, pickle::parse_state_dict};
use proptest::prelude::*;

fn state_dict() -> Vec<u8> {
    let storage = || pickle::storage("FloatStorage", "0", 6);
    pickle::state_dict(&[
        ("a", pickle::tensor(storage(), 0, &[3, 2], &[2, 1])),
        (
            "b",
            pickle::parameter(pickle::tensor(storage(), 0, &[2, 3], &[1, 2])),
        ),
    ])
}

fn torch_file() -> Vec<u8> {
    torch(&state_dict(), &[("0", &f32s([1.0; 6]))])
}

fn safetensors_file() -> Vec<u8> {
    let header = r#"{"a":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},
        "b":{"dtype":"F16","shape":[2],"data_offsets":[24,28]}}"#;
    safetensors(header, &[0; 28])
}

/// Peak of the address space, in kB: counts what is reserved, touched or not.
fn peak_kb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmPeak:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Opens a file under that name and reads whatever it claims to hold.
fn read_all(name: &str, bytes: &[u8]) {
    let before = peak_kb();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), bytes).unwrap();
    if let Ok(file) = checkpoint::open(dir.path()) {
        for tensor in file.tensors().keys() {
            // Tensors lie within the file, so that reading fails for no reason of its own.
            let read = file.read(tensor).unwrap();
            assert!(read.bytes.len() <= bytes.len());
        }
    }
    // Threads of other tests reserve arenas meanwhile; a claim that is believed takes far more.
    let taken = peak_kb() - before;
    assert!(taken < 1 << 20, "a small file took {taken} kB");
}

/// A few bytes of a file replaced, and its end cut off.
fn mutated(file: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = file.len();
    let edits = prop::collection::vec((0..len, any::<u8>()), 0..6);
    (edits, 0..=len, any::<bool>()).prop_map(move |(edits, cut, whole)| {
        let mut bytes = file.clone();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        bytes.truncate(if whole { len } else { cut });
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_pickles(bytes in mutated(state_dict())) {
        let _ = parse_state_dict(&bytes);
    }

    #[test]
    fn random_opcodes(
        bytes in prop::collection::vec(
            prop_oneof![
                prop::sample::select(b"(.01GJKMNQRX]abceh jqrst)u}\x80\x85\x86\x87\x88\x8a\x94".to_vec()),
                any::<u8>(),
            ],
            0..200,
        )
    ) {
        let _ = parse_state_dict(&bytes);
    }

    #[test]
    fn mutated_torch_files(bytes in mutated(torch_file())) {
        read_all("pytorch_model.bin", &bytes);
    }

    #[test]
    fn mutated_safetensors(bytes in mutated(safetensors_file())) {
        read_all("model.safetensors", &bytes);
    }

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        read_all("model.safetensors", &bytes);
        read_all("pytorch_model.bin", &bytes);
        let _ = parse_state_dict(&bytes);
    }

    #[test]
    fn random_headers(header in "[\\[\\]{}:,\"a-c0-9]{0,80}") {
        read_all("model.safetensors", &safetensors(&header, &[0; 32]));
    }
}
