//! `kiln-perf table`.

use crate::table::kinds::Shape;
use crate::table::measure::{Measured, measure};
use crate::table::predicted::{ceilings, gpu_for, predict_steps};
use crate::table::references::{self, References};
use crate::table::steps::{Wanted, plan_steps};
use crate::table::{Ceilings, Machine, ModelTable, Source, StepTable, TABLE_VERSION, Table};
use crate::table::{TableError, text};
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kiln_bundle::{Bundle, Target};
use kiln_runtime::LoadOptions;
use kiln_runtime::cpu::{Isa, ThreadPool, peak, physical_cores};
use kiln_runtime::device::{CpuOptions, Device, DeviceChoice, load};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

/// Share of a step by which the sum of its kernels and the remainder may be off.
const UNEXPLAINED_SHARE: f64 = 0.03;
/// The target of a processor.
const CPU: &str = "cpu";

/// Arguments of `kiln-perf table`.
#[derive(clap::Args)]
pub(super) struct TableArgs {
    /// Directories of compiled bundles
    #[arg(required = true, value_name = "BUNDLE")]
    bundles: Vec<PathBuf>,
    /// Device to measure on: auto, cpu, cuda or cuda:N
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        conflicts_with = "target"
    )]
    device: DeviceChoice,
    /// Threads of the CPU device [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Target of the bundles: `cpu` is measured here; for the target of a GPU, which need not be there,
    /// times are predicted
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Predict times for this GPU [default: one of the target's]
    #[arg(long, value_name = "NAME", requires = "target")]
    gpu: Option<String>,
    /// Step of this executable; may be given several times [default: prefill in the largest bucket, decode
    /// of one sequence and of as many as a step takes]
    #[arg(long = "executable", value_name = "NAME")]
    executables: Vec<String>,
    /// In decode, past and new positions of each sequence; may be given several times [default: as many as
    /// the executable takes]
    #[arg(long = "kv-len", value_name = "N")]
    kv_lens: Vec<usize>,
    /// In decode, steps at 16, 32, 64 ... 2048 positions, as far as the executable goes
    #[arg(long)]
    sweep_kv: bool,
    /// In prefill, tokens of the prompt [default: as many as the executable takes]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Steps of each kind that are timed
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Measure the same products by another program; may be given twice
    #[arg(long = "reference", value_name = "NAME", value_enum)]
    references: Vec<Peer>,
    /// Python that has PyTorch, for `--reference torch`
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Commit of kiln, to be written into the table
    #[arg(long, value_name = "ID")]
    commit: Option<String>,
    /// Write the table as JSON to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

/// What can be measured beside kiln.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// The `gemm` crate: linears, in f32.
    Gemm,
    /// PyTorch: linears and attention, in f32 and bf16.
    Torch,
}

pub(super) fn run(args: &TableArgs) -> Result<ExitCode> {
    let (machine, models) = match args.target.as_deref() {
        Some(target) if target != CPU => predict(args, target)?,
        _ => measure_all(args)?,
    };
    let table = Table {
        version: TABLE_VERSION,
        kiln_version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: args.commit.clone(),
        made: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        machine,
        models,
    };
    if let Some(path) = &args.output {
        let json = serde_json::to_vec_pretty(&table)?;
        write(path, &json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let text = match args.json {
        true => serde_json::to_string(&table)?,
        false => text::text(&table),
    };
    super::print(&format!("{}\n", text.trim_end()))?;
    Ok(ExitCode::SUCCESS)
}

/// The whole file or none.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    let file = file.persist(path)?;
    drop(file);
    Ok(())
}

impl TableArgs {
    fn wanted(&self) -> Wanted {
        Wanted {
            executables: self.executables.clone(),
            kv_lens: self.kv_lens.clone(),
            sweep_kv: self.sweep_kv,
            tokens: self.tokens,
        }
    }

    fn threads(&self) -> usize {
        self.threads
            .map_or_else(|| physical_cores().len(), usize::from)
    }
}

fn target_of<'a>(bundle: &'a Bundle, name: &str) -> Result<&'a Target, TableError> {
    let manifest = bundle.manifest();
    let mut targets = manifest.targets.iter();
    targets
        .find(|target| target.name == name)
        .ok_or_else(|| TableError::NoTarget {
            bundle: bundle.dir().display().to_string(),
            wanted: name.to_owned(),
            found: manifest
                .targets
                .iter()
                .map(|has| has.name.clone())
                .collect(),
        })
}

fn model_table(
    bundle: &Bundle,
    target: &Target,
    source: Source,
    steps: Vec<StepTable>,
) -> ModelTable {
    ModelTable {
        model: bundle.manifest().model.name.clone(),
        target: target.name.clone(),
        weights: target.weights,
        dtype: target.dtype,
        source,
        steps,
    }
}

fn predict(args: &TableArgs, target: &str) -> Result<(Machine, Vec<ModelTable>)> {
    ensure!(
        args.references.is_empty() && args.threads.is_none(),
        "times of {target} are predicted: --reference and --threads are for measurements"
    );
    let mut machine = None;
    let mut models = Vec::new();
    for path in &args.bundles {
        let bundle = Bundle::open(path)?;
        let target = target_of(&bundle, target)?;
        let gpu = gpu_for(target, args.gpu.as_deref())?;
        let plans = plan_steps(&target.name, &target.executables, &args.wanted())?;
        let steps = predict_steps(&bundle, target, &plans, &gpu)?;
        models.push(model_table(&bundle, target, Source::Predicted, steps));
        machine = Some(Machine {
            device: gpu.name.to_owned(),
            threads: None,
            ceilings: ceilings(&gpu),
        });
    }
    let machine = machine.context("there is no bundle")?;
    Ok((machine, models))
}

fn measure_all(args: &TableArgs) -> Result<(Machine, Vec<ModelTable>)> {
    ensure!(
        args.gpu.is_none(),
        "--gpu is for predictions of a GPU's target; cpu is measured"
    );
    let mut machine: Option<Machine> = None;
    let mut models = Vec::new();
    for path in &args.bundles {
        let bundle = Bundle::open(path)?;
        if args.device == DeviceChoice::Cpu {
            target_of(&bundle, CPU).context("give --target for predictions of a GPU's target")?;
        }
        let threads = args.threads();
        let options = LoadOptions {
            device: args.device,
            cpu: CpuOptions {
                threads: Some(threads),
                ..CpuOptions::default()
            },
            ..LoadOptions::default()
        };
        let mut device =
            load(&bundle, &options).with_context(|| format!("cannot load {}", path.display()))?;
        let target = target_of(&bundle, &device.facts().target.clone())?;
        // What cannot be done is said before anything takes its time.
        let plans = plan_steps(&target.name, &target.executables, &args.wanted())?;
        let ceilings = match &machine {
            Some(machine) => machine.ceilings,
            None => {
                let found = describe(device.as_mut(), threads)?;
                machine.insert(found).ceilings
            }
        };
        let repeat = args.repeat as usize;
        let bar = progress_bar(&bundle, 2 * repeat * plans.len());
        let measured = measure(device.as_mut(), target, &plans, &ceilings, repeat, &|| {
            bar.inc(1)
        })
        .with_context(|| format!("cannot measure {}", path.display()))?;
        bar.finish_and_clear();
        drop(device);
        for note in measured.iter().filter_map(note) {
            eprintln!("note: {note}");
        }
        let steps = with_references(args, measured)?;
        models.push(model_table(&bundle, target, Source::Measured, steps));
    }
    let machine = machine.context("there is no bundle")?;
    Ok((machine, models))
}

fn progress_bar(bundle: &Bundle, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64).with_message(bundle.manifest().model.name.clone());
    match ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} steps {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Says where kernels and remainder are not the step that was measured apart from them.
fn note(Measured { step, .. }: &Measured) -> Option<String> {
    let off = step.explained() - 1.0;
    (off.abs() > UNEXPLAINED_SHARE).then(|| {
        format!(
            "{} at {} positions takes {:.1} us; its kernels and the remainder, timed in other steps, sum to \
             {:+.1} %: times are no more certain than that; is the machine busy?",
            step.executable,
            step.kv_len,
            step.time.median_us,
            100.0 * off
        )
    })
}

/// The machine, with what it can do at most.
fn describe(device: &mut dyn Device, threads: usize) -> Result<Machine> {
    if device.facts().target != CPU {
        bail!(TableError::NoKernelTimes {
            device: device.facts().name.clone()
        });
    }
    let bandwidth = device.read_bandwidth();
    let read_gb_per_s = bandwidth.context("the device cannot measure its bandwidth")?;
    let pool = ThreadPool::new(threads).context("the system refuses threads")?;
    let peak = peak(&pool, Isa::detect()?);
    let facts = &device.facts().name;
    Ok(Machine {
        device: match processor() {
            Some(processor) => format!("{processor}, {facts}"),
            None => facts.clone(),
        },
        threads: Some(threads),
        ceilings: Ceilings {
            read_gb_per_s,
            float_gflop_per_s: peak.float_gflop_per_s,
            integer_gop_per_s: Some(peak.integer_gop_per_s),
        },
    })
}

/// The processor's name, where the system tells.
fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The steps, each row with what others take for the same.
fn with_references(args: &TableArgs, measured: Vec<Measured>) -> Result<Vec<StepTable>> {
    let mut shapes: Vec<Shape> = Vec::new();
    for shape in measured
        .iter()
        .flat_map(|step| &step.kinds)
        .filter_map(|kind| kind.shape)
    {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    let (threads, repeat) = (args.threads(), args.repeat as usize);
    let mut found = References::new();
    if args.references.contains(&Peer::Gemm) {
        references::gemm(&shapes, threads, repeat, &mut found)?;
    }
    if args.references.contains(&Peer::Torch) {
        references::torch(&args.python, &shapes, threads, repeat, &mut found)?;
    }
    let steps = measured.into_iter().map(
        |Measured {
             mut step, kinds, ..
         }| {
            for (row, kind) in step.rows.iter_mut().zip(kinds) {
                let references = kind.shape.and_then(|shape| found.get(&shape));
                row.references = references.cloned().unwrap_or_default();
            }
            step
        },
    );
    Ok(steps.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Times;

    #[test]
    fn steps_that_are_not_explained_are_noted() {
        let taking = |time_us| Measured {
            step: StepTable {
                executable: "decode-b1-kv64".to_owned(),
                phase: kiln_bundle::Phase::Decode,
                sequences: 1,
                tokens: 1,
                kv_len: 9,
                logit_rows: 1,
                rows: Vec::new(),
                time: Times::predicted(time_us),
                floor_us: 0.0,
                remainder_us: 100.0,
            },
            kinds: Vec::new(),
        };
        assert_eq!(note(&taking(102.9)), None);
        assert_eq!(note(&taking(97.2)), None);
        let note = note(&taking(80.0)).unwrap();
        assert!(
            note.contains("decode-b1-kv64 at 9 positions") && note.contains("+25.0 %"),
            "{note}"
        );
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write(&dir.path().join("absent/table.json"), b"").is_err());
    }
}
