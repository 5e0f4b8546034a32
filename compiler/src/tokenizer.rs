//! The bundle's `tokenizer.json`: the checkpoint's own, or built from `vocab.json` and
//! `merges.txt`, which is all that OPT checkpoints ship.

use kiln_models::{Architecture, ModelConfig};
use serde_json::Value;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use tokenizers::{
    AddedToken, Tokenizer, decoders::byte_level::ByteLevel, models::bpe::BPE,
    processors::template::TemplateProcessing,
};

/// Why a tokenizer cannot be packaged.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The path or the disk.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is damaged, or of another kind.
    #[error("{} is no tokenizer: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Tokenizer and model do not belong together.
    #[error(
        "{}: token {token:?} has id {id}, but the model's vocabulary ends at {vocab_size}; the \
         tokenizer belongs to another model",
        path.display()
    )]
    OutsideVocabulary {
        /// The file.
        path: PathBuf,
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// V.
        vocab_size: usize,
    },
    /// One of the two files is missing.
    #[error("{} has {found} without {missing}; a byte-level BPE needs both", dir.display())]
    Half {
        /// The checkpoint directory.
        dir: PathBuf,
        /// The file that is there.
        found: &'static str,
        /// The file that is not.
        missing: &'static str,
    },
}

/// The ids of a whole text, with what the model expects around it; else what is wrong.
pub fn encode(tokenizer: &str, text: &str) -> Result<Vec<u32>, String> {
    let mut tokenizer: Tokenizer = tokenizer.parse().map_err(|error| format!("{error}"))?;
    tokenizer
        .with_padding(None)
        .with_truncation(None)
        .map_err(|error| error.to_string())?;
    let encoding = tokenizer
        .encode(text, true)
        .map_err(|error| error.to_string())?;
    Ok(encoding.get_ids().to_vec())
}

/// The text of `tokenizer.json`; `None` when the checkpoint has no tokenizer.
///
/// # Errors
/// Files that are no tokenizer, or one for another vocabulary.
pub fn build(dir: &Path, config: &ModelConfig) -> Result<Option<String>, TokenizerError> {
    let [ready, vocab, merges] =
        ["tokenizer.json", "vocab.json", "merges.txt"].map(|name| dir.join(name));
    if ready.exists() {
        let text = read(&ready)?;
        let tokenizer: Tokenizer = text.parse().map_err(|error| invalid(&ready, error))?;
        check_vocabulary(&tokenizer, &ready, config)?;
        return Ok(Some(text));
    }
    match (vocab.exists(), merges.exists()) {
        (false, false) => return Ok(None),
        (true, false) => return Err(half(dir, "vocab.json", "merges.txt")),
        (false, true) => return Err(half(dir, "merges.txt", "vocab.json")),
        (true, true) => {}
    }
    let tokenizer = byte_level_bpe(&vocab, &merges, &Special::read(dir, config)?)?;
    check_vocabulary(&tokenizer, &vocab, config)?;
    let text = tokenizer
        .to_string(false)
        .map_err(|error| invalid(&vocab, error))?;
    // Through a sorted map: the library writes the vocabulary in the order of a hash table.
    let sorted: Value = serde_json::from_str(&text).map_err(|error| invalid(&vocab, error))?;
    Ok(Some(sorted.to_string()))
}

fn half(dir: &Path, found: &'static str, missing: &'static str) -> TokenizerError {
    TokenizerError::Half {
        dir: dir.to_owned(),
        found,
        missing,
    }
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    fs::read_to_string(path).map_err(|source| TokenizerError::Read {
        path: path.to_owned(),
        source,
    })
}

fn invalid(path: &Path, problem: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Invalid {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

fn check_vocabulary(
    tokenizer: &Tokenizer,
    path: &Path,
    config: &ModelConfig,
) -> Result<(), TokenizerError> {
    let vocab_size = config.vocab_size;
    match tokenizer
        .get_vocab(true)
        .into_iter()
        .max_by_key(|(_, id)| *id)
    {
        Some((token, id)) if id as usize >= vocab_size => Err(TokenizerError::OutsideVocabulary {
            path: path.to_owned(),
            token,
            id,
            vocab_size,
        }),
        _ => Ok(()),
    }
}

/// Special tokens, by text.
struct Special {
    /// All of them, which are never split.
    tokens: Vec<String>,
    /// Put before every text.
    prefix: Option<String>,
}

impl Special {
    /// What `special_tokens_map.json` and `tokenizer_config.json` say, else what the architecture's
    /// published checkpoints do: OPT starts a text with `</s>`, GPT-2 with nothing.
    fn read(dir: &Path, config: &ModelConfig) -> Result<Special, TokenizerError> {
        let mut fields = serde_json::Map::new();
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            if path.exists() {
                let value: Value =
                    serde_json::from_str(&read(&path)?).map_err(|error| invalid(&path, error))?;
                let Value::Object(object) = value else {
                    return Err(invalid(&path, "it is no JSON object"));
                };
                fields.extend(object);
            }
        }
        // A token is given as text or as an object with its text.
        let text = |key: &str| {
            let value = fields.get(key)?;
            value
                .as_str()
                .or_else(|| value.get("content")?.as_str())
                .map(str::to_owned)
        };
        let opt = config.architecture == Architecture::Opt;
        let (end, pad) = if opt {
            ("</s>", Some("<pad>"))
        } else {
            ("<|endoftext|>", None)
        };
        let bos = text("bos_token").unwrap_or(end.to_owned());
        let adds_bos = fields
            .get("add_bos_token")
            .and_then(Value::as_bool)
            .unwrap_or(opt);
        let mut tokens = vec![bos.clone()];
        tokens.push(text("eos_token").unwrap_or(end.to_owned()));
        tokens.extend(text("unk_token"));
        tokens.extend(text("pad_token").or(pad.map(str::to_owned)));
        let mut seen = std::collections::HashSet::new();
        tokens.retain(|token| seen.insert(token.clone()));
        Ok(Special {
            tokens,
            prefix: adds_bos.then_some(bos),
        })
    }
}

fn byte_level_bpe(
    vocab: &Path,
    merges: &Path,
    special: &Special,
) -> Result<Tokenizer, TokenizerError> {
    let bpe = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy())
        .build()
        .map_err(|error| invalid(vocab, error))?;
    let mut tokenizer = Tokenizer::new(bpe);
    let known: Vec<AddedToken> = special
        .tokens
        .iter()
        .filter(|token| tokenizer.token_to_id(token).is_some())
        .map(|token| AddedToken::from(token.clone(), true))
        .collect();
    tokenizer
        .add_special_tokens(known)
        .map_err(|error| invalid(vocab, error))?;
    // GPT-2's splitting, without a space put before the text.
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    if let Some(prefix) = &special.prefix {
        let Some(id) = tokenizer.token_to_id(prefix) else {
            return Err(invalid(
                vocab,
                format!("the token {prefix:?}, which starts every text, is not in it"),
            ));
        };
        let processor = TemplateProcessing::builder()
            .try_single(vec![format!("{prefix}:0"), "$A:0".to_owned()])
            .map_err(|error| invalid(vocab, error))?
            .special_tokens(vec![(prefix.clone(), id)])
            .build()
            .map_err(|error| invalid(vocab, error))?;
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(tokenizer)
}
