//! How many instructions kernels execute: a figure that is the same in every run, on a machine that has
//! other work as well, so that a change that makes a kernel do more fails a check.
//!
//! The program runs itself under callgrind ([`count`]). There it runs each of [`cases`] once to warm up
//! and once within [`counted`], which is the only function that callgrind counts in; it writes a file
//! before each call of [`written`], so that the files are the cases in their order.

use anyhow::{Context, ensure};
use kiln_bundle::{BLOCK_TOKENS, DType, WeightFormat, packing::Layout};
use kiln_runtime::cpu::{
    self, Attention, Cpu, Embedding, Isa, KvCache, KvCacheMut, Linear, Norm, PackedMatrix,
    PositionTable, Rows, RowsMut, Sequence, Storage, StorageMut, ThreadPool,
};
use kiln_runtime::{Draw, DrawParams, Sampler};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

/// By which share a count may grow before it fails: libraries of the system differ by less.
pub const TOLERANCE: f64 = 0.03;

/// Kernels' counts, and what they depend on besides the kernels.
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

/// Counts all cases with callgrind.
///
/// # Errors
/// Valgrind is missing or failed, or its files are not as expected.
pub fn count() -> anyhow::Result<Counts> {
    let dir = tempfile::tempdir()?;
    let files = dir.path().join("counts");
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--quiet"])
        .arg(format!("--callgrind-out-file={}", files.display()))
        .arg("--toggle-collect=*instructions::counted*")
        .arg("--dump-before=*instructions::written*")
        .arg(env::current_exe()?)
        .args(["instructions", "--cases"])
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

/// Runs the cases, as [`count`] has them run.
///
/// # Errors
/// The kernels cannot be set up.
pub fn run_cases() -> anyhow::Result<String> {
    let mut names = Vec::new();
    for (name, mut case) in cases()? {
        case();
        counted(&mut case);
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
fn counted(case: &mut dyn FnMut()) {
    case();
    // Keeps the call from becoming a jump, which would end this function before its case.
    black_box(());
}

/// Where callgrind writes a file, by its name.
#[inline(never)]
fn written() {
    black_box(());
}

type Case = Box<dyn FnMut()>;

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
fn cases() -> anyhow::Result<Vec<(String, Case)>> {
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
    PackedMatrix::from_bytes(bytemuck::cast_slice(&words), format, OUTPUTS, WIDTH)?;
    let (x, norm) = (vec![0.5; tokens * WIDTH], vec![1.0; WIDTH]);
    let (bias, mut out) = (vec![1.0; OUTPUTS], vec![0.0; tokens * OUTPUTS]);
    Ok(Box::new(move || {
        let bytes = bytemuck::cast_slice(&words);
        let Ok(weight) = PackedMatrix::from_bytes(bytes, format, OUTPUTS, WIDTH) else {
            return;
        };
        let spec = Linear {
            norm: Some(norm_of(&norm)),
            bias: Some(&bias),
            activation: cpu::Activation::GeluNew,
            ..Linear::new(weight)
        };
        let out = RowsMut::new(&mut out, tokens, OUTPUTS);
        cpu::linear(&mut cpu, &spec, Rows::new(&x, tokens, WIDTH), out);
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
    }))
}

fn embed(tokens: usize) -> anyhow::Result<Case> {
    let cpu = one_thread()?;
    let format = WeightFormat::F32;
    let words = small_numbers(format.bytes(Layout::Panels, OUTPUTS, WIDTH));
    PackedMatrix::from_bytes(bytemuck::cast_slice(&words), format, OUTPUTS, WIDTH)?;
    let positions = vec![0.5; tokens * WIDTH];
    let ids: Vec<u32> = (0..tokens as u32).collect();
    let mut out = vec![0.0; tokens * WIDTH];
    Ok(Box::new(move || {
        let bytes = bytemuck::cast_slice(&words);
        let Ok(table) = PackedMatrix::from_bytes(bytes, format, OUTPUTS, WIDTH) else {
            return;
        };
        let positions = PositionTable::new(Storage::F32(&positions), WIDTH);
        let embedding = Embedding {
            tokens: Some((table, &ids)),
            positions: Some((positions, &ids)),
        };
        cpu::embed(&cpu, &embedding, RowsMut::new(&mut out, tokens, WIDTH));
    }))
}

/// Bytes of the keys, or the values, of the KV cache.
fn cache_bytes(dtype: DType) -> u64 {
    (KV_LEN * WIDTH * dtype.size_bytes()) as u64
}

fn attention(dtype: DType, tokens: usize) -> anyhow::Result<Case> {
    let mut cpu = one_thread()?;
    let cache = small_numbers(cache_bytes(dtype));
    Storage::new(bytemuck::cast_slice(&cache), dtype)?;
    let blocks: Vec<u32> = (0..(KV_LEN / BLOCK_TOKENS) as u32).collect();
    let queries = vec![0.5; tokens * WIDTH];
    let mut out = vec![0.0; tokens * WIDTH];
    Ok(Box::new(move || {
        let Ok(part) = Storage::new(bytemuck::cast_slice(&cache), dtype) else {
            return;
        };
        let sequence = Sequence {
            first_row: 0,
            rows: tokens,
            past: KV_LEN - tokens,
            block_table: &blocks,
        };
        let attention = Attention {
            queries: Rows::new(&queries, tokens, WIDTH),
            sequences: &[sequence],
            cache: KvCache::new(part, part, HEADS, WIDTH / HEADS),
            scale: 0.125,
        };
        cpu::attention(&mut cpu, &attention, RowsMut::new(&mut out, tokens, WIDTH));
    }))
}

fn write_kv(dtype: DType, tokens: usize) -> anyhow::Result<Case> {
    let cpu = one_thread()?;
    let (mut keys, mut values) = (
        small_numbers(cache_bytes(dtype)),
        small_numbers(cache_bytes(dtype)),
    );
    StorageMut::new(bytemuck::cast_slice_mut(&mut keys), dtype)?;
    let rows = vec![0.5; tokens * WIDTH];
    let slots: Vec<u32> = (0..tokens as u32).collect();
    Ok(Box::new(move || {
        let parts = [&mut keys, &mut values]
            .map(|part| StorageMut::new(bytemuck::cast_slice_mut(part), dtype));
        let [Ok(keys), Ok(values)] = parts else {
            return;
        };
        let mut cache = KvCacheMut::new(keys, values, HEADS, WIDTH / HEADS);
        let rows = Rows::new(&rows, tokens, WIDTH);
        cpu::write_kv(&cpu, rows, rows, &slots, &mut cache);
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
    })
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
        let ran: Ran = serde_json::from_str(&run_cases().unwrap()).unwrap();
        assert!(ran.cases.len() > 20 && ran.place == Place::here());
    }
}
