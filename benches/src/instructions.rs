//! How many instructions kernels and whole steps execute: figures that are the same in every run, on a
//! machine that has other work as well, so that a change that makes one do more fails a check. (Those of
//! steps are the same to a few thousandths: hash tables have random seeds, and the allocator has a past.)
//!
//! The program runs itself under callgrind ([`count`]). There it runs each case a few times to warm up and
//! once within [`counted`], which is the only function that callgrind counts in; it writes a file before
//! each call of [`written`], so that the files are the cases in their order.
//!
//! Steps are of one thread, on a model so small that a good part of what a decode step executes is not of
//! kernels: what scheduler, device and sampler do for it is seen.

use crate::table::measure::arbitrary_id;
use anyhow::{Context, ensure};
use kiln_bundle::{BLOCK_TOKENS, Bundle, DType, WeightFormat, packing::Layout};
use kiln_compiler::{CompileOptions, Model, Silent, compile};
use kiln_runtime::cpu::{
    self, Attention, Cpu, Embedding, Isa, KvCache, KvCacheMut, KvLayout, Linear, Norm,
    PackedMatrix, PositionTable, Rows, RowsMut, Sequence, Storage, StorageMut, ThreadPool,
};
use kiln_runtime::device::{CpuOptions, DeviceChoice};
use kiln_runtime::{
    Draw, DrawParams, Engine, Event, LoadOptions, PhaseStats, Prompt, Request, Sampler,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

/// By which share a count may grow before it fails: libraries of the system differ by less.
pub const TOLERANCE: f64 = 0.03;

/// More than the allocator keeps lists of one size for, and less than it asks the system for.
const LARGE_BYTES: usize = 64 << 10;

/// Times that a case runs before it is counted, so that what it keeps has grown.
const WARM_UP: usize = 4;

/// The cases' counts, and what they depend on besides the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// What was counted on.
    pub place: Place,
    /// By case.
    pub instructions: BTreeMap<String, u64>,
}

/// Counts of different places are not comparable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Of the processor.
    pub arch: String,
    /// Of the kernels' vectors.
    pub isa: String,
    /// Cargo's, `dev` or `release`.
    pub profile: String,
}

impl Place {
    fn here() -> Place {
        Place {
            arch: env::consts::ARCH.to_owned(),
            isa: Isa::of_machine().name().to_owned(),
            profile: if cfg!(debug_assertions) {
                "dev"
            } else {
                "release"
            }
            .to_owned(),
        }
    }
}

/// What the counted program says: the files' order.
#[derive(Serialize, Deserialize)]
struct Ran {
    place: Place,
    cases: Vec<String>,
}

/// Counts all cases with callgrind; steps are of the model in a checkpoint directory.
///
/// # Errors
/// The model does not compile, valgrind is missing or failed, or its files are not as expected.
pub fn count(model: &Path) -> anyhow::Result<Counts> {
    let dir = tempfile::tempdir()?;
    // Here, where it takes no time.
    compile_bundles(model, dir.path())?;
    let files = dir.path().join("counts");
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--quiet"])
        .arg(format!("--callgrind-out-file={}", files.display()))
        .arg("--toggle-collect=*instructions::counted*")
        .arg("--dump-before=*instructions::written*")
        .arg(env::current_exe()?)
        .args(["instructions", "--cases"])
        .arg(dir.path())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    if env::var_os("KILN_ISA").is_none() {
        // Which of them valgrind knows depends on its version; this one all of them do.
        command.env("KILN_ISA", "avx2");
    }
    let output = command
        .output()
        .context("cannot run valgrind; install it (`apt-get install valgrind`)")?;
    ensure!(
        output.status.success(),
        "valgrind ended with {}",
        output.status
    );
    let ran: Ran = serde_json::from_slice(&output.stdout)?;
    let counts = (1..).zip(ran.cases).map(|(number, case)| {
        let count = total(&files.with_extension(number.to_string()));
        Ok((case, count?))
    });
    let instructions = counts.collect::<anyhow::Result<_>>()?;
    let place = ran.place;
    Ok(Counts {
        place,
        instructions,
    })
}

/// The count in a file of callgrind.
fn total(path: &Path) -> anyhow::Result<u64> {
    let text =
        fs::read_to_string(path).context("valgrind wrote fewer counts than there are cases")?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals:"));
    let total = total.and_then(|total| total.trim().parse().ok());
    total
        .filter(|&total| total > 0)
        .context("valgrind has not counted: the counted function is not in the program by its name")
}

/// Weights of the bundles whose steps are counted, which are their names, and the type of the KV cache.
const BUNDLES: [(&str, DType); 3] = [
    ("f32", DType::F32),
    ("bf16", DType::Bf16),
    ("int8", DType::F32),
];

/// Compiles a model into the bundles that [`run_cases`] takes.
fn compile_bundles(model: &Path, dir: &Path) -> anyhow::Result<()> {
    for (weights, dtype) in BUNDLES {
        let options = CompileOptions {
            weights: Some(weights.parse()?),
            dtype: Some(dtype),
            ..CompileOptions::default()
        };
        let named = || format!("cannot compile {}", model.display());
        let model = Model::open(model).with_context(named)?;
        compile(model, &dir.join(weights), &options, &Silent).with_context(named)?;
    }
    Ok(())
}

/// Runs the cases, as [`count`] has them run; `bundles` is the directory of the compiled ones.
///
/// # Errors
/// The cases cannot be set up, or do not do what they are to.
pub fn run_cases(bundles: &Path) -> anyhow::Result<String> {
    let mut names = Vec::new();
    for (name, mut case) in [kernels()?, steps(bundles)?].into_iter().flatten() {
        for _ in 0..WARM_UP {
            case()?;
        }
        // What was freed while cases were set up lies in the allocator's list of unsorted blocks until
        // something large is asked for: not within a case.
        drop(black_box(Vec::<u8>::with_capacity(LARGE_BYTES)));
        counted(&mut case)?;
        written();
        names.push(name);
    }
    let ran = Ran {
        place: Place::here(),
        cases: names,
    };
    Ok(serde_json::to_string(&ran)?)
}

/// What callgrind counts, by its name.
#[inline(never)]
fn counted(case: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let result = case();
    // Keeps the call from becoming a jump, which would end this function before its case.
    black_box(());
    result
}

/// Where callgrind writes a file, by its name.
#[inline(never)]
fn written() {
    black_box(());
}

type Case = Box<dyn FnMut() -> anyhow::Result<()>>;

/// C.
const WIDTH: usize = 256;
const HEADS: usize = 4;
/// Rows of weights of the linears, and V.
const OUTPUTS: usize = 512;
/// Positions of the KV cache.
const KV_LEN: usize = 512;
/// New tokens of a prefill.
const PREFILL: usize = 64;

/// Every kernel on small shapes, as decode and prefill call it.
fn kernels() -> anyhow::Result<Vec<(String, Case)>> {
    let mut cases: Vec<(String, Case)> = Vec::new();
    for (phase, tokens) in [("decode", 1), ("prefill", PREFILL)] {
        for format in ["f32", "f16", "bf16", "int8", "int4:g64"] {
            let name = format!("linear {format}, {phase}");
            cases.push((name, linear(format.parse()?, tokens)?));
        }
        for dtype in [DType::F32, DType::Bf16] {
            cases.push((
                format!("attention {dtype}, {phase}"),
                attention(dtype, tokens)?,
            ));
            cases.push((
                format!("write_kv {dtype}, {phase}"),
                write_kv(dtype, tokens)?,
            ));
        }
        cases.push((format!("embed, {phase}"), embed(tokens)?));
        cases.push((format!("layernorm, {phase}"), layer_norm(tokens)?));
    }
    let cut = DrawParams {
        temperature: 0.8,
        top_k: 50,
        top_p: 0.9,
        ..DrawParams::GREEDY
    };
    cases.push(("sample greedy".to_owned(), sample(DrawParams::GREEDY)));
    cases.push(("sample top-k, top-p".to_owned(), sample(cut)));
    Ok(cases)
}

fn one_thread() -> anyhow::Result<Cpu> {
    Ok(Cpu::new(ThreadPool::new(1)?, Isa::of_machine())?)
}

/// Memory of any type, in which every number is small.
fn small_numbers(bytes: u64) -> Vec<u32> {
    vec![0x3c10_3c10; bytes as usize / 4]
}

fn linear(format: WeightFormat, tokens: usize) -> anyhow::Result<Case> {
    let mut cpu = one_thread()?;
    let words = small_numbers(format.bytes(Layout::Panels, OUTPUTS, WIDTH));
    let (x, norm) = (vec![0.5; tokens * WIDTH], vec![1.0; WIDTH]);
    let (bias, mut out) = (vec![1.0; OUTPUTS], vec![0.0; tokens * OUTPUTS]);
    Ok(Box::new(move || {
        let bytes = bytemuck::cast_slice(&words);
        let weight = PackedMatrix::from_bytes(bytes, format, OUTPUTS, WIDTH)?;
        let spec = Linear {
            norm: Some(norm_of(&norm)),
            bias: Some(&bias),
            activation: cpu::Activation::GeluNew,
            ..Linear::new(weight)
        };
        let out = RowsMut::new(&mut out, tokens, OUTPUTS);
        cpu::linear(&mut cpu, &spec, Rows::new(&x, tokens, WIDTH), out);
        Ok(())
    }))
}

fn norm_of(weight: &[f32]) -> Norm<'_> {
    Norm {
        weight: Some(weight),
        bias: Some(weight),
        eps: 1e-5,
    }
}

fn layer_norm(tokens: usize) -> anyhow::Result<Case> {
    let mut cpu = one_thread()?;
    let (x, norm) = (vec![0.5; tokens * WIDTH], vec![1.0; WIDTH]);
    let mut out = vec![0.0; tokens * WIDTH];
    Ok(Box::new(move || {
        let (x, out) = (
            Rows::new(&x, tokens, WIDTH),
            RowsMut::new(&mut out, tokens, WIDTH),
        );
        cpu::layer_norm(&mut cpu, x, &norm_of(&norm), out);
        Ok(())
    }))
}

fn embed(tokens: usize) -> anyhow::Result<Case> {
    let cpu = one_thread()?;
    let format = WeightFormat::F32;
    let words = small_numbers(format.bytes(Layout::Panels, OUTPUTS, WIDTH));
    let positions = vec![0.5; tokens * WIDTH];
    let ids: Vec<u32> = (0..tokens as u32).collect();
    let mut out = vec![0.0; tokens * WIDTH];
    Ok(Box::new(move || {
        let bytes = bytemuck::cast_slice(&words);
        let table = PackedMatrix::from_bytes(bytes, format, OUTPUTS, WIDTH)?;
        let positions = PositionTable::new(Storage::F32(&positions), WIDTH);
        let embedding = Embedding {
            tokens: Some((table, &ids)),
            positions: Some((positions, &ids)),
        };
        cpu::embed(&cpu, &embedding, RowsMut::new(&mut out, tokens, WIDTH));
        Ok(())
    }))
}

/// Of one layer.
fn cache_layout() -> KvLayout {
    KvLayout::new(1, HEADS, WIDTH / HEADS)
}

/// Bytes of the KV cache.
fn cache_bytes(dtype: DType) -> u64 {
    (KV_LEN / BLOCK_TOKENS * cache_layout().block_len() * dtype.size_bytes()) as u64
}

fn attention(dtype: DType, tokens: usize) -> anyhow::Result<Case> {
    let mut cpu = one_thread()?;
    let cache = small_numbers(cache_bytes(dtype));
    let blocks: Vec<u32> = (0..(KV_LEN / BLOCK_TOKENS) as u32).collect();
    let queries = vec![0.5; tokens * WIDTH];
    let mut out = vec![0.0; tokens * WIDTH];
    Ok(Box::new(move || {
        let cache = Storage::new(bytemuck::cast_slice(&cache), dtype)?;
        let sequence = Sequence {
            first_row: 0,
            rows: tokens,
            past: KV_LEN - tokens,
            block_table: &blocks,
        };
        let attention = Attention {
            queries: Rows::new(&queries, tokens, WIDTH),
            sequences: &[sequence],
            cache: KvCache::new(cache, cache_layout(), 0),
            scale: 0.125,
            activations: None,
        };
        cpu::attention(&mut cpu, &attention, RowsMut::new(&mut out, tokens, WIDTH));
        Ok(())
    }))
}

fn write_kv(dtype: DType, tokens: usize) -> anyhow::Result<Case> {
    let cpu = one_thread()?;
    let mut cache = small_numbers(cache_bytes(dtype));
    let rows = vec![0.5; tokens * WIDTH];
    let slots: Vec<u32> = (0..tokens as u32).collect();
    Ok(Box::new(move || {
        let data = StorageMut::new(bytemuck::cast_slice_mut(&mut cache), dtype)?;
        let mut cache = KvCacheMut::new(data, cache_layout(), 0);
        let rows = Rows::new(&rows, tokens, WIDTH);
        cpu::write_kv(&cpu, rows, rows, &slots, &mut cache);
        Ok(())
    }))
}

fn sample(params: DrawParams) -> Case {
    let mut sampler = Sampler::default();
    let row: Vec<f32> = (0..4096u32)
        .map(|i| (i * 7919 % 4093) as f32 / 400.0)
        .collect();
    let draw = Draw {
        params,
        ..Draw::GREEDY
    };
    Box::new(move || {
        black_box(sampler.sample(&row, &draw));
        Ok(())
    })
}

/// Tokens of the prompts of sequences that decode.
const PROMPT: usize = 20;

/// Whole steps of the engine: decode, in a batch and alone, and prefill.
fn steps(bundles: &Path) -> anyhow::Result<Vec<(String, Case)>> {
    let mut cases = Vec::new();
    for (weights, _) in BUNDLES {
        let bundle = Bundle::open(&bundles.join(weights))?;
        for batch in [1, 8] {
            let name = format!("step {weights}, decode of {batch}");
            cases.push((name, decode_step(&bundle, batch)?));
        }
        cases.push((format!("step {weights}, prefill"), prefill_step(&bundle)?));
    }
    Ok(cases)
}

fn engine(bundle: &Bundle) -> anyhow::Result<Engine> {
    let options = LoadOptions {
        device: DeviceChoice::Cpu,
        cpu: CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        },
        ..LoadOptions::default()
    };
    Ok(Engine::load(bundle, &options)?)
}

fn request(salt: usize, prompt_len: usize, max_new_tokens: u32) -> Request {
    let ids = (0..prompt_len).map(|position| arbitrary_id(salt, position));
    let mut request = Request::new(Prompt::Ids(ids.collect()));
    request.max_new_tokens = Some(max_new_tokens);
    request.ignore_eos = true;
    request
}

/// A step of `batch` sequences, all of which decode.
fn decode_step(bundle: &Bundle, batch: usize) -> anyhow::Result<Case> {
    let mut engine = engine(bundle)?;
    for sequence in 0..batch {
        engine.submit(request(sequence, PROMPT, 64))?;
    }
    while engine.stats().prefill.tokens < (batch * PROMPT) as u64 {
        step(&mut engine)?;
    }
    Ok(Box::new(move || {
        let before = engine.stats().decode;
        step(&mut engine)?;
        is_step_of(before, engine.stats().decode, batch)
    }))
}

/// A request whose only step is a prefill, from its submission to its end.
fn prefill_step(bundle: &Bundle) -> anyhow::Result<Case> {
    let mut engine = engine(bundle)?;
    let mut salt = 0;
    Ok(Box::new(move || {
        // Another prompt than the last one's, which the cache still holds.
        salt += 1;
        let before = engine.stats().prefill;
        engine.submit(request(salt, PREFILL, 1))?;
        step(&mut engine)?;
        ensure!(engine.is_idle(), "a prefill has left something to do");
        is_step_of(before, engine.stats().prefill, PREFILL)
    }))
}

fn step(engine: &mut Engine) -> anyhow::Result<()> {
    for event in engine.step()? {
        if let Event::Failed { error, .. } = event {
            return Err(error.into());
        }
    }
    Ok(())
}

/// Whether in between there was one step, of so many tokens.
fn is_step_of(before: PhaseStats, after: PhaseStats, tokens: usize) -> anyhow::Result<()> {
    let found = (after.steps - before.steps, after.tokens - before.tokens);
    ensure!(
        found == (1, tokens as u64),
        "{} steps of {} tokens, where one of {tokens} was to be counted",
        found.0,
        found.1
    );
    Ok(())
}

/// A case in both counts.
#[derive(Debug, PartialEq)]
pub struct Difference {
    /// Which.
    pub case: String,
    /// Of the baseline; none where the case is new.
    pub old: Option<u64>,
    /// Now; none where the case is gone.
    pub new: Option<u64>,
}

impl Difference {
    /// New over old.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.new? as f64 / self.old? as f64)
    }

    /// Whether it needs more, or is not to be judged.
    pub fn fails(&self) -> bool {
        self.ratio().is_none_or(|ratio| ratio > 1.0 + TOLERANCE)
    }

    /// Whether it needs less, so that the baseline should be made again.
    pub fn is_better(&self) -> bool {
        self.ratio().is_some_and(|ratio| ratio < 1.0 - TOLERANCE)
    }
}

/// All cases of either.
pub fn differences(old: &Counts, new: &Counts) -> Vec<Difference> {
    let mut cases: Vec<&String> = old.instructions.keys().collect();
    cases.extend(
        new.instructions
            .keys()
            .filter(|case| !old.instructions.contains_key(*case)),
    );
    let differences = cases.into_iter().map(|case| Difference {
        case: case.clone(),
        old: old.instructions.get(case).copied(),
        new: new.instructions.get(case).copied(),
    });
    differences.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(instructions: &[(&str, u64)]) -> Counts {
        Counts {
            place: Place::here(),
            instructions: instructions
                .iter()
                .map(|&(case, n)| (case.to_owned(), n))
                .collect(),
        }
    }

    #[test]
    fn a_kernel_that_needs_more_fails() {
        let old = counts(&[("a", 1000), ("b", 1000), ("c", 1000), ("gone", 5)]);
        let new = counts(&[("a", 1029), ("b", 1031), ("c", 960), ("new", 5)]);
        let failed = |d: &Difference| (d.fails(), d.is_better());
        let found: Vec<(bool, bool)> = differences(&old, &new).iter().map(failed).collect();
        let expected = [
            (false, false),
            (true, false),
            (false, true),
            (true, false),
            (true, false),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn every_case_runs() {
        let dir = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-opt");
        compile_bundles(&model, dir.path()).unwrap();
        let ran: Ran = serde_json::from_str(&run_cases(dir.path()).unwrap()).unwrap();
        assert!(ran.place == Place::here());
        let steps = ran.cases.iter().filter(|case| case.starts_with("step "));
        assert_eq!(steps.count(), 9);
        assert!(ran.cases.len() > 30, "{:?}", ran.cases);
    }

    #[test]
    fn a_step_of_another_kind_is_not_counted() {
        let steps = |steps, tokens| PhaseStats {
            steps,
            tokens,
            ..PhaseStats::default()
        };
        assert!(is_step_of(steps(2, 30), steps(3, 38), 8).is_ok());
        for after in [steps(2, 30), steps(3, 37), steps(4, 38)] {
            let error = is_step_of(steps(2, 30), after, 8).unwrap_err().to_string();
            assert!(
                error.ends_with("where one of 8 was to be counted"),
                "{error}"
            );
        }
    }
}
