//! GPTQ: rounds matrices to integers so that what a layer computes on a text changes least.
//!
//! Rounding to the nearest keeps each weight's own error small. GPTQ (Frantar et al. 2022,
//! <https://arxiv.org/abs/2210.17323>) rounds a row input by input and moves each error on to the inputs
//! that are still exact, by how the inputs go together in the text: with H = X^T X of the layer's
//! inputs X (T, K) and U upper triangular with U^T U = H^-1,
//!
//! ```text
//! e = (w[i] - rounded(w[i])) / U[i][i]          w[j] -= e * U[i][j]   for j > i
//! ```
//!
//! Layers are calibrated in their order, and each reads what the rounded ones before it compute. A
//! group's grid is fitted when its first input is reached, to the weights as they are by then.

use crate::{
    CompileError, IntRows, Progress, Stored,
    interpret::{Interpreter, Layers, Sums, Values},
    product::dot,
    quantise::Grid,
};
use kiln_bundle::{IntFormat, trace::Label};
use kiln_ir::{Graph, Op, ValueId, WeightId};
use rayon::prelude::*;
use std::{sync::Arc, time::Instant};

/// Added to the diagonal of H, as a share of its mean: inputs that hardly vary in the text would
/// otherwise take up any error.
const DAMPING: f64 = 0.01;
/// Rows that are rounded together, so that U is read from memory once for all of them.
const BLOCK_ROWS: usize = 16;
/// Columns that are solved together.
const BLOCK_COLUMNS: usize = 64;
/// Tokens whose inputs are summed in f32, before they are added to those of others in f64.
const BLOCK_TOKENS: usize = 512;

/// Rounds every matrix that is to be of integers, but for the LM head and those whose codes are the
/// checkpoint's, on a text of `windows` tokens. The results are left in `stored`; their number is
/// returned.
///
/// # Errors
/// A weight that cannot be read, or a cancellation.
pub fn calibrate(
    graph: &Graph,
    stored: &mut Stored<'_>,
    windows: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<usize, CompileError> {
    let order = graph.schedule().unwrap_or_default();
    let matrices: Vec<(ValueId, WeightId, IntFormat)> = order
        .iter()
        .filter(|&&value| graph.logits != Some(value))
        .filter_map(|&value| match graph.node(value).op {
            Op::Matmul { weight } => Some((value, weight, stored.format(weight).int()?)),
            _ => None,
        })
        .filter(|&(_, weight, format)| !stored.keeps(weight, format))
        .collect();
    let tokens = windows.iter().map(Vec::len).sum();
    let mut values = Values::new(graph, (0..tokens).collect());
    // q, k and v have the same inputs.
    let mut factor: Option<(ValueId, Arc<Factor>)> = None;
    let mut done = 0;
    let mut layers = Layers::new(graph, progress);
    for value in order {
        if done == matrices.len() {
            layers.end();
            break;
        }
        if progress.cancelled() {
            return Err(CompileError::Cancelled);
        }
        if let Some(&(_, weight, format)) = matrices.iter().find(|(at, ..)| *at == value) {
            let operand = graph.operands(value)[0];
            let k = graph.weight(weight).shape[1];
            let name = &graph.weight(weight).name;
            let label = |work| Label::new(work).with("weight", name.as_str());
            let shared = match factor {
                Some((of, shared)) if of == operand => shared,
                _ => {
                    let began = Instant::now();
                    let inputs = values.of[&operand].chunks(BLOCK_TOKENS * k);
                    let factor = Arc::new(Factor::new(inputs, k));
                    progress.worked(label("factor"), began);
                    factor
                }
            };
            let began = Instant::now();
            let rows = stored.exact_rows(weight, 0..graph.weight(weight).shape[0])?;
            let rounded = shared.round(rows, format);
            progress.worked(label("round"), began);
            stored.replace(name.clone(), rounded);
            factor = Some((operand, shared));
            done += 1;
            progress.advance(done as u64, matrices.len() as u64);
        }
        let mut interpreter = Interpreter {
            graph,
            weights: &*stored,
            sequences: windows,
            sums: Sums::Narrow,
            values: &mut values,
            layers: &mut layers,
        };
        interpreter.step(value)?;
    }
    Ok(done)
}

/// U of the module's documentation.
pub struct Factor {
    k: usize,
    /// (K, K), row-major; zero below the diagonal.
    upper: Vec<f32>,
}

impl Factor {
    /// Of inputs (T, K) in several parts.
    pub fn new<'a>(inputs: impl Iterator<Item = &'a [f32]>, k: usize) -> Factor {
        let mut h = vec![0.0; k * k];
        for x in inputs {
            accumulate(&mut h, x, k);
        }
        let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
        for i in 0..k {
            // Of an input that never occurs nothing is known, not even by damping where none does.
            let diagonal = h[i * k + i] + DAMPING * mean;
            h[i * k + i] = if diagonal > 0.0 { diagonal } else { 1.0 };
        }
        // With both axes reversed, H = L L^T gives H = R R^T with R upper triangular, and U = R^-1. The
        // upper triangle becomes the lower one.
        h.reverse();
        cholesky(&mut h, k);
        let mut upper = inverse(&h, k);
        upper.reverse();
        Factor { k, upper }
    }

    /// Rounds rows, (rows, K).
    pub fn round(&self, mut rows: Vec<f32>, format: IntFormat) -> IntRows {
        let k = self.k;
        let blocks: Vec<IntRows> = rows
            .par_chunks_mut(BLOCK_ROWS * k)
            .map(|rows| self.round_block(rows, format))
            .collect();
        let mut rounded = IntRows::empty(format, k);
        blocks.into_iter().for_each(|block| rounded.append(block));
        rounded
    }

    fn round_block(&self, rows: &mut [f32], format: IntFormat) -> IntRows {
        let (k, group) = (self.k, format.group(self.k));
        let count = rows.len() / k;
        let mut grids = vec![Vec::with_capacity(format.groups(k)); count];
        let mut codes = vec![Vec::with_capacity(k); count];
        for (i, upper) in self.upper.chunks_exact(k).enumerate() {
            for ((row, grids), codes) in rows.chunks_exact_mut(k).zip(&mut grids).zip(&mut codes) {
                if i % group == 0 {
                    grids.push(Grid::fit(&row[i..k.min(i + group)], format));
                }
                let Some(grid) = grids.last() else { continue };
                let code = grid.code(row[i], format);
                codes.push(code);
                let error = (row[i] - grid.value(code)) / upper[i];
                for (weight, u) in row[i..].iter_mut().zip(&upper[i..]) {
                    *weight -= error * u;
                }
            }
        }
        IntRows::of(format, k, codes.concat(), &grids.concat())
    }
}

/// Adds X^T X of x (T, K) to the upper triangle of `h`, diagonal included.
fn accumulate(h: &mut [f64], x: &[f32], k: usize) {
    let tokens = x.len() / k;
    let mut columns = vec![0.0; x.len()];
    for (t, row) in x.chunks_exact(k).enumerate() {
        for (i, &value) in row.iter().enumerate() {
            columns[i * tokens + t] = value;
        }
    }
    let column = |i: usize| &columns[i * tokens..(i + 1) * tokens];
    h.par_chunks_mut(k).enumerate().for_each(|(i, row)| {
        for (j, sum) in row.iter_mut().enumerate().skip(i) {
            *sum += f64::from(dot(column(i), column(j)));
        }
    });
}

fn dot_wide(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

/// L of the positive definite matrix `a` (K, K), in its lower triangle.
fn cholesky(a: &mut [f64], k: usize) {
    for first in (0..k).step_by(BLOCK_COLUMNS) {
        let last = k.min(first + BLOCK_COLUMNS);
        let (above, below) = a.split_at_mut(last * k);
        for j in first..last {
            let (before, row) = above.split_at_mut(j * k);
            solve(row, before, first, j, k);
            let diagonal = row[j] - dot_wide(&row[..j], &row[..j]);
            // Rounding may take a diagonal below zero; damping has put the true one well above.
            row[j] = diagonal.max(f64::MIN_POSITIVE).sqrt();
        }
        below
            .par_chunks_mut(k)
            .for_each(|row| solve(row, above, first, last, k));
    }
}

/// Columns `first..last` of a row of L, from the rows above.
fn solve(row: &mut [f64], above: &[f64], first: usize, last: usize, k: usize) {
    for j in first..last {
        let other = &above[j * k..j * k + j + 1];
        row[j] = (row[j] - dot_wide(&row[..j], &other[..j])) / other[j];
    }
}

/// The inverse of L, which is the lower triangle of `l` (K, K).
fn inverse(l: &[f64], k: usize) -> Vec<f32> {
    let starts: Vec<usize> = (0..k).step_by(BLOCK_COLUMNS).collect();
    // Columns are independent: blocks of them, each (K, BLOCK_COLUMNS).
    let blocks: Vec<Vec<f64>> = starts
        .par_iter()
        .map(|&first| {
            let mut block = vec![0.0; k * BLOCK_COLUMNS];
            for i in first..k {
                let (before, rest) = block.split_at_mut(i * BLOCK_COLUMNS);
                let row = &mut rest[..BLOCK_COLUMNS];
                if i < first + BLOCK_COLUMNS {
                    row[i - first] = 1.0;
                }
                let factors = &l[i * k + first..i * k + i];
                let above = before[first * BLOCK_COLUMNS..].chunks_exact(BLOCK_COLUMNS);
                for (factor, above) in factors.iter().zip(above) {
                    for (value, above) in row.iter_mut().zip(above) {
                        *value -= factor * above;
                    }
                }
                let diagonal = l[i * k + i];
                row.iter_mut().for_each(|value| *value /= diagonal);
            }
            block
        })
        .collect();
    let mut inverse = vec![0.0; k * k];
    for (i, row) in inverse.chunks_exact_mut(k).enumerate() {
        for (block, values) in blocks.iter().zip(row.chunks_mut(BLOCK_COLUMNS)) {
            let from = &block[i * BLOCK_COLUMNS..];
            for (value, from) in values.iter_mut().zip(from) {
                *value = *from as f32;
            }
        }
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_bundle::WeightFormat;

    fn uniform(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Inputs (T, K) that go together: a few causes, and noise.
    fn inputs(tokens: usize, k: usize) -> Vec<f32> {
        const CAUSES: usize = 12;
        let mixing = uniform(CAUSES * k, 3);
        let causes = uniform(tokens * CAUSES, 5);
        let mut x: Vec<f32> = uniform(tokens * k, 7).iter().map(|x| 0.2 * x).collect();
        for (row, causes) in x.chunks_mut(k).zip(causes.chunks(CAUSES)) {
            for (cause, mixing) in causes.iter().zip(mixing.chunks(k)) {
                for (x, m) in row.iter_mut().zip(mixing) {
                    *x += cause * m;
                }
            }
        }
        x
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let k = 150;
        let x = inputs(400, k);
        let factor = Factor::new(x.chunks(100 * k), k);
        let u = |i: usize, j: usize| f64::from(factor.upper[i * k + j]);
        let h = |i: usize, j: usize| -> f64 {
            x.chunks(k)
                .map(|row| f64::from(row[i]) * f64::from(row[j]))
                .sum()
        };
        let mean = (0..k).map(|i| h(i, i)).sum::<f64>() / k as f64;
        for i in 0..k {
            assert!((0..i).all(|j| u(i, j) == 0.0));
        }
        // U H U^T is the identity, where U^T U is the inverse of H.
        for i in (0..k).step_by(29) {
            for j in (0..k).step_by(13) {
                let mut sum = 0.0;
                for a in i..k {
                    for b in j..k {
                        let damping = if a == b { 0.01 * mean } else { 0.0 };
                        sum += u(i, a) * (h(a, b) + damping) * u(j, b);
                    }
                }
                let needed = if i == j { 1.0 } else { 0.0 };
                assert!((sum - needed).abs() < 1e-3, "({i}, {j}): {sum}");
            }
        }
    }

    #[test]
    fn outputs_change_less_than_by_rounding_to_the_nearest() {
        let (n, k, tokens) = (40, 200, 600);
        let weights = uniform(n * k, 11);
        let x = inputs(tokens, k);
        let factor = Factor::new([&x[..]].into_iter(), k);
        let change = |rounded: &IntRows| -> f64 {
            let off: Vec<f32> = rounded
                .values()
                .iter()
                .zip(&weights)
                .map(|(a, b)| a - b)
                .collect();
            let rows = x
                .chunks(k)
                .flat_map(|x| off.chunks(k).map(move |row| dot(x, row)));
            rows.map(|sum| f64::from(sum).powi(2)).sum()
        };
        for text in ["int8", "int4:g32", "int4:g128"] {
            let format: WeightFormat = text.parse().unwrap();
            let format = format.int().unwrap();
            let gptq = change(&factor.round(weights.clone(), format));
            let nearest = change(&IntRows::round(&weights, k, format));
            assert!(gptq < 0.5 * nearest, "{text}: {gptq} for {nearest}");
        }
    }
}
