//! The other commands of both programs.

use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, fixture, interrupt, program, repository, success};
use serde_json::Value;
use std::{fs, path::Path, process::Output};

fn tiny() -> TestBundle {
    TestBundle::compile(&fixture("tiny-opt"), &CompileOptions::default())
}

fn run(name: &str, arguments: &[&str]) -> Output {
    program(name).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&success(output)).unwrap()
}

#[test]
fn compile_tells_times_and_sizes() {
    let bundle = tiny();
    let output = bundle.beside("again.kiln").to_string_lossy().into_owned();
    let dump = bundle.beside("ir").to_string_lossy().into_owned();
    let model = fixture("tiny-opt").to_string_lossy().into_owned();
    let report = json(&run(
        "kilnc",
        &[
            "compile",
            &model,
            "-o",
            &output,
            "--json",
            "--dump-ir",
            &dump,
            "--weights",
            "bf16",
        ],
    ));
    assert_eq!(report["targets"][0]["weights"], "bf16");
    assert!(report["bundle_bytes"].as_u64().unwrap() > 0);
    let stages: Vec<&str> = report["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| stage["name"].as_str().unwrap())
        .collect();
    assert_eq!(stages, ["build", "fuse", "specialise", "pack", "self-test"]);
    let text = fs::read_to_string(bundle.beside("ir").join("01-fuse.ir")).unwrap();
    assert!(text.starts_with("graph opt {"), "{text}");
}

#[test]
fn compile_exits_with_1_on_failure_and_2_on_wrong_usage() {
    let message = failure(
        &run(
            "kilnc",
            &["compile", "no-such-model", "-o", "unwritten.kiln"],
        ),
        1,
    );
    assert!(
        message.contains("there is no model \"no-such-model\""),
        "{message}"
    );
    let message = failure(
        &run("kilnc", &["compile", "opt-125m", "-o", "unwritten.kiln"]),
        2,
    );
    assert!(message.contains("add --dummy-weights"), "{message}");
    failure(&run("kilnc", &["compile", "opt-125m"]), 2);
    failure(
        &run(
            "kilnc",
            &["compile", "opt-125m", "-o", "x", "--target", "sm_1"],
        ),
        2,
    );
}

/// Runs `kilnc compile` with files limited to a few kilobytes, as on a disk that fills up.
#[test]
fn a_disk_that_fills_up_leaves_no_half_bundle() {
    let dir = tempfile::TempDir::new().unwrap();
    let output = dir.path().join("out.kiln");
    let kilnc = program("kilnc").get_program().to_owned();
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" compile \"$1\" -o \"$2\"";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(kilnc)
        .arg(fixture("tiny-opt"))
        .arg(&output)
        .output()
        .unwrap();
    let message = failure(&output, 1);
    assert!(
        message.contains("cannot write") && message.contains("weights-cpu.safetensors"),
        "{message}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A model large enough to be interrupted while it is packed.
#[test]
fn an_interrupted_compilation_leaves_nothing() {
    let dir = tempfile::TempDir::new().unwrap();
    let mut child = program("kilnc")
        .args(["compile", "opt-1.3b", "--dummy-weights", "-o"])
        .arg(dir.path().join("out.kiln"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The temporary directory appears when packing begins.
    while fs::read_dir(dir.path()).unwrap().count() == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it packed"
        );
    }
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn export_writes_a_checkpoint_that_compiles() {
    let dir = tempfile::TempDir::new().unwrap();
    let exported = dir.path().join("exported").to_string_lossy().into_owned();
    let model = fixture("tiny-gpt2").to_string_lossy().into_owned();
    assert!(
        run("kilnc", &["export", &model, "-o", &exported])
            .status
            .success()
    );
    let bundles = [model, exported].map(|model| {
        let bundle = TestBundle::compile(std::path::Path::new(&model), &CompileOptions::default());
        fs::read(bundle.path().join("weights-cpu.safetensors")).unwrap()
    });
    assert!(bundles[0] == bundles[1], "the weights differ");
}

#[test]
fn inspect_counts_what_is_there() {
    let bundle = tiny();
    let path = bundle.path().to_string_lossy().into_owned();
    let report = json(&run("kilnc", &["inspect", &path, "--json"]));
    let executables = report["targets"][0]["executables"].as_array().unwrap();
    assert_eq!(executables.len(), 10);
    // 3 layers of qkv, attention, out, up, down; embedding, head and sampling.
    assert_eq!(executables[0]["kernels"], 18);
    // q, k, v, out: 4 * 64 * 64; up, down: 2 * 64 * 128; head: 320 (300 in whole panels) * 64.
    let matrices = 3 * (4 * 64 * 64 + 2 * 64 * 128) + 320 * 64;
    // Biases of q, k, v, out, up and down, two norms; the last norm.
    let vectors = 3 * (3 * 64 + 64 + 128 + 64 + 2 * 128) + 128;
    let elements = matrices + vectors;
    assert_eq!(executables[0]["weights_bytes_per_step"], elements * 4);
    let text = run("kilnc", &["inspect", &path, "--kernels"]);
    assert!(
        String::from_utf8_lossy(&text.stdout)
            .contains("weight=@layers.2.ffn.down.weight [64, 128]")
    );
}

#[test]
fn configs_lists_the_published_sizes() {
    let report = json(&run("kilnc", &["configs", "--json"]));
    let find = |name: &str| {
        report
            .as_array()
            .unwrap()
            .iter()
            .find(|config| config["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(find("opt-125m")["parameters"], 125_239_296);
    assert_eq!(find("gpt2")["parameters"], 124_439_808);
    assert_eq!(report.as_array().unwrap().len(), 13);
}

#[test]
fn verify_passes_on_a_sound_bundle_and_names_an_altered_file() {
    let bundle = tiny();
    let path = bundle.path().to_string_lossy().into_owned();
    assert!(run("kiln", &["verify", &path]).status.success());
    let file = bundle.path().join("weights-cpu.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    let message = failure(&run("kiln", &["verify", &path]), 1);
    assert!(
        message.contains("weights-cpu.safetensors") && message.contains("hash differs"),
        "{message}"
    );
}

#[test]
fn verify_fails_when_the_logits_are_others() {
    let bundle = tiny();
    let file = bundle.path().join("bundle.json");
    let mut manifest: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let logit = &mut manifest["self_test"]["top_logits"][0][1];
    *logit = (logit.as_f64().unwrap() * 1.01).into();
    fs::write(&file, manifest.to_string()).unwrap();
    failure(
        &run("kiln", &["verify", &bundle.path().to_string_lossy()]),
        1,
    );
}

#[test]
fn a_bundle_for_another_target_names_what_it_has() {
    let bundle = tiny();
    let file = bundle.path().join("bundle.json");
    let text = fs::read_to_string(&file)
        .unwrap()
        .replace("\"name\": \"cpu\"", "\"name\": \"sm_90a\"");
    fs::write(&file, text).unwrap();
    let path = bundle.path().to_string_lossy().into_owned();
    let message = failure(&run("kiln", &["generate", &path, "--prompt-ids", "2"]), 1);
    assert!(
        message.contains("cpu") && message.contains("sm_90a"),
        "{message}"
    );
}

#[test]
fn a_gpu_that_is_not_there_is_an_error() {
    let bundle = tiny();
    let path = bundle.path().to_string_lossy().into_owned();
    let flags = ["generate", &path, "--prompt-ids", "2", "--device"];
    let run_on = |device| run("kiln", &[&flags[..], &[device]].concat());
    // With a driver or without one.
    let message = failure(&run_on("cuda:99"), 1);
    assert!(
        message.contains("NVIDIA driver") || message.contains("there is no GPU cuda:99"),
        "{message}"
    );
    let message = failure(&run_on("gpu"), 2);
    assert!(message.contains("auto, cpu, cuda or cuda:N"), "{message}");
    assert!(run_on("auto").status.success());
}

#[test]
fn a_gpu_bundle_is_compiled_and_inspected_without_a_gpu() {
    let dir = tempfile::TempDir::new().unwrap();
    let output = dir.path().join("out.kiln").to_string_lossy().into_owned();
    let model = fixture("tiny-opt").to_string_lossy().into_owned();
    let flags = ["compile", &model, "-o", &output, "--target", "sm_90a"];
    let buckets = ["--max-batch", "2", "--prefill-buckets", "16,128"];
    let compile = |nvrtc: &Path, more: &[&str]| {
        program("kilnc")
            .args(flags)
            .args(buckets)
            .args(more)
            .env("KILN_NVRTC", nvrtc)
            .output()
            .unwrap()
    };
    // Nothing is compiled and nothing left behind where the toolchain is missing.
    let message = failure(&compile(dir.path(), &[]), 1);
    assert!(message.contains("scripts/fetch-nvrtc"), "{message}");
    assert!(!Path::new(&output).exists());
    assert!(compile(dir.path(), &["--emit-only"]).status.success());
    let message = failure(&run("kiln", &["generate", &output, "--prompt-ids", "2"]), 1);
    assert!(message.contains("sm_90a"), "{message}");

    let result = compile(&repository("target/nvrtc"), &[]);
    assert!(result.status.success(), "{}", failure(&result, 1));
    assert!(run("kilnc", &["inspect", &output]).status.success());
    let report = |more: &[&str]| -> Value {
        let output = run("kilnc", &[&["inspect", &output, "--json"], more].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let files = report(&[])["files"].clone();
    let cubins = files.as_object().unwrap().keys();
    let cubins: Vec<_> = cubins.filter(|name| name.ends_with(".cubin")).collect();
    assert!(cubins.len() > 10, "{cubins:?}");
    for cubin in cubins {
        let bytes = fs::read(Path::new(&output).join(cubin)).unwrap();
        assert!(bytes.starts_with(b"\x7fELF"), "{cubin}");
    }
    assert!(files.get("cuda/sm_90a/resources.json").is_some());

    // Half of the bandwidth, more time; a GPU that does not run the target predicts nothing.
    let time =
        |report: &Value| report["targets"][0]["executables"][0]["predicted"]["floor_us"].as_f64();
    let (h200, h100) = (report(&["--gpu", "h200"]), report(&["--gpu", "H100"]));
    assert!(time(&h200) < time(&h100), "{h200}");
    assert_eq!(time(&report(&["--gpu", "a100"])), None);
    let message = failure(&run("kilnc", &["inspect", &output, "--gpu", "abacus"]), 2);
    assert!(message.contains("H200"), "{message}");
}

#[test]
fn bench_measures_each_phase() {
    let bundle = tiny();
    let path = bundle.path().to_string_lossy().into_owned();
    let flags = [
        "bench",
        &path,
        "--prompt-len",
        "16",
        "--gen-len",
        "4",
        "--batch",
        "2",
        "--repeat",
        "2",
        "--json",
    ];
    let report = json(&run("kiln", &flags));
    assert!(report.is_object(), "{report}");
}
