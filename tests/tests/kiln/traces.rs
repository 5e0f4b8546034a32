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

/// As Perfetto reads it: microseconds become whole nanoseconds, and what is behind the point of these is
/// cut off.
fn nanoseconds(microseconds: &Value) -> u64 {
    let nanoseconds = microseconds.as_f64().unwrap() * 1e3;
    assert!(nanoseconds >= 0.0);
    nanoseconds as u64
}

#[derive(Clone, Debug)]
struct Span {
    name: String,
    /// In nanoseconds, as all times.
    start: u64,
    length: u64,
    args: Value,
}

impl Span {
    fn end(&self) -> u64 {
        self.start + self.length
    }

    fn holds(&self, other: &Span) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }
}

/// The spans of a trace by track, each in order of time. Panics where the file is not what the Trace Event
/// Format asks for, as far as kiln uses it: one process with a name, complete events on threads with names
/// and places, and nothing else.
fn spans(path: &Path) -> BTreeMap<String, Vec<Span>> {
    let trace: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let mut names = BTreeMap::new();
    let mut places = BTreeSet::new();
    let mut processes = 0;
    let mut tracks: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        assert_eq!(event["pid"], 1);
        // Viewers take thread 0 for an idle one.
        let tid = event["tid"].as_u64().filter(|&tid| tid > 0).unwrap();
        let (name, args) = (event["name"].as_str().unwrap(), &event["args"]);
        assert!(!name.is_empty() && args.is_object(), "{event}");
        let keys: BTreeSet<&str> = event.as_object().unwrap().keys().map(|k| &**k).collect();
        let ph = event["ph"].as_str().unwrap();
        let mut needed = BTreeSet::from(["ph", "name", "pid", "tid", "args"]);
        if ph == "X" {
            needed.extend(["ts", "dur"]);
        }
        assert_eq!(keys, needed, "{event}");
        let named = || args["name"].as_str().filter(|name| !name.is_empty());
        match (ph, name) {
            ("M", "process_name") => processes += usize::from(named().is_some()),
            ("M", "thread_name") => {
                let old = names.insert(tid, named().unwrap().to_owned());
                assert_eq!(old, None);
            }
            ("M", "thread_sort_index") => {
                assert!(places.insert(args["sort_index"].as_u64().unwrap()));
            }
            (ph, _) => {
                assert_eq!(ph, "X", "{event}");
                let span = Span {
                    name: name.to_owned(),
                    start: nanoseconds(&event["ts"]),
                    length: nanoseconds(&event["dur"]),
                    args: args.clone(),
                };
                // A name comes before what it names.
                tracks.entry(names[&tid].clone()).or_default().push(span);
            }
        }
    }
    assert_eq!((processes, names.len()), (1, places.len()));
    for spans in tracks.values() {
        assert!(spans.is_sorted_by_key(|span| span.start));
        check_nesting(spans);
    }
    tracks
}

/// Whether of any two spans one holds the other, or both are apart. Viewers leave out what is neither.
fn check_nesting(spans: &[Span]) {
    let mut open: Vec<&Span> = vec![];
    for span in spans {
        open.retain(|outer| outer.end() > span.start);
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
        assert!(pair[0].end() <= pair[1].start, "{pair:?}");
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
            assert!(pair[0].end() <= pair[1].start, "{pair:?}");
        }
        let of_device: Vec<&Span> = device.iter().filter(|s| step.holds(s)).collect();
        let (whole, kernels): (Vec<&Span>, Vec<&Span>) = of_device.into_iter().partition(is_step);
        assert_eq!(whole.len(), 1);
        assert_eq!((&whole[0].name, &whole[0].args), (&step.name, &step.args));
        let sum: u64 = kernels.iter().map(|kernel| kernel.length).sum();
        assert!(sum <= whole[0].length, "{sum} of {whole:?}");
        for kernel in &kernels {
            assert!(submit.holds(kernel) && whole[0].holds(kernel), "{kernel:?}");
            assert_eq!(kernel.args, json!({"executable": step.name}));
        }
        // Tokens are chosen when the model's kernels have run.
        let (draws, model): (Vec<&Span>, Vec<&Span>) =
            kernels.iter().partition(|kernel| kernel.name == "sample");
        let length = |kernels: &[&Span]| kernels.iter().map(|kernel| kernel.length).sum::<u64>();
        assert!(length(&model) < launch.length, "{launch:?}");
        assert!(length(&draws) < submit.length - launch.length, "{submit:?}");
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

    let stages = &tracks["stages"];
    let told: Vec<Value> = stages
        .iter()
        .map(|stage| json!({"name": stage.name, "ms": stage.length as f64 / 1e6}))
        .collect();
    let told_names = told.iter().map(|stage| &stage["name"]);
    let reported = report["stages"].as_array().unwrap();
    assert!(told_names.eq(reported.iter().map(|stage| &stage["name"])));
    for (told, reported) in told.iter().zip(reported) {
        let of = |stage: &Value| stage["ms"].as_f64().unwrap();
        assert!((of(told) - of(reported)).abs() < 1e-3, "{told} {reported}");
    }

    let pack = stages.iter().find(|stage| stage.name == "pack").unwrap();
    let tensors = tracks["main"].iter().filter(|span| pack.holds(span));
    let tensors: Vec<&Span> = tensors.collect();
    let bundle = Bundle::open(&dir.path().join("tiny.kiln")).unwrap();
    let target = &bundle.manifest().targets[0];
    for tensor in &tensors {
        let stored = bundle.weights(target).unwrap();
        let stored = stored.tensor(&tensor.name).unwrap();
        assert_eq!(tensor.args["bytes"], stored.data.len());
    }
    let matrices = target.programs.iter().flat_map(|program| &program.kernels);
    for linear in matrices.filter_map(KernelSpec::linear) {
        assert!(tensors.iter().any(|tensor| tensor.name == linear.weight));
    }
}

/// The spans that lie right inside of a span.
fn inside<'a>(spans: &'a [Span], outer: &Span) -> Vec<&'a Span> {
    let mut children: Vec<&Span> = vec![];
    let within = |span: &&Span| {
        outer.holds(span)
            && (span.start, span.length, &span.name) != (outer.start, outer.length, &outer.name)
    };
    for span in spans.iter().filter(within) {
        if !children.last().is_some_and(|last| last.holds(span)) {
            children.push(span);
        }
    }
    children
}

#[test]
fn a_trace_of_compiling_has_the_layers_that_texts_go_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let mut compile = program("kilnc");
    compile.arg("compile").arg(repository("models/demo"));
    compile.args(["--target", "cpu", "--weights", "int8", "-o"]);
    compile.arg(dir.path().join("demo.kiln"));
    compile.arg("--calibrate").arg(fixture("calibration.txt"));
    compile.arg("--eval").arg(fixture("held-out.txt"));
    compile.args(["--eval-tokens", "600", "--trace"]).arg(&path);
    success(&compile.output().unwrap());
    let tracks = spans(&path);
    let work = &tracks["main"];
    let stage = |name: &str| {
        let stage = tracks["stages"].iter().find(|stage| stage.name == name);
        inside(work, stage.unwrap())
    };
    let manifest = Bundle::open(&dir.path().join("demo.kiln")).unwrap();
    let layers = manifest.manifest().model.layers as usize;
    assert!(layers > 1);
    let names =
        |spans: &[&Span]| -> Vec<String> { spans.iter().map(|span| span.name.clone()).collect() };
    let mut walk = vec!["embed".to_owned()];
    walk.extend((0..layers).map(|layer| format!("layer {layer}")));
    let whole = [&walk[..], &["head".to_owned()]].concat();

    let self_test = stage("self-test");
    assert_eq!(names(&self_test), whole);
    // Matrices as they are before any is joined or folded: q, k, v, output, up and down.
    let matrices = |layer: &Span| {
        let products = inside(work, layer);
        let is_matrix = |span: &&&Span| span.name.ends_with(".weight");
        products.iter().filter(is_matrix).count()
    };
    for layer in &self_test[1..=layers] {
        assert_eq!(matrices(layer), 6);
    }
    assert_eq!(
        names(&inside(work, self_test[layers + 1])),
        ["embed.tokens"]
    );

    let passes = stage("evaluate");
    let expected = ["weights of the checkpoint", "weights of the bundle"];
    assert_eq!(names(&passes), expected);
    for pass in passes {
        assert_eq!(names(&inside(work, pass)), whole);
    }

    // The head is not calibrated.
    let calibrated = stage("calibrate");
    assert_eq!(names(&calibrated), walk);
    for layer in &calibrated[1..] {
        let parts = inside(work, layer);
        let count = |name: &str| parts.iter().filter(|span| span.name == name).count();
        // What q, k and v read is the same.
        assert_eq!((count("factor"), count("round")), (4, 6));
        let rounded = parts.iter().filter(|span| span.name == "round");
        for span in rounded {
            assert!(span.args["weight"].as_str().unwrap().ends_with(".weight"));
        }
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
