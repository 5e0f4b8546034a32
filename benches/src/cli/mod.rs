//! The command line. Results go to standard output, everything else to standard error.
//!
//! Exit codes: 0 done, 1 failed or slower, 2 wrong usage.

mod compare;
mod instructions;
mod overhead;
mod report;
mod table;

use crate::table::text::figures;
use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::process::ExitCode;

/// The kernel performance table: where a step's time goes, and what is left to the limit
#[derive(Parser)]
#[command(name = "kiln-perf", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time every kernel of bundles, or predict its time
    Table(Box<table::TableArgs>),
    /// Tell what is slower in a new table than in an old one
    Compare(compare::CompareArgs),
    /// Make a page of tables
    Report(report::ReportArgs),
    /// Tell where the host's time goes in a decode step
    Overhead(overhead::OverheadArgs),
    /// Count what CPU kernels and whole steps execute, with valgrind, and fail where it has become more
    Instructions(instructions::InstructionsArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Table(args) => table::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Overhead(args) => overhead::run(&args),
        Command::Instructions(args) => instructions::run(&args),
    };
    result.unwrap_or_else(|error| {
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

/// Writes to standard output; a reader that has seen enough is no failure.
fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
