//! The command line.

mod overhead;

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
enum Command {
    /// Tell where the host's time goes in a decode step
    Overhead(overhead::OverheadArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Overhead(args) => overhead::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
