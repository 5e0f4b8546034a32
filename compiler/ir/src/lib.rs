//! kiln's graph IR: what a model computes, before and after fusion.
//!
//! A [`Graph`] is one decoder step over ragged activations: T new tokens of all sequences together,
//! R rows whose logits are asked for. Lengths, block tables and slots belong to the step and are
//! implicit in `kv_write` and `attention`. [`verify`](Graph::verify) holds the specification,
//! [`text`] the text form.
//!
//! Shape legend: T new tokens, R logit rows, C hidden size, H heads, D head size, F feed-forward
//! size, V vocabulary size, N outputs and K inputs of a linear.

mod graph;
mod op;
pub mod text;
mod verify;

pub use graph::{Graph, HiddenState, Node, Rows, Type, ValueId, Weight, WeightId, WeightSource};
pub use kiln_bundle::DType;
pub use op::{Activation, Linear, Norm, Op};
pub use text::ParseError;
pub use verify::VerifyError;
