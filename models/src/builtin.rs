//! The published OPT and GPT-2 configurations, by name.

use kiln_ir::DType;

use crate::config::{Activation, Architecture, ModelConfig, NormPlacement};

/// Name, layers, hidden size, heads. The FFN is four times as wide as the residual stream.
const SIZES: [(&str, usize, usize, usize); 13] = [
    ("opt-125m", 12, 768, 12),
    ("opt-350m", 24, 1024, 16),
    ("opt-1.3b", 24, 2048, 32),
    ("opt-2.7b", 32, 2560, 32),
    ("opt-6.7b", 32, 4096, 32),
    ("opt-13b", 40, 5120, 40),
    ("opt-30b", 48, 7168, 56),
    ("opt-66b", 64, 9216, 72),
    ("opt-175b", 96, 12288, 96),
    ("gpt2", 12, 768, 12),
    ("gpt2-medium", 24, 1024, 16),
    ("gpt2-large", 36, 1280, 20),
    ("gpt2-xl", 48, 1600, 25),
];

/// The built-in configuration of that name, if there is one.
pub fn builtin(name: &str) -> Option<ModelConfig> {
    let &(_, layers, hidden_size, heads) = SIZES.iter().find(|(known, ..)| *known == name)?;
    let common = ModelConfig {
        architecture: Architecture::Gpt2,
        vocab_size: 50257,
        hidden_size,
        layers,
        heads,
        ffn_size: 4 * hidden_size,
        max_positions: 1024,
        position_offset: 0,
        embed_size: hidden_size,
        norm_placement: NormPlacement::Pre,
        final_norm: true,
        norm_eps: 1e-5,
        norm_affine: true,
        linear_bias: true,
        activation: Activation::GeluNew,
        attention_scale: (1.0 / ((hidden_size / heads) as f64).sqrt()) as f32,
        scale_by_inverse_layer: false,
        tied_head: true,
        dtype: DType::F32,
        quantisation: None,
        bos_token_id: Some(50256),
        eos_token_ids: vec![50256],
        pad_token_id: None,
    };
    if name.starts_with("gpt2") {
        return Some(common);
    }
    let opt = ModelConfig {
        architecture: Architecture::Opt,
        vocab_size: 50272,
        max_positions: 2048,
        position_offset: 2,
        activation: Activation::Relu,
        dtype: DType::F16,
        bos_token_id: Some(2),
        eos_token_ids: vec![2],
        pad_token_id: Some(1),
        ..common
    };
    // The one OPT size that was trained with post-norm and a narrower embedding.
    if name == "opt-350m" {
        return Some(ModelConfig {
            embed_size: 512,
            norm_placement: NormPlacement::Post,
            final_norm: false,
            ..opt
        });
    }
    Some(opt)
}

/// Names of the built-in configurations, small to large within a family.
pub fn builtin_names() -> impl Iterator<Item = &'static str> {
    SIZES.iter().map(|(name, ..)| *name)
}

/// The number of parameters, a tied head counted once.
pub fn parameters(config: &ModelConfig) -> u64 {
    let n = |size: usize| size as u64;
    let (c, f, e) = (
        n(config.hidden_size),
        n(config.ffn_size),
        n(config.embed_size),
    );
    let bias = u64::from(config.linear_bias);
    let norm = if config.norm_affine { 2 * c } else { 0 };

    let attention = 4 * (c * c + bias * c);
    let ffn = 2 * c * f + bias * (f + c);
    let block = attention + ffn + 2 * norm;

    let embedding = n(config.vocab_size) * e + n(config.position_rows()) * c;
    let projections = if config.has_projections() {
        2 * c * e
    } else {
        0
    };
    let head = if config.tied_head {
        0
    } else {
        n(config.vocab_size) * e
    };
    let final_norm = if config.final_norm { norm } else { 0 };
    embedding + projections + n(config.layers) * block + final_norm + head
}
