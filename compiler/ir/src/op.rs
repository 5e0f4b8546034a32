//! Operations.

use crate::{Rows, WeightId};

/// Pointwise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// The tanh form of GELU.
    GeluNew,
}

/// Parameters of a layer normalisation over the last axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Scale (width), if the model has one.
    pub weight: Option<WeightId>,
    /// Shift (width), if the model has one.
    pub bias: Option<WeightId>,
    /// Added to the variance.
    pub eps: f32,
}

/// The fused linear: `residual_norm(residual) + activation(norm(x) W^T + bias)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linear {
    /// Applied to each input row first.
    pub norm: Option<Norm>,
    /// Which rows of the operands are computed: all, or those whose logits are asked for.
    pub rows: Rows,
    /// W (N, K).
    pub weight: WeightId,
    /// (N).
    pub bias: Option<WeightId>,
    /// After the bias.
    pub activation: Option<Activation>,
    /// Applied to the residual, which is the second operand.
    pub residual_norm: Option<Norm>,
}

impl Linear {
    /// A product and nothing else.
    pub const fn new(weight: WeightId) -> Linear {
        Linear {
            norm: None,
            rows: Rows::Tokens,
            weight,
            bias: None,
            activation: None,
            residual_norm: None,
        }
    }
}

/// What a node computes. Model builders use the first group, `fuse` leaves the second (and
/// `token_ids`, `positions`, `attention`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// The step's token ids (T).
    TokenIds,
    /// The position of each token in its sequence (T).
    Positions,
    /// Rows of a table (V, C) by token id.
    EmbedTokens {
        /// (V, C).
        table: WeightId,
    },
    /// Rows of a table by position.
    EmbedPositions {
        /// (positions, C).
        table: WeightId,
        /// Table row of position 0.
        offset: u32,
    },
    /// `x W^T`.
    Matmul {
        /// W (N, K).
        weight: WeightId,
    },
    /// `x + b`.
    Bias {
        /// (width).
        bias: WeightId,
    },
    /// Pointwise function.
    Activation(Activation),
    /// Sum of two values of one type.
    Add,
    /// Layer normalisation.
    LayerNorm(Norm),
    /// Puts k and v of the new tokens into the cache.
    KvWrite {
        /// Layer of the cache.
        layer: u32,
    },
    /// Causal attention of q over the cache: operands q and the `kv_write`, or one `qkv`.
    Attention {
        /// Layer of the cache.
        layer: u32,
        /// H.
        heads: u32,
        /// D.
        head_dim: u32,
        /// Multiplies the scores.
        scale: f32,
    },
    /// The rows whose logits are asked for.
    SelectLogitRows,

    /// Sum of the rows of one or both tables; an operand for each table that is there.
    Embed {
        /// (V, C).
        tokens: Option<WeightId>,
        /// (positions, C), and the table row of position 0.
        positions: Option<(WeightId, u32)>,
    },
    /// The fused linear; operands x and, optionally, the residual.
    Linear(Linear),
    /// The fused linear whose result is q | k | v (T, 3C), k and v going to the cache as well.
    Qkv {
        /// N is 3C.
        linear: Linear,
        /// Layer of the cache.
        layer: u32,
    },
}
