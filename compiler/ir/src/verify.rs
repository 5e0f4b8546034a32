//! The IR's specification, as the verifier checks it.
//!
//! **Graph.** Acyclic. Every node is needed by an output. The logits are (R, V). Hidden states are
//! (T, C), all of one width.
//!
//! **Weights.** Names are unique. A load has one or two dimensions, none zero; only matrices are
//! transposed; `rows` is as long as the first dimension. A concatenation has at least two parts,
//! declared before it, that agree in all but the first dimension, of which its own is the sum.
//!
//! **Types.** With x an operand's type, `[T, K]` or `[R, K]`:
//!
//! | op | operands | attributes | result |
//! |---|---|---|---|
//! | `token_ids`, `positions` | | | `ids` |
//! | `embed_tokens` | ids | table (V, C) | `[T, C]` |
//! | `embed_positions` | ids | table (P, C), offset < P | `[T, C]` |
//! | `embed` | ids for each table | tokens (V, C) or positions (P, C) or both | `[T, C]` |
//! | `matmul` | x | weight (N, K) | `[.., N]` |
//! | `bias` | x | bias (K) | as x |
//! | `relu`, `gelu_new` | x | | as x |
//! | `add` | x, x | | as x |
//! | `layer_norm` | x | norm (K) | as x |
//! | `kv_write` | `[T, C]`, `[T, C]` | layer | `kv` |
//! | `attention` | `[T, C]` and a `kv_write` of the layer, or a `qkv` of the layer | H * D = C | `[T, C]` |
//! | `select_logit_rows` | `[T, K]` | | `[R, K]` |
//! | `linear` | x, optionally a residual of as many rows and the result's width | weight (N, K), bias (N), norm (K), residual_norm (N) with a residual only | `[.., N]` |
//! | `qkv` | `[T, K]` | a linear with N a multiple of 3, no activation, residual or row selection; layer | `[T, N]` |
//!
//! A linear whose `rows` is `logits` takes `[T, K]`, and a residual `[T, N]`, and gives `[R, N]`.
//!
//! **Cache.** Each layer is written once.

use crate::{Graph, Linear, Norm, Op, Rows, Type, ValueId, WeightId, WeightSource};
use std::collections::HashSet;

/// A graph that breaks a rule of the specification: the mistake of the pass or builder that made
/// it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct VerifyError {
    /// The node, weight or output.
    pub place: String,
    /// The rule and what was found.
    pub problem: String,
}

type Check<T = ()> = Result<T, String>;

impl Graph {
    /// Checks the graph against the specification in the module's documentation.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn verify(&self) -> Result<(), VerifyError> {
        let at = |place: String| move |problem: String| VerifyError { place, problem };
        let mut names = HashSet::new();
        for (id, weight) in self.weights() {
            let place = format!("@{}", weight.name);
            if !names.insert(&weight.name) {
                return Err(at(place)("the name is declared twice".to_owned()));
            }
            self.verify_weight(id).map_err(at(place))?;
        }
        let Some(order) = self.schedule() else {
            return Err(at("graph".to_owned())("it has a cycle".to_owned()));
        };
        let needed: HashSet<ValueId> = order.iter().copied().collect();
        if let Some(dead) = self
            .values()
            .into_iter()
            .find(|value| !needed.contains(value))
        {
            return Err(at(dead.to_string())("no output needs it".to_owned()));
        }
        let mut written = HashSet::new();
        for value in order {
            let found = self.node(value).ty;
            let needed = self.infer(value).map_err(at(value.to_string()))?;
            if found != needed {
                return Err(at(value.to_string())(format!(
                    "its type is {found}, its operation gives {needed}"
                )));
            }
            if let Op::KvWrite { layer } | Op::Qkv { layer, .. } = self.node(value).op
                && !written.insert(layer)
            {
                return Err(at(value.to_string())(format!(
                    "layer {layer} of the cache is written twice"
                )));
            }
        }
        self.verify_outputs().map_err(at("outputs".to_owned()))
    }

    fn verify_weight(&self, id: WeightId) -> Check {
        let weight = self.weight(id);
        if !(1..=2).contains(&weight.shape.len()) || weight.shape.contains(&0) {
            return Err(format!(
                "its shape is {:?}; one or two dimensions above zero are needed",
                weight.shape
            ));
        }
        match &weight.source {
            WeightSource::Load {
                transposed, rows, ..
            } => {
                if *transposed && weight.shape.len() != 2 {
                    return Err("only matrices can be transposed".to_owned());
                }
                match rows {
                    Some(rows) if rows.len() != weight.shape[0] => Err(format!(
                        "it takes rows {}..{}, but its first dimension is {}",
                        rows.start, rows.end, weight.shape[0]
                    )),
                    _ => Ok(()),
                }
            }
            WeightSource::Concat(parts) => {
                if parts.len() < 2 || parts.iter().any(|part| *part >= id) {
                    return Err(
                        "a concatenation needs two or more weights declared before it".to_owned(),
                    );
                }
                let mut length = 0;
                for part in parts.iter().map(|&part| self.weight(part)) {
                    if part.shape.len() != weight.shape.len()
                        || part.shape[1..] != weight.shape[1..]
                    {
                        return Err(format!(
                            "its part @{} has shape {:?}, its own is {:?}",
                            part.name, part.shape, weight.shape
                        ));
                    }
                    length += part.shape[0];
                }
                if length != weight.shape[0] {
                    return Err(format!(
                        "its parts have {length} rows, its shape is {:?}",
                        weight.shape
                    ));
                }
                Ok(())
            }
        }
    }

    fn verify_outputs(&self) -> Check {
        let Some(logits) = self.logits else {
            return Err("there are no logits".to_owned());
        };
        if !matches!(
            self.node(logits).ty,
            Type::Rows {
                rows: Rows::Logits,
                ..
            }
        ) {
            return Err(format!(
                "the logits {logits} are {}, not [R, V]",
                self.node(logits).ty
            ));
        }
        let mut widths = HashSet::new();
        for state in &self.hidden_states {
            let Type::Rows {
                rows: Rows::Tokens,
                width,
            } = self.node(state.value).ty
            else {
                return Err(format!(
                    "the hidden state {} is {}, not [T, C]",
                    state.value,
                    self.node(state.value).ty
                ));
            };
            self.check_norm(state.norm, width)?;
            widths.insert(width);
        }
        if widths.len() > 1 {
            return Err("the hidden states differ in width".to_owned());
        }
        Ok(())
    }

    /// Type of a node's result by its operation and operands.
    fn infer(&self, value: ValueId) -> Check<Type> {
        let operands = self.operands(value);
        let types: Vec<Type> = operands
            .iter()
            .map(|&operand| self.node(operand).ty)
            .collect();
        let tokens = |width| Type::Rows {
            rows: Rows::Tokens,
            width,
        };
        let op = self.node(value).op;
        match (op, &types[..]) {
            (Op::TokenIds | Op::Positions, []) => Ok(Type::Ids),
            (Op::EmbedTokens { table }, [Type::Ids]) => Ok(tokens(self.table_width(table, 0)?)),
            (Op::EmbedPositions { table, offset }, [Type::Ids]) => {
                Ok(tokens(self.table_width(table, offset)?))
            }
            (
                Op::Embed {
                    tokens: ids,
                    positions,
                },
                types,
            ) => {
                let widths: Vec<usize> = ids
                    .map(|table| (table, 0))
                    .into_iter()
                    .chain(positions)
                    .map(|(table, offset)| self.table_width(table, offset))
                    .collect::<Check<_>>()?;
                if types != vec![Type::Ids; widths.len()] {
                    return Err(format!(
                        "it has {} tables and operands {}",
                        widths.len(),
                        list(types)
                    ));
                }
                match widths[..] {
                    [width] => Ok(tokens(width)),
                    [a, b] if a == b => Ok(tokens(a)),
                    _ => Err(format!("its tables have widths {widths:?}")),
                }
            }
            (Op::Matmul { weight }, &[Type::Rows { rows, width }]) => Ok(Type::Rows {
                rows,
                width: self.outputs(weight, width)?,
            }),
            (Op::Bias { bias }, &[ty @ Type::Rows { width, .. }]) => {
                self.check_vector(Some(bias), width)?;
                Ok(ty)
            }
            (Op::Activation(_), &[ty @ Type::Rows { .. }]) => Ok(ty),
            (Op::Add, &[a @ Type::Rows { .. }, b]) if a == b => Ok(a),
            (Op::LayerNorm(norm), &[ty @ Type::Rows { width, .. }]) => {
                self.check_norm(Some(norm), width)?;
                Ok(ty)
            }
            (
                Op::KvWrite { .. },
                &[
                    k @ Type::Rows {
                        rows: Rows::Tokens, ..
                    },
                    v,
                ],
            ) if k == v => Ok(Type::Kv),
            (
                Op::Attention {
                    layer,
                    heads,
                    head_dim,
                    scale,
                },
                types,
            ) => {
                if !scale.is_finite() {
                    return Err(format!("scale is {scale}"));
                }
                let producer = operands.last().map(|&operand| self.node(operand).op);
                let width = match (types, producer) {
                    (
                        &[
                            Type::Rows {
                                rows: Rows::Tokens,
                                width,
                            },
                        ],
                        Some(Op::Qkv { layer: of, .. }),
                    ) if of == layer => width / 3,
                    (
                        &[
                            Type::Rows {
                                rows: Rows::Tokens,
                                width,
                            },
                            Type::Kv,
                        ],
                        Some(Op::KvWrite { layer: of }),
                    ) if of == layer => width,
                    _ => {
                        return Err(format!(
                            "its operands {} are neither q and the kv_write of layer {layer} nor its qkv",
                            list(types)
                        ));
                    }
                };
                if heads
                    .checked_mul(head_dim)
                    .is_none_or(|product| product as usize != width)
                {
                    return Err(format!(
                        "{heads} heads of {head_dim} do not make the width {width}"
                    ));
                }
                Ok(tokens(width))
            }
            (
                Op::SelectLogitRows,
                &[
                    Type::Rows {
                        rows: Rows::Tokens,
                        width,
                    },
                ],
            ) => Ok(Type::Rows {
                rows: Rows::Logits,
                width,
            }),
            (Op::Linear(linear), &[x, ref residual @ ..]) if residual.len() <= 1 => {
                let ty = self.infer_linear(&linear, x)?;
                match residual {
                    [] if linear.residual_norm.is_some() => {
                        Err("it has a residual_norm and no residual".to_owned())
                    }
                    [residual] if *residual != with_rows_of(x, ty) => Err(format!(
                        "its input is {x}, its residual {residual}, its result {ty}"
                    )),
                    _ => Ok(ty),
                }
            }
            (
                Op::Qkv { linear, .. },
                &[
                    x @ Type::Rows {
                        rows: Rows::Tokens, ..
                    },
                ],
            ) => {
                let plain = linear.activation.is_none()
                    && linear.residual_norm.is_none()
                    && linear.rows == Rows::Tokens;
                match self.infer_linear(&linear, x)? {
                    ty @ Type::Rows { width, .. } if plain && width % 3 == 0 => Ok(ty),
                    _ => Err("q, k and v are of one width and have no activation, residual or row selection".to_owned()),
                }
            }
            (_, types) => Err(format!("it cannot take the operands {}", list(types))),
        }
    }

    fn infer_linear(&self, linear: &Linear, x: Type) -> Check<Type> {
        let Type::Rows { rows, width } = x else {
            return Err(format!("its input is {x}"));
        };
        if linear.rows == Rows::Logits && rows == Rows::Logits {
            return Err("it selects logit rows twice".to_owned());
        }
        self.check_norm(linear.norm, width)?;
        let outputs = self.outputs(linear.weight, width)?;
        self.check_vector(linear.bias, outputs)?;
        self.check_norm(linear.residual_norm, outputs)?;
        let rows = if linear.rows == Rows::Logits {
            Rows::Logits
        } else {
            rows
        };
        Ok(Type::Rows {
            rows,
            width: outputs,
        })
    }

    fn table_width(&self, table: WeightId, offset: u32) -> Check<usize> {
        match self.weight(table).shape[..] {
            [rows, width] if (offset as usize) < rows => Ok(width),
            _ => Err(format!(
                "@{} of shape {:?} is no table with a row {offset}",
                self.weight(table).name,
                self.weight(table).shape
            )),
        }
    }

    fn outputs(&self, weight: WeightId, inputs: usize) -> Check<usize> {
        match self.weight(weight).shape[..] {
            [outputs, found] if found == inputs => Ok(outputs),
            _ => Err(format!(
                "@{} of shape {:?} does not take {inputs} inputs",
                self.weight(weight).name,
                self.weight(weight).shape
            )),
        }
    }

    fn check_vector(&self, vector: Option<WeightId>, width: usize) -> Check {
        match vector.map(|id| self.weight(id)) {
            Some(weight) if weight.shape != [width] => Err(format!(
                "@{} has shape {:?}, needed is [{width}]",
                weight.name, weight.shape
            )),
            _ => Ok(()),
        }
    }

    fn check_norm(&self, norm: Option<Norm>, width: usize) -> Check {
        let Some(norm) = norm else { return Ok(()) };
        if !(norm.eps.is_finite() && norm.eps >= 0.0) {
            return Err(format!("eps is {}", norm.eps));
        }
        self.check_vector(norm.weight, width)?;
        self.check_vector(norm.bias, width)
    }
}

/// The type with the rows of another.
fn with_rows_of(other: Type, ty: Type) -> Type {
    match (other, ty) {
        (Type::Rows { rows, .. }, Type::Rows { width, .. }) => Type::Rows { rows, width },
        _ => ty,
    }
}

fn list(types: &[Type]) -> String {
    let types: Vec<String> = types.iter().map(Type::to_string).collect();
    format!("({})", types.join(", "))
}
