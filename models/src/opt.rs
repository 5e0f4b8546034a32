//! OPT: the names of its tensors, as transformers' `modeling_opt.py` gives them.

use crate::decoder::{Part, Role};
use kiln_ir::WeightSource;

/// What checkpoints put before the names below.
pub(crate) const PREFIXES: &[&str] = &["model.decoder.", "decoder.", ""];

/// Tensors that take no part in the computation.
pub(crate) fn is_inert(name: &str) -> bool {
    name == "version"
}

/// Where the checkpoint has the tensor of a role.
pub(crate) fn source(role: Role) -> WeightSource {
    let tensor = match role {
        Role::TokenTable => "embed_tokens.weight".to_owned(),
        Role::PositionTable => "embed_positions.weight".to_owned(),
        Role::ProjectIn => "project_in.weight".to_owned(),
        Role::ProjectOut => "project_out.weight".to_owned(),
        Role::FinalNorm(param) => format!("final_layer_norm.{param}"),
        Role::Head => "lm_head.weight".to_owned(),
        Role::Layer(layer, part, param) => {
            let part = match part {
                Part::AttentionNorm => "self_attn_layer_norm",
                Part::Query => "self_attn.q_proj",
                Part::Key => "self_attn.k_proj",
                Part::Value => "self_attn.v_proj",
                Part::Output => "self_attn.out_proj",
                Part::FfnNorm => "final_layer_norm",
                Part::Up => "fc1",
                Part::Down => "fc2",
            };
            format!("layers.{layer}.{part}.{param}")
        }
    };
    WeightSource::Load {
        tensor,
        transposed: false,
        rows: None,
    }
}
