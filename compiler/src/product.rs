//! Matrix products and attention of many rows, with sums in f32: what the interpreter computes texts
//! with, where its plain sums in f64 would take too long.

use rayon::prelude::*;

/// Outputs of a panel: their sums are vectors.
const LANES: usize = 8;
/// Rows of x that go through a panel together.
const ROWS: usize = 4;
/// Rows of x that a thread takes at a time.
const CHUNK_ROWS: usize = 64;

/// x (T, K) by rows w (n, K), transposed, into the columns of `out` (T, N) from `first` on.
pub(crate) fn product_into(x: &[f32], w: &[f32], k: usize, out: &mut [f32], first: usize) {
    let width = out.len() / (x.len() / k).max(1);
    let panels: Vec<Vec<[f32; LANES]>> = w.par_chunks(LANES * k).map(|w| panel(w, k)).collect();
    let rows = w.len() / k;
    out.par_chunks_mut(CHUNK_ROWS * width)
        .zip(x.par_chunks(CHUNK_ROWS * k))
        .for_each(|(out, x)| {
            for (index, panel) in panels.iter().enumerate() {
                let from = index * LANES;
                let len = LANES.min(rows - from);
                for (out, x) in out.chunks_mut(ROWS * width).zip(x.chunks(ROWS * k)) {
                    // Missing rows repeat the first, and are not read.
                    let rows = std::array::from_fn(|row| x.chunks(k).nth(row).unwrap_or(&x[..k]));
                    for (out, sums) in out.chunks_mut(width).zip(tile(rows, panel)) {
                        out[first + from..][..len].copy_from_slice(&sums[..len]);
                    }
                }
            }
        });
}

/// Rows (LANES, K), fewer at the end of a matrix, as (K, LANES).
fn panel(w: &[f32], k: usize) -> Vec<[f32; LANES]> {
    let mut panel = vec![[0.0; LANES]; k];
    for (lane, row) in w.chunks(k).enumerate() {
        for (column, &value) in panel.iter_mut().zip(row) {
            column[lane] = value;
        }
    }
    panel
}

fn tile([a, b, c, d]: [&[f32]; ROWS], panel: &[[f32; LANES]]) -> [[f32; LANES]; ROWS] {
    let mut sums = [[0.0; LANES]; ROWS];
    for ((((w, a), b), c), d) in panel.iter().zip(a).zip(b).zip(c).zip(d) {
        for (sums, x) in sums.iter_mut().zip([a, b, c, d]) {
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum += x * w;
            }
        }
    }
    sums
}

/// Causal attention of one sequence; q, k, v are (T, H*D).
pub(crate) fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: usize,
    head_dim: usize,
    scale: f32,
) -> Vec<f32> {
    let width = heads * head_dim;
    let mut result = vec![0.0; q.len()];
    result
        .par_chunks_mut(width)
        .enumerate()
        .for_each(|(position, out)| {
            let query = &q[position * width..][..width];
            let heads = query.chunks(head_dim).zip(out.chunks_mut(head_dim));
            for (head, (query, out)) in heads.enumerate() {
                let columns = head * head_dim..(head + 1) * head_dim;
                let keys = k.chunks(width).take(position + 1);
                let mut scores: Vec<f32> = keys
                    .map(|key| scale * dot(query, &key[columns.clone()]))
                    .collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores
                    .iter_mut()
                    .for_each(|score| *score = (*score - largest).exp());
                let total: f32 = scores.iter().sum();
                for (weight, value) in scores.iter().zip(v.chunks(width)) {
                    for (out, v) in out.iter_mut().zip(&value[columns.clone()]) {
                        *out += weight / total * v;
                    }
                }
            }
        });
    result
}

/// The sum of the products, in f32.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_fill_their_columns_whatever_the_sizes() {
        for (tokens, n, k) in [(1, 1, 1), (3, 8, 5), (7, 17, 9), (130, 20, 33)] {
            let x: Vec<f32> = (0..tokens * k).map(|at| (at % 7) as f32 - 3.0).collect();
            let w: Vec<f32> = (0..n * k).map(|at| (at % 5) as f32 - 2.0).collect();
            let mut out = vec![9.0; tokens * (n + 2)];
            product_into(&x, &w, k, &mut out, 1);
            for (out, x) in out.chunks(n + 2).zip(x.chunks(k)) {
                let needed: Vec<f32> = w.chunks(k).map(|w| dot(x, w)).collect();
                assert_eq!(out[1..=n], needed);
                assert_eq!((out[0], out[n + 1]), (9.0, 9.0));
            }
        }
    }
}
