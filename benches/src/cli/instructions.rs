//! `kiln-perf instructions`: counts what kernels and steps execute, and compares with what they did.

use super::{figures, print};
use crate::instructions::{Counts, Difference, TOLERANCE, count, differences, run_cases};
use anyhow::{Context, bail};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln-perf instructions`.
#[derive(clap::Args)]
pub(super) struct InstructionsArgs {
    /// Counts to compare with
    #[arg(
        long,
        value_name = "FILE",
        default_value = "benches/gate/instructions.json"
    )]
    baseline: PathBuf,
    /// Writes the counts as the new baseline
    #[arg(long)]
    update: bool,
    /// Checkpoint directory of the model whose steps are counted
    #[arg(long, value_name = "DIR", default_value = "tests/fixtures/tiny-opt")]
    model: PathBuf,
    /// What runs under valgrind, on the bundles in this directory
    #[arg(long, value_name = "DIR", hide = true)]
    cases: Option<PathBuf>,
}

pub(super) fn run(args: &InstructionsArgs) -> anyhow::Result<ExitCode> {
    if let Some(bundles) = &args.cases {
        print(&run_cases(bundles)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let new = count(&args.model)?;
    let file = args.baseline.display();
    if args.update {
        let text = serde_json::to_string_pretty(&new)? + "\n";
        fs::write(&args.baseline, text).with_context(|| format!("cannot write {file}"))?;
        eprintln!("wrote {file}");
        return Ok(ExitCode::SUCCESS);
    }
    let text = fs::read_to_string(&args.baseline)
        .with_context(|| format!("cannot read {file}; make it with --update"))?;
    let old: Counts =
        serde_json::from_str(&text).with_context(|| format!("{file} holds no counts"))?;
    if old.place != new.place {
        eprintln!(
            "not compared: {file} was counted on {:?}, this is {:?}",
            old.place, new.place
        );
        return Ok(ExitCode::SUCCESS);
    }
    let differences = differences(&old, &new);
    print(&format!("{}\n", text_of(&differences)))?;
    let failed = differences.iter().filter(|d| d.fails()).count();
    if failed > 0 {
        bail!(
            "{failed} kernels or steps need over {:.0}% more instructions than in {file}, or are not in it; where \
             that is meant, renew it: scripts/perf-gate --update",
            100.0 * TOLERANCE
        );
    }
    if differences.iter().any(Difference::is_better) {
        eprintln!("some need less; keep it so: scripts/perf-gate --update");
    }
    Ok(ExitCode::SUCCESS)
}

fn text_of(differences: &[Difference]) -> comfy_table::Table {
    let mut table = figures(&["kernel or step", "old", "new", "ratio", ""], 1);
    for difference in differences {
        let count = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let ratio = difference.ratio().map(|ratio| format!("{ratio:.4}"));
        let verdict = match (difference.fails(), difference.is_better()) {
            (true, _) => "more",
            (_, true) => "less",
            _ => "",
        };
        table.add_row([
            difference.case.clone(),
            count(difference.old),
            count(difference.new),
            ratio.unwrap_or_else(|| "-".to_owned()),
            verdict.to_owned(),
        ]);
    }
    table
}
