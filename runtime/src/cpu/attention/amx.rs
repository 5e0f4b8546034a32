//! Attention's products by the tiles of AMX, of bf16. Of 32 components of a key, and of the 16 positions of a block, the
//! products of those of even number are a chain of fused multiply-adds from zero, and so are the others; both are added
//! to each other, then to the sum.

use super::{AttendTile, CHUNK, HeadCache, Products, Reach, share_len};
use crate::cpu::amx::{BF16_INPUTS, Configuration, ROW_BYTES, Shapes, Sums, TILE};
use crate::cpu::kv_cache::width;
use crate::cpu::simd::{Dots, LANES, Simd};
use crate::cpu::tile::LINE;
use half::bf16;
use kiln_bundle::BLOCK_TOKENS;
use std::ops::Range;
use std::ptr;

/// Queries and weights of bf16.
#[derive(Default)]
pub(super) struct Amx(Configuration);

// A line of words is a row of a tile, and a block's positions are half of the inputs.
const _: () = assert!(LINE * size_of::<f32>() == ROW_BYTES && 2 * BLOCK_TOKENS == BF16_INPUTS);
/// Most products that are summed at once: of a chunk's blocks.
const MOST: usize = CHUNK / BLOCK_TOKENS;

impl Products for Amx {
    type Element = bf16;

    const INPUTS: usize = 2;
    const DOTS: Option<Dots> = None;

    fn tile_rows<S: Simd>() -> usize {
        2 * TILE
    }

    #[inline(always)]
    fn attend<S: Simd>(simd: S, tile: AttendTile<'_, Self>) {
        tile.attend::<S, { 2 * TILE }>(simd);
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_bf16(p.cast(), values) }
    }

    #[inline(always)]
    fn score_tile<S: Simd, const ROWS: usize>(
        &mut self,
        _: S,
        cache: HeadCache<'_, bf16>,
        positions: Range<usize>,
        rows: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let width = width(cache.head_dim());
        let first = positions.start / BLOCK_TOKENS;
        let blocks = positions.len().div_ceil(BLOCK_TOKENS);
        let scores = scores.chunks_exact_mut(ROWS * LINE).take(blocks);
        for (block, scores) in scores.enumerate() {
            let keys = cache.keys(first + block);
            for d in (0..width).step_by(MOST * BF16_INPUTS) {
                let components = d..width.min(d + MOST * BF16_INPUTS);
                self.score::<ROWS>(keys, components, rows, q, scores);
            }
        }
    }

    #[inline(always)]
    fn score_row<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, bf16>,
        block: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let (keys, width) = (cache.keys(block), width(cache.head_dim()));
        for d in (0..width).step_by(BF16_INPUTS) {
            let components = d..width.min(d + BF16_INPUTS);
            prefetch_stream(simd, keys, components.start / 2..components.end / 2);
            self.score::<1>(keys, components, 1, q, scores);
        }
    }

    #[inline(always)]
    fn sum_values<S: Simd, const ROWS: usize>(
        &mut self,
        _: S,
        cache: HeadCache<'_, bf16>,
        reach: Reach,
        weights: &mut [f32],
        shares: &mut [f32],
    ) {
        const { assert!(ROWS.is_multiple_of(TILE)) };
        let (width, share_len) = (width(cache.head_dim()), share_len(cache.head_dim()));
        // Blocks of which all rows attend to each position, and all blocks.
        let whole = reach.of(0) / BLOCK_TOKENS;
        let blocks = reach.of(reach.rows - 1).div_ceil(BLOCK_TOKENS);
        // Rows that end in an earlier block than others have no weights in the later ones.
        let lines_of_blocks = weights.chunks_exact_mut(ROWS * LINE).take(blocks);
        for (block, lines) in lines_of_blocks.enumerate().skip(whole) {
            for (r, line) in lines.chunks_exact_mut(LINE).enumerate().take(reach.rows) {
                if reach.of(r) <= block * BLOCK_TOKENS {
                    line.fill(0.0);
                }
            }
        }
        assert!(reach.rows <= ROWS && shares.len() >= ROWS * share_len);
        for d in (0..width).step_by(LANES) {
            let weights = |block: usize, r: usize| weights[(block * ROWS + r) * LINE..].as_ptr();
            let values = |block: usize| &cache.values(reach.first / BLOCK_TOKENS + block)[2 * d..];
            let mut factors = [[ptr::null(); 2]; MOST];
            for (block, factors) in factors.iter_mut().enumerate().take(whole) {
                *factors = [weights(block, 0).cast(), values(block).as_ptr().cast()];
            }
            let sums = Sums {
                factors: &factors[..whole],
                weights_row_bytes: row_bytes(width),
                resume: false,
                sums: shares[d..].as_mut_ptr(),
                sums_row_bytes: share_len * size_of::<f32>(),
            };
            // SAFETY: of ROWS rows, whole tiles, there are lines of weights, and shares; a block's values are (8, D', 2).
            unsafe { self.add::<true>(&sums, reach.rows) };
            for block in whole..blocks {
                let left = |r: usize| reach.of(r).saturating_sub(block * BLOCK_TOKENS);
                let len = |r: usize| left(r).min(BLOCK_TOKENS);
                let all = Kept::of(values(block), width, len(reach.rows - 1));
                // What has a weight of zero for some rows must be numbers, or each row takes what is its own.
                let together = match all.is_finite_from(len(0)) {
                    true => reach.rows,
                    false => 1,
                };
                for r in (0..reach.rows).step_by(together) {
                    let kept = match together {
                        1 => &Kept::of(values(block), width, len(r)),
                        _ => &all,
                    };
                    let sums = Sums {
                        factors: &[[weights(block, r).cast(), kept.as_ptr()]],
                        weights_row_bytes: ROW_BYTES,
                        resume: block > 0,
                        sums: sums.sums.wrapping_add(r * share_len),
                        ..sums
                    };
                    // SAFETY: as above.
                    unsafe { self.add::<true>(&sums, together) };
                }
            }
        }
    }

    #[inline(always)]
    fn add_values<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, bf16>,
        positions: Range<usize>,
        weights: &[f32],
        share: &mut [f32],
    ) {
        let width = width(cache.head_dim());
        let values = cache.values(positions.start / BLOCK_TOKENS);
        assert!(weights.len() >= LINE && share.len() >= width);
        for d in (0..width).step_by(LANES) {
            prefetch_stream(simd, values.as_ptr(), d / 2..(d + LANES) / 2);
            let kept;
            let (values, weights_row_bytes) = match positions.len() {
                BLOCK_TOKENS => (values[2 * d..].as_ptr().cast(), row_bytes(width)),
                len => {
                    kept = Kept::of(&values[2 * d..], width, len);
                    (kept.as_ptr(), ROW_BYTES)
                }
            };
            let sums = Sums {
                factors: &[[weights.as_ptr().cast(), values]],
                weights_row_bytes,
                resume: !positions.start.is_multiple_of(CHUNK),
                sums: share[d..].as_mut_ptr(),
                sums_row_bytes: ROW_BYTES,
            };
            // SAFETY: a line of weights, and sixteen sums.
            unsafe { self.add::<true>(&sums, 1) };
        }
    }
}

impl Amx {
    /// `scores[r][p] = q[r] . k[p]` of `rows` queries and a block's positions, (ROWS, 16), as far as some components make
    /// them up, of [`MOST`] tiles at most: to what is there, but where these are the first.
    #[inline(always)]
    fn score<const ROWS: usize>(
        &mut self,
        keys: *const bf16,
        components: Range<usize>,
        rows: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        const { assert!(ROWS == 1 || ROWS.is_multiple_of(TILE)) };
        assert!(rows <= ROWS && scores.len() >= ROWS * LINE);
        let at = |d: usize| {
            let q = q[d / BF16_INPUTS * ROWS * LINE..][..ROWS * LINE].as_ptr();
            [q.cast(), keys.wrapping_add(d * BLOCK_TOKENS).cast()]
        };
        let whole = components.len() / BF16_INPUTS;
        let mut factors = [[ptr::null(); 2]; MOST];
        for (i, factors) in factors.iter_mut().enumerate().take(whole) {
            *factors = at(components.start + i * BF16_INPUTS);
        }
        let sums = Sums {
            factors: &factors[..whole],
            weights_row_bytes: ROW_BYTES,
            resume: components.start > 0,
            sums: scores.as_mut_ptr(),
            sums_row_bytes: ROW_BYTES,
        };
        // SAFETY: keys are (D', 16), and of ROWS rows, one or whole tiles, there are queries and scores.
        unsafe { self.add::<false>(&sums, rows) };
        let half = components.start + whole * BF16_INPUTS;
        if half < components.end {
            let sums = Sums {
                factors: &[at(half)],
                resume: half > 0,
                ..sums
            };
            // SAFETY: as above.
            unsafe { self.add::<true>(&sums, rows) };
        }
    }

    /// Adds up products of one row, or of all of the one or two tiles that several begin.
    ///
    /// # Safety
    /// What is read and written exists, of whole tiles but for a single row.
    #[inline(always)]
    unsafe fn add<const HALF: bool>(&mut self, sums: &Sums<'_>, rows: usize) {
        if sums.factors.is_empty() {
            return;
        }
        self.0.set(Shapes::OfSums(if rows == 1 { 1 } else { TILE }));
        // SAFETY: the caller's.
        unsafe { sums.add::<HALF>(rows > TILE) };
    }
}

/// Values of a block's first positions in sixteen columns, and zeros in place of those that follow.
#[repr(align(64))]
struct Kept([[bf16; 2 * LANES]; BLOCK_TOKENS / 2]);

impl Kept {
    /// Of `len` positions, given a block's values from the first of the columns on.
    #[inline(always)]
    fn of(values: &[bf16], width: usize, len: usize) -> Kept {
        let mut kept = [[bf16::ZERO; 2 * LANES]; BLOCK_TOKENS / 2];
        for (pair, kept) in kept.iter_mut().enumerate().take(len.div_ceil(2)) {
            kept.copy_from_slice(&values[pair * 2 * width..][..2 * LANES]);
            if len == 2 * pair + 1 {
                kept.iter_mut()
                    .skip(1)
                    .step_by(2)
                    .for_each(|x| *x = bf16::ZERO);
            }
        }
        Kept(kept)
    }

    /// Whether all are numbers, from position `first` on.
    #[inline(always)]
    fn is_finite_from(&self, first: usize) -> bool {
        (first..BLOCK_TOKENS).all(|position| {
            let mut values = self.0[position / 2].iter().skip(position % 2).step_by(2);
            values.all(|value| value.is_finite())
        })
    }

    fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

/// From a pair of values to the next.
const fn row_bytes(width: usize) -> usize {
    2 * width * size_of::<bf16>()
}

/// Asks for what a stream will want while some of its lines are read: a few at a time, or products wait for requests.
#[inline(always)]
fn prefetch_stream<S: Simd>(simd: S, stream: *const bf16, lines: Range<usize>) {
    for line in lines {
        simd.prefetch_stream(stream.wrapping_byte_add(line * ROW_BYTES).cast());
    }
}
