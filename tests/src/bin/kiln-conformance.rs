//! The conformance suite on a device of this machine. Compiles small models on the spot, so a GPU
//! needs NVRTC as `kilnc` does, and nothing else of the repository.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use kiln_bundle::{Bundle, DType};
use kiln_compiler::{TargetChoice, cuda::native_gpu};
use kiln_runtime::device::{CpuDevice, CpuOptions, CudaOptions, Device, DeviceChoice, LoadOptions};
use kiln_tests::conformance::{
    CHOICES, Outcome, Subject, accuracy, choices, crowd, invariance, subjects,
};
use serde_json::json;
use std::{io::Write, process::ExitCode};

/// Holds a device against the CPU, and against itself in other company.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cuda", value_parser = device)]
    device: DeviceChoice,
    /// Only these models; `--list` has their names.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Print the names of the models, one a line, and run nothing.
    #[arg(long)]
    list: bool,
    /// Only this element type.
    #[arg(long, value_enum)]
    dtype: Option<Narrow>,
    /// Launch kernels one by one instead of replaying recorded chains.
    #[arg(long)]
    no_graphs: bool,
    /// One JSON object a case.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Narrow {
    F16,
    Bf16,
}

impl From<Narrow> for DType {
    fn from(narrow: Narrow) -> DType {
        match narrow {
            Narrow::F16 => DType::F16,
            Narrow::Bf16 => DType::Bf16,
        }
    }
}

fn device(name: &str) -> Result<DeviceChoice, String> {
    match name {
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => name
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| "known are cpu, cuda and cuda:N".to_owned()),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("{failed} cases failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the suite. Returns the number of cases that failed.
fn run(arguments: &Arguments) -> Result<usize> {
    if arguments.list {
        for subject in subjects() {
            writeln!(std::io::stdout(), "{}", subject.name)?;
        }
        return Ok(0);
    }
    let dtypes = match arguments.dtype {
        Some(dtype) => vec![dtype],
        None => vec![Narrow::F16, Narrow::Bf16],
    };
    let only = &arguments.only;
    let mut failed = 0;
    for subject in subjects() {
        if !only.is_empty() && !only.iter().any(|name| name == subject.name) {
            continue;
        }
        for &dtype in &dtypes {
            let dtype = DType::from(dtype);
            for outcome in check(&subject, dtype, arguments)
                .with_context(|| format!("{} in {dtype}", subject.name))?
            {
                failed += usize::from(!outcome.passed);
                report(subject.name, dtype, &outcome, arguments.json)?;
            }
        }
    }
    Ok(failed)
}

fn report(subject: &str, dtype: DType, outcome: &Outcome, as_json: bool) -> Result<()> {
    let mut out = std::io::stdout();
    let case = format!("{subject} {dtype}: {}", outcome.case);
    if as_json {
        let line = json!({"case": case, "passed": outcome.passed, "detail": outcome.detail});
        writeln!(out, "{line}")?;
    } else {
        let word = if outcome.passed { "ok" } else { "FAILED" };
        writeln!(out, "{word:6} {case}: {}", outcome.detail)?;
    }
    Ok(())
}

fn check(subject: &Subject, dtype: DType, arguments: &Arguments) -> Result<Vec<Outcome>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bundle");
    let mut targets = vec![TargetChoice::Cpu];
    if arguments.device != DeviceChoice::Cpu {
        let gpu = native_gpu().context("this machine has no GPU that kiln compiles for")?;
        targets.push(TargetChoice::Cuda(gpu));
    }
    subject.compile(&path, dtype, targets, false)?;
    let bundle = Bundle::open(&path)?;
    let mut reference = CpuDevice::load(&bundle, &CpuOptions::default())?;
    let mut outcomes = vec![];
    for part in [accuracy, crowd] {
        let mut device = open(&bundle, arguments)?;
        outcomes.extend(part(&mut reference, device.as_mut(), &bundle, dtype)?);
    }
    let mut device = open(&bundle, arguments)?;
    outcomes.extend(invariance(device.as_mut(), &bundle)?);
    // On one device, so that slots come to other sequences.
    for case in 0..CHOICES {
        outcomes.extend(choices(device.as_mut(), &bundle, case)?);
    }
    Ok(outcomes)
}

fn open(bundle: &Bundle, arguments: &Arguments) -> Result<Box<dyn Device>> {
    let options = LoadOptions {
        device: arguments.device,
        cuda: CudaOptions {
            graphs: !arguments.no_graphs,
            ..CudaOptions::default()
        },
        ..LoadOptions::default()
    };
    Ok(kiln_runtime::device::load(bundle, &options)?)
}
