//! What was recorded of runs: `--trace` of both programs, `kiln-perf overhead`.

use kiln_bundle::{Bundle, KernelSpec};
use kiln_compiler::CompileOptions;
use kiln_tests::{TestBundle, failure, fixture, program, repository, success};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::OnceLock,
};

/// The demo model, which has a tokenizer.
fn demo() -> &'static TestBundle {
    static BUNDLE: OnceLock<TestBundle> = OnceLock::new();
    BUNDLE
        .get_or_init(|| TestBundle::compile(&repository("models/demo"), &CompileOptions::default()))
}

/// Times of viewers are microseconds as floating-point numbers.
const ROUNDING_US: f64 = 0.01;

#[derive(Clone, Debug)]
struct Span {
    name: String,
    start: f64,
    length: f64,
    args: Value,
}

impl Span {
    fn end(&self) -> f64 {
        self.start + self.length
    }

    fn holds(&self, other: &Span) -> bool {
        self.start <= other.start + ROUNDING_US && other.end() <= self.end() + ROUNDING_US
    }
}

/// The spans of a trace by track, each in order of time.
fn spans(path: &Path) -> BTreeMap<String, Vec<Span>> {
    let trace: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let mut names = BTreeMap::new();
    let mut tracks: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        assert_eq!(event["pid"], 1);
        let tid = event["tid"].as_u64().unwrap();
        match (event["ph"].as_str().unwrap(), &event["name"]) {
            ("M", name) if name == "thread_name" => {
                let name = event["args"]["name"].as_str().unwrap().to_owned();
                names.insert(tid, name);
            }
            ("M", name) => assert_eq!(name, "thread_sort_index"),
            (ph, name) => {
                assert_eq!(ph, "X", "{event}");
                let span = Span {
                    name: name.as_str().unwrap().to_owned(),
                    start: event["ts"].as_f64().unwrap(),
                    length: event["dur"].as_f64().unwrap(),
                    args: event["args"].clone(),
                };
                assert!(span.start >= 0.0 && span.length >= 0.0, "{span:?}");
                tracks.entry(names[&tid].clone()).or_default().push(span);
            }
        }
    }
    tracks
}

/// Whether of any two spans one holds the other, or both are apart.
fn check_nesting(spans: &[Span]) {
    let mut open: Vec<&Span> = vec![];
    for span in spans {
        open.retain(|outer| outer.end() > span.start + ROUNDING_US);
        for outer in &open {
            assert!(outer.holds(span), "{outer:?} and {span:?} overlap");
        }
        open.push(span);
    }
}

fn generate(flags: &[&str]) -> Output {
    let mut command = program("kiln");
    command.arg("generate").arg(demo().path()).args(flags);
    command.output().unwrap()
}

/// Generates with a trace, and without one.
fn traced(name: &str, flags: &[&str]) -> (PathBuf, Vec<Value>) {
    let path = demo().beside(name);
    let trace = path.to_string_lossy().into_owned();
    let ids = |output: &Output| -> Vec<Value> {
        let lines = success(output);
        let line = |line| serde_json::from_str::<Value>(line).unwrap()["choices"].take();
        lines.lines().map(line).collect()
    };
    let found = ids(&generate(&[flags, &["--json", "--trace", &trace]].concat()));
    assert_eq!(found, ids(&generate(&[flags, &["--json"]].concat())));
    (path, found)
}

#[test]
fn a_trace_of_generating_has_steps_parts_and_kernels() {
    let flags = ["The sea", "--max-new-tokens", "12", "--ignore-eos"];
    let (path, _) = traced("generate.json", &flags);
    let tracks = spans(&path);
    let names: Vec<&String> = tracks.keys().collect();
    assert_eq!(names, ["device", "host"]);
    let (host, device) = (&tracks["host"], &tracks["device"]);
    check_nesting(host);
    check_nesting(device);

    let is_step = |span: &&Span| span.args["phase"].is_string();
    let steps: Vec<&Span> = host.iter().filter(is_step).collect();
    // The prompt, and every token but the last, is fed.
    assert_eq!(steps.len(), 12);
    assert_eq!(steps[0].args["phase"], "prefill");
    let prompt = steps[0].args["tokens"].as_u64().unwrap();
    for (step, fed) in steps[1..].iter().zip(1..) {
        let expected =
            json!({"phase": "decode", "sequences": 1, "tokens": 1, "kv_len": prompt + fed});
        assert_eq!(step.args, expected);
        assert!(step.name.starts_with("decode-"), "{step:?}");
    }
    for pair in steps.windows(2) {
        assert!(pair[0].end() <= pair[1].start + ROUNDING_US, "{pair:?}");
    }
    for name in ["load", "tokenise", "stream"] {
        let spans: Vec<&Span> = host.iter().filter(|span| span.name == name).collect();
        assert!(!spans.is_empty(), "no {name}");
        let inside = |span: &&Span| steps.iter().any(|step| step.holds(span));
        assert!(!spans.iter().any(inside), "{name} lies in a step");
    }

    let bundle = Bundle::open(&demo().path()).unwrap();
    let target = &bundle.manifest().targets[0];
    for step in steps {
        let part = |name: &str| {
            let parts = host.iter().filter(|s| s.name == name && step.holds(s));
            let parts: Vec<&Span> = parts.collect();
            assert_eq!(parts.len(), 1, "{name} in {step:?}");
            parts[0]
        };
        let (schedule, submit) = (part("schedule"), part("submit"));
        let launch = part("launch");
        assert!(submit.holds(launch));
        let tables = host.iter().filter(|s| s.name == "block tables");
        let tables: Vec<&Span> = tables.filter(|span| step.holds(span)).collect();
        assert!(!tables.is_empty(), "{step:?}");
        assert!(tables.iter().all(|span| schedule.holds(span)), "{tables:?}");
        let (collect, take) = (part("collect"), part("take"));
        assert!(take.holds(part("detokenise")));
        for pair in [schedule, submit, collect, take].windows(2) {
            assert!(pair[0].end() <= pair[1].start + ROUNDING_US, "{pair:?}");
        }
        let of_device: Vec<&Span> = device.iter().filter(|s| step.holds(s)).collect();
        let (whole, kernels): (Vec<&Span>, Vec<&Span>) = of_device.into_iter().partition(is_step);
        assert_eq!(whole.len(), 1);
        assert_eq!((&whole[0].name, &whole[0].args), (&step.name, &step.args));
        let sum: f64 = kernels.iter().map(|kernel| kernel.length).sum();
        assert!(sum <= whole[0].length + ROUNDING_US, "{sum} of {whole:?}");
        for kernel in &kernels {
            assert!(submit.holds(kernel) && whole[0].holds(kernel), "{kernel:?}");
            // Tokens are chosen when the model's kernels have run.
            let model = kernel.name != "sample";
            let before_end = kernel.start <= launch.end() + ROUNDING_US;
            assert_eq!(before_end, model, "{kernel:?} {launch:?}");
            assert_eq!(kernel.args, json!({"executable": step.name}));
        }
        let mut executables = target.executables.iter();
        let executable = executables.find(|e| e.name == step.name).unwrap();
        let program = &target.programs[executable.program as usize];
        let found: BTreeSet<&str> = kernels.iter().map(|k| k.name.as_str()).collect();
        assert_eq!(found.len(), program.kernels.len(), "{found:?}");
        for kernel in &program.kernels {
            let name = match kernel {
                KernelSpec::Linear(linear) => format!("linear {}", linear.weight),
                KernelSpec::Qkv { layer, .. } => format!("qkv {layer}"),
                KernelSpec::Attention { layer, .. } => format!("attention {layer}"),
                KernelSpec::Embed { .. } | KernelSpec::Sample { .. } => kernel.name().to_owned(),
            };
            assert!(found.contains(name.as_str()), "no {name} in {found:?}");
        }
    }
}

#[test]
fn whatever_is_asked_for_a_trace_changes_nothing() {
    let requests = demo().beside("traced.jsonl");
    let lines = [
        json!({"prompt": "The sea", "num_beams": 3, "num_return_sequences": 2}),
        json!({"prompt": "A ship", "seed": 4, "num_return_sequences": 2, "logprobs": 1}),
        json!({"prompt_ids": [5, 9, 11], "repetition_penalty": 1.3}),
    ];
    fs::write(&requests, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let input = requests.to_string_lossy().into_owned();
    let flags = ["--input", &input, "--max-new-tokens", "9"];
    let (path, choices) = traced("requests.json", &flags);
    assert_eq!(choices.len(), 3);
    let tracks = spans(&path);
    check_nesting(&tracks["host"]);
    check_nesting(&tracks["device"]);
    let sequences = |span: &Span| span.args["sequences"].as_u64();
    assert_eq!(tracks["host"].iter().filter_map(sequences).max(), Some(6));
}

/// Files of a directory.
fn files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn there_is_a_trace_where_one_is_asked_for_and_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let in_dir =
        |command: &mut std::process::Command| command.current_dir(dir.path()).output().unwrap();
    let mut generate = program("kiln");
    generate.arg("generate").arg(demo().path());
    generate.args(["The sea", "--max-new-tokens", "2"]);
    success(&in_dir(&mut generate));
    assert_eq!(files(dir.path()), [""; 0]);
    success(&in_dir(generate.args(["--trace", "trace.json"])));
    assert_eq!(files(dir.path()), ["trace.json"]);

    let model = fixture("tiny-opt");
    for wrong in ["none/trace.json", "."] {
        let mut generate = program("kiln");
        // The path is refused before the bundle is looked for.
        generate.args(["generate", "no-such.kiln", "The sea", "--trace", wrong]);
        let output = in_dir(&mut generate);
        let message = failure(&output, 1);
        let expected = format!("cannot write {wrong}: ");
        assert!(message.contains(&expected), "{message}");
        assert!(output.stdout.is_empty());
        let mut compile = program("kilnc");
        compile.arg("compile").arg(&model);
        compile.args(["-o", "tiny.kiln", "--trace", wrong]);
        let message = failure(&in_dir(&mut compile), 1);
        assert!(message.contains(&expected), "{message}");
        assert_eq!(files(dir.path()), ["trace.json"]);
    }

    // What fails leaves nothing.
    let mut generate = program("kiln");
    generate.args([
        "generate",
        "no-such.kiln",
        "The sea",
        "--trace",
        "failed.json",
    ]);
    failure(&in_dir(&mut generate), 1);
    let mut generate = program("kiln");
    generate.args([
        "generate",
        "x.kiln",
        "--interactive",
        "--trace",
        "failed.json",
    ]);
    failure(&in_dir(&mut generate), 2);
    assert_eq!(files(dir.path()), ["trace.json"]);
}

#[test]
fn a_trace_of_compiling_has_stages_and_what_runs_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let mut compile = program("kilnc");
    compile.arg("compile").arg(fixture("tiny-opt")).arg("-o");
    compile
        .arg(dir.path().join("tiny.kiln"))
        .arg("--trace")
        .arg(&path);
    compile.args(["--json", "--target", "cpu"]);
    let report: Value = serde_json::from_str(&success(&compile.output().unwrap())).unwrap();
    let tracks = spans(&path);
    tracks.values().for_each(|spans| check_nesting(spans));

    let stages = &tracks["stages"];
    let told: Vec<Value> = stages
        .iter()
        .map(|stage| json!({"name": stage.name, "ms": stage.length / 1e3}))
        .collect();
    let told_names = told.iter().map(|stage| &stage["name"]);
    let reported = report["stages"].as_array().unwrap();
    assert!(told_names.eq(reported.iter().map(|stage| &stage["name"])));
    for (told, reported) in told.iter().zip(reported) {
        let of = |stage: &Value| stage["ms"].as_f64().unwrap();
        assert!((of(told) - of(reported)).abs() < 1e-3, "{told} {reported}");
    }

    let pack = stages.iter().find(|stage| stage.name == "pack").unwrap();
    let tensors = &tracks["main"];
    let bundle = Bundle::open(&dir.path().join("tiny.kiln")).unwrap();
    let target = &bundle.manifest().targets[0];
    for tensor in tensors {
        assert!(pack.holds(tensor), "{tensor:?} {pack:?}");
        let stored = bundle.weights(target).unwrap();
        let stored = stored.tensor(&tensor.name).unwrap();
        assert_eq!(tensor.args["bytes"], stored.data.len());
    }
    let matrices = target.programs.iter().flat_map(|program| &program.kernels);
    for linear in matrices.filter_map(KernelSpec::linear) {
        assert!(tensors.iter().any(|tensor| tensor.name == linear.weight));
    }
}

#[test]
fn parts_of_the_overhead_sum_to_the_step() {
    let overhead = |batch: &str, gen_len: &str, flags: &[&str]| {
        let mut command = program("kiln-perf");
        command.arg("overhead").arg(demo().path());
        command.args(["--batch", batch, "--prompt-len", "9", "--gen-len", gen_len]);
        command.args(flags).output().unwrap()
    };
    let found: Value = serde_json::from_str(&success(&overhead("3", "12", &["--json"]))).unwrap();
    assert_eq!(
        (&found["batch"], &found["gen_len"]),
        (&json!(3), &json!(12))
    );
    // Five runs, whose first token is that of the prefill.
    assert_eq!(found["steps"], 55);
    let of = |value: &Value| value.as_f64().unwrap();
    let step = of(&found["step_us"]);
    assert!(of(&found["unrecorded_step_us"]) > 0.0);
    let parts = found["parts"].as_array().unwrap();
    let sum = |key: &str| -> f64 { parts.iter().map(|part| of(&part[key])).sum() };
    assert!((sum("us") - step).abs() < 1e-6 * step, "{found}");
    assert!((sum("share") - 1.0).abs() < 1e-6, "{found}");
    for part in parts {
        let (name, us) = (part["name"].as_str().unwrap(), of(&part["us"]));
        assert!(us > 0.0, "{name}: {found}");
    }
    let names: Vec<&str> = parts
        .iter()
        .filter_map(|part| part["name"].as_str())
        .collect();
    let expected = [
        "schedule",
        "block tables",
        "submit",
        "launch",
        "kernels",
        "sampling",
        "collect",
        "take",
        "detokenise",
        "stream",
        "rest",
    ];
    assert_eq!(names, expected);

    let table = success(&overhead("1", "12", &[]));
    for line in [
        "schedule",
        "detokenise",
        "stream",
        "rest",
        "unrecorded step",
        "recording",
    ] {
        let has = |text: &str| text.trim_start().starts_with(line);
        assert!(table.lines().any(has), "no {line} in\n{table}");
    }
    let message = failure(&overhead("1000", "12", &[]), 1);
    assert!(
        message.contains("--batch is 1000; this bundle runs 16 at a time"),
        "{message}"
    );
    failure(&overhead("1", "1", &[]), 2);
    let message = failure(&overhead("1", "100000", &[]), 1);
    assert!(
        message.contains("are 100009 positions; a sequence of this bundle has 512"),
        "{message}"
    );
}
