//! `kilnc export`.

use anyhow::Result;
use clap::Args;
use kiln_compiler::Model;
use kiln_models::checkpoint::export_hf;
use std::{io::IsTerminal, path::PathBuf};

#[derive(Args)]
pub struct Arguments {
    /// A checkpoint directory, a hub id (owner/name), or with --dummy-weights a built-in
    /// configuration.
    model: String,
    /// The directory to write.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Write seeded random weights, the ones that `kilnc compile --dummy-weights` uses.
    #[arg(long)]
    dummy_weights: bool,
    /// Seed of --dummy-weights.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        requires = "dummy_weights"
    )]
    dummy_seed: u64,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let seed = arguments.dummy_weights.then_some(arguments.dummy_seed);
    let model = Model::find(&arguments.model, seed, std::io::stderr().is_terminal())?;
    export_hf(&arguments.output, &model.config, model.checkpoint.as_ref())?;
    Ok(())
}
