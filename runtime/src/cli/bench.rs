//! `kiln bench`: how fast, and how near to what the memory allows.
//!
//! Every decode step reads all weights once, whatever the batch, and the keys and values of every
//! sequence; so the bytes of a step over its time, as a share of the measured bandwidth, says how
//! much there is left to gain. The bandwidth is the device's own: of reading on the CPU, of copying
//! (bytes read and bytes written) on a GPU.

use super::{DeviceArgs, Loaded, load, milliseconds};
use anyhow::{bail, ensure};
use comfy_table::{Table, presets};
use indicatif::ProgressBar;
use kiln_bundle::{
    Activations, Manifest, Phase, Target, WeightFormat,
    packing::Layout,
    work::{StepSize, step_work},
};
use kiln_runtime::{Engine, Event, PhaseStats, Prompt, Request};
use serde::Serialize;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Arguments of `kiln bench`.
#[derive(clap::Args)]
pub(super) struct BenchArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_len: u32,
    /// Tokens to generate from each
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    gen_len: u32,
    /// Prompts at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Runs to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What was measured; times and rates over the repeats.
#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    weights: WeightFormat,
    activations: Option<Activations>,
    prompt_len: u32,
    gen_len: u32,
    batch: u32,
    repeat: u32,
    load_ms: f64,
    prefill: Rates,
    decode: Rates,
    decode_step: StepBytes,
    /// None where the device cannot measure it.
    read_bandwidth_gb_per_s: Option<Spread>,
    /// Of the median decode rate in the median bandwidth.
    bandwidth_share: Option<f64>,
    memory: Memory,
}

#[derive(Serialize)]
struct Rates {
    /// Of all steps of the phase.
    ms: Spread,
    tokens_per_s: Spread,
}

#[derive(Serialize)]
struct StepBytes {
    weight_bytes: u64,
    /// Mean over the steps.
    kv_bytes: u64,
    ms: Spread,
    gb_per_s: Spread,
}

#[derive(Serialize)]
struct Memory {
    peak_resident_bytes: Option<u64>,
    /// On the CPU: weights are read where their file is mapped.
    mapped_weight_bytes: Option<u64>,
    /// Of these, those in huge pages: the rest is read more slowly.
    huge_page_bytes: Option<u64>,
    /// On a GPU: weights are copied to it.
    device_weight_bytes: Option<u64>,
    arena_bytes: u64,
    kv_cache_bytes: u64,
}

#[derive(Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let last = values.len().saturating_sub(1);
        let median = (at(last / 2) + at(values.len() / 2)) / 2.0;
        Spread {
            median,
            min: at(0),
            max: at(last),
        }
    }
}

/// One run of the whole batch.
struct Run {
    prefill: PhaseStats,
    decode: PhaseStats,
    bandwidth_gb_per_s: Option<f64>,
}

pub(super) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let Loaded {
        mut engine,
        bundle,
        load_time,
    } = load(&args.bundle, &args.device)?;
    let manifest = bundle.manifest();
    let slots = engine.facts().slots;
    ensure!(
        args.batch <= slots,
        "--batch is {}; this bundle runs {slots} at a time",
        args.batch
    );
    let name = engine.facts().target.clone();
    let Some(target) = manifest.targets.iter().find(|target| target.name == name) else {
        bail!("the bundle has no target {name}");
    };

    let progress = ProgressBar::new(u64::from(args.repeat) + 1);
    run_batch(&mut engine, args, 0)?;
    progress.inc(1);
    // Before the buffer that bandwidth is measured with adds to it.
    let peak_resident_bytes = peak_resident_bytes();
    let mut runs = Vec::new();
    for run in 1..=args.repeat {
        let bandwidth_gb_per_s = engine.read_bandwidth();
        let before = engine.stats();
        run_batch(&mut engine, args, run)?;
        let after = engine.stats();
        runs.push(Run {
            prefill: since(before.prefill, after.prefill),
            decode: since(before.decode, after.decode),
            bandwidth_gb_per_s,
        });
        progress.inc(1);
    }
    progress.finish_and_clear();

    let weight_bytes = engine.facts().memory.weight_bytes;
    let mapped = target.layout == Layout::Panels;
    let memory = Memory {
        peak_resident_bytes,
        mapped_weight_bytes: mapped.then_some(weight_bytes),
        huge_page_bytes: mapped.then(mapped_huge_page_bytes).flatten(),
        device_weight_bytes: (!mapped).then_some(weight_bytes),
        arena_bytes: engine.facts().memory.arena_bytes,
        kv_cache_bytes: engine.facts().memory.kv_bytes,
    };
    let report = report(args, &engine, manifest, target, load_time, &runs, memory);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{}", table(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prompts of arbitrary, different tokens, run to their full length. Those of other runs are different
/// too, so that none of them is found in the cache.
fn run_batch(engine: &mut Engine, args: &BenchArgs, run: u32) -> anyhow::Result<()> {
    // Ids that every vocabulary of these models has.
    const IDS: u32 = 200;
    for sequence in 0..args.batch {
        let id = |position: u32| {
            let prompt = sequence.wrapping_add(run.wrapping_mul(1009));
            3 + (position.wrapping_mul(7919) ^ prompt.wrapping_mul(104_729)) % IDS
        };
        let mut request = Request::new(Prompt::Ids((0..args.prompt_len).map(id).collect()));
        request.max_new_tokens = Some(args.gen_len);
        request.ignore_eos = true;
        engine.submit(request)?;
    }
    while !engine.is_idle() {
        for event in engine.step()? {
            if let Event::Failed { error, .. } = event {
                return Err(error.into());
            }
        }
    }
    Ok(())
}

fn since(before: PhaseStats, after: PhaseStats) -> PhaseStats {
    PhaseStats {
        steps: after.steps - before.steps,
        tokens: after.tokens - before.tokens,
        kv_positions: after.kv_positions - before.kv_positions,
        time: after.time - before.time,
    }
}

fn report(
    args: &BenchArgs,
    engine: &Engine,
    manifest: &Manifest,
    target: &Target,
    load_time: Duration,
    runs: &[Run],
    memory: Memory,
) -> Report {
    let rates = |phase: fn(&Run) -> &PhaseStats| Rates {
        ms: Spread::of(runs.iter().map(|run| milliseconds(phase(run).time))),
        tokens_per_s: Spread::of(
            runs.iter()
                .map(|run| phase(run).tokens as f64 / phase(run).time.as_secs_f64()),
        ),
    };
    let facts = engine.facts();
    let position_bytes = manifest.model.kv_bytes_per_token(target.dtype);
    let weight_bytes = decode_weight_bytes(target);
    let step_kv_bytes =
        |run: &Run| run.decode.kv_positions * position_bytes / run.decode.steps.max(1);
    let step_seconds = |run: &Run| run.decode.time.as_secs_f64() / run.decode.steps.max(1) as f64;
    let kv_bytes = runs.first().map_or(0, step_kv_bytes);
    let gb_per_s = Spread::of(
        runs.iter()
            .map(|run| (weight_bytes + step_kv_bytes(run)) as f64 / step_seconds(run) / 1e9),
    );
    let bandwidth: Option<Vec<f64>> = runs.iter().map(|run| run.bandwidth_gb_per_s).collect();
    let bandwidth = bandwidth.map(Spread::of);
    Report {
        model: manifest.model.name.clone(),
        device: facts.name.clone(),
        weights: target.weights,
        activations: target.activations,
        prompt_len: args.prompt_len,
        gen_len: args.gen_len,
        batch: args.batch,
        repeat: args.repeat,
        load_ms: milliseconds(load_time),
        prefill: rates(|run| &run.prefill),
        decode: rates(|run| &run.decode),
        decode_step: StepBytes {
            weight_bytes,
            kv_bytes,
            ms: Spread::of(runs.iter().map(|run| step_seconds(run) * 1e3)),
            gb_per_s,
        },
        read_bandwidth_gb_per_s: bandwidth,
        bandwidth_share: bandwidth.map(|bandwidth| gb_per_s.median / bandwidth.median),
        memory,
    }
}

/// Bytes of the matrices and vectors that one decode step reads; of the embedding tables it reads
/// single rows.
fn decode_weight_bytes(target: &Target) -> u64 {
    let decode = target
        .executables
        .iter()
        .find(|executable| executable.phase == Phase::Decode);
    let program = decode.and_then(|executable| target.programs.get(executable.program as usize));
    program.map_or(0, |program| {
        step_work(target, program, &StepSize::default()).weight_bytes
    })
}

/// The most memory that this process has held so far, where the system tells (Linux: `VmHWM`).
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    kib_of(&status, "VmHWM:")
}

/// Bytes of mapped files that are mapped in huge pages, where the system tells (Linux: `FilePmdMapped`).
fn mapped_huge_page_bytes() -> Option<u64> {
    let maps = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    kib_of(&maps, "FilePmdMapped:")
}

/// The bytes that a file of /proc gives under a name, in KiB.
fn kib_of(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn table(report: &Report) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    let spread = |spread: &Spread| {
        format!(
            "{:.2}  ({:.2} to {:.2})",
            spread.median, spread.min, spread.max
        )
    };
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let rounded = report.activations.map_or(String::new(), |activations| {
        format!(", activations rounded to {}", activations.name())
    });
    row(
        "model",
        format!("{}, {} weights{rounded}", report.model, report.weights),
    );
    row("device", report.device.clone());
    row(
        "run",
        format!(
            "{} x ({} prompt + {} new tokens), {} repeats",
            report.batch, report.prompt_len, report.gen_len, report.repeat
        ),
    );
    row("load", format!("{:.1} ms", report.load_ms));
    row("prefill ms", spread(&report.prefill.ms));
    row("prefill tokens/s", spread(&report.prefill.tokens_per_s));
    row("decode ms/step", spread(&report.decode_step.ms));
    row("decode tokens/s", spread(&report.decode.tokens_per_s));
    let step = &report.decode_step;
    row(
        "decode reads",
        format!(
            "{} weights + {} KV a step",
            mib(step.weight_bytes),
            mib(step.kv_bytes)
        ),
    );
    row("decode GB/s", spread(&step.gb_per_s));
    let mapped = report.memory.mapped_weight_bytes;
    if let Some(bandwidth) = &report.read_bandwidth_gb_per_s {
        let name = match mapped {
            Some(_) => "read bandwidth GB/s",
            None => "copy bandwidth GB/s (read + write)",
        };
        row(name, spread(bandwidth));
    }
    if let Some(share) = report.bandwidth_share {
        row("share", format!("{:.0} %", 100.0 * share));
    }
    if let Some(bytes) = report.memory.peak_resident_bytes {
        row("peak resident", mib(bytes));
    }
    row(
        "memory",
        format!(
            "{} weights{}, {} activations, {} KV cache",
            mib(mapped.or(report.memory.device_weight_bytes).unwrap_or(0)),
            match (mapped, report.memory.huge_page_bytes) {
                (Some(_), Some(huge)) => format!(" (mapped, {} in huge pages)", mib(huge)),
                (Some(_), None) => " (mapped)".to_owned(),
                (None, _) => String::new(),
            },
            mib(report.memory.arena_bytes),
            mib(report.memory.kv_cache_bytes)
        ),
    );
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let spread = Spread::of([3.0, 1.0, 2.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert_eq!(Spread::of([1.0, 2.0]).median, 1.5);
        assert!(Spread::of([]).median.is_nan());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_holds_memory() {
        assert!(peak_resident_bytes().unwrap() > 1 << 20);
    }
}
