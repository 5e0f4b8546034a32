//! The reference interpreter: evaluates a graph operation by operation, plainly.
//!
//! It is the oracle of the compiler: it computes the bundle's self-test vector from the *unfused*
//! graph and the checkpoint, so that `kiln verify` holds fusion, packing, memory plan and kernels
//! to something that shares none of their code. Its sums are taken in f64; those over a text, which
//! matrices are calibrated and evaluated on, in f32. Weights are read a block at a time, so that a model
//! larger than memory can be evaluated.

use kiln_ir::{Activation, Graph, Linear, Norm, Op, Rows, Type, ValueId, WeightId};
use kiln_models::WeightError;

use crate::{CompileError, Progress, Stored, product};
use kiln_bundle::trace::Label;
use rayon::prelude::*;
use std::{collections::HashMap, time::Instant};

/// Elements of a weight that are held at a time.
const BLOCK_ELEMENTS: usize = 4 << 20;
/// Elements that are worth a thread's while.
const PARALLEL_ELEMENTS: usize = 4096;

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
    let rows = match rows {
        LogitRows::All => (0..token_ids.len()).collect(),
        LogitRows::Last => token_ids.len().checked_sub(1).into_iter().collect(),
    };
    let mut values = Values::new(graph, rows);
    for state in &graph.hidden_states {
        values.keep(state.value);
    }
    graph
        .logits
        .into_iter()
        .for_each(|value| values.keep(value));
    let sequences = [token_ids.to_vec()];
    let mut interpreter = Interpreter {
        graph,
        weights,
        sequences: &sequences,
        sums: Sums::Wide,
        values: &mut values,
        layers: &mut Layers::new(graph, progress),
    };
    for value in graph.schedule().unwrap_or_default() {
        if progress.cancelled() {
            return Err(CompileError::Cancelled);
        }
        interpreter.step(value)?;
    }
    let mut evaluation = Evaluation::default();
    for state in &graph.hidden_states {
        let value = interpreter.values.of[&state.value].clone();
        evaluation
            .hidden_states
            .push(interpreter.normalised(state.norm, value)?);
    }
    if let Some(logits) = graph.logits {
        evaluation.logits = interpreter.values.of[&logits].clone();
    }
    Ok(evaluation)
}

/// How sums over the inputs of a matrix, and over the positions of attention, are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sums {
    /// In f64, plainly.
    Wide,
    /// In f32, which is several times as fast.
    Narrow,
}

/// What has been evaluated and is still needed.
pub(crate) struct Values {
    /// Row-major, the rows of all sequences one after the other; those of a `kv_write` are all rows
    /// of k, then all rows of v.
    pub(crate) of: HashMap<ValueId, Vec<f32>>,
    /// Reads of each value that are to come.
    uses: HashMap<ValueId, usize>,
    /// Rows whose logits are evaluated.
    logit_rows: Vec<usize>,
}

impl Values {
    /// Before the first node.
    pub(crate) fn new(graph: &Graph, logit_rows: Vec<usize>) -> Values {
        let mut values = Values {
            of: HashMap::new(),
            uses: HashMap::new(),
            logit_rows,
        };
        for value in graph.schedule().unwrap_or_default() {
            graph
                .operands(value)
                .into_iter()
                .for_each(|operand| values.keep(operand));
        }
        values
    }

    /// Keeps a value for one reader more.
    fn keep(&mut self, value: ValueId) {
        *self.uses.entry(value).or_default() += 1;
    }

    /// One reader is done.
    fn release(&mut self, value: ValueId) {
        let left = self.uses.entry(value).or_default();
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.of.remove(&value);
        }
    }
}

/// Evaluates the nodes of a graph in their order, for sequences without a past.
pub(crate) struct Interpreter<'a, 'g> {
    pub(crate) graph: &'a Graph,
    pub(crate) weights: &'a Stored<'a>,
    pub(crate) sequences: &'a [Vec<u32>],
    pub(crate) sums: Sums,
    pub(crate) values: &'a mut Values,
    pub(crate) layers: &'a mut Layers<'g>,
}

/// Tells what of a graph's evaluation ran when: each product with a matrix, by the matrix's name, and
/// around these each layer.
pub(crate) struct Layers<'g> {
    graph: &'g Graph,
    progress: &'g dyn Progress,
    /// Layers that are over, the embedding among them.
    done: usize,
    /// When the one at hand began.
    began: Instant,
}

impl<'g> Layers<'g> {
    /// Before the first node.
    pub(crate) fn new(graph: &'g Graph, progress: &'g dyn Progress) -> Layers<'g> {
        Layers {
            graph,
            progress,
            done: 0,
            began: Instant::now(),
        }
    }

    /// A node that began then has been evaluated.
    pub(crate) fn evaluated(&mut self, value: ValueId, began: Instant) {
        if let Op::Matmul { weight } = self.graph.node(value).op {
            let name = self.graph.weight(weight).name.clone();
            self.progress.worked(Label::new(name), began);
        }
        let states = &self.graph.hidden_states;
        let state = states.get(self.done).map(|state| state.value);
        if state.or(self.graph.logits) == Some(value) {
            self.end();
        }
    }

    /// The layer at hand is over.
    pub(crate) fn end(&mut self) {
        let label = match self.done {
            0 => Label::new("embed"),
            layer if layer < self.graph.hidden_states.len() => {
                Label::new(format!("layer {}", layer - 1))
            }
            _ => Label::new("head"),
        };
        self.progress.worked(label, self.began);
        self.done += 1;
        self.began = Instant::now();
    }
}

impl Interpreter<'_, '_> {
    /// Evaluates a node whose operands have been.
    pub(crate) fn step(&mut self, value: ValueId) -> Result<(), WeightError> {
        let began = Instant::now();
        let result = self.node(value)?;
        self.layers.evaluated(value, began);
        self.values.of.insert(value, result);
        for operand in self.graph.operands(value) {
            self.values.release(operand);
        }
        Ok(())
    }

    fn node(&self, value: ValueId) -> Result<Vec<f32>, WeightError> {
        let operands = self.graph.operands(value);
        let operand = |position: usize| self.values.of[&operands[position]].clone();
        match self.graph.node(value).op {
            Op::TokenIds => Ok(self
                .sequences
                .iter()
                .flatten()
                .map(|&id| id as f32)
                .collect()),
            Op::Positions => Ok(self
                .sequences
                .iter()
                .flat_map(|ids| (0..ids.len()).map(|position| position as f32))
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
            Op::Matmul { weight } => self.matmul(weight, &self.values.of[&operands[0]]),
            Op::Bias { bias } => self.biased(Some(bias), operand(0)),
            Op::Activation(activation) => Ok(activated(Some(activation), operand(0))),
            Op::Add => Ok(sum(
                &self.values.of[&operands[0]],
                &self.values.of[&operands[1]],
            )),
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
                let attention = match self.sums {
                    Sums::Wide => attention,
                    Sums::Narrow => product::attention,
                };
                let mut result = Vec::with_capacity(q.len());
                let mut first = 0;
                for ids in self.sequences {
                    let rows = first * width..(first + ids.len()) * width;
                    let [q, k, v] = [&q, &k, &v].map(|x| &x[rows.clone()]);
                    result.extend(attention(q, k, v, heads, head_dim, scale));
                    first += ids.len();
                }
                Ok(result)
            }
            Op::Linear(linear) => {
                let residual = match operands.get(1) {
                    Some(_) => {
                        let rows = self.rows(linear.rows, operand(1));
                        Some(self.normalised(linear.residual_norm, rows)?)
                    }
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
        let x = self.rows(linear.rows, x);
        let product = self.matmul(linear.weight, &self.normalised(linear.norm, x)?)?;
        Ok(activated(
            linear.activation,
            self.biased(linear.bias, product)?,
        ))
    }

    fn rows(&self, rows: Rows, x: Vec<f32>) -> Vec<f32> {
        match rows {
            Rows::Tokens => x,
            Rows::Logits => self.selected(x),
        }
    }

    fn selected(&self, x: Vec<f32>) -> Vec<f32> {
        let tokens: usize = self.sequences.iter().map(Vec::len).sum();
        let width = x.len() / tokens.max(1);
        let rows = self.values.logit_rows.iter();
        rows.flat_map(|row| &x[row * width..(row + 1) * width])
            .copied()
            .collect()
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
            if self.sums == Sums::Narrow {
                product::product_into(x, &w, k, &mut result, first);
                continue;
            }
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

    fn biased(&self, bias: Option<WeightId>, mut x: Vec<f32>) -> Result<Vec<f32>, WeightError> {
        let Some(bias) = bias else { return Ok(x) };
        let bias = self.vector(bias)?;
        x.iter_mut()
            .zip(bias.iter().cycle())
            .for_each(|(x, b)| *x += b);
        Ok(x)
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
    x.par_iter_mut()
        .with_min_len(PARALLEL_ELEMENTS)
        .for_each(|x| {
            *x = match activation {
                None => *x,
                Some(Activation::Relu) => x.max(0.0),
                Some(Activation::GeluNew) => {
                    let wide = f64::from(*x);
                    let inner =
                        (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
                    (0.5 * wide * (1.0 + inner.tanh())) as f32
                }
            };
        });
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
