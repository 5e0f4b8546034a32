//! The fused vocabulary: what a kernel computes, on which buffers and weights.
//!
//! A [`KernelSpec`] is device-neutral. The CPU device executes specs directly; for other targets
//! the compiler adds a launch record beside each. Specs name weights by their tensor name in the
//! target's weight file and buffers by index into their program's buffer list.
//!
//! Shape legend, used everywhere in kiln: B sequences, T new tokens of a step (summed over its
//! sequences), R rows whose logits are asked for, P past positions, C hidden size, H heads,
//! D head size (C = H*D), F feed-forward size, V vocabulary size, L layers.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Index of a buffer in its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BufferId(pub u32);

impl fmt::Display for BufferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

/// A layer normalisation: `(x - mean) / sqrt(var + eps) * weight + bias`, over the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Norm {
    /// Scale, f32 (width); absent in models without affine norms.
    pub weight: Option<String>,
    /// Shift, f32 (width).
    pub bias: Option<String>,
    /// Added to the variance.
    pub eps: f32,
}

/// Pointwise function of a linear's epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`: OPT.
    Relu,
    /// The tanh form of GELU, `gelu_new` in transformers: GPT-2.
    GeluNew,
}

impl Activation {
    /// The spelling of the text IR.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Relu => "relu",
            Activation::GeluNew => "gelu_new",
        }
    }
}

/// Which rows of its input, and of its residual, a linear computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// Every row, in order.
    All,
    /// The rows of the step's `logit_rows` list: input (T, K), residual (T, N), output (R, N).
    Logits,
}

/// Rows added to a linear's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    /// The rows, as many as the input's and of the output's width.
    pub buffer: BufferId,
    /// Applied to each row first: post-norm models add the normalised row.
    pub norm: Option<Norm>,
}

/// `out = residual + activation(norm(input) W^T + bias)`; every part but the product is optional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// Rows of width K.
    pub input: BufferId,
    /// Applied to each input row first.
    pub norm: Option<Norm>,
    /// Which rows are computed.
    pub rows: Rows,
    /// The matrix, packed (N, K).
    pub weight: String,
    /// f32 (N).
    pub bias: Option<String>,
    /// Pointwise, after the bias.
    pub activation: Option<Activation>,
    /// Added last.
    pub residual: Option<Residual>,
    /// K.
    pub in_features: u32,
    /// N.
    pub out_features: u32,
    /// Rows of width N.
    pub out: BufferId,
}

/// A kernel of the fused vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kernel", rename_all = "snake_case")]
pub enum KernelSpec {
    /// `out[t] = tokens[token_ids[t]] + positions[position[t] + offset]`; either table may be
    /// absent, not both.
    Embed {
        /// Token table, packed (V, C).
        tokens: Option<String>,
        /// Position table, (rows, C), row-major.
        positions: Option<String>,
        /// Table row of position 0 (2 for OPT).
        position_offset: u32,
        /// (T, C).
        out: BufferId,
    },
    /// A linear layer with its prologue and epilogue.
    Linear(Linear),
    /// The linear whose (T, 3C) result is q | k | v: q stays in `out`, k and v go to the KV cache
    /// of `layer` at the step's slots. A device may leave the k and v columns of `out` unwritten.
    Qkv {
        /// The product; `out_features` is 3C.
        linear: Linear,
        /// Layer of the KV cache.
        layer: u32,
    },
    /// Causal attention of the step's queries over each sequence's own cached positions.
    Attention {
        /// (T, 3C), of which the first C columns are read.
        q: BufferId,
        /// Layer of the KV cache.
        layer: u32,
        /// H.
        heads: u32,
        /// D.
        head_dim: u32,
        /// Multiplies the scores before the softmax.
        scale: f32,
        /// (T, C).
        out: BufferId,
    },
    /// Chooses the next token of each sequence from its row of logits, by its own parameters.
    Sample {
        /// f32 (R, V).
        logits: BufferId,
    },
}

impl KernelSpec {
    /// A short name for tables and messages.
    pub const fn name(&self) -> &'static str {
        match self {
            KernelSpec::Embed { .. } => "embed",
            KernelSpec::Linear(_) => "linear",
            KernelSpec::Qkv { .. } => "qkv",
            KernelSpec::Attention { .. } => "attention",
            KernelSpec::Sample { .. } => "sample",
        }
    }

    /// The linear inside, for the kinds that have one.
    pub const fn linear(&self) -> Option<&Linear> {
        match self {
            KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => Some(linear),
            _ => None,
        }
    }

    /// Buffers read, in a fixed order.
    pub fn reads(&self) -> Vec<BufferId> {
        match self {
            KernelSpec::Embed { .. } => vec![],
            KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => {
                let residual = linear.residual.as_ref().map(|residual| residual.buffer);
                std::iter::once(linear.input).chain(residual).collect()
            }
            KernelSpec::Attention { q, .. } => vec![*q],
            KernelSpec::Sample { logits } => vec![*logits],
        }
    }

    /// The buffer written, if any.
    pub fn writes(&self) -> Option<BufferId> {
        match self {
            KernelSpec::Embed { out, .. } | KernelSpec::Attention { out, .. } => Some(*out),
            KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => Some(linear.out),
            KernelSpec::Sample { .. } => None,
        }
    }
}
