//! The documents tell of things that exist, and the bundle of their examples is what kilnc makes.

use kiln_bundle::WeightFormat;
use kiln_compiler::{CompileOptions, Model, Silent, compile};
use kiln_tests::{fixture, repository};
use serde_json::{Value, json};
use std::{collections::BTreeMap, env, fs, path::Path};

/// Words in backquotes that look like paths of the repository: they hold a slash, or end like a
/// file.
fn paths(text: &str) -> Vec<&str> {
    let code = text.split('`').skip(1).step_by(2);
    code.filter(|word| {
        let file = [".rs", ".toml", ".md", ".py", ".json"]
            .iter()
            .any(|end| word.ends_with(end));
        let path = word
            .chars()
            .all(|char| char.is_ascii_alphanumeric() || "-_./".contains(char));
        path && (word.contains('/') && !word.starts_with('/') || file)
    })
    .collect()
}

#[test]
fn architecture_names_paths_that_exist() {
    let text = fs::read_to_string(repository("ARCHITECTURE.md")).unwrap();
    let found = paths(&text);
    assert!(found.len() > 10, "{found:?}");
    for path in found {
        assert!(
            repository(path).exists(),
            "ARCHITECTURE.md names {path}, which does not exist"
        );
    }
}

#[test]
fn readme_names_scripts_that_exist() {
    let text = fs::read_to_string(repository("README.md")).unwrap();
    for script in ["scripts/quickstart", "scripts/check"] {
        assert!(text.contains(script), "README.md does not name {script}");
        assert!(repository(script).exists());
    }
}

/// Where the examples in the documentation of the runtime find a bundle.
const EXAMPLE: &str = "runtime/examples/tiny.kiln";

/// Compiles the model of the examples: a smaller tiny-opt with random weights.
fn compile_example(output: &Path) {
    let dir = tempfile::TempDir::new().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(fixture("tiny-opt").join(name), dir.path().join(name)).unwrap();
    }
    let config = fs::read_to_string(fixture("tiny-opt/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["hidden_size"] = json!(32);
    config["word_embed_proj_dim"] = json!(32);
    config["ffn_dim"] = json!(64);
    config["num_hidden_layers"] = json!(2);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let model = Model::find(&dir.path().to_string_lossy(), Some(0), false).unwrap();
    let options = CompileOptions {
        model_name: "tiny".to_owned(),
        weights: Some(WeightFormat::Bf16),
        max_batch: 4,
        max_seq_len: Some(64),
        prefill_buckets: vec![64],
        decode_batch: vec![4],
        decode_kv: vec![64],
        ..CompileOptions::default()
    };
    compile(model, output, &options, &Silent).unwrap();
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// With `KILN_WRITE_EXAMPLE=1` the committed bundle is replaced.
#[test]
fn the_bundle_of_the_examples_is_up_to_date() {
    let committed = repository(EXAMPLE);
    if env::var_os("KILN_WRITE_EXAMPLE").is_some_and(|value| value == "1") {
        compile_example(&committed);
    }
    let dir = tempfile::TempDir::new().unwrap();
    let made = dir.path().join("tiny.kiln");
    compile_example(&made);
    let (committed, made) = (files(&committed), files(&made));
    assert!(committed.keys().eq(made.keys()), "{:?}", committed.keys());
    for (name, bytes) in &made {
        assert!(
            &committed[name] == bytes,
            "{EXAMPLE}/{name} is not what kilnc makes now: run this test with KILN_WRITE_EXAMPLE=1"
        );
    }
}
