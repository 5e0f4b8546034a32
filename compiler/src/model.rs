//! What the MODEL argument names: a checkpoint directory, a hub id, or a built-in configuration.

use kiln_models::{
    Checkpoint, CheckpointError, ConfigError, DummyCheckpoint, ModelConfig, builtin, builtin_names,
    checkpoint, hub,
};
use std::path::{Path, PathBuf};

/// A model to compile.
pub struct Model {
    /// What it computes.
    pub config: ModelConfig,
    /// Its tensors.
    pub checkpoint: Box<dyn Checkpoint>,
    /// Where its tokenizer's files are, if it may have any.
    pub tokenizer_dir: Option<PathBuf>,
}

/// Why a MODEL argument names no model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A built-in configuration has no weights of its own.
    #[error(
        "{0} is a built-in configuration without weights; add --dummy-weights, or name a \
         checkpoint directory or a hub id (owner/name)"
    )]
    NeedsDummy(String),
    /// Only built-in configurations and directories with a config.json can have random weights.
    #[error(
        "--dummy-weights needs a built-in configuration or a directory with config.json, and {0:?} is neither; `kilnc configs` lists the built-in ones"
    )]
    NoConfig(String),
    /// Nothing has that name.
    #[error(
        "there is no model {model:?}: it is no directory, no hub id (owner/name) and none of the built-in configurations ({known})"
    )]
    Unknown {
        /// What was given.
        model: String,
        /// What would have been known.
        known: String,
    },
    /// Its config.json.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The download.
    #[error(transparent)]
    Hub(#[from] hub::HubError),
}

impl Model {
    /// Finds a model. With `dummy_seed`, weights are random and only the configuration is read;
    /// `progress` shows a bar for downloads.
    ///
    /// # Errors
    /// Any of [`ModelError`].
    pub fn find(model: &str, dummy_seed: Option<u64>, progress: bool) -> Result<Model, ModelError> {
        let dir = Path::new(model);
        let config = match builtin(model) {
            Some(config) if !dir.is_dir() => Some(config),
            _ => None,
        };
        match (config, dummy_seed) {
            (Some(config), Some(seed)) => Ok(Model::dummy(config, seed, None)),
            (Some(_), None) => Err(ModelError::NeedsDummy(model.to_owned())),
            (None, Some(seed)) if dir.is_dir() => Ok(Model::dummy(
                ModelConfig::load(dir)?,
                seed,
                Some(dir.to_owned()),
            )),
            (None, Some(_)) => Err(ModelError::NoConfig(model.to_owned())),
            (None, None) if dir.is_dir() => Model::open(dir),
            (None, None) if model.matches('/').count() == 1 && !dir.exists() => {
                Model::open(&hub::resolve(model, progress)?)
            }
            (None, None) => Err(ModelError::Unknown {
                model: model.to_owned(),
                known: builtin_names().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Opens a checkpoint directory.
    ///
    /// # Errors
    /// A config.json or weights that cannot be used.
    pub fn open(dir: &Path) -> Result<Model, ModelError> {
        let config = ModelConfig::load(dir)?;
        Ok(Model {
            checkpoint: checkpoint::dequantised(checkpoint::open(dir)?, &config)?,
            config,
            tokenizer_dir: Some(dir.to_owned()),
        })
    }

    /// A configuration with random weights.
    pub fn dummy(config: ModelConfig, seed: u64, tokenizer_dir: Option<PathBuf>) -> Model {
        let checkpoint = Box::new(DummyCheckpoint::new(&config, seed));
        Model {
            config,
            checkpoint,
            tokenizer_dir,
        }
    }
}
