//! `kiln-perf table`.

use crate::table::kinds::Shape;
use crate::table::measure::{Measured, measure};
use crate::table::predicted::{ceilings, datasheet_of, gpu_for, predict_steps};
use crate::table::references::{self, Place, References};
use crate::table::steps::{Wanted, plan_steps};
use crate::table::{
    CPU, Ceilings, MAX_SAMPLES, Machine, ModelTable, Source, StepTable, TABLE_VERSION, Table,
};
use crate::table::{TableError, cublaslt, profile, text};
use anyhow::{Context, Error, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kiln_bundle::{Bundle, Target, WholeFile};
use kiln_runtime::LoadOptions;
use kiln_runtime::cpu::{BANDWIDTH_BYTES, Isa, ThreadPool, peak, physical_cores, read_bandwidth};
use kiln_runtime::device::{CpuOptions, Device, DeviceChoice, DeviceFacts, load};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

/// Share of a step by which the sum of its kernels and the remainder may be off.
const UNEXPLAINED_SHARE: f64 = 0.03;

/// Arguments of `kiln-perf table`.
#[derive(clap::Args)]
pub(super) struct TableArgs {
    /// Directories of compiled bundles
    #[arg(required = true, value_name = "BUNDLE")]
    bundles: Vec<PathBuf>,
    /// Device to measure on: auto, cpu, cuda or cuda:N. Kernels of a GPU are timed by events around graph
    /// replays, one after another, and the whole step without
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
    /// With --target, predict times for this GPU [default: one of the target's]; measuring on a GPU, take
    /// the rate of its operations from this one's datasheet [default: as the driver names it]
    #[arg(long, value_name = "NAME")]
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
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=MAX_SAMPLES as i64))]
    repeat: u32,
    /// Measure the same products by another program, on the same device; may be given several times
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
    /// The `gemm` crate, on a CPU: linears, in f32.
    Gemm,
    /// PyTorch: linears and attention, in bf16 and f32 on a CPU, in bf16 and f16 on a GPU.
    Torch,
    /// NVIDIA's library libcublasLt, on a GPU: linears, in f16.
    Cublaslt,
}

pub(super) fn run(args: &TableArgs) -> Result<ExitCode> {
    let file = args.output.as_deref().map(WholeFile::create).transpose()?;
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
    let json = table.to_json().map_err(Error::msg)?;
    if let Some(file) = file {
        file.finish(|to| to.write_all(json.as_bytes()))?;
    }
    let text = match args.json {
        true => serde_json::to_string(&table)?,
        false => text::text(&table),
    };
    super::print(&format!("{}\n", text.trim_end()))?;
    Ok(ExitCode::SUCCESS)
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

    /// Whether what was asked for is of the device that was found: said before anything takes its time.
    fn check(&self, facts: &DeviceFacts) -> Result<()> {
        let has = |peer| self.references.contains(&peer);
        let of_another = match facts.gpu {
            Some(_) => [
                (self.threads.is_some(), "--threads"),
                (has(Peer::Gemm), "--reference gemm"),
            ],
            None => [
                (self.gpu.is_some(), "--gpu"),
                (has(Peer::Cublaslt), "--reference cublaslt"),
            ],
        };
        for (given, flag) in of_another {
            ensure!(!given, "{flag} is not for {}", facts.name);
        }
        if has(Peer::Cublaslt) {
            cublaslt::check_library()?;
        }
        Ok(())
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
        activations: target.activations,
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
            isa: None,
            profile: profile().to_owned(),
            datasheet: None,
            ceilings: ceilings(&gpu),
        });
    }
    let machine = machine.context("there is no bundle")?;
    Ok((machine, models))
}

fn measure_all(args: &TableArgs) -> Result<(Machine, Vec<ModelTable>)> {
    if profile() != "release" {
        eprintln!(
            "note: this is a {} build; times are not those of a release",
            profile()
        );
    }
    let repeat = args.repeat as usize;
    let device_choice = match args.target {
        // The only target that is measured by name.
        Some(_) => DeviceChoice::Cpu,
        None => args.device,
    };
    let options = LoadOptions {
        device: device_choice,
        cpu: CpuOptions {
            threads: Some(args.threads()),
            ..CpuOptions::default()
        },
        ..LoadOptions::default()
    };
    let mut machine: Option<Machine> = None;
    let mut measured = Vec::new();
    for path in &args.bundles {
        let bundle = Bundle::open(path)?;
        if device_choice == DeviceChoice::Cpu {
            target_of(&bundle, CPU).context("give --target for predictions of a GPU's target")?;
        }
        let mut device =
            load(&bundle, &options).with_context(|| format!("cannot load {}", path.display()))?;
        let facts = device.facts().clone();
        args.check(&facts)?;
        let target = target_of(&bundle, &facts.target)?.clone();
        // What cannot be done is said before anything takes its time.
        let plans = plan_steps(&target.name, &target.executables, &args.wanted())?;
        machine = Some(measure_machine(args, device.as_mut(), machine)?);
        let bar = progress_bar(&bundle, 2 * repeat * plans.len());
        let mut steps = measure(device.as_mut(), &target, &plans, repeat, &|| bar.inc(1))
            .with_context(|| format!("cannot measure {}", path.display()))?;
        bar.finish_and_clear();
        machine = Some(measure_machine(args, device.as_mut(), machine)?);
        // What others need of its memory is theirs.
        drop(device);
        for note in steps.iter().filter_map(note) {
            eprintln!("note: {note}");
        }
        add_references(args, facts.gpu, &mut steps)?;
        measured.push((bundle, target, steps));
    }
    let machine = machine.context("there is no bundle")?;
    let models = measured.into_iter().map(|(bundle, target, mut steps)| {
        let floors = |step: &mut Measured| step.set_floors(&machine.ceilings);
        steps.iter_mut().for_each(floors);
        let steps = steps.into_iter().map(|measured| measured.step).collect();
        model_table(&bundle, &target, Source::Measured, steps)
    });
    let models = models.collect();
    Ok((machine, models))
}

/// The machine with the best of its ceilings so far and those of now: what it can do varies with what else
/// runs on it, and a ceiling is what it can do at its best.
fn measure_machine(
    args: &TableArgs,
    device: &mut dyn Device,
    so_far: Option<Machine>,
) -> Result<Machine> {
    let facts = device.facts().clone();
    let now = match facts.gpu {
        Some(_) => gpu(&facts, device.read_bandwidth(), args.gpu.as_deref())?,
        None => cpu(facts.name, args.threads())?,
    };
    let Some(so_far) = so_far else {
        return Ok(now);
    };
    ensure!(
        so_far.device == now.device,
        "a table is of one machine, and these bundles run on {} and {}; give --device",
        so_far.device,
        now.device
    );
    let ceilings = so_far.ceilings.max(now.ceilings);
    Ok(Machine { ceilings, ..now })
}

fn cpu(name: String, threads: usize) -> Result<Machine> {
    let pool = ThreadPool::new(threads).context("the system refuses threads")?;
    let isa = Isa::detect()?;
    let peak = peak(&pool, isa);
    let bandwidth = read_bandwidth(&pool, isa, BANDWIDTH_BYTES);
    let bandwidth = bandwidth.context("no memory to measure the bandwidth with")?;
    Ok(Machine {
        device: match processor() {
            Some(processor) => format!("{processor}, {name}"),
            None => name,
        },
        threads: Some(threads),
        isa: Some(isa.name().to_owned()),
        profile: profile().to_owned(),
        datasheet: None,
        ceilings: Ceilings {
            read_gb_per_s: bandwidth.best,
            float_gflop_per_s: peak.float_gflop_per_s,
            integer_gop_per_s: Some(peak.integer_gop_per_s),
            bf16_pieces_gflop_per_s: peak.bf16_pieces_gflop_per_s,
            bf16_gflop_per_s: Some(peak.bf16_gflop_per_s),
            int8_gop_per_s: Some(peak.int8_gop_per_s),
        },
    })
}

/// A GPU: the bandwidth as it was measured, the rate of operations by a datasheet.
fn gpu(
    facts: &DeviceFacts,
    bandwidth: Option<f64>,
    named: Option<&str>,
) -> Result<Machine, TableError> {
    let gpu = datasheet_of(&facts.name, named)?;
    let no_bandwidth = || TableError::NoBandwidth {
        device: facts.name.clone(),
    };
    Ok(Machine {
        device: facts.name.clone(),
        threads: None,
        isa: None,
        profile: profile().to_owned(),
        datasheet: Some(gpu.name.to_owned()),
        ceilings: Ceilings {
            read_gb_per_s: bandwidth.ok_or_else(no_bandwidth)?,
            ..ceilings(&gpu)
        },
    })
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

/// The processor's name, where the system tells.
fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Says of each row what others take for the same.
fn add_references(args: &TableArgs, gpu: Option<u32>, measured: &mut [Measured]) -> Result<()> {
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
        let place = gpu.map_or(Place::Cpu { threads }, Place::Gpu);
        references::torch(&args.python, &shapes, place, repeat, &mut found)?;
    }
    if let Some(gpu) = gpu.filter(|_| args.references.contains(&Peer::Cublaslt)) {
        cublaslt::measure(gpu, &shapes, repeat, &mut found)?;
    }
    for Measured { step, kinds } in measured {
        for (row, kind) in step.rows.iter_mut().zip(kinds) {
            let references = kind.shape.and_then(|shape| found.get(&shape));
            row.references = references.cloned().unwrap_or_default();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Times;
    use clap::Parser;
    use kiln_runtime::device::MemoryNeed;

    #[derive(Parser)]
    struct TestArgs {
        #[command(flatten)]
        args: TableArgs,
    }

    fn facts(gpu: Option<u32>, name: &str) -> DeviceFacts {
        DeviceFacts {
            name: name.to_owned(),
            target: "sm_90a".to_owned(),
            gpu,
            slots: 1,
            kv_blocks: 1,
            memory: MemoryNeed::default(),
            available_bytes: None,
        }
    }

    #[test]
    fn flags_of_another_device_are_refused() {
        let (cpu, gpu) = (facts(None, "cpu (2 threads)"), facts(Some(0), "cuda:0 (X)"));
        for (flags, right, wrong) in [
            (["--threads", "2"], &cpu, &gpu),
            (["--reference", "gemm"], &cpu, &gpu),
            (["--gpu", "H100"], &gpu, &cpu),
        ] {
            let args = TestArgs::parse_from(["table", "x.kiln"].iter().chain(&flags)).args;
            args.check(right).unwrap();
            let message = args.check(wrong).unwrap_err().to_string();
            let flag = flags.join(" ");
            let flag = flag.trim_end_matches(" 2").trim_end_matches(" H100");
            assert_eq!(message, format!("{flag} is not for {}", wrong.name));
        }
    }

    #[test]
    fn a_gpu_has_its_own_bandwidth_and_the_rate_of_a_datasheet() {
        let h200 = facts(Some(0), "cuda:0 (NVIDIA H200, sm_90a)");
        let machine = gpu(&h200, Some(4100.0), None).unwrap();
        assert_eq!(machine.datasheet.as_deref(), Some("H200"));
        let ceilings = machine.ceilings;
        assert_eq!(
            (
                ceilings.read_gb_per_s,
                ceilings.float_gflop_per_s,
                ceilings.integer_gop_per_s
            ),
            (4100.0, 989_000.0, None)
        );
        let named = gpu(&h200, Some(4100.0), Some("A100")).unwrap();
        assert_eq!(named.ceilings.float_gflop_per_s, 312_000.0);
        let message = gpu(&h200, None, None).unwrap_err().to_string();
        assert!(
            message.contains("bandwidth of cuda:0 (NVIDIA H200, sm_90a) cannot be measured"),
            "{message}"
        );
        let unknown = facts(Some(0), "cuda:0 (NVIDIA X1, sm_90a)");
        assert!(gpu(&unknown, Some(1.0), None).is_err());
    }

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
}
