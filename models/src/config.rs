//! What an OPT or GPT-2 model is, normalised from a Hugging Face `config.json`.
//!
//! A field that changes the computation is either honoured or refused by name. A key that is on no
//! list is refused too, unless it is null, false or empty: computing something else in silence is
//! worse than asking.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

pub use kiln_ir::Activation;
use kiln_ir::DType;
use serde_json::{Map, Value, json};

/// A model family: which graph is built and how the weights are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Open Pre-trained Transformers (`model_type` "opt").
    Opt,
    /// GPT-2 (`model_type` "gpt2").
    Gpt2,
}

impl Architecture {
    /// Every architecture, in the order in which messages list them.
    pub const ALL: [Architecture; 2] = [Architecture::Opt, Architecture::Gpt2];

    /// The `model_type` of config.json.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Opt => "opt",
            Architecture::Gpt2 => "gpt2",
        }
    }

    /// Classes of transformers whose weights and computation are those of the language model; the
    /// first is the one that is written.
    const fn classes(self) -> [&'static str; 2] {
        match self {
            Architecture::Opt => ["OPTForCausalLM", "OPTModel"],
            Architecture::Gpt2 => ["GPT2LMHeadModel", "GPT2Model"],
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// Where the layer norms of a block stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormPlacement {
    /// Before attention and FFN, on what they read.
    Pre,
    /// After each residual add (opt-350m).
    Post,
}

/// The normalised description of a model. Sizes are within [`ModelConfig::check`]'s bounds, so that
/// products of any three of them fit 64 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// V: rows of the token embedding and of the LM head.
    pub vocab_size: usize,
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// H: attention heads; the head dimension D is C / H.
    pub heads: usize,
    /// Width of the FFN's hidden layer.
    pub ffn_size: usize,
    /// Longest sequence, in tokens.
    pub max_positions: usize,
    /// Row of the position table that the first token uses: 2 for OPT, 0 for GPT-2. The table has
    /// `max_positions + position_offset` rows.
    pub position_offset: usize,
    /// Width of the token embedding: C unless the model projects into and out of it (opt-350m).
    pub embed_size: usize,
    /// Where the layer norms of a block stand.
    pub norm_placement: NormPlacement,
    /// Whether a layer norm follows the last block.
    pub final_norm: bool,
    /// The epsilon of every layer norm.
    pub norm_eps: f32,
    /// Whether layer norms have a weight and a bias.
    pub norm_affine: bool,
    /// Whether the linear layers of the blocks have a bias.
    pub linear_bias: bool,
    /// The FFN's non-linearity.
    pub activation: Activation,
    /// What attention scores are multiplied with, before the division below.
    pub attention_scale: f32,
    /// Whether layer i divides its scores by i + 1 as well.
    pub scale_by_inverse_layer: bool,
    /// Whether the LM head is the token embedding.
    pub tied_head: bool,
    /// Element type that the checkpoint was saved in.
    pub dtype: DType,
    /// How linears are stored as integers, where they are.
    pub quantisation: Option<GptqConfig>,
    /// The token that starts a text; it may lie outside a reduced vocabulary.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The padding token, which kiln itself never uses.
    pub pad_token_id: Option<u32>,
}

/// How the integers of a GPTQ checkpoint are stored. Which linears they are for, its tensors tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptqConfig {
    /// Bits of a code, 4 or 8.
    pub bits: u32,
    /// Inputs that share a scale; all inputs of an output where absent.
    pub group_size: Option<usize>,
    /// Whether zero points are stored less one: the format "gptq", and not "gptq_v2".
    pub zeros_less_one: bool,
}

/// What `generation_config.json` says of the special tokens; it overrides `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GenerationDefaults {
    /// The token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; None where the file does not say.
    pub eos_token_ids: Option<Vec<u32>>,
    /// The padding token.
    pub pad_token_id: Option<u32>,
}

/// Why a config.json or generation_config.json cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read: the caller's path or the file system.
    #[error("cannot read {path}: {source}; give a checkpoint directory that holds config.json")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than any configuration is: not a configuration.
    #[error("{path} has {bytes} bytes; a configuration has at most {limit}: this is another file")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// The file is not a JSON object: the checkpoint's mistake.
    #[error("{path} is not a JSON object: {found}; download the checkpoint again")]
    NotJson {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// A field without which the model is not defined is absent.
    #[error("{path}: field {field:?} is missing; needed: {needed}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The absent field.
        field: &'static str,
        /// What it should hold.
        needed: String,
    },
    /// A field holds what it cannot hold.
    #[error("{path}: field {field:?} is {found}; needed: {needed}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What it may hold.
        needed: String,
    },
    /// A field asks for something that kiln does not compute.
    #[error(
        "{path}: field {field:?} is {found}, which kiln does not support; supported: {supported}"
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// The values that are supported.
        supported: String,
    },
    /// A key that kiln does not know and that may change the computation.
    #[error(
        "{path}: key {field:?} (value {found}) is unknown to kiln for {architecture} models and may \
         change what the model computes; remove it from the file if it does not"
    )]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// Its value.
        found: String,
        /// The model family whose keys were expected.
        architecture: Architecture,
    },
}

/// No configuration file is larger.
const CONFIG_LIMIT_BYTES: u64 = 16 << 20;

/// Exclusive bounds of the sizes. Any product of two widths, a layer count and a small constant
/// stays below 2^63.
const MAX_WIDTH: usize = 1 << 20;
const MAX_FFN: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 14;
const MAX_ROWS: usize = 1 << 24;

impl ModelConfig {
    /// Reads `config.json` of a checkpoint directory, then `generation_config.json` where there is
    /// one.
    pub fn load(dir: &Path) -> Result<ModelConfig, ConfigError> {
        let path = dir.join("config.json");
        let config = ModelConfig::from_json(&read_text(&path)?, &path)?;
        let path = dir.join("generation_config.json");
        if !path.exists() {
            return Ok(config);
        }
        let defaults = GenerationDefaults::from_json(&read_text(&path)?, &path)?;
        Ok(config.with_generation_defaults(&defaults))
    }

    /// Parses the text of a `config.json`; `path` only serves messages.
    pub fn from_json(text: &str, path: &Path) -> Result<ModelConfig, ConfigError> {
        let map = parse_object(text, path)?;
        let fields = Fields::of(&map, path);
        let architecture = fields.architecture()?;
        fields.refuse_unknown(architecture)?;
        let config = match architecture {
            Architecture::Opt => fields.opt()?,
            Architecture::Gpt2 => fields.gpt2()?,
        };
        config.check(path)?;
        Ok(config)
    }

    /// The same model with the special tokens that `generation_config.json` gives.
    pub fn with_generation_defaults(mut self, defaults: &GenerationDefaults) -> ModelConfig {
        self.bos_token_id = defaults.bos_token_id.or(self.bos_token_id);
        self.pad_token_id = defaults.pad_token_id.or(self.pad_token_id);
        if let Some(ids) = &defaults.eos_token_ids {
            self.eos_token_ids.clone_from(ids);
        }
        self
    }

    /// D: the width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// What layer `layer` (from 0) multiplies attention scores with.
    pub fn layer_attention_scale(&self, layer: usize) -> f32 {
        if self.scale_by_inverse_layer {
            self.attention_scale / (layer + 1) as f32
        } else {
            self.attention_scale
        }
    }

    /// Rows of the position table.
    pub fn position_rows(&self) -> usize {
        self.max_positions + self.position_offset
    }

    /// Whether the embedding is projected into the residual stream and out of it again.
    pub fn has_projections(&self) -> bool {
        self.embed_size != self.hidden_size
    }

    /// Checks every size: not zero, heads divide C, below the bounds that keep products in range.
    /// `path` only serves messages.
    pub fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_ROWS),
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_WIDTH),
            ("ffn_dim", self.ffn_size, MAX_FFN),
            ("max_position_embeddings", self.max_positions, MAX_ROWS),
            ("word_embed_proj_dim", self.embed_size, MAX_WIDTH),
        ];
        for (hf_name, value, limit) in sizes {
            if value == 0 || value >= limit {
                return Err(ConfigError::Invalid {
                    path: path.to_owned(),
                    field: self.hf_name(hf_name).to_owned(),
                    found: value.to_string(),
                    needed: format!("an integer from 1 to {}", limit - 1),
                });
            }
        }
        if !self.hidden_size.is_multiple_of(self.heads) {
            return Err(ConfigError::Invalid {
                path: path.to_owned(),
                field: self.hf_name("num_attention_heads").to_owned(),
                found: self.heads.to_string(),
                needed: format!("a divisor of the hidden size {}", self.hidden_size),
            });
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(ConfigError::Invalid {
                path: path.to_owned(),
                field: self.hf_name("layer_norm_eps").to_owned(),
                found: self.norm_eps.to_string(),
                needed: "a finite number that is not negative".to_owned(),
            });
        }
        Ok(())
    }

    /// The text of a `config.json` under transformers' field names; [`ModelConfig::from_json`] reads
    /// the same model back, without its integers: it describes a checkpoint of what they stand for.
    pub fn to_hf_json(&self) -> String {
        let dtype = match self.dtype {
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
            DType::F32 | DType::I32 | DType::U8 => "float32",
        };
        let activation = match self.activation {
            Activation::Relu => "relu",
            Activation::GeluNew => "gelu_new",
        };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let mut value = json!({
            "architectures": [self.architecture.classes()[0]],
            "model_type": self.architecture.model_type(),
            "vocab_size": self.vocab_size,
            "activation_function": activation,
            "tie_word_embeddings": self.tied_head,
            "torch_dtype": dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        });
        let own = match self.architecture {
            Architecture::Opt => json!({
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "ffn_dim": self.ffn_size,
                "max_position_embeddings": self.max_positions,
                "word_embed_proj_dim": self.embed_size,
                "do_layer_norm_before": self.norm_placement == NormPlacement::Pre,
                "_remove_final_layer_norm":
                    self.norm_placement == NormPlacement::Pre && !self.final_norm,
                "layer_norm_elementwise_affine": self.norm_affine,
                "enable_bias": self.linear_bias,
            }),
            Architecture::Gpt2 => json!({
                "n_embd": self.hidden_size,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_inner": self.ffn_size,
                "n_positions": self.max_positions,
                "layer_norm_epsilon": shortest_f64(self.norm_eps),
                "scale_attn_weights": self.attention_scale != 1.0,
                "scale_attn_by_inverse_layer_idx": self.scale_by_inverse_layer,
            }),
        };
        if let (Value::Object(all), Value::Object(own)) = (&mut value, own) {
            all.extend(own);
        }
        format!("{value:#}\n")
    }

    /// A field's name in this architecture's own config.json.
    fn hf_name(&self, opt_name: &'static str) -> &'static str {
        match self.architecture {
            Architecture::Opt => opt_name,
            Architecture::Gpt2 => match opt_name {
                "hidden_size" => "n_embd",
                "num_hidden_layers" => "n_layer",
                "num_attention_heads" => "n_head",
                "ffn_dim" => "n_inner",
                "max_position_embeddings" => "n_positions",
                "layer_norm_eps" => "layer_norm_epsilon",
                other => other,
            },
        }
    }
}

impl GenerationDefaults {
    /// Parses the text of a `generation_config.json`; `path` only serves messages.
    pub fn from_json(text: &str, path: &Path) -> Result<GenerationDefaults, ConfigError> {
        let map = parse_object(text, path)?;
        let fields = Fields::of(&map, path);
        Ok(GenerationDefaults {
            bos_token_id: fields.token("bos_token_id")?,
            eos_token_ids: match fields.get("eos_token_id") {
                None => None,
                Some(_) => Some(fields.tokens("eos_token_id")?),
            },
            pad_token_id: fields.pad_token(),
        })
    }
}

/// Keys of any configuration that do not change what the model computes in inference.
const HARMLESS: &[&str] = &[
    // Read here, for both architectures.
    "activation_function",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_type",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
    // Names and bookkeeping.
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "transformers_version",
    "transformers_weights",
    "prefix",
    "license",
    "language",
    // How it is run or trained, not what is computed.
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "init_std",
    "initializer_range",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "return_dict",
    "return_dict_in_generate",
    "tf_legacy_loss",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    // Dropout.
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "layerdrop",
    "resid_pdrop",
    "summary_first_dropout",
    // Heads other than the LM head.
    "_num_labels",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    // Generation defaults that old files keep here.
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "repetition_penalty",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Keys that only an OPT configuration has, all of them read or harmless.
const OPT_KEYS: &[&str] = &[
    "_remove_final_layer_norm",
    "do_layer_norm_before",
    "enable_bias",
    "ffn_dim",
    "hidden_size",
    "layer_norm_elementwise_affine",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "word_embed_proj_dim",
];

/// Keys that only a GPT-2 configuration has. `n_ctx` was the size of the causal mask buffer;
/// `reorder_and_upcast_attn` asks for scores in f32, which is how kiln computes them always.
const GPT2_KEYS: &[&str] = &[
    "hidden_size",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "n_ctx",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "reorder_and_upcast_attn",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
];

/// Keys whose set values kiln knows it does not support, with what to do.
const REFUSED: &[(&str, &str)] = &[
    ("add_cross_attention", "false (decoder-only models)"),
    ("is_encoder_decoder", "false (decoder-only models)"),
    (
        "pruned_heads",
        "none; save the model with its heads removed from the weights",
    ),
    ("auto_map", "none; kiln runs no code from checkpoints"),
];

/// Keys of a GPTQ checkpoint's `quantization_config` that do not change what the integers stand for:
/// those that are read here, how the integers were found, and how libraries are to run them.
const GPTQ_KEYS: &[&str] = &[
    "bits",
    "checkpoint_format",
    "desc_act",
    "format",
    "group_size",
    "pack_dtype",
    "quant_method",
    "sym",
    "_pre_quantization_dtype",
    "act_group_aware",
    "auto_gptq_version",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "v2_alpha",
];

/// The fields of one configuration file, or of an object in it.
struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    /// What messages put before a field's name.
    within: &'static str,
}

impl<'a> Fields<'a> {
    fn of(map: &'a Map<String, Value>, path: &'a Path) -> Fields<'a> {
        Fields {
            path,
            map,
            within: "",
        }
    }
}

impl Fields<'_> {
    fn opt(&self) -> Result<ModelConfig, ConfigError> {
        let hidden_size = self.size(&["hidden_size"])?;
        let heads = self.size(&["num_attention_heads"])?;
        let norm_before = self.flag("do_layer_norm_before", true)?;
        Ok(ModelConfig {
            architecture: Architecture::Opt,
            vocab_size: self.size(&["vocab_size"])?,
            hidden_size,
            layers: self.size(&["num_hidden_layers"])?,
            heads,
            ffn_size: self.size(&["ffn_dim"])?,
            max_positions: self.size(&["max_position_embeddings"])?,
            position_offset: 2,
            embed_size: self
                .optional_size("word_embed_proj_dim")?
                .unwrap_or(hidden_size),
            norm_placement: if norm_before {
                NormPlacement::Pre
            } else {
                NormPlacement::Post
            },
            final_norm: norm_before && !self.flag("_remove_final_layer_norm", false)?,
            norm_eps: 1e-5,
            norm_affine: self.flag("layer_norm_elementwise_affine", true)?,
            linear_bias: self.flag("enable_bias", true)?,
            activation: self.activation(Activation::Relu)?,
            attention_scale: inverse_root(hidden_size, heads),
            scale_by_inverse_layer: false,
            tied_head: self.flag("tie_word_embeddings", true)?,
            dtype: self.dtype()?,
            quantisation: self.quantisation()?,
            bos_token_id: self.token_or("bos_token_id", Some(2))?,
            eos_token_ids: self.tokens_or("eos_token_id", 2)?,
            pad_token_id: if self.map.contains_key("pad_token_id") {
                self.pad_token()
            } else {
                Some(1)
            },
        })
    }

    fn gpt2(&self) -> Result<ModelConfig, ConfigError> {
        let hidden_size = self.size(&["n_embd", "hidden_size"])?;
        let heads = self.size(&["n_head", "num_attention_heads"])?;
        // Both spellings of a choice that changes nothing in f32 are checked for their type.
        self.flag("reorder_and_upcast_attn", false)?;
        Ok(ModelConfig {
            architecture: Architecture::Gpt2,
            vocab_size: self.size(&["vocab_size"])?,
            hidden_size,
            layers: self.size(&["n_layer", "num_hidden_layers"])?,
            heads,
            ffn_size: match self.optional_size("n_inner")? {
                Some(size) => size,
                None => hidden_size.saturating_mul(4),
            },
            max_positions: self.size(&["n_positions", "max_position_embeddings"])?,
            position_offset: 0,
            embed_size: hidden_size,
            norm_placement: NormPlacement::Pre,
            final_norm: true,
            norm_eps: self.epsilon("layer_norm_epsilon", 1e-5)?,
            norm_affine: true,
            linear_bias: true,
            activation: self.activation(Activation::GeluNew)?,
            attention_scale: if self.flag("scale_attn_weights", true)? {
                inverse_root(hidden_size, heads)
            } else {
                1.0
            },
            scale_by_inverse_layer: self.flag("scale_attn_by_inverse_layer_idx", false)?,
            tied_head: self.flag("tie_word_embeddings", true)?,
            dtype: self.dtype()?,
            quantisation: self.quantisation()?,
            bos_token_id: self.token_or("bos_token_id", Some(50256))?,
            eos_token_ids: self.tokens_or("eos_token_id", 50256)?,
            pad_token_id: self.pad_token(),
        })
    }

    /// The architecture that `model_type` names; `architectures` may only confirm it.
    fn architecture(&self) -> Result<Architecture, ConfigError> {
        let classes: Vec<&str> = match self.get("architectures") {
            None => Vec::new(),
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
                list.iter().filter_map(Value::as_str).collect()
            }
            Some(_) => return Err(self.invalid("architectures", "a list of class names")),
        };
        let known_types = || Architecture::ALL.map(Architecture::model_type).join(", ");
        let architecture = match self.get("model_type") {
            Some(Value::String(name)) => Architecture::ALL
                .into_iter()
                .find(|a| a.model_type() == name)
                .ok_or_else(|| self.unsupported("model_type", known_types()))?,
            Some(_) => return Err(self.invalid("model_type", "a string")),
            None if classes.is_empty() => {
                return Err(ConfigError::Missing {
                    path: self.path.to_owned(),
                    field: "model_type",
                    needed: format!("one of {}", known_types()),
                });
            }
            None => Architecture::ALL
                .into_iter()
                .find(|a| a.classes().contains(&classes[0]))
                .ok_or_else(|| {
                    let known = Architecture::ALL.map(|a| a.classes().join(", "));
                    self.unsupported("architectures", known.join(", "))
                })?,
        };
        if classes
            .iter()
            .any(|class| !architecture.classes().contains(class))
        {
            return Err(self.unsupported("architectures", architecture.classes().join(", ")));
        }
        Ok(architecture)
    }

    fn refuse_unknown(&self, architecture: Architecture) -> Result<(), ConfigError> {
        let own = match architecture {
            Architecture::Opt => OPT_KEYS,
            Architecture::Gpt2 => GPT2_KEYS,
        };
        for (key, value) in self.map {
            if is_unset(value) {
                continue;
            }
            if let Some((_, supported)) = REFUSED.iter().find(|(name, _)| name == key) {
                return Err(self.unsupported(key, (*supported).to_owned()));
            }
            if !own.contains(&key.as_str()) && !HARMLESS.contains(&key.as_str()) {
                return Err(ConfigError::UnknownKey {
                    path: self.path.to_owned(),
                    field: key.clone(),
                    found: shorten(value),
                    architecture,
                });
            }
        }
        Ok(())
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A size under its own name or under the common one; both may stand there if they agree.
    fn size(&self, names: &[&'static str]) -> Result<usize, ConfigError> {
        let mut size = None;
        for name in names {
            let Some(value) = self.optional_size(name)? else {
                continue;
            };
            if size.is_some_and(|other| other != value) {
                return Err(self.invalid(name, &format!("the value of {:?}", names[0])));
            }
            size = Some(value);
        }
        size.ok_or_else(|| ConfigError::Missing {
            path: self.path.to_owned(),
            field: names[0],
            needed: "a positive integer".to_owned(),
        })
    }

    fn optional_size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .map(Some)
                .ok_or_else(|| self.invalid(field, "a positive integer")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.invalid(field, "true or false")),
        }
    }

    fn epsilon(&self, field: &str, default: f32) -> Result<f32, ConfigError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .map(|eps| eps as f32)
                .ok_or_else(|| self.invalid(field, "a number")),
        }
    }

    fn activation(&self, default: Activation) -> Result<Activation, ConfigError> {
        match self.get("activation_function") {
            None => Ok(default),
            Some(Value::String(name)) => match name.as_str() {
                "relu" => Ok(Activation::Relu),
                // Three spellings of the same tanh form.
                "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluNew),
                _ => Err(self.unsupported(
                    "activation_function",
                    "relu, gelu_new, gelu_pytorch_tanh, gelu_fast".to_owned(),
                )),
            },
            Some(_) => Err(self.invalid("activation_function", "a string")),
        }
    }

    fn dtype(&self) -> Result<DType, ConfigError> {
        let field = if self.get("dtype").is_some() {
            "dtype"
        } else {
            "torch_dtype"
        };
        match self.get(field) {
            None => Ok(DType::F32),
            Some(Value::String(name)) => match name.strip_prefix("torch.").unwrap_or(name) {
                "float32" | "float" => Ok(DType::F32),
                "float16" | "half" => Ok(DType::F16),
                "bfloat16" => Ok(DType::Bf16),
                _ => Err(self.unsupported(field, "float32, float16, bfloat16".to_owned())),
            },
            Some(_) => Err(self.invalid(field, "a string")),
        }
    }

    /// `quantization_config`, which must be that of GPTQ.
    fn quantisation(&self) -> Result<Option<GptqConfig>, ConfigError> {
        const FIELD: &str = "quantization_config";
        let map = match self.get(FIELD) {
            None => return Ok(None),
            Some(value) if is_unset(value) => return Ok(None),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(self.invalid(FIELD, "an object")),
        };
        let fields = Fields {
            path: self.path,
            map,
            within: "quantization_config.",
        };
        let text = |field| fields.get(field).and_then(Value::as_str);
        if text("quant_method") != Some("gptq") {
            let supported = "gptq; else give the unquantised checkpoint";
            return Err(fields.unsupported("quant_method", supported.to_owned()));
        }
        for (key, value) in map {
            if !is_unset(value) && !GPTQ_KEYS.contains(&key.as_str()) {
                return Err(fields.unsupported(key, "none".to_owned()));
            }
        }
        let bits = match fields.get("bits").and_then(Value::as_u64) {
            Some(bits @ (4 | 8)) => bits as u32,
            _ => return Err(fields.unsupported("bits", "4, 8".to_owned())),
        };
        let group_size = match fields.get("group_size") {
            // What transformers takes it for.
            None => Some(128),
            Some(value) if value.as_i64() == Some(-1) => None,
            Some(_) => match fields.optional_size("group_size") {
                Ok(Some(size)) if (1..MAX_FFN).contains(&size) => Some(size),
                _ => return Err(fields.invalid("group_size", "a positive integer or -1")),
            },
        };
        // The tensors say both; they are checked for their type.
        fields.flag("desc_act", false)?;
        fields.flag("sym", true)?;
        if fields.get("pack_dtype").is_some() && text("pack_dtype") != Some("int32") {
            return Err(fields.unsupported("pack_dtype", "int32".to_owned()));
        }
        let mut zeros_less_one = None;
        for field in ["checkpoint_format", "format"] {
            if fields.get(field).is_none() {
                continue;
            }
            let less_one = match text(field) {
                Some("gptq") => true,
                Some("gptq_v2") => false,
                _ => return Err(fields.unsupported(field, "gptq, gptq_v2".to_owned())),
            };
            if zeros_less_one.is_some_and(|other| other != less_one) {
                return Err(fields.invalid(field, "the value of \"checkpoint_format\""));
            }
            zeros_less_one = Some(less_one);
        }
        Ok(Some(GptqConfig {
            bits,
            group_size,
            zeros_less_one: zeros_less_one.unwrap_or(true),
        }))
    }

    fn token(&self, field: &str) -> Result<Option<u32>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => token_id(value)
                .map(Some)
                .ok_or_else(|| self.invalid(field, "a token id (an integer from 0) or null")),
        }
    }

    /// As transformers has it: the default where the key is absent, none where it is null.
    fn token_or(&self, field: &str, default: Option<u32>) -> Result<Option<u32>, ConfigError> {
        if self.map.contains_key(field) {
            self.token(field)
        } else {
            Ok(default)
        }
    }

    fn tokens(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let needed = "a token id, a list of token ids, or null";
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list
                .iter()
                .map(|value| token_id(value).ok_or_else(|| self.invalid(field, needed)))
                .collect(),
            Some(value) => token_id(value)
                .map(|id| vec![id])
                .ok_or_else(|| self.invalid(field, needed)),
        }
    }

    fn tokens_or(&self, field: &str, default: u32) -> Result<Vec<u32>, ConfigError> {
        if self.map.contains_key(field) {
            self.tokens(field)
        } else {
            Ok(vec![default])
        }
    }

    /// kiln never pads, so that files which say -1 for "none" are taken as they are.
    fn pad_token(&self) -> Option<u32> {
        self.get("pad_token_id").and_then(token_id)
    }

    fn found(&self, field: &str) -> String {
        self.map
            .get(field)
            .map_or_else(|| "absent".to_owned(), shorten)
    }

    fn invalid(&self, field: &str, needed: &str) -> ConfigError {
        ConfigError::Invalid {
            path: self.path.to_owned(),
            field: format!("{}{field}", self.within),
            found: self.found(field),
            needed: needed.to_owned(),
        }
    }

    fn unsupported(&self, field: &str, supported: String) -> ConfigError {
        ConfigError::Unsupported {
            path: self.path.to_owned(),
            field: format!("{}{field}", self.within),
            found: self.found(field),
            supported,
        }
    }
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let read_error = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(read_error)?.len();
    if bytes > CONFIG_LIMIT_BYTES {
        let limit = CONFIG_LIMIT_BYTES;
        return Err(ConfigError::TooLarge {
            path: path.to_owned(),
            bytes,
            limit,
        });
    }
    std::fs::read_to_string(path).map_err(read_error)
}

fn parse_object(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let not_json = |found| ConfigError::NotJson {
        path: path.to_owned(),
        found,
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(not_json(shorten(&other))),
        Err(error) => Err(not_json(error.to_string())),
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Null, false and empty say that a feature is off.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as a message shows it.
fn shorten(value: &Value) -> String {
    const LIMIT: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// D^-0.5, rounded once. Zero heads are left to [`ModelConfig::check`].
fn inverse_root(hidden_size: usize, heads: usize) -> f32 {
    let head_dim = hidden_size.checked_div(heads).unwrap_or(1).max(1);
    (1.0 / (head_dim as f64).sqrt()) as f32
}

/// The f64 that prints as the f32 does (1e-5, not 9.999999747378752e-6).
fn shortest_f64(value: f32) -> f64 {
    value
        .to_string()
        .parse()
        .unwrap_or_else(|_| f64::from(value))
}
