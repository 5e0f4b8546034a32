//! The kernels that the compiler emits, on emulated CUDA: what they compute does not depend on the
//! order of threads and blocks, they touch nothing that is not theirs, and where one has a mistake,
//! it shows.

use kiln_bundle::{Bundle, DType, Executable};
use kiln_compiler::{TargetChoice, cuda::CudaTarget};
use kiln_models::ModelConfig;
use kiln_runtime::Draw;
use kiln_runtime::device::{
    CpuDevice, CpuOptions, CudaDevice, CudaOptions, Device, DeviceError, DeviceFacts, LogitRows,
    SequenceStep, Step, StepId, StepOutput, Tokens, cuda::KernelImage,
};
use kiln_tests::{
    conformance::{
        CHOICES, CROWD, Outcome, Subject, accuracy, choices, crowd, invariance, subjects,
    },
    emulation::{EmulatedDriver, EmulationOptions, compile_all, rerun_sanitized},
    fences::{FencedDriver, Fences, fence},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};
use tempfile::TempDir;

const TARGET: &str = "sm_90a";
/// Choices by processors of every kind.
const SOME_CHOICES: [u32; 2] = [1, 3];

/// A subject that is small and fills no tile.
fn small(like: &str) -> Subject {
    let subjects = subjects();
    let like = subjects
        .iter()
        .find(|subject| subject.name == like)
        .unwrap();
    let (heads, head_dim) = (3, 16);
    let hidden_size = heads * head_dim;
    Subject {
        name: like.name,
        config: ModelConfig {
            hidden_size,
            embed_size: hidden_size * like.config.embed_size / like.config.hidden_size,
            heads,
            ffn_size: 328,
            attention_scale: 0.25,
            ..like.config.clone()
        },
        max_batch: 9,
        weights: None,
    }
}

fn norms_before() -> Subject {
    small("opt-d64")
}

fn integers() -> Subject {
    Subject {
        weights: Some(("int4:g32", "int8")),
        ..norms_before()
    }
}

fn norms_behind() -> Subject {
    small("opt-post-d64")
}

/// A subject's bundle, whose sources may be changed.
struct Compiled {
    _dir: TempDir,
    path: PathBuf,
}

impl Compiled {
    fn new(subject: &Subject) -> Compiled {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        let targets = vec![TargetChoice::Cpu, TargetChoice::Cuda(CudaTarget::Sm90a)];
        subject.compile(&path, DType::F16, targets, true).unwrap();
        Compiled { _dir: dir, path }
    }

    /// The path of a kernel's source, `kernel.cu`, or of a header as that kernel alone sees it,
    /// `kernel.cu/header.cuh`.
    fn own(&self, file: &str) -> PathBuf {
        let cuda = self.path.join("cuda");
        let Some((kernel, header)) = file.split_once('/') else {
            return cuda.join(file);
        };
        let change = |from: &Path, to: &Path| {
            let text = fs::read_to_string(from).unwrap();
            let text = text.replace("\"kiln/", "\"mine/");
            // This one is the emulation's.
            fs::write(to, text.replace("\"mine/ptx.cuh", "\"kiln/ptx.cuh")).unwrap();
        };
        let mine = cuda.join("mine");
        fs::create_dir(&mine).unwrap();
        for entry in fs::read_dir(cuda.join("kiln")).unwrap() {
            let entry = entry.unwrap();
            change(&entry.path(), &mine.join(entry.file_name()));
        }
        change(&cuda.join(kernel), &cuda.join(kernel));
        mine.join(header)
    }

    /// Replaces the only `from` of a file. Lengths stay as they are: the manifest says how long a
    /// bundle's files are.
    fn plant(&self, file: &str, from: &str, to: &str) {
        let path = self.own(file);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches(from).count(), 1, "{from:?} in {file}");
        let padded = format!("{to:len$}", len = from.len());
        assert_eq!(padded.len(), from.len(), "{to:?} is too long");
        fs::write(path, text.replace(from, &padded)).unwrap();
    }

    fn bundle(&self) -> Bundle {
        Bundle::open(&self.path).unwrap()
    }

    /// The CPU's outputs are the reference of the conformance suite.
    fn cpu(&self) -> CpuDevice {
        let options = CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        };
        CpuDevice::load(&self.bundle(), &options).unwrap()
    }

    fn emulated(&self, seed: u64, fences: Option<&Fences>) -> Box<dyn Device> {
        let options = EmulationOptions {
            seed,
            ..EmulationOptions::default()
        };
        let bundle = self.bundle();
        let target = bundle.manifest().targets.iter().find(|t| t.name == TARGET);
        let target = target.unwrap();
        let images = target.images.iter().map(|image| KernelImage {
            entry: image.entry.clone(),
            source: self.path.join(&image.source),
            cubin: None,
            block_threads: image.block_threads,
            dynamic_smem_bytes: image.dynamic_smem_bytes,
        });
        compile_all(&images.collect::<Vec<_>>(), options.sanitize).unwrap();
        let driver = EmulatedDriver::new(options);
        let options = CudaOptions::default();
        let silent = &mut |_, _| {};
        match fences {
            None => Box::new(CudaDevice::load(&bundle, target, driver, &options, silent).unwrap()),
            Some(fences) => {
                let driver = FencedDriver::new(driver, fences);
                Box::new(CudaDevice::load(&bundle, target, driver, &options, silent).unwrap())
            }
        }
    }

    /// The suite's accuracy part, and some choices, on the emulated device, whose outputs are held against
    /// `expected`.
    fn run(&self, seed: u64, expected: &[StepOutput]) -> Result<Witness, String> {
        let mut witness = Witness::new(self.emulated(seed, None), expected);
        let bundle = self.bundle();
        let accurate = accuracy(&mut self.cpu(), &mut witness, &bundle, DType::F16);
        all_pass(&accurate.map_err(|error| error.to_string())?)?;
        for case in SOME_CHOICES {
            let chosen = choices(&mut witness, &bundle, case);
            all_pass(&chosen.map_err(|error| error.to_string())?)?;
        }
        Ok(witness)
    }
}

fn all_pass(outcomes: &[Outcome]) -> Result<(), String> {
    let failed = outcomes.iter().find(|outcome| !outcome.passed);
    failed.map_or(Ok(()), |outcome| {
        Err(format!("{}: {}", outcome.case, outcome.detail))
    })
}

/// A device whose outputs are kept, and held against those of another run, byte for byte.
struct Witness {
    device: Box<dyn Device>,
    expected: Vec<StepOutput>,
    found: Vec<StepOutput>,
}

impl Witness {
    fn new(device: Box<dyn Device>, expected: &[StepOutput]) -> Witness {
        Witness {
            device,
            expected: expected.to_vec(),
            found: vec![],
        }
    }
}

impl Device for Witness {
    fn keeps_histories(&self) -> bool {
        self.device.keeps_histories()
    }

    fn facts(&self) -> &DeviceFacts {
        self.device.facts()
    }

    fn executables(&self) -> &[Executable] {
        self.device.executables()
    }

    fn pipeline_depth(&self) -> usize {
        self.device.pipeline_depth()
    }

    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
        self.device.submit(step)
    }

    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError> {
        let output = self.device.collect(id)?;
        let index = self.found.len();
        self.found.push(output.clone());
        match self.expected.get(index) {
            Some(expected) if !same_bytes(&output, expected) => {
                Err(DeviceError::Step(format!("step {index} has other bytes")))
            }
            _ => Ok(output),
        }
    }
}

fn same_bytes(a: &StepOutput, b: &StepOutput) -> bool {
    let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    a.tokens == b.tokens
        && a.continuations == b.continuations
        && bits(&a.logits) == bits(&b.logits)
        && bits(&a.hidden_states) == bits(&b.hidden_states)
}

/// The outputs that every order has to give: those of the natural one.
fn expected() -> &'static [StepOutput] {
    static EXPECTED: OnceLock<Vec<StepOutput>> = OnceLock::new();
    EXPECTED.get_or_init(|| Compiled::new(&norms_before()).run(0, &[]).unwrap().found)
}

fn same_in_every_order(subject: &Subject) {
    let compiled = Compiled::new(subject);
    let bundle = compiled.bundle();
    let mut natural = vec![];
    for seed in 0..4 {
        let mut witness = Witness::new(compiled.emulated(seed, None), &natural);
        let accurate = accuracy(&mut compiled.cpu(), &mut witness, &bundle, DType::F16).unwrap();
        let invariant = invariance(&mut witness, &bundle).unwrap();
        all_pass(&accurate).unwrap();
        all_pass(&invariant).unwrap();
        natural = witness.found;
        assert!(natural.len() > accurate.len());
    }
}

#[test]
fn norms_before_give_the_same_bytes_in_every_order() {
    same_in_every_order(&norms_before());
}

#[test]
fn norms_behind_give_the_same_bytes_in_every_order() {
    same_in_every_order(&norms_behind());
}

#[test]
fn integers_give_the_same_bytes_in_every_order() {
    same_in_every_order(&integers());
}

#[test]
fn choices_are_those_of_the_cpu() {
    let compiled = Compiled::new(&norms_before());
    let bundle = compiled.bundle();
    let (mut device, mut cpu) = (compiled.emulated(1, None), compiled.cpu());
    // On one device, so that slots come to other sequences.
    for case in 0..CHOICES {
        all_pass(&choices(device.as_mut(), &bundle, case).unwrap()).unwrap();
        all_pass(&choices(&mut cpu, &bundle, case).unwrap()).unwrap();
    }
}

#[test]
fn a_crowd_gets_what_the_cpu_gives() {
    let compiled = Compiled::new(&Subject {
        max_batch: CROWD,
        ..norms_before()
    });
    let bundle = compiled.bundle();
    let mut device = compiled.emulated(1, None);
    let outcomes = crowd(&mut compiled.cpu(), device.as_mut(), &bundle, DType::F16);
    all_pass(&outcomes.unwrap()).unwrap();
}

/// No kernel is without a launch, and a step gives the same with events around them.
#[test]
fn every_kernel_has_a_time() {
    let compiled = Compiled::new(&norms_before());
    let bundle = compiled.bundle();
    let mut targets = bundle.manifest().targets.iter();
    let target = targets.find(|target| target.name == TARGET).unwrap();
    let mut device = compiled.emulated(0, None);
    for (index, executable) in target.executables.iter().enumerate() {
        let mut step = Step::default();
        step.executable = index;
        step.push(&SequenceStep {
            slot: 0,
            tokens: Tokens::Ids(&[5]),
            past_len: 0,
            block_table: &[0],
            logit_rows: LogitRows::Last,
            draw: Some(Draw::GREEDY),
        });
        let [plain, timed] = [false, true].map(|kernel_times| {
            step.observe.kernel_times = kernel_times;
            let id = device.submit(&step).unwrap();
            device.collect(id).unwrap()
        });
        assert!(plain.kernel_times.is_empty() && plain.tokens == timed.tokens);
        let program = &target.programs[executable.program as usize];
        assert_eq!(timed.kernel_times.len(), program.kernels.len());
        let mut end = Duration::ZERO;
        for time in timed.kernel_times {
            assert!(
                time.start == end && time.length > Duration::ZERO,
                "{time:?}"
            );
            end += time.length;
        }
    }
}

/// Within a sanitized process: the suite under fences.
fn run_fenced(compiled: &Compiled) {
    let fences = fence(&compiled.path, TARGET);
    let mut device = compiled.emulated(1, Some(&fences));
    let mut reference = compiled.cpu();
    let outcomes = accuracy(
        &mut reference,
        device.as_mut(),
        &compiled.bundle(),
        DType::F16,
    );
    all_pass(&outcomes.unwrap()).unwrap();
    for case in SOME_CHOICES {
        let outcomes = choices(device.as_mut(), &compiled.bundle(), case);
        all_pass(&outcomes.unwrap()).unwrap();
    }
}

fn keep_to_their_own_memory(test: &str, subjects: impl FnOnce() -> Vec<Subject>) {
    match rerun_sanitized(&format!("emulated_kernels::{test}")) {
        Some(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stderr}");
        }
        None => subjects()
            .iter()
            .for_each(|subject| run_fenced(&Compiled::new(subject))),
    }
}

#[test]
fn norms_before_keep_to_their_own_memory() {
    keep_to_their_own_memory("norms_before_keep_to_their_own_memory", || {
        vec![norms_before()]
    });
}

#[test]
fn norms_behind_keep_to_their_own_memory() {
    keep_to_their_own_memory("norms_behind_keep_to_their_own_memory", || {
        vec![norms_behind()]
    });
}

#[test]
fn integers_keep_to_their_own_memory() {
    keep_to_their_own_memory("integers_keep_to_their_own_memory", || vec![integers()]);
}

#[test]
#[ignore = "takes two minutes"]
fn all_subjects_keep_to_their_own_memory() {
    keep_to_their_own_memory("all_subjects_keep_to_their_own_memory", || {
        let max_batch = norms_before().max_batch;
        let own = |subject| Subject {
            max_batch,
            ..subject
        };
        subjects().into_iter().map(own).collect()
    });
}

/// What shows that a bundle's kernels have a mistake, in one of a few orders.
fn mistake(compiled: &Compiled) -> Option<String> {
    (0..6).find_map(|seed| compiled.run(seed, expected()).err())
}

/// Changes a kernel, or a header as that kernel sees it: the mistake must show.
macro_rules! mistakes {
    ($($test:ident: $file:literal, $from:literal => $to:literal, $shows:expr;)*) => {$(
        #[test]
        fn $test() {
            let compiled = Compiled::new(&norms_before());
            compiled.plant($file, $from, $to);
            let found = mistake(&compiled).expect("the mistake does not show");
            assert!(found.contains($shows), "{found}");
        }
    )*};
}

const BYTES: &str = "has other bytes";

mistakes! {
    sums_read_before_they_are_written: "linear_48x48_r8_bias_residual_f32_f16.cu",
        "__syncthreads();\n\n    const Epilogue" => "\n\n    const Epilogue", BYTES;
    moments_read_before_they_are_written: "rows_norm_48_f16_tokens.cu/rows.cuh",
        "__syncthreads();\n    for (uint32_t r" => "\n    for (uint32_t r", BYTES;
    tiles_read_before_all_have_copied: "gemm_328x48_b64x64_bias_residual_f32_f16.cu",
        "__syncthreads();" => "", BYTES;
    tiles_read_before_they_arrive: "gemm_328x48_b64x64_bias_residual_f32_f16.cu",
        "copy_wait<STAGES - 2>();" => "", BYTES;
    chunks_read_before_all_have_copied: "attention_prefill_h3_d16_f16.cu",
        "copy_wait<1>();\n        __syncthreads();" => "copy_wait<1>();\n", BYTES;
    chunks_copied_over_while_they_are_read: "attention_prefill_h3_d16_f16.cu",
        "__syncthreads();\n    }\n    copy_wait<0>();" => "\n    }\n    copy_wait<0>();", BYTES;
    a_flag_read_before_it_is_written: "attention_decode_h3_d16_f16.cu",
        "__syncthreads();\n    if (!last) return;" => "\n    if (!last) return;", BYTES;
    a_counter_that_is_not_reset: "attention_decode_h3_d16_f16.cu",
        "if (last) *counter = 0;" => "", BYTES;
    best_tokens_read_before_they_are_written: "sample_301_of_38.cu/sampling.cuh",
        "__syncthreads();\n    best = scratch.best[0];" => "\n    best = scratch.best[0];", BYTES;
    sums_written_over_while_they_are_read: "sample_301_of_38.cu/sampling.cuh",
        "__syncthreads();\n    if (lane_index() == 31)" => "\n    if (lane_index() == 31)", BYTES;
    copies_of_other_blocks: "copy_blocks_384.cu",
        "+ copy.y * static_cast<uint64_t>(VECTORS)" => "+ copy.y", BYTES;
    counts_of_another_sequence: "sample_301_of_38.cu/processors.cuh",
        "counts[token] = 0;" => "(void)token;", BYTES;
    a_token_that_is_not_counted: "sample_301_of_38.cu/processors.cuh",
        "counts[token] = load_fresh(counts + token) + 1;" => "", BYTES;
    biases_added_after_penalties: "sample_301_of_38.cu/processors.cuh",
        "__syncthreads();\n\n    const bool by_count" => "\n\n    const bool by_count", BYTES;
    scores_chosen_from_before_all_are_changed: "sample_301_of_38.cu/processors.cuh",
        "        }\n    }\n    __syncthreads();\n}" => "        }\n    }\n}", BYTES;
    continuations_ranked_before_all_are_found: "sample_301_of_38.cu/beams.cuh",
        "__syncthreads();\n    for (uint32_t i" => "\n    for (uint32_t i", BYTES;
    a_kernel_that_overtakes_the_previous: "embed_tokens_positions_48_f16.cu",
        "wait_for_previous();" => "", "no thread has called wait_for_previous()";
}

/// Changes how a kernel reads integers: the CPU must disagree.
macro_rules! mistakes_in_integers {
    ($($test:ident: $file:literal, $from:literal => $to:literal;)*) => {$(
        #[test]
        fn $test() {
            let compiled = Compiled::new(&integers());
            compiled.plant(concat!($file, "/weights.cuh"), $from, $to);
            let found = compiled.run(0, &[]).err().expect("the mistake does not show");
            assert!(!found.contains(BYTES), "{found}");
        }
    )*};
}

mistakes_in_integers! {
    numbers_of_another_group: "linear_norm_48x144_int4g32_r8_bias_qkv_f16.cu",
        "load_numbers(strip, tile / GROUP_TILES, lane_index() / 4)" => "load_numbers(strip, 0, lane_index() / 4)";
    numbers_of_another_tile: "gemm_328x48_int4g32_b64x64_bias_residual_f32_f16.cu",
        "lane_index() / 4 * 4 + tile)" => "lane_index() / 4 * 4)";
    codes_of_another_tile: "gemm_48x328_int4g32_b64x64_bias_relu_f16.cu",
        "low = words[tile], high = low >> 8" => "low = words[0], high = low >> 8";
    units_of_another_output: "linear_norm_48x301_int8_r8_logits_f16.cu",
        "n % TILE_N) * Codes" => "0) * Codes";
    a_row_of_another_token: "embed_tokens_positions_48_int8_f16.cu",
        "output * 4 + k % TILE_K / 8" => "k % TILE_K / 8";
}

/// Changes a kernel: a sanitizer must find it, at that kernel.
macro_rules! sanitized_mistakes {
    ($($test:ident: $file:literal, $from:literal => $to:literal, $shows:expr;)*) => {$(
        #[test]
        fn $test() {
            let test = concat!("emulated_kernels::", stringify!($test));
            let Some(output) = rerun_sanitized(test) else {
                let compiled = Compiled::new(&norms_before());
                compiled.plant($file, $from, $to);
                return run_fenced(&compiled);
            };
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "nothing was found: {stderr}");
            for part in [$file, $shows, "emulated: "] {
                assert!(stderr.contains(part), "{part:?} is missing in: {stderr}");
            }
        }
    )*};
}

sanitized_mistakes! {
    logits_behind_the_vocabulary: "linear_48x301_r64_logits_f16.cu",
        "if (n >= N) return;" => "", "use-after-poison";
    biases_of_no_output: "gemm_48x328_b64x64_bias_relu_f16.cu",
        "bias_x = n < N ? bias[n] : 0.0f" => "bias_x = bias[n]", "use-after-poison";
    residuals_of_no_row: "gemm_328x48_b64x64_bias_residual_f32_f16.cu",
        "if (row >= rows) continue;\n                float &x" => "\n                float &x",
        "use-after-poison";
    slots_of_no_row: "gemm_48x144_b64x64_bias_qkv_f16.cu",
        "if (row >= rows) continue;\n#pragma" => "\n#pragma", "use-after-poison";
    copies_of_no_row: "gemm_48x328_b64x64_bias_relu_f16.cu",
        "row = wanted < rows ? wanted : 0;\n        rows_exist[j] = wanted < rows;" =>
        "row = wanted;\n        rows_exist[j] = true;", "use-after-poison";
    sums_of_no_row: "linear_48x48_r8_bias_residual_f32_f16.cu",
        "if (row >= ROWS || row >= rows) continue;" => "", "out of bounds";
    keys_read_before_they_are_written: "attention_decode_h3_d16_f16.cu",
        " && b != written" => "", "use-after-poison";
    warps_that_do_not_wait: "linear_48x48_r8_bias_residual_f32_f16.cu",
        "const uint32_t rows = load_fresh(&step.counts->tokens);\n\n    wait_for_previous();" =>
        "auto rows = load_fresh(&step.counts->tokens);\n    if (!warp) wait_for_previous();",
        "use-after-poison";
    scores_behind_the_vocabulary: "sample_301_of_38.cu",
        "i < V; i += SAMPLE_THREADS) own[i]" => "i <=V; i += SAMPLE_THREADS) own[i]", "use-after-poison";
    copies_behind_a_block: "copy_blocks_384.cu",
        "if (i < VECTORS) v[d]" => "v[d]", "use-after-poison";
    attention_of_no_row: "attention_prefill_h3_d16_f16.cu",
        "if (row >= end) continue;" => "", "use-after-poison";
}

/// Takes away each barrier of the kernels in turn; the mistakes above are a choice of these.
#[test]
#[ignore = "takes two minutes"]
fn every_barrier_is_needed() {
    let files = [
        "linear_norm_48x144_r8_bias_qkv_f16.cu",
        "linear_norm_48x144_r8_bias_qkv_f16.cu/linear.cuh",
        "linear_norm_48x301_r8_logits_f16.cu",
        "linear_norm_48x301_r8_logits_f16.cu/linear.cuh",
        "gemm_328x48_b64x64_bias_residual_f32_f16.cu",
        "rows_norm_48_f16_tokens.cu/rows.cuh",
        "attention_prefill_h3_d16_f16.cu",
        "attention_decode_h3_d16_f16.cu",
        "sample_301_of_38.cu/sampling.cuh",
        // Not processors.cuh: two of its barriers keep a score from being changed while another thread
        // changes it, and threads take turns only at barriers.
        "sample_301_of_38.cu/beams.cuh",
    ];
    const BARRIER: &str = "__syncthreads();";
    for file in files {
        for index in 0.. {
            let compiled = Compiled::new(&norms_before());
            let path = compiled.own(file);
            let text = fs::read_to_string(&path).unwrap();
            let Some((at, _)) = text.match_indices(BARRIER).nth(index) else {
                assert!(index > 0, "{file} has no barrier");
                break;
            };
            let (before, after) = (&text[..at], &text[at + BARRIER.len()..]);
            let blank = " ".repeat(BARRIER.len());
            fs::write(&path, [before, &blank, after].concat()).unwrap();
            let line = before.lines().count();
            let found = mistake(&compiled).unwrap_or_else(|| panic!("{file}:{line} shows nothing"));
            println!("{file}:{line}: {found}");
        }
    }
}
