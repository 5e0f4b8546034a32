//! `kiln-perf overhead`.

use super::{figures, print};
use crate::overhead::{Overhead, Workload, measure};
use comfy_table::{CellAlignment, Table};
use kiln_bundle::Bundle;
use kiln_runtime::device::{CpuOptions, DeviceChoice};
use kiln_runtime::{Engine, LoadOptions};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln-perf overhead`.
#[derive(clap::Args)]
pub(super) struct OverheadArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_len: u32,
    /// Tokens to generate from each
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    gen_len: u32,
    /// Device to run on: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Threads of the CPU device [default: one for each physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &OverheadArgs) -> anyhow::Result<ExitCode> {
    let bundle = Bundle::open(&args.bundle)?;
    let options = LoadOptions {
        device: args.device,
        cpu: CpuOptions {
            threads: args.threads.map(usize::from),
            ..CpuOptions::default()
        },
        ..LoadOptions::default()
    };
    let mut engine = Engine::load(&bundle, &options)?;
    let workload = Workload {
        batch: args.batch,
        prompt_len: args.prompt_len,
        gen_len: args.gen_len,
    };
    let overhead = measure(&mut engine, bundle.manifest(), workload)?;
    let text = match args.json {
        true => serde_json::to_string(&overhead)?,
        false => table(&overhead).to_string(),
    };
    print(&format!("{text}\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn table(overhead: &Overhead) -> Table {
    let Workload {
        batch,
        prompt_len,
        gen_len,
    } = overhead.workload;
    let what = format!(
        "{} on {}, {batch} x ({prompt_len} prompt + {gen_len} new tokens), middle half of {} steps",
        overhead.model, overhead.device, overhead.steps
    );
    let mut table = figures(&["part of a decode step", "us", "share", &what], 1);
    if let Some(column) = table.column_mut(3) {
        column.set_cell_alignment(CellAlignment::Left);
    }
    let us = |us: f64| format!("{us:.1}");
    let share = |share: f64| format!("{:.1} %", 100.0 * share);
    for part in &overhead.parts {
        let cells = [part.name, &us(part.us), &share(part.share), part.what];
        table.add_row(cells);
    }
    let step = overhead.step_us;
    let all = "call of the engine to call of the engine, recorded";
    table.add_row(["step", &us(step), &share(1.0), all]);
    let bare = overhead.unrecorded_step_us;
    table.add_row([
        "unrecorded step",
        &us(bare),
        &share(bare / step),
        "the same in runs in turn with these",
    ]);
    table.add_row([
        "recording",
        &us(step - bare),
        &share((step - bare) / step),
        "what these figures cost",
    ]);
    table
}
