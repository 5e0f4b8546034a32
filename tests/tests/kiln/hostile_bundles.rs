//! Bundles that were altered in any way end in an error or in a sound load, never in a panic or a
//! read outside a file.

use kiln_bundle::Bundle;
use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, fixture};
use proptest::prelude::*;
use std::{fs, path::Path, sync::OnceLock};

fn tiny() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE.get_or_init(|| {
        TestBundle::compile(&fixture("tiny-opt-sharded"), &CompileOptions::default())
    })
}

/// Opens the bundle with one of its files replaced, maps its weights and reads every byte.
fn open_with(file: &str, bytes: &[u8]) {
    let dir = tempfile::TempDir::new().unwrap();
    for entry in fs::read_dir(tiny().path()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    fs::write(dir.path().join(file), bytes).unwrap();
    let _ = load(dir.path());
}

fn load(dir: &Path) -> Option<u64> {
    let bundle = Bundle::open(dir).ok()?;
    let mut sum = 0;
    for target in &bundle.manifest().targets {
        let weights = bundle.weights(target).ok()?;
        for name in weights.names() {
            let tensor = weights.tensor(name)?;
            sum += tensor.data.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        }
    }
    Some(sum)
}

fn original(file: &str) -> Vec<u8> {
    fs::read(tiny().path().join(file)).unwrap()
}

/// Where the JSON header of the weights ends.
fn header_end(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn altered_manifests(at in any::<prop::sample::Index>(), length in 0usize..10, insert in "[0-9a-z{}\":,-]{0,6}") {
        let mut bytes = original("bundle.json");
        let start = at.index(bytes.len());
        let end = (start + length).min(bytes.len());
        bytes.splice(start..end, insert.into_bytes());
        open_with("bundle.json", &bytes);
    }

    #[test]
    fn altered_numbers(at in any::<prop::sample::Index>(), value in prop_oneof![Just(0u64), Just(1), Just(u64::MAX), Just(1 << 31), any::<u64>()]) {
        // Another number in place of one of the manifest's.
        let text = String::from_utf8(original("bundle.json")).unwrap();
        let starts: Vec<usize> = text
            .match_indices(|char: char| char.is_ascii_digit())
            .map(|(at, _)| at)
            .filter(|&at| !text[..at].ends_with(|char: char| char.is_ascii_digit()))
            .collect();
        let start = starts[at.index(starts.len())];
        let end = start + text[start..].find(|char: char| !char.is_ascii_digit()).unwrap();
        let altered = format!("{}{value}{}", &text[..start], &text[end..]);
        open_with("bundle.json", altered.as_bytes());
    }

    #[test]
    fn altered_weight_headers(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = original("weights-cpu.safetensors");
        let header = header_end(&bytes);
        let at = at.index(header);
        bytes[at] = byte;
        open_with("weights-cpu.safetensors", &bytes);
    }

    #[test]
    fn truncated_weights(length in any::<prop::sample::Index>()) {
        let mut bytes = original("weights-cpu.safetensors");
        let length = length.index(bytes.len());
        bytes.truncate(length);
        open_with("weights-cpu.safetensors", &bytes);
    }
}

#[test]
fn the_original_loads() {
    assert!(load(&tiny().path()).is_some());
}

#[test]
fn truncated_weights_are_named() {
    let dir = tempfile::TempDir::new().unwrap();
    for entry in fs::read_dir(tiny().path()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("weights-cpu.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = Bundle::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains(&format!(
            "has {} bytes, the manifest says {}",
            bytes.len() - 1,
            bytes.len()
        )),
        "{error}"
    );
}
