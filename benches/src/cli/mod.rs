//! The command line.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The kernel performance table: where a step's time goes, and what is left to the limit
#[derive(Parser)]
#[command(name = "kiln-perf", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {}

/// Runs the program.
pub fn main() -> ExitCode {
    match Cli::parse().command {}
}
