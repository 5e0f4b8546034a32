//! GPT-2: the names of its tensors, as transformers' `modeling_gpt2.py` gives them. Its `Conv1D`
//! layers hold (K, N), the transpose of a linear's weight, and `c_attn` holds q | k | v.

use crate::{
    ModelConfig,
    decoder::{Param, Part, Role},
};
use kiln_ir::WeightSource;

/// What checkpoints put before the names below.
pub(crate) const PREFIXES: &[&str] = &["transformer.", ""];

/// Tensors that take no part in the computation: the causal masks of older checkpoints.
pub(crate) fn is_inert(name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    matches!(parts[..], ["h", _, "attn", "bias" | "masked_bias"])
}

/// Where the checkpoint has the tensor of a role.
pub(crate) fn source(role: Role, config: &ModelConfig) -> WeightSource {
    let c = config.hidden_size;
    let (tensor, transposed, rows) = match role {
        Role::TokenTable => ("wte.weight".to_owned(), false, None),
        Role::PositionTable => ("wpe.weight".to_owned(), false, None),
        // GPT-2 has no projections; the names serve the message that they are missing.
        Role::ProjectIn => ("project_in.weight".to_owned(), false, None),
        Role::ProjectOut => ("project_out.weight".to_owned(), false, None),
        Role::FinalNorm(param) => (format!("ln_f.{param}"), false, None),
        Role::Head => ("lm_head.weight".to_owned(), false, None),
        Role::Layer(layer, part, param) => {
            let (name, rows) = match part {
                Part::AttentionNorm => ("ln_1", None),
                Part::Query => ("attn.c_attn", Some(0..c)),
                Part::Key => ("attn.c_attn", Some(c..2 * c)),
                Part::Value => ("attn.c_attn", Some(2 * c..3 * c)),
                Part::Output => ("attn.c_proj", None),
                Part::FfnNorm => ("ln_2", None),
                Part::Up => ("mlp.c_fc", None),
                Part::Down => ("mlp.c_proj", None),
            };
            let norm = matches!(part, Part::AttentionNorm | Part::FfnNorm);
            let transposed = param == Param::Weight && !norm;
            (format!("h.{layer}.{name}.{param}"), transposed, rows)
        }
    };
    WeightSource::Load {
        tensor,
        transposed,
        rows,
    }
}
