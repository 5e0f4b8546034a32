//! The perplexity of a text, as `kiln eval` defines it: over windows that begin half a window apart,
//! in each of which the tokens are scored that no earlier one had.
//!
//! The graph is evaluated node by node, each for all windows at once, so that every weight is read,
//! and rounded, once. Memory is bounded: each token is in two windows, three at a border, a row of
//! activations is at most `8 * C + 2 * F` numbers of f32 with what a node reads and writes, and beside
//! these a block of one matrix is held, and the logits of a block of the vocabulary.

use crate::{
    CompileError, Progress, Stored,
    interpret::{Interpreter, Layers, Sums, Values},
    product::product_into,
};
use kiln_ir::{Graph, Op, ValueId, WeightId};
use rayon::prelude::*;
use std::{ops::Range, time::Instant};

/// Logits that are held at a time.
const BLOCK_LOGITS: usize = 8 << 20;

/// A text in windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalText {
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from the start of a window to that of the next.
    pub stride: usize,
    /// Tokens that are scored: all but the first.
    pub scored: usize,
    /// The tokens of each window.
    sequences: Vec<Vec<u32>>,
    /// The row that each scored token is predicted by, counted over all windows, and the token.
    targets: Vec<(usize, u32)>,
}

/// What a text says of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluated {
    /// Tokens of the file.
    pub text_tokens: usize,
    /// Tokens that were read.
    pub tokens: usize,
    /// Tokens that were scored.
    pub scored: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from the start of a window to that of the next.
    pub stride: usize,
    /// Of the checkpoint's own weights.
    pub perplexity_before: f64,
    /// Of the weights that the bundle stores.
    pub perplexity_after: f64,
}

impl EvalText {
    /// Cuts two or more tokens into windows of at most `window`, two or more.
    pub fn new(ids: &[u32], window: usize) -> EvalText {
        let stride = window / 2;
        let mut text = EvalText {
            window,
            stride,
            scored: ids.len() - 1,
            sequences: vec![],
            targets: vec![],
        };
        let mut rows = 0;
        for (tokens, first_scored) in windows(ids.len(), window, stride) {
            let targets = first_scored..tokens.end;
            let row = |token: usize| rows + token - 1 - tokens.start;
            text.targets
                .extend(targets.map(|token| (row(token), ids[token])));
            rows += tokens.len();
            text.sequences.push(ids[tokens].to_vec());
        }
        text
    }

    /// exp of the mean of -ln p of the scored tokens. `advance` hears of multiplications as they are
    /// done, those of [`EvalText::work`] in all.
    ///
    /// # Errors
    /// A weight that cannot be read, or a cancellation.
    pub fn perplexity(
        &self,
        graph: &Graph,
        weights: &Stored<'_>,
        progress: &dyn Progress,
        advance: &mut dyn FnMut(u64),
    ) -> Result<f64, CompileError> {
        let logit_rows = self.targets.iter().map(|(row, _)| *row).collect();
        let mut values = Values::new(graph, logit_rows);
        let mut layers = Layers::new(graph, progress);
        for value in graph.schedule().unwrap_or_default() {
            if progress.cancelled() {
                return Err(CompileError::Cancelled);
            }
            if let Some((hidden, head)) = head(graph).filter(|_| graph.logits == Some(value)) {
                let hidden = &values.of[&hidden];
                let began = Instant::now();
                let nats = self.nats(graph, weights, hidden, head, progress, advance)?;
                layers.evaluated(value, began);
                return Ok((nats / self.scored as f64).exp());
            }
            let mut interpreter = Interpreter {
                graph,
                weights,
                sequences: &self.sequences,
                sums: Sums::Narrow,
                values: &mut values,
                layers: &mut layers,
            };
            interpreter.step(value)?;
            advance(self.node_work(graph, value));
        }
        Ok(f64::NAN)
    }

    /// Multiplications of [`EvalText::perplexity`], but for attention's.
    pub fn work(&self, graph: &Graph) -> u64 {
        let order = graph.schedule().unwrap_or_default();
        order
            .into_iter()
            .map(|value| self.node_work(graph, value))
            .sum()
    }

    fn node_work(&self, graph: &Graph, value: ValueId) -> u64 {
        let Op::Matmul { weight } = graph.node(value).op else {
            return 0;
        };
        let rows = match graph.logits == Some(value) {
            true => self.targets.len(),
            false => self.sequences.iter().map(Vec::len).sum(),
        };
        graph.weight(weight).shape.iter().product::<usize>() as u64 * rows as u64
    }

    /// The sum of -ln p of the targets; `hidden` (R, E) are the rows that predict them.
    fn nats(
        &self,
        graph: &Graph,
        weights: &Stored<'_>,
        hidden: &[f32],
        head: WeightId,
        progress: &dyn Progress,
        advance: &mut dyn FnMut(u64),
    ) -> Result<f64, CompileError> {
        let [vocabulary, width] = graph.weight(head).shape[..] else {
            return Ok(f64::NAN);
        };
        let mut sums = vec![SoftmaxSum::default(); self.targets.len()];
        let block = (BLOCK_LOGITS / self.targets.len().max(width)).max(1);
        for first in (0..vocabulary).step_by(block) {
            if progress.cancelled() {
                return Err(CompileError::Cancelled);
            }
            let ids = first..(first + block).min(vocabulary);
            let rows = weights.rows(head, ids.clone())?;
            let mut logits = vec![0.0; self.targets.len() * ids.len()];
            product_into(hidden, &rows, width, &mut logits, 0);
            sums.par_iter_mut()
                .zip(logits.par_chunks(ids.len()))
                .zip(&self.targets)
                .for_each(|((sum, logits), &(_, target))| sum.add(&ids, logits, target));
            advance((self.targets.len() * width * ids.len()) as u64);
        }
        Ok(sums.iter().map(SoftmaxSum::nats).sum())
    }
}

/// The value that logits are made of, and the matrix that makes them.
fn head(graph: &Graph) -> Option<(ValueId, WeightId)> {
    let logits = graph.logits?;
    match graph.node(logits).op {
        Op::Matmul { weight } => Some((*graph.operands(logits).first()?, weight)),
        _ => None,
    }
}

/// What softmax needs of a row's logits, a block at a time.
#[derive(Clone, Copy, Debug)]
struct SoftmaxSum {
    largest: f32,
    /// Of exp(logit - largest).
    sum: f64,
    target: f32,
}

impl Default for SoftmaxSum {
    fn default() -> SoftmaxSum {
        SoftmaxSum {
            largest: f32::NEG_INFINITY,
            sum: 0.0,
            target: f32::NAN,
        }
    }
}

impl SoftmaxSum {
    fn add(&mut self, ids: &Range<usize>, logits: &[f32], target: u32) {
        let before = self.largest;
        self.largest = logits.iter().copied().fold(before, f32::max);
        let largest = self.largest;
        self.sum *= f64::from(before - largest).exp();
        let terms = logits
            .iter()
            .map(|logit| f64::from((logit - largest).exp()));
        self.sum += terms.sum::<f64>();
        if ids.contains(&(target as usize)) {
            self.target = logits[target as usize - ids.start];
        }
    }

    /// -ln p of the target.
    fn nats(&self) -> f64 {
        self.sum.ln() + f64::from(self.largest) - f64::from(self.target)
    }
}

/// The windows of a text of `len` tokens, each with the first of its tokens that is scored.
fn windows(len: usize, window: usize, stride: usize) -> Vec<(Range<usize>, usize)> {
    let mut windows: Vec<(Range<usize>, usize)> = vec![];
    for start in (0..len).step_by(stride) {
        let done = windows.last().map_or(1, |(last, _)| last.end);
        if done >= len {
            break;
        }
        windows.push((start..len.min(start + window), done));
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_by_the_one_before_it() {
        for len in 2..40 {
            for window in 2..12 {
                let ids: Vec<u32> = (0..len).collect();
                let text = EvalText::new(&ids, window);
                let rows = text.sequences.concat();
                let found: Vec<u32> = text.targets.iter().map(|(_, id)| *id).collect();
                assert_eq!(found, ids[1..]);
                assert_eq!(text.scored, found.len());
                assert!(text.targets.iter().all(|&(row, id)| rows[row] + 1 == id));
                assert!(text.sequences.iter().all(|ids| ids.len() <= window));
            }
        }
    }

    #[test]
    fn softmax_is_summed_in_blocks() {
        let logits: Vec<f32> = (0..50)
            .map(|at| ((at * 37) % 50) as f32 * 0.7 - 9.0)
            .collect();
        let whole = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
        for block in [1, 7, 50] {
            let mut sum = SoftmaxSum::default();
            for (index, part) in logits.chunks(block).enumerate() {
                sum.add(&(index * block..index * block + part.len()), part, 20);
            }
            let needed = whole.ln() - f64::from(logits[20]);
            assert!((sum.nats() - needed).abs() < 1e-6);
        }
    }
}
