//! The command line. Results go to standard output, everything else to standard error.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

mod bench;
mod embed;
mod eval;
mod generate;
mod interactive;
mod interrupt;
mod lines;
mod output;
mod requests;
mod settings;
mod verify;

use anyhow::Context;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use kiln_bundle::Bundle;
use kiln_runtime::device::{CpuOptions, CudaOptions, DeviceChoice};
use kiln_runtime::{Engine, LoadOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Runs OPT and GPT language models compiled by kilnc
#[derive(clap::Parser)]
#[command(name = "kiln", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue prompts
    Generate(Box<generate::GenerateArgs>),
    /// Turn texts into vectors
    Embed(embed::EmbedArgs),
    /// Measure load, prefill, decode and memory
    Bench(bench::BenchArgs),
    /// Measure the perplexity of a text
    Eval(eval::EvalArgs),
    /// Check a bundle's files, then run its self-test on the device
    Verify(verify::VerifyArgs),
}

/// Where a bundle runs.
#[derive(clap::Args)]
struct DeviceArgs {
    /// Device to run on: cpu, cuda or cuda:N for a GPU (N counts from 0), or auto: a GPU that the
    /// bundle was compiled for, else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Threads of the CPU device [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Size of the KV cache in MiB [default: a full batch of full sequences, at most half of the
    /// memory that is left, or nine tenths of a GPU's]
    #[arg(long, value_name = "N")]
    kv_cache_mb: Option<u32>,
    /// Read all weights of the CPU device at the start and keep them from being paged out; `ulimit -l`
    /// must allow as much
    #[arg(long)]
    mlock: bool,
    /// Keep each thread of the CPU device on a core of its own; for machines that do nothing else
    #[arg(long)]
    pin: bool,
    /// auto: where the machine has several memory nodes, keep the CPU device's threads on them in order, and
    /// copy the weights so that each thread has its share in the memory of its node; Linux alone
    #[arg(long, value_name = "auto|off", default_value = "off")]
    numa: Numa,
    /// Launches a GPU's kernels one by one: slower than replaying recorded graphs, with the same
    /// results
    #[arg(long)]
    no_graphs: bool,
}

/// Whether memory nodes are looked at.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Numa {
    Auto,
    Off,
}

/// Runs the command and reports its error.
pub(crate) fn run(args: Args) -> ExitCode {
    let result = match args.command {
        Command::Generate(args) => generate::run(*args),
        Command::Embed(args) => embed::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    result.unwrap_or_else(|error| {
        // A reader that has seen enough is no failure.
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
        {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {}", describe(&error));
        ExitCode::FAILURE
    })
}

/// The error with those of its causes that it does not mention itself.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A bundle on its device.
struct Loaded {
    engine: Engine,
    bundle: Bundle,
    load_time: Duration,
}

fn load(path: &Path, args: &DeviceArgs) -> anyhow::Result<Loaded> {
    let start = Instant::now();
    // Shown on terminals only; the first frame comes after a tick.
    let spinner = ProgressBar::new_spinner().with_message(format!("loading {}", path.display()));
    spinner.enable_steady_tick(Duration::from_millis(250));
    let bundle = Bundle::open(path)?;
    let kv_cache_bytes = args.kv_cache_mb.map(|mib| u64::from(mib) << 20);
    let bar = ProgressStyle::with_template("copying weights {bar:40} {bytes}/{total_bytes} {eta}")?;
    let copied = |done, total| {
        if spinner.length().is_none() {
            spinner.set_style(bar.clone());
            spinner.set_length(total);
        }
        spinner.set_position(done);
    };
    let options = LoadOptions {
        device: args.device,
        cpu: CpuOptions {
            threads: args.threads.map(usize::from),
            kv_cache_bytes,
            lock_weights: args.mlock,
            pin_threads: args.pin,
            by_node: args.numa == Numa::Auto,
        },
        cuda: CudaOptions {
            kv_cache_bytes,
            graphs: !args.no_graphs,
            ..CudaOptions::default()
        },
        progress: Some(&copied),
    };
    let engine = Engine::load(&bundle, &options)
        .with_context(|| format!("cannot load {}", path.display()))?;
    spinner.finish_and_clear();
    Ok(Loaded {
        engine,
        bundle,
        load_time: start.elapsed(),
    })
}

/// A file's bytes; `-` is standard input.
fn read_file(path: &PathBuf) -> anyhow::Result<Vec<u8>> {
    if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::stdin().lock(), &mut bytes)
            .context("cannot read standard input")?;
        return Ok(bytes);
    }
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let io = io::Error::other("disk on fire");
        let error = anyhow::Error::new(io).context("cannot read x");
        assert_eq!(describe(&error), "cannot read x: disk on fire");
        let error = anyhow::anyhow!("cannot read x: disk on fire");
        let error = anyhow::Error::new(io::Error::other("disk on fire")).context(error.to_string());
        assert_eq!(describe(&error), "cannot read x: disk on fire");
    }
}
