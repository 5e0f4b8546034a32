//! From CUDA sources to cubins. These tests need what `scripts/fetch-nvrtc --tools` fetches.

use crate::sass::{count, nvrtc_folder, opcodes, sass};
use kiln_compiler::{
    Progress, Silent,
    cuda::{BuildError, BuiltKernel, Cache, EmittedKernel, Nvrtc, NvrtcError, Source, build_with},
};
use std::{env, fs, path::Path, process::Command, sync::Mutex, time::Instant};

const HEADERS: [(&str, &str); 2] = [
    (
        "kiln/ptx.cuh",
        include_str!("../../../templates/kiln/ptx.cuh"),
    ),
    (
        "kiln/step.cuh",
        include_str!("../../../templates/kiln/step.cuh"),
    ),
];
const TARGETS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];
const EVERY_FUNCTION: &str = include_str!("every_function.cu");

fn nvrtc() -> Nvrtc {
    let nvrtc = Nvrtc::open(&nvrtc_folder());
    // The message says what to run.
    nvrtc.map_err(|error| error.to_string()).unwrap()
}

/// Kernels `k0`, `k1`, ... that differ in a constant.
fn kernels(len: usize) -> Vec<EmittedKernel> {
    let kernel = |index| EmittedKernel {
        entry: format!("k{index}"),
        source: format!(
            "#include \"kiln/ptx.cuh\"\n\
             KILN_KERNEL(128, 1) k{index}(float* out) {{ out[threadIdx.x] = {index}.0f; }}\n"
        ),
    };
    (0..len).map(kernel).collect()
}

fn build(cache: &Cache, kernels: &[EmittedKernel], archs: &[&str]) -> Vec<BuiltKernel> {
    build_with(&nvrtc(), cache, kernels, &HEADERS, archs, &Silent).unwrap()
}

/// What `Nvrtc::find` says in a process with other variables: the library it found, or an error.
fn found(set: &[(&str, &Path)]) -> String {
    let mut child = Command::new(env::current_exe().unwrap());
    for name in ["KILN_NVRTC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        child.env_remove(name);
    }
    child.args([
        "--exact",
        "nvrtc::prints_what_is_found",
        "--ignored",
        "--nocapture",
    ]);
    child.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let output = child.envs(set.iter().copied()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "the child of the tests about environment variables"]
fn prints_what_is_found() {
    match Nvrtc::find() {
        Ok(nvrtc) => println!("found {}", nvrtc.path().display()),
        Err(error) => println!("error: {error}"),
    }
}

#[test]
fn a_missing_nvrtc_is_told_with_the_command_that_fetches_it() {
    let empty = tempfile::tempdir().unwrap();
    let told = found(&[("KILN_NVRTC", empty.path())]);
    let folder = empty.path().display();
    assert!(
        told.contains(&format!(
            "error: found no NVRTC (libnvrtc.so) in {folder}, {folder}/lib64, {folder}/lib; \
             scripts/fetch-nvrtc fetches it, or KILN_NVRTC names it"
        )),
        "{told}"
    );
}

#[test]
fn nvrtc_is_found_where_the_variables_say_then_where_it_was_fetched() {
    let library = fs::canonicalize(nvrtc_folder().join("lib/libnvrtc.so.13"));
    let library = library.expect("run scripts/fetch-nvrtc --tools");
    let found_it = format!("found {}", library.display());
    let elsewhere = tempfile::tempdir().unwrap();
    let lib64 = elsewhere.path().join("lib64");
    std::os::unix::fs::symlink(library.parent().unwrap(), &lib64).unwrap();
    for set in [
        &[("KILN_NVRTC", library.as_path())][..],
        &[("KILN_NVRTC", elsewhere.path())],
        &[("CUDA_HOME", elsewhere.path())],
        &[("CUDA_PATH", elsewhere.path())],
        &[],
    ] {
        let told = found(set);
        assert!(told.contains(&found_it), "{set:?}: {told}");
    }
}

#[test]
fn a_library_that_is_none_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("libnvrtc.so.13");
    fs::write(&library, "no library").unwrap();
    let error = Nvrtc::open(dir.path()).unwrap_err();
    assert!(matches!(error, NvrtcError::Load { .. }));
    let text = error.to_string();
    assert!(
        text.contains("libnvrtc.so.13") && text.contains("scripts/fetch-nvrtc"),
        "{text}"
    );
}

#[test]
fn a_target_that_nvrtc_lacks_is_told() {
    let nvrtc = nvrtc();
    assert!(nvrtc.version() >= (12, 8));
    for arch in ["sm_35", "sm_x", "90a", ""] {
        let error = nvrtc.check_target(arch).unwrap_err().to_string();
        assert!(
            error.contains(&format!("has no target {arch}, only sm_")),
            "{error}"
        );
    }
}

#[test]
fn a_syntax_error_tells_log_source_and_target() {
    let source = Source {
        name: "broken.cu",
        text: "#include \"kiln/ptx.cuh\"\n\nKILN_KERNEL(32, 1) broken() { nothing(); }\n",
        headers: &HEADERS,
    };
    let error = nvrtc().compile(&source, "sm_90a").unwrap_err().to_string();
    assert!(
        error.starts_with("broken.cu does not compile for sm_90a:\n"),
        "{error}"
    );
    assert!(
        error.contains("broken.cu(3): error: identifier \"nothing\" is undefined"),
        "{error}"
    );

    let missing = Source {
        headers: &[],
        ..source
    };
    let error = nvrtc().compile(&missing, "sm_90a").unwrap_err().to_string();
    assert!(
        error.contains("cannot open source file \"kiln/ptx.cuh\""),
        "{error}"
    );

    let nul = Source {
        text: "\0",
        ..source
    };
    let error = nvrtc().compile(&nul, "sm_90a").unwrap_err().to_string();
    assert_eq!(error, "broken.cu holds a NUL character");
}

#[test]
fn every_function_of_ptx_compiles_for_every_target() {
    let defined = HEADERS[0].1.lines().filter_map(|line| {
        let (head, _) = line.strip_prefix("KILN_DEVICE ")?.split_once('(')?;
        let name = head.split_whitespace().next_back()?;
        name.split('<')
            .next()
            .map(|name| name.trim_start_matches('*'))
    });
    for name in defined {
        let called = [format!("{name}("), format!("{name}<")];
        assert!(
            called.iter().any(|call| EVERY_FUNCTION.contains(call)),
            "every_function.cu does not call {name}"
        );
    }

    let entries = ["everything_f16", "everything_bf16"].map(|entry| EmittedKernel {
        entry: entry.to_owned(),
        source: EVERY_FUNCTION.to_owned(),
    });
    let built = build(&Cache::off(), &entries, &TARGETS);
    for (index, kernel) in built.iter().enumerate() {
        let BuiltKernel {
            entry,
            arch,
            resources,
            log,
            ..
        } = kernel;
        assert_eq!(
            (entry, arch.as_str()),
            (&entries[index % 2].entry, TARGETS[index / 2])
        );
        assert!((8..64).contains(&resources.registers), "{arch}: {log}");
        assert_eq!(resources.static_smem_bytes, 32 * 4, "{arch}: {log}");
        assert_eq!(
            (resources.stack_bytes, resources.barriers),
            (0, 1),
            "{arch}: {log}"
        );
        assert!(
            resources.blocks_per_multiprocessor(32, 512, arch) >= 16,
            "{arch}"
        );
        if index % 2 == 1 {
            // Both entries came of one compilation.
            assert_eq!(kernel.cubin, built[index - 1].cubin);
            continue;
        }
        let text = sass(&kernel.cubin);
        let opcodes = opcodes(&text);
        // Weights come 16 bytes at a time, they and the copies past L1. Nothing is declared to be
        // constant, which would let it move behind the wait.
        assert_eq!(count(&opcodes, "LDG", "NA"), 2, "{arch}: {text}");
        assert_eq!(count(&opcodes, "LDG", "CONSTANT"), 0, "{arch}: {text}");
        assert_eq!(count(&opcodes, "LDG", "128"), 6, "{arch}: {text}");
        assert_eq!(count(&opcodes, "LDGSTS", "BYPASS"), 2, "{arch}: {text}");
        assert_eq!(count(&opcodes, "HMMA", "16816"), 2, "{arch}: {text}");
        assert_eq!(count(&opcodes, "HMMA", "BF16"), 1, "{arch}: {text}");
        assert_eq!(count(&opcodes, "MUFU", "EX2"), 2, "{arch}: {text}");
        assert_eq!(
            count(&opcodes, "LDL", "") + count(&opcodes, "STL", ""),
            0,
            "{arch}"
        );
        // Programmatic dependent launch begins with sm_90.
        let dependent = if arch.starts_with("sm_8") { 0 } else { 2 };
        assert_eq!(count(&opcodes, "ACQBULK", ""), dependent, "{arch}: {text}");
        assert_eq!(count(&opcodes, "PREEXIT", ""), dependent, "{arch}: {text}");
    }
}

#[test]
fn the_same_source_gives_the_same_bytes_wherever_it_is_compiled() {
    let source = Source {
        name: "everything.cu",
        text: EVERY_FUNCTION,
        headers: &HEADERS,
    };
    let (once, again) = rayon::join(
        || nvrtc().compile(&source, "sm_90a").unwrap(),
        || nvrtc().compile(&source, "sm_90a").unwrap(),
    );
    assert_eq!(once, again);
    assert!(!once.log.contains("Compile time"), "{}", once.log);
    let here = env::current_dir().unwrap();
    let here = here.to_str().unwrap().as_bytes();
    assert!(!once.cubin.windows(here.len()).any(|bytes| bytes == here));
}

#[test]
fn what_was_compiled_before_comes_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("kernels"));
    let kernels = kernels(3);
    let cold = build(&cache, &kernels, &["sm_80", "sm_90a"]);
    assert_eq!(cold.len(), 6);
    assert!(cold.iter().all(|kernel| !kernel.cached));
    let mut warm = build(&cache, &kernels, &["sm_80", "sm_90a"]);
    assert!(warm.iter().all(|kernel| kernel.cached));
    warm.iter_mut().for_each(|kernel| kernel.cached = false);
    assert_eq!(warm, cold);

    // One entry cut short, one changed: compiled again, and kept again.
    let mut entries: Vec<_> = fs::read_dir(dir.path().join("kernels"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    assert_eq!(entries.len(), 6);
    let mut bytes = fs::read(&entries[0]).unwrap();
    fs::write(&entries[0], &bytes[..bytes.len() - 1]).unwrap();
    bytes = fs::read(&entries[1]).unwrap();
    bytes[100] ^= 1;
    fs::write(&entries[1], &bytes).unwrap();
    let mut repaired = build(&cache, &kernels, &["sm_80", "sm_90a"]);
    assert_eq!(repaired.iter().filter(|kernel| !kernel.cached).count(), 2);
    repaired.iter_mut().for_each(|kernel| kernel.cached = false);
    assert_eq!(repaired, cold);
    let warm = build(&cache, &kernels, &["sm_80", "sm_90a"]);
    assert!(warm.iter().all(|kernel| kernel.cached));

    // Another header is another kernel.
    let header = format!("{}\n// changed\n", HEADERS[0].1);
    let headers = [(HEADERS[0].0, header.as_str())];
    let changed = build_with(
        &nvrtc(),
        &cache,
        &kernels[..1],
        &headers,
        &["sm_80"],
        &Silent,
    );
    assert!(!changed.unwrap()[0].cached);
}

#[test]
fn a_build_tells_its_progress_and_can_be_cancelled() {
    #[derive(Default)]
    struct Told(Mutex<Vec<(u64, u64)>>, bool);
    impl Progress for Told {
        fn stage(&self, _: &'static str) {}
        fn advance(&self, done_bytes: u64, total_bytes: u64) {
            self.0.lock().unwrap().push((done_bytes, total_bytes));
        }
        fn cancelled(&self) -> bool {
            self.1
        }
    }
    let kernels = kernels(2);
    let bytes: u64 = kernels
        .iter()
        .map(|kernel| kernel.source.len() as u64)
        .sum();
    let told = Told::default();
    let run = |told: &Told| {
        build_with(
            &nvrtc(),
            &Cache::off(),
            &kernels,
            &HEADERS,
            &["sm_90a"],
            told,
        )
    };
    run(&told).unwrap();
    let mut steps = told.0.into_inner().unwrap();
    steps.sort();
    assert_eq!((steps.len(), steps[1]), (2, (bytes, bytes)));

    let told = Told(Default::default(), true);
    assert!(matches!(run(&told), Err(BuildError::Cancelled)));
}

#[test]
fn the_first_failing_kernel_is_told() {
    let mut kernels = kernels(4);
    kernels[3].source.push_str("also broken");
    kernels[1].source.push_str("broken");
    let fail = |kernels: &[EmittedKernel], archs: &[&str]| {
        let built = build_with(&nvrtc(), &Cache::off(), kernels, &HEADERS, archs, &Silent);
        built.unwrap_err().to_string()
    };
    let error = fail(&kernels, &["sm_90a"]);
    assert!(
        error.starts_with("k1.cu does not compile for sm_90a:"),
        "{error}"
    );
    let error = fail(&kernels, &["sm_90a", "sm_20"]);
    assert!(error.contains("has no target sm_20"), "{error}");
    kernels[0].entry = "other".to_owned();
    let error = fail(&kernels[..1], &["sm_90a"]);
    assert!(
        error.starts_with("the source of kernel other has no such entry point"),
        "{error}"
    );
}

/// Sixty kernels of the size of a model's.
#[test]
#[ignore = "a measurement: cargo test -p kiln-compiler -- --ignored --nocapture building_takes"]
fn building_takes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let kernels: Vec<_> = (0..60)
        .map(|index| EmittedKernel {
            entry: "everything_f16".to_owned(),
            source: format!("{EVERY_FUNCTION}// {index}\n"),
        })
        .collect();
    for state in ["cold", "cached"] {
        let start = Instant::now();
        build(&cache, &kernels, &["sm_90a"]);
        println!("{state}: {} ms", start.elapsed().as_millis());
    }
}
