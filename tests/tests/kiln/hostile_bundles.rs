//! Bundles that were altered in any way end in an error or in a sound load, never in a panic or a
//! read outside a file.

use kiln_bundle::Bundle;
use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, fixture};
use proptest::prelude::*;
use std::{fs, path::Path, sync::OnceLock};
use tempfile::TempDir;

fn compile(weights: Option<&str>) -> TestBundle {
    let options = CompileOptions {
        weights: weights.map(|weights| weights.parse().unwrap()),
        ..CompileOptions::default()
    };
    TestBundle::compile(&fixture("tiny-opt-sharded"), &options)
}

fn tiny() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE.get_or_init(|| compile(None))
}

/// Its matrices are integers.
fn integers() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE.get_or_init(|| compile(Some("int4:g32")))
}

/// A copy of a bundle with one of its files replaced.
fn with(bundle: &TestBundle, file: &str, bytes: &[u8]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for entry in fs::read_dir(bundle.path()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    fs::write(dir.path().join(file), bytes).unwrap();
    dir
}

/// Opens the bundle with one of its files replaced, maps its weights and reads every byte.
fn open_with(file: &str, bytes: &[u8]) {
    let _ = load(with(tiny(), file, bytes).path());
}

/// Opens the bundle of integers with a text of its manifest replaced; the error.
fn refusal(found: &str, replaced: &str) -> String {
    let text = fs::read_to_string(integers().path().join("bundle.json")).unwrap();
    assert!(text.contains(found), "{found}");
    let dir = with(
        integers(),
        "bundle.json",
        text.replace(found, replaced).as_bytes(),
    );
    let bundle = match Bundle::open(dir.path()) {
        Err(error) => return error.to_string(),
        Ok(bundle) => bundle,
    };
    bundle
        .weights(&bundle.manifest().targets[0])
        .unwrap_err()
        .to_string()
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
    fn altered_manifests_of_integers(at in any::<prop::sample::Index>(), length in 0usize..10, insert in "[0-9a-z{}\":,-]{0,6}") {
        // Around the formats, which no other manifest has.
        let mut bytes = fs::read(integers().path().join("bundle.json")).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (first, last) = (text.find("\"weights\"").unwrap(), text.find("\"programs\"").unwrap());
        let start = first + at.index(last - first);
        bytes.splice(start..(start + length).min(last), insert.into_bytes());
        let _ = load(with(integers(), "bundle.json", &bytes).path());
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
fn formats_that_contradict_the_weights_are_named() {
    assert!(load(&integers().path()).is_some());
    for (found, replaced, message) in [
        // Groups of no use.
        (
            "int4:g32",
            "int4:g0",
            "must be a multiple of 32 from 32 to 1024",
        ),
        (
            "int4:g32",
            "int4:g40",
            "must be a multiple of 32 from 32 to 1024",
        ),
        (
            "int4:g32",
            "int4:g4294967296",
            "must be a multiple of 32 from 32 to 1024",
        ),
        ("int4:g32", "int2", "unknown weight format"),
        // Other sizes than those of the file.
        ("int4:g32", "int8:g32", "needed is u8"),
        ("int4:g32", "f16", "needed is f16"),
        ("\"int8\"", "\"int4:g32\"", "needed is u8"),
        ("\"int8\"", "\"bf16\"", "needed is bf16"),
        // What is no matrix.
        (
            "\"embed.tokens\": \"int8\"",
            "\"final_norm.weight\": \"int8\"",
            "is no matrix of its programs",
        ),
        (
            "\"embed.tokens\": \"int8\"",
            "\"embed.positions\": \"int8\"",
            "is no matrix of its programs",
        ),
        (
            "\"layout\": \"panels\"",
            "\"layout\": \"tiles\"",
            "needed is u8",
        ),
        (
            "\"layout\": \"panels\"",
            "\"layout\": \"tiles\", \"activations\": \"int8\"",
            "activations are int8, which is for the CPU",
        ),
        (
            "\"layout\": \"panels\"",
            "\"layout\": \"panels\", \"activations\": \"int5\"",
            "unknown variant `int5`",
        ),
        (
            "\"tables\": \"f32\"",
            "\"tables\": \"u8\"",
            "tables is u8, which is no floating-point type",
        ),
    ] {
        let error = refusal(found, replaced);
        assert!(error.contains(message), "{found} as {replaced}: {error}");
    }
}

#[test]
fn scales_that_are_no_numbers_end_a_request() {
    let path = integers().path().join("weights-cpu.safetensors");
    let mut bytes = fs::read(path).unwrap();
    let start = header_end(&bytes);
    for byte in &mut bytes[start..] {
        *byte = 0xff;
    }
    let dir = with(integers(), "weights-cpu.safetensors", &bytes);
    let output = kiln_tests::program("kiln")
        .arg("generate")
        .arg(dir.path())
        .args(["--prompt-ids", "2,3", "--device", "cpu"])
        .output()
        .unwrap();
    let message = kiln_tests::failure(&output, 1);
    assert!(message.contains("no finite number"), "{message}");
}

#[test]
fn truncated_weights_are_named() {
    let bytes = original("weights-cpu.safetensors");
    let dir = with(tiny(), "weights-cpu.safetensors", &bytes[..bytes.len() - 1]);
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
