//! The MODEL argument, which several commands take.

use clap::Args;
use kiln_compiler::{Model, ModelError};
use std::{io::IsTerminal, path::Path};

#[derive(Args)]
pub struct ModelArguments {
    /// A checkpoint directory as transformers saves it, a hub id (owner/name), or with
    /// --dummy-weights a built-in configuration such as opt-125m.
    model: String,
    /// Use seeded random weights instead of the checkpoint's.
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

impl ModelArguments {
    /// Finds the model; downloads show a bar on a terminal.
    pub fn find(&self) -> Result<Model, ModelError> {
        let seed = self.dummy_weights.then_some(self.dummy_seed);
        Model::find(&self.model, seed, std::io::stderr().is_terminal())
    }

    /// The last part of the path or hub id.
    pub fn name(&self) -> String {
        let path = Path::new(&self.model);
        // `models/demo/.` and `.` name directories too.
        let path = path.canonicalize().unwrap_or(path.to_owned());
        let name = path.file_name();
        name.map_or(self.model.clone(), |name| {
            name.to_string_lossy().into_owned()
        })
    }
}
