//! The reference interpreter: evaluates a graph operation by operation, plainly.
//!
//! It is the oracle of the compiler: it computes the bundle's self-test vector from the *unfused*
//! graph and the checkpoint, so that `kiln verify` holds fusion, packing, memory plan and kernels
//! to something that shares none of their code. Sums are taken in f64. Weights are read a block at
//! a time, so that a model larger than memory can be evaluated.

use kiln_ir::{Activation, Graph, Linear, Norm, Op, Rows, Type, ValueId, WeightId};
use kiln_models::WeightError;

use crate::{CompileError, Progress, Stored};
use rayon::prelude::*;
use std::collections::HashMap;

/// Elements of a weight that are held at a time.
const BLOCK_ELEMENTS: usize = 4 << 20;

/// Results of one evaluation.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// The L+1 hidden states, (T, C) each.
    pub hidden_states: Vec<Vec<f32>>,
    /// (T, V), or (1, V) where only the last row was asked for.
    pub logits: Vec<f32>,
}

/// Which rows' logits are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those of every token.
    All,
    /// Those of the last token.
    Last,
}

/// Evaluates a verified graph for one sequence without a past.
///
/// Matrices are rounded first, as the bundle stores them.
///
/// # Errors
/// A weight that cannot be read, or a cancellation.
///
/// # Panics
/// On a graph that does not verify, or token ids and positions outside its tables.
pub fn interpret(
    graph: &Graph,
    weights: &Stored<'_>,
    token_ids: &[u32],
    rows: LogitRows,
    progress: &dyn Progress,
) -> Result<Evaluation, CompileError> {
    let mut interpreter = Interpreter {
        graph,
        weights,
        token_ids,
        rows,
        values: HashMap::new(),
    };
    for value in graph.schedule().unwrap_or_default() {
        if progress.cancelled() {
            return Err(CompileError::Cancelled);
        }
        let result = interpreter.node(value)?;
        interpreter.values.insert(value, result);
    }
    let mut evaluation = Evaluation::default();
    for state in &graph.hidden_states {
        let value = interpreter.values[&state.value].clone();
        evaluation
            .hidden_states
            .push(interpreter.normalised(state.norm, value)?);
    }
    if let Some(logits) = graph.logits {
        evaluation.logits = interpreter.values[&logits].clone();
    }
    Ok(evaluation)
}

pub(crate) struct Interpreter<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) weights: &'a Stored<'a>,
    pub(crate) token_ids: &'a [u32],
    pub(crate) rows: LogitRows,
    /// Row-major values; those of a `kv_write` are all rows of k, then all rows of v.
    pub(crate) values: HashMap<ValueId, Vec<f32>>,
}

impl Interpreter<'_> {
    /// Evaluates a node whose operands have been.
    pub(crate) fn node(&self, value: ValueId) -> Result<Vec<f32>, WeightError> {
        let operands = self.graph.operands(value);
        let operand = |position: usize| self.values[&operands[position]].clone();
        match self.graph.node(value).op {
            Op::TokenIds => Ok(self.token_ids.iter().map(|&id| id as f32).collect()),
            Op::Positions => Ok((0..self.token_ids.len())
                .map(|position| position as f32)
                .collect()),
            Op::EmbedTokens { table } => self.gather(table, &operand(0), 0),
            Op::EmbedPositions { table, offset } => self.gather(table, &operand(0), offset),
            Op::Embed { tokens, positions } => {
                let tables = tokens.map(|table| (table, 0)).into_iter().chain(positions);
                let rows: Vec<Vec<f32>> = tables
                    .enumerate()
                    .map(|(position, (table, offset))| {
                        self.gather(table, &operand(position), offset)
                    })
                    .collect::<Result<_, _>>()?;
                Ok(rows
                    .into_iter()
                    .reduce(|a, b| sum(&a, &b))
                    .unwrap_or_default())
            }
            Op::Matmul { weight } => self.matmul(weight, &operand(0)),
            Op::Bias { bias } => self.biased(Some(bias), operand(0)),
            Op::Activation(activation) => Ok(activated(Some(activation), operand(0))),
            Op::Add => Ok(sum(&operand(0), &operand(1))),
            Op::LayerNorm(norm) => self.normalised(Some(norm), operand(0)),
            Op::KvWrite { .. } => Ok([operand(0), operand(1)].concat()),
            Op::SelectLogitRows => Ok(self.selected(operand(0))),
            Op::Attention {
                heads,
                head_dim,
                scale,
                ..
            } => {
                let (heads, head_dim) = (heads as usize, head_dim as usize);
                let width = heads * head_dim;
                let [q, k, v] = match operands[..] {
                    [_, _] => {
                        let (q, mut k) = (operand(0), operand(1));
                        let v = k.split_off(k.len() / 2);
                        [q, k, v]
                    }
                    _ => {
                        let qkv = operand(0);
                        [0, 1, 2].map(|part| {
                            qkv.chunks(3 * width)
                                .flat_map(|row| row[part * width..(part + 1) * width].to_vec())
                                .collect()
                        })
                    }
                };
                Ok(attention(&q, &k, &v, heads, head_dim, scale))
            }
            Op::Linear(linear) => {
                let residual = match operands.get(1) {
                    Some(_) => Some(self.normalised(linear.residual_norm, operand(1))?),
                    None => None,
                };
                let result = self.linear(&linear, operand(0))?;
                Ok(match residual {
                    Some(residual) => sum(&result, &residual),
                    None => result,
                })
            }
            Op::Qkv { linear, .. } => self.linear(&linear, operand(0)),
        }
    }

    fn linear(&self, linear: &Linear, x: Vec<f32>) -> Result<Vec<f32>, WeightError> {
        let x = match linear.rows {
            Rows::Tokens => x,
            Rows::Logits => self.selected(x),
        };
        let product = self.matmul(linear.weight, &self.normalised(linear.norm, x)?)?;
        Ok(activated(
            linear.activation,
            self.biased(linear.bias, product)?,
        ))
    }

    fn selected(&self, x: Vec<f32>) -> Vec<f32> {
        match self.rows {
            LogitRows::All => x,
            LogitRows::Last => x[x.len() - x.len() / self.token_ids.len()..].to_vec(),
        }
    }

    fn vector(&self, id: WeightId) -> Result<Vec<f32>, WeightError> {
        self.weights
            .exact_rows(id, 0..self.graph.weight(id).shape[0])
    }

    fn gather(&self, table: WeightId, ids: &[f32], offset: u32) -> Result<Vec<f32>, WeightError> {
        let mut rows = vec![];
        for id in ids {
            let row = *id as usize + offset as usize;
            rows.extend(self.weights.rows(table, row..row + 1)?);
        }
        Ok(rows)
    }

    /// x (T, K) by W (N, K), transposed: (T, N).
    fn matmul(&self, weight: WeightId, x: &[f32]) -> Result<Vec<f32>, WeightError> {
        let (n, k) = (
            self.graph.weight(weight).shape[0],
            self.graph.weight(weight).shape[1],
        );
        let tokens = x.len() / k;
        let block = (BLOCK_ELEMENTS / k).max(1);
        let mut result = vec![0.0; tokens * n];
        for first in (0..n).step_by(block) {
            let rows = first..(first + block).min(n);
            let w = self.weights.rows(weight, rows.clone())?;
            let products: Vec<f32> = w
                .par_chunks(k)
                .flat_map_iter(|row| x.chunks(k).map(move |x| dot(x, row) as f32))
                .collect();
            for (index, product) in products.into_iter().enumerate() {
                result[index % tokens * n + rows.start + index / tokens] = product;
            }
        }
        Ok(result)
    }

    fn biased(&self, bias: Option<WeightId>, x: Vec<f32>) -> Result<Vec<f32>, WeightError> {
        let Some(bias) = bias else { return Ok(x) };
        let bias = self.vector(bias)?;
        Ok(x.iter()
            .zip(bias.iter().cycle())
            .map(|(x, b)| x + b)
            .collect())
    }

    fn normalised(&self, norm: Option<Norm>, x: Vec<f32>) -> Result<Vec<f32>, WeightError> {
        let Some(norm) = norm else { return Ok(x) };
        let width = match self
            .graph
            .hidden_states
            .first()
            .map(|state| self.graph.node(state.value).ty)
        {
            Some(Type::Rows { width, .. }) => width,
            _ => x.len(),
        };
        let weight = norm
            .weight
            .map(|id| self.vector(id))
            .transpose()?
            .unwrap_or(vec![1.0; width]);
        let bias = norm
            .bias
            .map(|id| self.vector(id))
            .transpose()?
            .unwrap_or(vec![0.0; width]);
        let rows = x.chunks(width).flat_map(|row| {
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = row
                .iter()
                .map(|&x| (f64::from(x) - mean).powi(2))
                .sum::<f64>()
                / width as f64;
            let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
            let affine = weight.iter().zip(&bias);
            row.iter()
                .zip(affine)
                .map(move |(&x, (w, b))| ((f64::from(x) - mean) * scale) as f32 * w + b)
                .collect::<Vec<_>>()
        });
        Ok(rows.collect())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn activated(activation: Option<Activation>, mut x: Vec<f32>) -> Vec<f32> {
    for x in &mut x {
        *x = match activation {
            None => *x,
            Some(Activation::Relu) => x.max(0.0),
            Some(Activation::GeluNew) => {
                let wide = f64::from(*x);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
                (0.5 * wide * (1.0 + inner.tanh())) as f32
            }
        };
    }
    x
}

/// Causal attention of one sequence; q, k, v are (T, H*D).
fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: usize,
    head_dim: usize,
    scale: f32,
) -> Vec<f32> {
    let width = heads * head_dim;
    let mut result = vec![0.0; q.len()];
    for (position, out) in result.chunks_mut(width).enumerate() {
        for head in 0..heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            let row = |matrix: &'_ [f32], at: usize| matrix[at * width..][columns.clone()].to_vec();
            let query = row(q, position);
            let scores: Vec<f64> = (0..=position)
                .map(|at| dot(&query, &row(k, at)) * f64::from(scale))
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (at, weight) in weights.iter().enumerate() {
                for (out, v) in out[columns.clone()].iter_mut().zip(row(v, at)) {
                    *out += (weight / total * f64::from(v)) as f32;
                }
            }
        }
    }
    result
}
