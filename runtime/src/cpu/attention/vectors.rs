//! Attention's products by vectors: scores are chains of multiply-adds over d, sums of values over positions.

use super::{AttendTile, CHUNK, HeadCache, Products, Reach, share_len};
use crate::cpu::kv_cache::width;
use crate::cpu::simd::{Dots, LANES, Simd};
use crate::cpu::tile::{Factors, LINE, Step, Tile};
use kiln_bundle::BLOCK_TOKENS;
use std::marker::PhantomData;
use std::ops::Range;

/// Products of factors of a kind.
pub(super) struct Vectors<F>(PhantomData<F>);

impl<F> Default for Vectors<F> {
    fn default() -> Self {
        Vectors(PhantomData)
    }
}

impl<F: Factors> Products for Vectors<F> {
    type Element = F::Element;

    const INPUTS: usize = F::INPUTS;
    const DOTS: Option<Dots> = F::DOTS;

    fn tile_rows<S: Simd>() -> usize {
        F::tile_rows::<S>()
    }

    #[inline(always)]
    fn attend<S: Simd>(simd: S, tile: AttendTile<'_, Self>) {
        match F::tile_rows::<S>() {
            ..=4 => tile.attend::<S, 4>(simd),
            5..=6 => tile.attend::<S, 6>(simd),
            _ => tile.attend::<S, 12>(simd),
        }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V) {
        // SAFETY: the caller's.
        unsafe { F::store(simd, p, values) }
    }

    /// All ROWS queries are multiplied.
    #[inline(always)]
    fn score_tile<S: Simd, const ROWS: usize>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, F::Element>,
        positions: Range<usize>,
        _: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let head_dim = cache.head_dim();
        let first_block = positions.start / BLOCK_TOKENS;
        let blocks = positions.len().div_ceil(BLOCK_TOKENS);
        assert!(scores.len() >= blocks * ROWS * LINE && q.len() >= ROWS * width(head_dim));
        for first in (0..blocks).step_by(S::TILE_VECTORS) {
            let keys = |block: usize| cache.keys(first_block + block.min(blocks - 1));
            let [one, other, next] = [first, first + 1, first + S::TILE_VECTORS].map(keys);
            let tile = Tile::<F> {
                k: inputs::<F>(head_dim),
                a: q.as_ptr().cast(),
                b: one,
                b_step: BLOCK_TOKENS,
                b_vector: (other.addr() as isize - one.addr() as isize)
                    / size_of::<F::Element>() as isize,
                c: scores[first * ROWS * LINE..].as_mut_ptr(),
                c_stride: LINE,
                c_vector: ROWS * LINE,
                resume: false,
                // Of two blocks only the first is asked for.
                ahead: next.cast(),
                ahead_step: F::WORDS * F::INPUTS * BLOCK_TOKENS * size_of::<F::Element>(),
            };
            // SAFETY: q has ROWS rows of D, each block's keys are (D, 16), and the scores have a line of
            // each row for each block.
            unsafe {
                match first + 1 < blocks && S::TILE_VECTORS == 2 {
                    true => tile.run::<S, ROWS, 2>(simd),
                    false => tile.run::<S, ROWS, 1>(simd),
                }
            }
        }
    }

    #[inline(always)]
    fn score_row<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, F::Element>,
        block: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let words = inputs::<F>(cache.head_dim()) / F::INPUTS;
        let q: &[u32] = &bytemuck::cast_slice(q)[..words];
        let keys = cache.keys(block);
        let mut sum = simd.zero();
        let inputs = F::WORDS * F::INPUTS;
        for (d, words) in (0..).step_by(inputs).zip(q.chunks_exact(F::WORDS)) {
            let step = Step {
                at: keys.wrapping_add(d * BLOCK_TOKENS),
                to_vector: 0,
            };
            simd.prefetch_stream(step.at.cast());
            // SAFETY: these components of a block's keys, which are (D, 16).
            let [key] = unsafe { F::columns::<S, 1, 0>(simd, step) };
            sum = F::add_products(simd, sum, key, words[0]);
            if let Some(&word) = words.get(1) {
                // SAFETY: as above.
                let [key] = unsafe { F::columns::<S, 1, 1>(simd, step) };
                sum = F::add_products(simd, sum, key, word);
            }
        }
        // SAFETY: as many scores.
        unsafe { simd.store_f32(scores[..BLOCK_TOKENS].as_mut_ptr(), sum) };
    }

    #[inline(always)]
    fn sum_values<S: Simd, const ROWS: usize>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, F::Element>,
        reach: Reach,
        weights: &mut [f32],
        shares: &mut [f32],
    ) {
        // Positions that lie together are taken at once.
        let together = reach.of(0) / F::TOGETHER * F::TOGETHER;
        for block in (0..together).step_by(BLOCK_TOKENS) {
            let positions = reach.first + block..reach.first + together.min(block + BLOCK_TOKENS);
            let weights = &weights[block * ROWS..];
            accumulate::<F, S, ROWS>(simd, &cache, positions, weights, shares);
        }
        for r in 0..reach.rows {
            let (mut done, len) = (together, reach.of(r));
            while done < len {
                let end = len.min((done + 1).next_multiple_of(BLOCK_TOKENS));
                let positions = reach.first + done..reach.first + end;
                let line = (done / BLOCK_TOKENS * ROWS + r) * LINE;
                let weights = &weights[line + done % BLOCK_TOKENS / F::INPUTS..];
                let share = &mut shares[r * share_len(cache.head_dim())..];
                accumulate::<F, S, 1>(simd, &cache, positions, weights, share);
                done = end;
            }
        }
    }

    #[inline(always)]
    fn add_values<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, F::Element>,
        positions: Range<usize>,
        weights: &[f32],
        share: &mut [f32],
    ) {
        accumulate::<F, S, 1>(simd, &cache, positions, weights, share);
    }
}

/// Components of a key that are multiplied: one without another lies with a zero.
const fn inputs<F: Factors>(head_dim: usize) -> usize {
    head_dim.next_multiple_of(F::TOGETHER)
}

/// `sums[r] += sum over positions of weights[r][position] * v[position]`, where the positions lie
/// in one block and begin a word; from zero where they begin a chunk. The weights are a line of each row,
/// from the first of the positions on, the sums begin the rows' shares.
#[inline(always)]
fn accumulate<F: Factors, S: Simd, const ROWS: usize>(
    simd: S,
    cache: &HeadCache<'_, F::Element>,
    positions: Range<usize>,
    weights: &[f32],
    shares: &mut [f32],
) {
    let head_dim = cache.head_dim();
    let width = width(head_dim);
    let (block, offset) = (
        positions.start / BLOCK_TOKENS,
        positions.start % BLOCK_TOKENS,
    );
    let values = &cache.values(block)[offset * width..];
    let last = positions.len() % F::TOGETHER;
    let tile = Tile::<F> {
        k: positions.len() - last,
        a: weights.as_ptr().cast(),
        b: values.as_ptr(),
        b_step: width,
        b_vector: (F::TOGETHER * LANES) as isize,
        c: shares.as_mut_ptr(),
        c_stride: share_len(head_dim),
        c_vector: LANES,
        resume: !positions.start.is_multiple_of(CHUNK),
        ahead: values
            .as_ptr()
            .wrapping_byte_add(simd.stream_ahead())
            .cast(),
        ahead_step: F::WORDS * F::INPUTS * width * size_of::<F::Element>(),
    };
    assert!(values.len() >= (positions.len() + last) * width);
    assert!(shares.len() >= ROWS * share_len(head_dim));
    assert!(weights.len() >= (ROWS - 1) * LINE + (positions.len() + last).div_ceil(F::INPUTS));
    let at = |d: usize| Tile {
        b: tile.b.wrapping_add(F::TOGETHER * d),
        ahead: tile
            .ahead
            .wrapping_add(F::TOGETHER * d * size_of::<F::Element>()),
        c: tile.c.wrapping_add(d),
        ..tile
    };
    let mut d = 0;
    // SAFETY (of all): the columns lie within the values, (positions, D'), and the shares' sums, (D') each; the
    // weights are as asserted.
    if ROWS == 1 {
        while d + 4 * LANES <= width {
            // SAFETY: as above.
            unsafe { at(d).run::<S, ROWS, 4>(simd) };
            d += 4 * LANES;
        }
    }
    if ROWS > 1 && S::TILE_VECTORS == 2 {
        while d + 2 * LANES <= width {
            // SAFETY: as above.
            unsafe { at(d).run::<S, ROWS, 2>(simd) };
            d += 2 * LANES;
        }
    }
    while d < width {
        // SAFETY: as above.
        unsafe { at(d).run::<S, ROWS, 1>(simd) };
        d += LANES;
    }
    if last > 0 {
        // A position without the one that it lies with. (Of one row; several take whole pairs.)
        let word = weights[tile.k / F::INPUTS].to_bits();
        let resume = tile.resume || tile.k > 0;
        for (d, sums) in (0..width)
            .step_by(LANES)
            .zip(shares.chunks_exact_mut(LANES))
        {
            let step = Step {
                at: values[tile.k * width + F::TOGETHER * d..].as_ptr(),
                to_vector: 0,
            };
            // SAFETY: as above.
            unsafe {
                let sum = match resume {
                    true => simd.load_f32(sums.as_ptr()),
                    false => simd.zero(),
                };
                let sum = F::add_first(simd, sum, step, word);
                simd.store_f32(sums.as_mut_ptr(), sum);
            }
        }
    }
}
