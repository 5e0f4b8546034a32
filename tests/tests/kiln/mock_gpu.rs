//! `kiln-perf table` on the GPU that `tests/mock/cuda.cpp` makes up: what is called, in which order, what
//! becomes of the times, and that all is given back.

use kiln_bundle::{
    Argument, BlockCopies, Bundle, DType, FileRecord, MANIFEST_FILE, StepPointers, Target,
};
use kiln_compiler::{CompileOptions, TargetChoice, cuda::CudaTarget};
use kiln_tests::{TestBundle, failure, fixture, program, repository, success};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::symlink,
    process::{Command, Output},
};
use tempfile::TempDir;

/// What the mock's launches take, where none overlaps with another, and its products.
const KERNEL_US: f64 = 10_000.0;
const PRODUCT_US: f64 = 2_500.0;

/// The mock's libraries.
struct Mock {
    dir: TempDir,
}

impl Mock {
    fn new() -> Mock {
        let dir = tempfile::tempdir().unwrap();
        let mut compiler = Command::new("g++");
        compiler.args([
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
        ]);
        compiler.arg(dir.path().join("libcuda.so"));
        success(
            &compiler
                .arg(repository("tests/mock/cuda.cpp"))
                .output()
                .unwrap(),
        );
        Mock { dir }
    }

    fn with_cublaslt(self) -> Mock {
        symlink("libcuda.so", self.dir.path().join("libcublasLt.so")).unwrap();
        self
    }

    fn table(&self, bundle: &TestBundle, flags: &[&str]) -> Output {
        let mut command = program("kiln-perf");
        command.arg("table").arg(bundle.path()).args(flags);
        command.args(["--device", "cuda"]);
        command.env("LD_LIBRARY_PATH", self.dir.path());
        command.env("MOCK_CUDA_LOG", self.dir.path().join("log"));
        command.output().unwrap()
    }

    /// What was not given back, for each context.
    fn left(&self) -> Vec<String> {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
        log.lines().map(str::to_owned).collect()
    }
}

/// A bundle for the mock's GPU, whose machine code is what the mock reads.
fn bundle() -> TestBundle {
    let options = CompileOptions {
        targets: vec![TargetChoice::Cuda(CudaTarget::Sm90a)],
        emit_only: true,
        weights: Some("f16".parse().unwrap()),
        dtype: Some(DType::F16),
        max_batch: 2,
        max_seq_len: Some(64),
        prefill_buckets: vec![32],
        decode_batch: vec![1, 2],
        decode_kv: vec![64],
        ..CompileOptions::default()
    };
    let bundle = TestBundle::compile(&fixture("tiny-opt"), &options);
    let mut manifest = Bundle::open(&bundle.path()).unwrap().manifest().clone();
    let Target {
        executables,
        images,
        ..
    } = &mut manifest.targets[0];
    for (index, image) in images.iter_mut().enumerate() {
        let mut launches = executables.iter().flat_map(|has| &has.launches);
        let parameters: Vec<usize> = match launches.find(|has| has.image as usize == index) {
            Some(launch) => {
                let bytes = |argument: &Argument| match argument {
                    Argument::Step => size_of::<StepPointers>(),
                    _ => size_of::<u64>(),
                };
                launch.arguments.iter().map(bytes).collect()
            }
            // Blocks are copied.
            None => vec![size_of::<BlockCopies>(), size_of::<u64>()],
        };
        let mut cubin = vec![0; 64];
        cubin[..5].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2]);
        cubin[0x3a] = 64;
        for word in [parameters.len()].into_iter().chain(parameters) {
            cubin.extend((word as u32).to_le_bytes());
        }
        let name = format!("cuda/{}.cubin", image.entry);
        fs::write(bundle.path().join(&name), &cubin).unwrap();
        let record = FileRecord {
            bytes: cubin.len() as u64,
            blake3: blake3::hash(&cubin).to_hex().to_string(),
        };
        manifest.files.insert(name.clone(), record);
        image.cubin = Some(name);
    }
    let manifest = serde_json::to_vec(&manifest).unwrap();
    fs::write(bundle.path().join(MANIFEST_FILE), manifest).unwrap();
    bundle
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap()
}

#[test]
fn a_table_of_a_gpu_is_of_events() {
    let (mock, bundle) = (Mock::new().with_cublaslt(), bundle());
    let file = bundle.beside("table.json");
    let path = file.to_string_lossy();
    let flags = ["--repeat", "3", "--reference", "cublaslt", "-o", &path];
    let text = success(&mock.table(&bundle, &flags));
    let table: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();

    let machine = &table["machine"];
    assert_eq!(machine["device"], "cuda:0 (NVIDIA H200, sm_90a)");
    assert_eq!(
        (&machine["datasheet"], &machine["threads"]),
        (&"H200".into(), &Value::Null)
    );
    let copied = number(machine, "/ceilings/read_gb_per_s");
    assert!((copied - 4000.0).abs() < 1.0, "{copied}");
    assert_eq!(number(machine, "/ceilings/float_gflop_per_s"), 989_000.0);

    let manifest = Bundle::open(&bundle.path()).unwrap().manifest().clone();
    let executables = &manifest.targets[0].executables;
    let steps = table["models"][0]["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3);
    for step in steps {
        let executable = executables
            .iter()
            .find(|has| step["executable"] == *has.name);
        let launches = executable.unwrap().launches.len();
        let mut kernels_us = 0.0;
        for row in step["rows"].as_array().unwrap() {
            let times = row["time"]["samples_us"].as_array().unwrap();
            assert_eq!(times.len(), 3);
            let median = number(row, "/time/median_us");
            assert!(
                times.iter().all(|time| time.as_f64().unwrap() == median),
                "{row}"
            );
            kernels_us += number(row, "/count") * median;
            let reference = row.pointer("/references/0");
            let is_linear = matches!(row["kernel"].as_str(), Some("linear" | "qkv"));
            assert_eq!(reference.is_some(), is_linear, "{row}");
            if let Some(reference) = reference {
                assert_eq!(
                    (&reference["name"], &reference["format"]),
                    (&"cublaslt".into(), &"f16".into())
                );
                let median = number(reference, "/time/median_us");
                assert!((median - PRODUCT_US).abs() < 0.1, "{reference}");
            }
        }
        // None of the launches overlaps, and none is left out.
        assert!(
            (kernels_us - KERNEL_US * launches as f64).abs() < 1.0,
            "{kernels_us} us, {launches} launches"
        );
        // The mock's kernels take the host no time.
        let [whole, remainder] =
            ["/time/median_us", "/remainder_us"].map(|path| number(step, path));
        assert!(
            whole < kernels_us && (remainder - (whole - kernels_us)).abs() < 1.0,
            "{step}"
        );
    }
    for part in [
        "4000.0 GB/s of copying, measured in this run; 989000 GFLOP/s of the datasheet of H200",
        "timed by events",
        "remainder -",
        "cublaslt f16",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }

    // The device's context, and that of cuBLASLt.
    let left = mock.left();
    assert_eq!(left.len(), 2);
    for (line, kinds) in left
        .iter()
        .zip([["events", "instances"], ["layouts", "instances"]])
    {
        let words: Vec<&str> = line.split_whitespace().collect();
        let counts = words.chunks_exact(2);
        assert!(counts.clone().all(|count| count[1] == "0"), "{line}");
        assert!(kinds.iter().all(|kind| words.contains(kind)), "{line}");
    }
}

#[test]
fn what_a_gpu_cannot_be_asked_for_is_refused() {
    let (mock, bundle) = (Mock::new(), bundle());
    for (flags, expect) in [
        (
            &["--threads", "2"],
            "--threads is not for cuda:0 (NVIDIA H200, sm_90a)",
        ),
        (
            &["--reference", "gemm"],
            "--reference gemm is not for cuda:0",
        ),
        (
            &["--gpu", "H9"],
            "the datasheet of cuda:0 (NVIDIA H200, sm_90a) is not known",
        ),
        (
            &["--python", "/no-such-python"],
            "cannot measure torch: /no-such-python",
        ),
    ] {
        let mut flags = flags.to_vec();
        if flags[0] == "--python" {
            flags.extend([
                "--reference",
                "torch",
                "--repeat",
                "1",
                "--executable",
                "decode-b1-kv64",
            ]);
        }
        let message = failure(&mock.table(&bundle, &flags), 1);
        assert!(message.contains(expect), "{message}");
    }
}
