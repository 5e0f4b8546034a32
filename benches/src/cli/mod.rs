//! The command line. Results go to standard output, everything else to standard error.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

mod table;

use clap::{Parser, Subcommand};
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
    Table(Box<table::Arguments>),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Table(arguments) => table::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
