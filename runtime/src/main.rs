//! `kiln`: generates text from a compiled bundle, measures it and checks it.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(cli::Args::parse())
}
