//! `kiln-perf compare`: what is slower in a new table than in an old one.

use super::{figures, print};
use crate::compare::{Change, CompareOptions, Comparison, Key, Verdict, compare};
use crate::report::markdown_text;
use crate::table::Table;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln-perf compare`.
#[derive(clap::Args)]
pub(super) struct CompareArgs {
    /// Table to compare with
    old: PathBuf,
    /// Table that may be slower
    new: PathBuf,
    /// By how much a time may grow, in per cent
    #[arg(long, value_name = "N%", default_value = "5%", value_parser = percent)]
    threshold: f64,
    /// Shows also what has not changed
    #[arg(long)]
    all: bool,
    /// Compares times of different machines
    #[arg(long)]
    across_machines: bool,
    /// Passes although steps or kernels of the old table are not in the new one
    #[arg(long)]
    allow_missing: bool,
    /// Prints Markdown, for the summary of a pull request
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Prints one JSON object, with all rows
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let [old, new] = [Table::read(&args.old)?, Table::read(&args.new)?];
    let options = CompareOptions {
        threshold: args.threshold,
        across_machines: args.across_machines,
    };
    let comparison = compare(&old, &new, options)?;
    let text = if args.json {
        serde_json::to_string(&comparison)? + "\n"
    } else if args.markdown {
        markdown(&comparison, args.all)
    } else {
        plain(&comparison, args.all)
    };
    print(&text)?;
    let is_missing = !comparison.gone.is_empty() && !args.allow_missing;
    if is_missing {
        eprintln!("the new table lacks what the old one has; --allow-missing lets that pass");
    }
    Ok(match comparison.is_slower() || is_missing {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// `5%` and `5` as 0.05.
fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>();
    match number {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number / 100.0),
        _ => Err("needed is a share of at least 0, such as 5%".to_owned()),
    }
}

const HEADER: [&str; 8] = [
    "bundle",
    "step",
    "kernel",
    "old µs",
    "new µs",
    "ratio",
    "95% interval",
    "",
];

/// The cells of [`HEADER`].
fn cells(change: &Change) -> [String; 8] {
    let ratio = change.ratio;
    let verdict = match change.verdict {
        Verdict::Slower => "slower",
        Verdict::Faster => "faster",
        Verdict::Same => "",
    };
    [
        change.key.bundle(),
        change.key.step(),
        change.key.part(),
        format!("{:.2}", change.old_us),
        format!("{:.2}", change.new_us),
        format!("{:.3}", ratio.median),
        format!("{:.3} to {:.3}", ratio.low, ratio.high),
        verdict.to_owned(),
    ]
}

fn shown(comparison: &Comparison, all: bool) -> impl Iterator<Item = &Change> {
    let changes = comparison.changes.iter();
    changes.filter(move |change| all || change.verdict != Verdict::Same)
}

fn summary(comparison: &Comparison) -> String {
    format!(
        "{} slower, {} faster, {} the same, by more than {:.1}% with all of the 95% interval",
        comparison.count(Verdict::Slower),
        comparison.count(Verdict::Faster),
        comparison.count(Verdict::Same),
        100.0 * comparison.threshold
    )
}

/// What is in one table alone, with a name for each table.
fn alone(comparison: &Comparison) -> [(&'static str, &[Key]); 2] {
    [
        ("only in the old table", &comparison.gone),
        ("only in the new table", &comparison.new),
    ]
}

fn plain(comparison: &Comparison, all: bool) -> String {
    let mut text = String::new();
    let mut table = figures(&HEADER, 3);
    shown(comparison, all).for_each(|change| {
        table.add_row(cells(change));
    });
    if !table.is_empty() {
        text = format!("{table}\n\n");
    }
    for (name, keys) in alone(comparison) {
        let _ = keys
            .iter()
            .try_for_each(|key| writeln!(text, "{name}: {key}"));
    }
    text + &summary(comparison) + "\n"
}

fn markdown(comparison: &Comparison, all: bool) -> String {
    let mut text = format!("{}\n", summary(comparison));
    let mut rows = shown(comparison, all).peekable();
    if rows.peek().is_some() {
        let _ = write!(
            text,
            "\n| {} |\n|---|---|---|--:|--:|--:|--:|---|\n",
            HEADER.join(" | ")
        );
    }
    for change in rows {
        let cells = cells(change).map(|cell| markdown_text(&cell));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    for (name, keys) in alone(comparison) {
        if !keys.is_empty() {
            let _ = writeln!(text, "\n{name}:\n");
        }
        for key in keys {
            let _ = writeln!(text, "- {}", markdown_text(&key.to_string()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn shares() {
        assert_eq!(percent("5%"), Ok(0.05));
        assert_eq!(percent("7"), Ok(0.07));
        for wrong in ["-1%", "five", "inf", "%"] {
            assert!(percent(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_changed_rows_are_shown() {
        let old = testing::table(1);
        let mut new = testing::table(2);
        testing::slow_down(&mut new.models[0].steps[0].rows[2].time, 1.12);
        let options = CompareOptions {
            threshold: 0.05,
            across_machines: false,
        };
        let comparison = compare(&old, &new, options).unwrap();
        let text = plain(&comparison, false);
        assert!(
            text.contains("attention 12 x 64") && !text.contains("qkv"),
            "{text}"
        );
        assert!(plain(&comparison, true).contains("qkv"));
        let text = markdown(&comparison, false);
        assert_eq!(
            text.lines()
                .filter(|line| line.contains("slower |"))
                .count(),
            1,
            "{text}"
        );
    }
}
