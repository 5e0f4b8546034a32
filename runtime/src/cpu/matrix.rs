//! Weight matrices as products see them: panels that lie one after the other, the form that rows take
//! beforehand, and the tile that multiplies both.

use super::fixed::{self, RUN};
use super::norm::load;
use super::simd::{Codes, LANES, Simd};
use super::storage::IntPanels;
use super::tile::{AnyRows, Factors, IntRows, IntTile, LINE, Tile};
use bytemuck::Zeroable;
use half::bf16;
use kiln_bundle::packing::PANEL;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of a panel in a block. Each tile reads it from the L2 cache, which the processor does ahead of time by itself;
/// with blocks that stay in the L1 cache sums would be put away and fetched again more often. (Tests have small
/// matrices, and several blocks all the same.)
const BLOCK_BYTES: usize = if cfg!(test) { 16 } else { 64 } * 1024;

/// The panels of W in one way of storing them, and rows in the form that suits it.
///
/// The rows of a tile are *prepared* together: values of four bytes in lines, (values / LINE, rows, LINE), each of
/// one input or several; and where rows are cut into runs, the scale and the sum of each, (runs, rows, 2).
pub(super) trait Matrix: Copy + Sync {
    /// What a thread keeps from one part to the next.
    type State: Default;

    /// Inputs of a step of a tile.
    const STEP_INPUTS: usize;
    /// Whether the values are those of the row itself, if these make up whole steps.
    const AS_THEY_ARE: bool = false;
    /// Rows of x that a block meets: their share of x stays in the L2 cache.
    const CHUNK_ROWS: usize = 96;

    /// Rows of the tallest tile.
    fn tile_rows<S: Simd>() -> usize;

    /// Rows up to which a tile is a whole panel across.
    fn direct_rows<S: Simd>() -> usize {
        S::DIRECT_ROWS
    }

    /// Values that the first `k` inputs take in a prepared row, in whole lines; blocks and rows end there.
    fn values(&self, k: usize) -> usize;

    /// Runs that end with input `k`, or before.
    fn runs(&self, k: usize) -> usize;

    /// Inputs of a block that stays in a cache, the L2 or the L1: whole runs and lines.
    fn block_inputs(&self) -> usize;

    /// Bytes that `inputs` inputs of a panel take, about.
    fn bytes(&self, inputs: usize) -> usize;

    /// Bytes from the weights being multiplied to those being asked for, by a tile of `rows` rows that meets
    /// each once: as of any stream, unless it depends on the tile.
    fn prefetch_bytes<S: Simd>(simd: S, _rows: usize) -> usize {
        simd.stream_ahead()
    }

    /// The block that begins with input `k`; what lies behind the panel for its end.
    fn block(&self, panel: usize, k: usize) -> Block;

    /// Writes `row` as a row of a tile.
    fn prepare<S: Simd>(&self, simd: S, row: &[f32], prepared: PreparedRow<'_>);

    /// Computes a part of a panel for a tile of rows.
    ///
    /// # Safety
    /// `part` is within the panel, its operands exist.
    unsafe fn multiply<S: Simd, const VECTORS: usize>(
        &self,
        simd: S,
        part: &Part,
        state: &mut Self::State,
    );
}

/// As [`Matrix::prefetch_bytes`], given the products of a row and a line of the cache's weights.
fn prefetch_bytes<S: Simd>(simd: S, rows: usize, line_products: usize) -> usize {
    // Where memory is slower than the tile, asking is in the way of many a processor's own looking ahead.
    match rows == 1 || line_products == 1 {
        true => simd.stream_ahead(),
        false => simd.stream_ahead().max(2048),
    }
}

/// Where row `r` of a tile is written to.
pub(super) struct PreparedRow<'a> {
    pub(super) r: usize,
    /// Of the tile.
    pub(super) rows: usize,
    /// (values / LINE, rows, LINE)
    pub(super) values: &'a mut [f32],
    /// (runs, rows, 2)
    pub(super) runs: &'a mut [f32],
}

impl<'a> PreparedRow<'a> {
    /// The row's lines, (LINE) each, and the scales and sums of its runs, (2) each.
    pub(super) fn parts(
        self,
    ) -> (
        impl Iterator<Item = &'a mut [f32]>,
        impl Iterator<Item = &'a mut [f32]>,
    ) {
        let PreparedRow { r, rows, .. } = self;
        let lines = self.values.chunks_exact_mut(rows * LINE);
        let runs = self.runs.chunks_exact_mut(rows * 2);
        (
            lines.map(move |lines| &mut lines[r * LINE..][..LINE]),
            runs.map(move |runs| &mut runs[r * 2..][..2]),
        )
    }
}

/// Where a block of a panel lies.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The scales of its first group, where there are any.
    scales: *const u8,
    /// The weights of its first input.
    weights: *const u8,
}

impl Block {
    /// Its first byte.
    pub(super) fn address(&self) -> *const u8 {
        self.weights
    }
}

/// A block of a panel, some vectors across, and a tile of rows.
pub(super) struct Part {
    pub(super) block: Block,
    /// The block's inputs.
    pub(super) inputs: Range<usize>,
    /// First output within the panel.
    pub(super) column: usize,
    pub(super) rows: usize,
    /// Prepared rows, from the block's first input on.
    pub(super) x: *const f32,
    /// Their runs, likewise.
    pub(super) runs: *const f32,
    /// Sums, (rows, PANEL).
    pub(super) sums: *mut f32,
    /// What to ask for.
    pub(super) ahead: Ahead,
}

/// Memory that will be wanted next.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    /// So many bytes behind what is being multiplied.
    Behind(usize),
    /// From an address on, so many bytes in each step.
    At(*const u8, usize),
}

impl Ahead {
    /// Where the first step asks, and from a step to the next, given `weights` and how many bytes of them a step takes.
    #[inline(always)]
    pub(super) fn from(self, weights: *const u8, step_bytes: usize) -> (*const u8, usize) {
        match self {
            Ahead::Behind(bytes) => (weights.wrapping_add(bytes), step_bytes),
            Ahead::At(ahead, step) => (ahead, step),
        }
    }
}

/// Panels of floating-point numbers, and rows for [`Factors`] of that kind.
#[derive(Clone, Copy)]
pub(super) struct Floats<'a, F: Factors> {
    weight: &'a [F::Element],
    /// Inputs of a panel, with those that make up the last that lie together.
    k: usize,
}

impl<'a, F: Factors> Floats<'a, F> {
    /// Panels of `k` inputs.
    pub(super) fn new(weight: &'a [F::Element], k: usize) -> Floats<'a, F> {
        let k = k.next_multiple_of(F::TOGETHER);
        Floats { weight, k }
    }
}

impl<F: Factors> Matrix for Floats<'_, F> {
    type State = ();

    const STEP_INPUTS: usize = F::INPUTS * F::WORDS;
    const AS_THEY_ARE: bool = F::AS_THEY_ARE;

    fn tile_rows<S: Simd>() -> usize {
        F::tile_rows::<S>()
    }

    fn values(&self, k: usize) -> usize {
        k.div_ceil(F::INPUTS).next_multiple_of(LINE)
    }

    fn runs(&self, _: usize) -> usize {
        0
    }

    fn block_inputs(&self) -> usize {
        BLOCK_BYTES / self.bytes(1)
    }

    fn bytes(&self, inputs: usize) -> usize {
        inputs * PANEL * size_of::<F::Element>()
    }

    fn prefetch_bytes<S: Simd>(simd: S, rows: usize) -> usize {
        prefetch_bytes(
            simd,
            rows,
            size_of::<f32>() / size_of::<F::Element>() / F::INPUTS,
        )
    }

    #[inline(always)]
    fn block(&self, panel: usize, k: usize) -> Block {
        let weights = self.weight[(panel * self.k + k) * PANEL..].as_ptr().cast();
        Block {
            scales: weights,
            weights,
        }
    }

    #[inline(always)]
    fn prepare<S: Simd>(&self, simd: S, row: &[f32], prepared: PreparedRow<'_>) {
        for (part, line) in row.chunks(F::INPUTS * LINE).zip(prepared.parts().0) {
            let line: &mut [u32] = bytemuck::cast_slice_mut(line);
            let words = line.chunks_exact_mut(LANES / F::INPUTS);
            for (i, words) in (0..).step_by(LANES).zip(words) {
                // SAFETY: what is loaded exists, if anything, and zeros make up a vector.
                unsafe {
                    let left = part.len().saturating_sub(i);
                    let values = load(simd, part.as_ptr().wrapping_add(i), left);
                    F::store(simd, words.as_mut_ptr(), values);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd, const VECTORS: usize>(&self, simd: S, part: &Part, (): &mut ()) {
        let block = part.block.weights;
        let (ahead, ahead_step) = part.ahead.from(block, self.bytes(Self::STEP_INPUTS));
        let tile = Tile::<F> {
            k: part.inputs.len(),
            a: part.x.cast(),
            b: block
                .cast::<F::Element>()
                .wrapping_add(F::TOGETHER * part.column),
            b_step: PANEL,
            b_vector: (F::TOGETHER * LANES) as isize,
            c: part.sums,
            c_stride: PANEL,
            c_vector: LANES,
            resume: part.inputs.start > 0,
            ahead,
            ahead_step,
        };
        // SAFETY: the caller's.
        unsafe { tile.run_rows::<S, VECTORS>(simd, part.rows) };
    }
}

/// Panels of integers, in words of C, for rows of integers in words of R.
#[derive(Clone, Copy)]
pub(super) struct Integers<'a, C, R> {
    panels: IntPanels<'a>,
    k: usize,
    /// Inputs of a group, and the bytes of one and of a panel.
    group: usize,
    group_bytes: usize,
    panel_bytes: usize,
    /// Pieces of a row's integers that share a line.
    line_pieces: usize,
    words: PhantomData<(C, R)>,
}

impl<'a, C: Codes, R: IntRows> Integers<'a, C, R> {
    /// Panels of `k` inputs.
    pub(super) fn new(panels: IntPanels<'a>, k: usize) -> Integers<'a, C, R> {
        let group = panels.format.group(k).max(1);
        Integers {
            panels,
            k,
            group,
            group_bytes: panels.format.group_bytes(group),
            panel_bytes: panels.format.panel_bytes(k),
            line_pieces: R::PIECES,
            words: PhantomData,
        }
    }

    /// The same for rows of which each piece lies in lines of its own.
    pub(super) fn with_pieces_apart(self) -> Integers<'a, C, R> {
        Integers {
            line_pieces: 1,
            ..self
        }
    }

    /// Whether each run is of whole `inputs`, of which [`RUN`] is a multiple.
    pub(super) fn runs_are_of(&self, inputs: usize) -> bool {
        self.group.is_multiple_of(inputs) && self.k.is_multiple_of(inputs)
    }

    /// Of each run of a part its codes, its scales, behind which its minima lie, and its inputs.
    #[inline(always)]
    pub(super) fn runs_of(
        &self,
        part: &Part,
    ) -> impl Iterator<Item = (*const C, *const bf16, usize)> + use<C, R> {
        let (len, group, group_bytes) = (part.inputs.len(), self.group, self.group_bytes);
        let codes = part.block.weights.cast::<C>();
        let scales = part.block.scales.cast::<bf16>();
        (0..len).step_by(group).flat_map(move |first| {
            let bytes = first / group * group_bytes;
            let inputs = group.min(len - first);
            (0..inputs).step_by(RUN).map(move |at| {
                let codes = codes.wrapping_byte_add(bytes);
                (
                    codes.wrapping_add(at / C::INPUTS * PANEL),
                    scales.wrapping_byte_add(bytes),
                    RUN.min(inputs - at),
                )
            })
        })
    }

    /// Inputs of a block of about so many bytes.
    pub(super) fn block_inputs_in(&self, bytes: usize) -> usize {
        // A group's scales lie before its first input: a block is of whole groups, unless there is only
        // one.
        let unit = match self.group == self.k {
            true => RUN,
            false => self.group,
        };
        (bytes / self.bytes(unit)).max(1) * unit
    }

    /// Words of R that a run of inputs takes, so that they meet whole words of C.
    fn words(run: usize) -> usize {
        run.div_ceil(C::INPUTS) * R::words::<C>()
    }
}

impl<C: Codes, R: IntRows> Matrix for Integers<'_, C, R> {
    type State = ();

    const STEP_INPUTS: usize = C::INPUTS;

    fn tile_rows<S: Simd>() -> usize {
        S::INT_TILE_ROWS / R::PIECES
    }

    fn direct_rows<S: Simd>() -> usize {
        S::DIRECT_ROWS / R::PIECES
    }

    fn values(&self, k: usize) -> usize {
        let run_values = |run: usize| Self::words(run).next_multiple_of(LINE);
        let values = |k: usize| k / RUN * run_values(RUN) + run_values(k % RUN);
        k / self.group * values(self.group) + values(k % self.group)
    }

    fn runs(&self, k: usize) -> usize {
        fixed::runs(k, self.group)
    }

    fn block_inputs(&self) -> usize {
        self.block_inputs_in(BLOCK_BYTES)
    }

    fn bytes(&self, inputs: usize) -> usize {
        inputs.div_ceil(C::INPUTS) * PANEL * size_of::<C>()
    }

    fn prefetch_bytes<S: Simd>(simd: S, rows: usize) -> usize {
        prefetch_bytes(simd, rows, R::words::<C>())
    }

    #[inline(always)]
    fn block(&self, panel: usize, k: usize) -> Block {
        let groups = k / self.group;
        let start = match k >= self.k {
            true => self.panel_bytes,
            false => groups * self.group_bytes,
        };
        let scales = self.panels.bytes[panel * self.panel_bytes + start..].as_ptr();
        let codes = self.panels.format.header_bytes() + self.bytes(k - groups * self.group);
        Block {
            scales,
            weights: scales.wrapping_add(codes),
        }
    }

    #[inline(always)]
    fn prepare<S: Simd>(&self, simd: S, row: &[f32], prepared: PreparedRow<'_>) {
        let (mut lines, mut runs) = prepared.parts();
        for run in row.chunks(self.group).flat_map(|group| group.chunks(RUN)) {
            // What fills up the last line is zero.
            let mut pieces = [[R::Piece::zeroed(); RUN]; 2];
            let [scale, sum] = fixed::round::<S, R>(simd, run, &mut pieces);
            if let Some(numbers) = runs.next() {
                let second = match C::HAVE_MINIMA {
                    true => scale * sum,
                    false => f32::from_bits((-C::quad_offset::<S>() * sum as i32).cast_unsigned()),
                };
                numbers.copy_from_slice(&[scale, second]);
            }
            for pieces in pieces.iter_mut().take(R::PIECES) {
                R::in_turn::<C>(pieces);
            }
            // Of a word of C the words of one piece lie before those of the next.
            let parts = C::INPUTS / R::INPUTS;
            let words = parts * self.line_pieces;
            for first in (0..run.len()).step_by(LINE / words * C::INPUTS) {
                for pieces in pieces[..R::PIECES].chunks_exact(self.line_pieces) {
                    let Some(line) = lines.next() else { break };
                    if let [pieces] = pieces {
                        bytemuck::cast_slice_mut(line)
                            .copy_from_slice(&pieces[first..][..LINE * R::INPUTS]);
                        continue;
                    }
                    let inputs = (first..).step_by(C::INPUTS);
                    for (words, input) in line.chunks_exact_mut(words).zip(inputs) {
                        for (words, pieces) in words.chunks_exact_mut(parts).zip(pieces) {
                            let pieces = &pieces[input..][..C::INPUTS];
                            bytemuck::cast_slice_mut::<_, u8>(words)
                                .copy_from_slice(bytemuck::cast_slice(pieces));
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd, const VECTORS: usize>(&self, simd: S, part: &Part, (): &mut ()) {
        let format = self.panels.format;
        let codes = part.block.weights;
        let scales = part.block.scales.cast::<bf16>().wrapping_add(part.column);
        let (ahead, ahead_step) = part.ahead.from(codes, self.bytes(Self::STEP_INPUTS));
        let ahead_group = match part.ahead {
            Ahead::Behind(_) => format.header_bytes(),
            Ahead::At(..) => 0,
        };
        let tile = IntTile {
            k: part.inputs.len(),
            group: self.group,
            group_bytes: self.group_bytes,
            x: part.x.cast(),
            runs: part.runs,
            codes: codes.cast::<C>().wrapping_add(part.column),
            scales,
            minima: scales.wrapping_add(PANEL),
            c: part.sums,
            resume: part.inputs.start > 0,
            ahead,
            ahead_step,
            ahead_group,
            form: PhantomData::<R>,
        };
        // SAFETY: the caller's.
        unsafe { tile.run_rows::<S, VECTORS>(simd, part.rows) };
    }
}
