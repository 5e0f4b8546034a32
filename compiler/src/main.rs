//! `kilnc`: compiles checkpoints into bundles.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kilnc: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
