//! The command line of `kilnc`.

mod compile;
mod export;
mod inspect;
mod model;

use anyhow::Result;
use clap::{Parser, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use kiln_bundle::Target;
use kiln_compiler::{CompileError, ModelError, PackageError};
use kiln_models::{ModelConfig, builtin, builtin_names, parameters};
use std::io::{self, Write};

/// Compiles OPT and GPT-2 checkpoints into bundles that `kiln` runs.
#[derive(Parser)]
#[command(name = "kilnc", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile a model into a bundle.
    Compile(Box<compile::Arguments>),
    /// Show what is inside a bundle.
    Inspect(inspect::Arguments),
    /// Write a model as a checkpoint directory that transformers reads: config.json and
    /// model.safetensors.
    Export(export::Arguments),
    /// List the built-in configurations.
    Configs {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
}

/// 1 failed, 2 wrong usage, 130 interrupted.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<CompileError>() {
        Some(CompileError::Option(_)) => 2,
        Some(CompileError::Cancelled | CompileError::Package(PackageError::Cancelled)) => 130,
        _ => match error.downcast_ref::<ModelError>() {
            Some(ModelError::NeedsDummy(_) | ModelError::NoConfig(_)) => 2,
            _ => 1,
        },
    }
}

/// Runs a command.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Compile(arguments) => compile::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Export(arguments) => export::run(&arguments),
        Command::Configs { json } => configs(json),
    }
}

fn configs(json: bool) -> Result<()> {
    let known: Vec<(&str, ModelConfig)> = builtin_names()
        .filter_map(|name| Some((name, builtin(name)?)))
        .collect();
    if json {
        let configs: Vec<serde_json::Value> = known
            .iter()
            .map(|(name, config)| {
                serde_json::json!({
                    "name": name,
                    "architecture": config.architecture.model_type(),
                    "layers": config.layers,
                    "hidden_size": config.hidden_size,
                    "heads": config.heads,
                    "ffn_size": config.ffn_size,
                    "vocab_size": config.vocab_size,
                    "max_positions": config.max_positions,
                    "parameters": parameters(config),
                    "dtype": config.dtype.name(),
                })
            })
            .collect();
        return print(&serde_json::to_string(&configs)?);
    }
    let mut table = table(&[
        "name",
        "layers",
        "hidden",
        "heads",
        "ffn",
        "vocabulary",
        "positions",
        "parameters",
        "dtype",
    ]);
    for (name, config) in &known {
        table.add_row([
            (*name).to_owned(),
            config.layers.to_string(),
            config.hidden_size.to_string(),
            config.heads.to_string(),
            config.ffn_size.to_string(),
            config.vocab_size.to_string(),
            config.max_positions.to_string(),
            parameters(config).to_string(),
            config.dtype.to_string(),
        ]);
    }
    print(&table.trim_fmt())
}

/// A plain table: the first column is text, the others are numbers.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// How a target's matrices are stored: `int4:g64, LM head int8`.
fn formats(target: &Target) -> String {
    let mut formats = target.weights.to_string();
    if let Some(lm_head) = target.lm_head().filter(|head| *head != target.weights) {
        formats = format!("{formats}, LM head {lm_head}");
    }
    if let Some(activations) = target.activations {
        formats = format!("{formats}, activations {}", activations.name());
    }
    formats
}

/// Prints a result; a reader that has gone away is no failure.
fn print(text: &str) -> Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
