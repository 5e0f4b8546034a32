//! What the integration tests share: fixtures, compiled bundles, and the two programs as a user
//! runs them.

#![allow(clippy::expect_used, reason = "a helper of tests fails the test")]

pub mod conformance;
pub mod emulation;
pub mod fences;
pub mod generation;

use kiln_compiler::{CompileOptions, Model, Silent, compile};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
};
use tempfile::TempDir;

/// A path in the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// A checkpoint directory or file under `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    repository("tests/fixtures").join(name)
}

/// One of the programs, `kiln` or `kilnc`, of the profile that the test was built with.
///
/// # Panics
/// When it has not been built: `cargo build --workspace` comes before `cargo test`.
pub fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap_or_default();
    let path = test.ancestors().nth(2).unwrap_or(Path::new(".")).join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace` first",
        path.display()
    );
    Command::new(path)
}

/// A bundle in a directory of its own, which goes with it.
pub struct TestBundle {
    dir: TempDir,
}

impl TestBundle {
    /// Compiles a checkpoint directory.
    ///
    /// # Panics
    /// When it does not compile.
    pub fn compile(model: &Path, options: &CompileOptions) -> TestBundle {
        TestBundle::of(Model::open(model).expect("a checkpoint"), options)
    }

    /// Compiles the config.json of a directory with random weights.
    ///
    /// # Panics
    /// When it does not compile.
    pub fn compile_dummy(model: &Path, options: &CompileOptions) -> TestBundle {
        let model = Model::find(&model.to_string_lossy(), Some(0), false);
        TestBundle::of(model.expect("a configuration"), options)
    }

    fn of(model: Model, options: &CompileOptions) -> TestBundle {
        let dir = TempDir::new().expect("a temporary directory");
        compile(model, &dir.path().join("bundle"), options, &Silent).expect("a bundle");
        TestBundle { dir }
    }

    /// The bundle.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    /// A path for a file beside the bundle.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `kiln generate` on requests, a line each, with logits and hidden states.
    ///
    /// # Panics
    /// When the program fails.
    pub fn generate(&self, requests: &[Value], flags: &[&str], isa: Option<&str>) -> Generated {
        let [input, logits, hidden] =
            ["requests.jsonl", "logits", "hidden"].map(|name| self.beside(name));
        let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
        fs::write(&input, lines.join("\n")).expect("a writable directory");
        let mut command = program("kiln");
        command
            .arg("generate")
            .arg(self.path())
            .arg("--json")
            .args(flags);
        command.arg("--input").arg(&input);
        command
            .arg("--output-logits")
            .arg(&logits)
            .arg("--output-hidden-states")
            .arg(&hidden);
        if let Some(isa) = isa {
            command.env("KILN_ISA", isa);
        }
        let output = command.output().expect("kiln runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let results = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("a JSON line"))
            .collect();
        Generated {
            results,
            logits: tensors(&logits),
            hidden_states: tensors(&hidden),
        }
    }
}

/// What a run of `kiln generate` gave.
pub struct Generated {
    /// A JSON object a request.
    pub results: Vec<Value>,
    /// `logits.<request>`.
    pub logits: BTreeMap<String, Tensor>,
    /// `hidden.<request>`.
    pub hidden_states: BTreeMap<String, Tensor>,
}

impl Generated {
    /// The new token ids of a request's first choice.
    ///
    /// # Panics
    /// When the result has none.
    pub fn ids(&self, request: usize) -> Vec<u32> {
        serde_json::from_value(self.results[request]["choices"][0]["ids"].clone())
            .expect("token ids")
    }
}

/// An f32 tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<f32>,
}

impl Tensor {
    /// The first rows of the last-but-one axis, for every index of the axes before it: of
    /// (layers + 1, positions, C), the first positions of each hidden state.
    pub fn first_rows(&self, rows: usize) -> Vec<&[f32]> {
        let [.., all, width] = self.shape[..] else {
            return vec![];
        };
        self.data
            .chunks(all * width)
            .map(|part| &part[..rows * width])
            .collect()
    }
}

/// The f32 tensors of a safetensors file.
///
/// # Panics
/// When it is none.
pub fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).expect("a file of tensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |view: TensorView<'_>| Tensor {
        shape: view.shape().to_vec(),
        data: view
            .data()
            .chunks_exact(4)
            .map(|chunk| f32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]))
            .collect(),
    };
    tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), tensor(view)))
        .collect()
}

/// Largest difference, as a share of the largest expected value.
///
/// # Panics
/// When the lengths differ.
pub fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected
        .iter()
        .fold(0.0f32, |largest, x| largest.max(x.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .fold(0.0f32, |worst, (a, b)| match (a - b).abs() {
            // NaN would lose every comparison.
            difference if difference.is_nan() => f32::INFINITY,
            difference => worst.max(difference),
        });
    worst / largest
}

/// Sends a program what Ctrl-C sends.
///
/// # Panics
/// When it has ended already.
pub fn interrupt(child: &Child) {
    // The shell's own `kill`: a bare machine may have no other.
    let status = Command::new("sh")
        .args(["-c", &format!("kill -INT {}", child.id())])
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "cannot interrupt"
    );
}

/// Standard output of a command that must have succeeded.
///
/// # Panics
/// When it has failed, or its output is no text.
pub fn success(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).expect("standard output is text")
}

/// Standard error of a failed command, after checking its exit code.
///
/// # Panics
/// When the exit code is another.
pub fn failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    stderr
}
