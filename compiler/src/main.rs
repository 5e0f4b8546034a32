//! `kilnc`: compiles checkpoints into bundles.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Every message names its own cause.
            eprintln!("error: {error}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
