//! `kilnc export`.

use super::model::ModelArguments;
use anyhow::Result;
use clap::Args;
use kiln_models::checkpoint::export_hf;
use std::path::PathBuf;

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The directory to write.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let model = arguments.model.find()?;
    export_hf(&arguments.output, &model.config, model.checkpoint.as_ref())?;
    Ok(())
}
