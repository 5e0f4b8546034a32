//! Causal attention over a paged KV cache, for prefill and decode alike.
//!
//! Queries are taken in tiles of rows, which share what is loaded of the keys and values; of their scores
//! those of a chunk of positions are kept, never a (T, T) matrix. A row's *share* of a chunk is the sum of its values,
//! weighted by a softmax of the chunk alone; shares are merged in order.
//!
//! A row's bits depend on its own query and on the positions up to its own: scores are sums over d in a fixed order, a
//! softmax has an exact maximum and sums by position modulo 16, a weighted sum of values is one over positions in a fixed
//! order. Tiles, chunks of a prompt, batches and threads change none of these. Slots behind a row's last position are
//! masked before they can take part, whatever they hold.
//!
//! What is multiplied, and in which order it is summed, are [`Products`]: by vectors, or by the tiles of AMX.
//!
//! A single row of a sequence is no tile. Tasks are of its chunks, cut between heads only where threads are to have as
//! much to do; in a chunk, all heads take what they want of a block before any goes on to the next. So a thread streams
//! keys, and then values, as they lie in memory.

mod amx;
mod vectors;

use super::kv_cache::{KvCache, KvLayout, width};
use super::norm;
use super::pool::partition;
use super::rows::SharedRows;
use super::scratch::Shards;
use super::simd::{Dots, Element, Kernel, LANES, Outlined, Simd};
use super::storage::Storage;
use super::tile::{Bf16Pairs, Bf16Singles, LINE, Singles, Tiles};
use super::{Cpu, Rows, RowsMut};
use amx::Amx;
use kiln_bundle::{Activations, BLOCK_TOKENS};
use std::cmp::Reverse;
use std::marker::PhantomData;
use std::ops::Range;
use vectors::Vectors;

// A vector of scores is a block.
const _: () = assert!(BLOCK_TOKENS == LANES);

/// Positions of a chunk.
const CHUNK: usize = 8 * BLOCK_TOKENS;

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The row of its first query.
    pub first_row: usize,
    /// Its queries, at positions `past..past + rows`.
    pub rows: usize,
    /// Positions that came before. With those of this step, which are in the cache already, its KV
    /// length is `past + rows`.
    pub past: usize,
    /// Blocks of the cache that hold its positions, in order.
    pub block_table: &'a [u32],
}

impl Sequence<'_> {
    fn kv_len(&self) -> usize {
        self.past + self.rows
    }

    /// Where it has a single row that attends to several chunks: these, whose shares wait for each other.
    fn waiting_chunks(&self) -> usize {
        match self.kv_len().div_ceil(CHUNK) {
            chunks if self.rows == 1 && chunks > 1 => chunks,
            _ => 0,
        }
    }
}

/// Attention of a step: each query attends to the positions of its sequence up to its own.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// (T, H*D).
    pub queries: Rows<'a>,
    /// Disjoint rows of the queries; rows of no sequence are left alone.
    pub sequences: &'a [Sequence<'a>],
    /// The layer's keys and values.
    pub cache: KvCache<'a>,
    /// What queries are multiplied with first.
    pub scale: f32,
    /// Where rows are rounded for linear layers, and the cache is of bf16, queries and what values are weighted with are
    /// rounded to bf16; else they stay `f32`.
    pub activations: Option<Activations>,
}

/// A sequence in the order of attention's tasks.
pub(super) struct Work {
    sequence: usize,
    /// Of its tasks, or, where it has a single row, of its positions times heads.
    first: usize,
    /// Of the shares that wait for others.
    first_share: usize,
}

impl Work {
    /// The one that `at`, a task or a position, falls to.
    fn find(work: &[Work], at: usize) -> &Work {
        &work[work.partition_point(|w| w.first <= at) - 1]
    }
}

/// Computes `op` into `out`, (T, H*D).
pub fn attention(cpu: &mut Cpu, op: &Attention<'_>, mut out: RowsMut<'_>) {
    let KvLayout {
        heads, head_dim, ..
    } = op.cache.layout;
    let (queries, blocks) = (&op.queries, op.cache.blocks());
    assert_eq!(queries.cols(), heads * head_dim, "columns of the queries");
    assert_eq!(
        (out.rows(), out.cols()),
        (queries.rows(), queries.cols()),
        "rows in and rows out"
    );
    for sequence in op.sequences {
        assert!(
            sequence.first_row + sequence.rows <= queries.rows(),
            "queries that exist"
        );
        let needed = sequence.kv_len().div_ceil(BLOCK_TOKENS);
        assert!(
            sequence.block_table.len() >= needed,
            "a block table of {needed} blocks"
        );
        let table = &sequence.block_table[..needed];
        assert!(
            table.iter().all(|&block| (block as usize) < blocks),
            "blocks that exist"
        );
    }
    match op.cache.data {
        Storage::F32(cache) => attend::<Vectors<Singles<_>>>(cpu, op, cache, &mut out),
        Storage::F16(cache) => attend::<Vectors<Singles<_>>>(cpu, op, cache, &mut out),
        Storage::Bf16(cache) => match op.activations {
            Some(_) => match cpu.isa.multiplies_tiles() {
                true => attend::<Amx>(cpu, op, cache, &mut out),
                false => attend::<Vectors<Bf16Pairs>>(cpu, op, cache, &mut out),
            },
            None => attend::<Vectors<Bf16Singles>>(cpu, op, cache, &mut out),
        },
    }
}

fn attend<P: Products>(
    cpu: &mut Cpu,
    op: &Attention<'_>,
    cache: &[P::Element],
    out: &mut RowsMut<'_>,
) {
    let isa = cpu.isa;
    let (heads, head_dim) = (op.cache.layout.heads, op.cache.layout.head_dim);
    let tile_rows = isa.run(TileRows::<P>(PhantomData));
    let cut = |sequence: &Sequence<'_>| Tiles::new(sequence.rows, tile_rows);

    // Long sequences first, and the last tiles of each first: where a thread helps another, the long tasks are
    // done. Tiles of one head follow each other, because they share its keys and values.
    let work = &mut cpu.scratch.work;
    work.clear();
    work.extend((0..op.sequences.len()).map(|sequence| Work {
        sequence,
        first: 0,
        first_share: 0,
    }));
    work.sort_unstable_by_key(|w| {
        let sequence = &op.sequences[w.sequence];
        (sequence.rows == 1, Reverse(sequence.kv_len()), w.sequence)
    });
    let (mut tile_tasks, mut positions, mut shares) = (0, 0, 0);
    for w in work.iter_mut() {
        let sequence = &op.sequences[w.sequence];
        let (first, len) = match sequence.rows {
            1 => (&mut positions, heads * sequence.kv_len()),
            _ => (&mut tile_tasks, heads * cut(sequence).count),
        };
        (w.first, w.first_share) = (*first, shares);
        *first += len;
        shares += heads * sequence.waiting_chunks();
    }
    let with_tiles = work.partition_point(|w| op.sequences[w.sequence].rows != 1);
    let (tiles_of, rows_of) = work.split_at(with_tiles);
    // Tasks of single rows are of equal length, a chunk or more if each thread gets one.
    let threads = cpu.pool.threads();
    let row_tasks = match positions / (heads * CHUNK) / threads {
        _ if positions == 0 => 0,
        each => threads * each.max(1),
    };

    let share_len = share_len(head_dim);
    let waiting = Shards::new(cpu.scratch.shares.reserve(shares * share_len));
    let row_len = width(head_dim) + CHUNK + 2 * share_len;
    let buffers = &mut cpu.scratch.threads;
    for buffer in buffers.iter_mut() {
        buffer.reserve(tile_rows.max(heads) * row_len);
    }
    let buffers = Shards::new(buffers);
    let out = out.shared();
    let part = |w: &Work| Part::<P> {
        cache,
        op,
        sequence: &op.sequences[w.sequence],
        out,
    };
    cpu.pool
        .parallel_for(tile_tasks + row_tasks, |thread, task| {
            // SAFETY: a thread uses the buffer of its own number.
            let scratch = unsafe { buffers.get(thread) }.reserve(0);
            if task < tile_tasks {
                let w = Work::find(tiles_of, task);
                let (part, task) = (part(w), task - w.first);
                let tiles = cut(part.sequence);
                return isa.run(Outlined(AttendTile {
                    part,
                    head: task / tiles.count,
                    rows: tiles.range(tiles.count - 1 - task % tiles.count),
                    scratch,
                }));
            }
            let mut left = partition(positions, row_tasks, task - tile_tasks);
            while !left.is_empty() {
                let w = Work::find(rows_of, left.start);
                let part = part(w);
                let chunk = (left.start - w.first) / (heads * CHUNK);
                let chunk_start = w.first + chunk * heads * CHUNK;
                let positions = chunk * CHUNK..part.sequence.kv_len().min((chunk + 1) * CHUNK);
                // A head falls to the task in which it begins.
                let head = |at: usize| (at - chunk_start).div_ceil(positions.len()).min(heads);
                let of_task = head(left.start)..head(left.end);
                left.start = left.end.min(chunk_start + heads * positions.len());
                let shares = (part.sequence.waiting_chunks() > 0).then(|| {
                    let first = w.first_share + chunk * heads + of_task.start;
                    // SAFETY: these heads' shares of the chunk belong to this task.
                    unsafe { waiting.range(first * share_len, of_task.len() * share_len) }
                });
                isa.run(Outlined(AttendRow {
                    part,
                    positions,
                    heads: of_task,
                    scratch: &mut *scratch,
                    shares,
                }));
            }
        });
    if shares > 0 {
        cpu.pool.parallel_for(rows_of.len() * heads, |_, task| {
            let (w, head) = (&rows_of[task / heads], task % heads);
            let part = part(w);
            let shares = (0..part.sequence.waiting_chunks()).map(|chunk| {
                let first = w.first_share + chunk * heads + head;
                // SAFETY: this head's shares belong to this task.
                unsafe { waiting.range(first * share_len, share_len) }
            });
            isa.run(MergeShares { part, head, shares });
        });
    }
}

/// Values of a row's share of a chunk, in one head: the sum of the values weighted with `exp(score - maximum)`,
/// (D'), then that maximum and the sum of the weights, and what fills up a line.
const fn share_len(head_dim: usize) -> usize {
    width(head_dim) + LANES
}

/// Queries in the tiles of an instruction set.
struct TileRows<P>(PhantomData<P>);

impl<P: Products> Kernel for TileRows<P> {
    type Output = usize;

    fn run<S: Simd>(self, _: S) -> usize {
        P::tile_rows::<S>()
    }
}

/// How queries are multiplied with keys, and weights with values: what a task keeps from one product to the next.
trait Products: Default {
    /// Of the KV cache.
    type Element: Element;

    /// Values of a word of a query, or of weights.
    const INPUTS: usize;
    /// As [`Kernel::DOTS`].
    const DOTS: Option<Dots>;

    /// Queries in the tallest tile.
    fn tile_rows<S: Simd>() -> usize;

    /// Computes a tile as one of as many rows as it takes.
    fn attend<S: Simd>(simd: S, tile: AttendTile<'_, Self>);

    /// Writes a vector of values as they are in words, which may be fewer.
    ///
    /// # Safety
    /// `p` is valid for writing as many.
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V);

    /// `scores[r][p] = q[r] . k[p]` of `rows` queries, for the whole blocks of some positions, which begin a block:
    /// (blocks, ROWS, 16). Queries are ROWS rows of words in lines.
    fn score_tile<S: Simd, const ROWS: usize>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, Self::Element>,
        positions: Range<usize>,
        rows: usize,
        q: &[f32],
        scores: &mut [f32],
    );

    /// `scores[p] = q . k[p]` of a single query, for a block's positions: (16).
    fn score_row<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, Self::Element>,
        block: usize,
        q: &[f32],
        scores: &mut [f32],
    );

    /// `sums[r] = sum over positions of weights[r][p] * v[p]`, of a chunk's positions those that a row attends to. Weights
    /// are words at the beginning of lines, (blocks, ROWS), and zeros behind a row's last one up to a whole line, and
    /// may be changed there; the sums begin the rows' shares.
    fn sum_values<S: Simd, const ROWS: usize>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, Self::Element>,
        reach: Reach,
        weights: &mut [f32],
        shares: &mut [f32],
    );

    /// `sums += sum over positions of weights[p] * v[p]` of a single row, for positions that begin a block; from zero
    /// where they begin a chunk.
    fn add_values<S: Simd>(
        &mut self,
        simd: S,
        cache: HeadCache<'_, Self::Element>,
        positions: Range<usize>,
        weights: &[f32],
        share: &mut [f32],
    );
}

/// A head's keys and values of a sequence.
struct HeadCache<'a, E> {
    layer: KvCache<'a>,
    data: &'a [E],
    head: usize,
    block_table: &'a [u32],
}

impl<'a, E> HeadCache<'a, E> {
    fn head_dim(&self) -> usize {
        self.layer.layout.head_dim
    }

    /// Where the keys of block `i` begin, (D', 16), in the whole cache, so that those of other blocks can be found from
    /// there.
    #[inline(always)]
    fn keys(&self, i: usize) -> *const E {
        let KvCache { layout, layer, .. } = self.layer;
        let range = layout.keys(self.block_table[i] as usize, layer, self.head);
        assert!(range.end <= self.data.len());
        self.data[range.start..].as_ptr()
    }

    /// The values of block `i`, (16, D').
    #[inline(always)]
    fn values(&self, i: usize) -> &'a [E] {
        let KvCache { layout, layer, .. } = self.layer;
        &self.data[layout.values(self.block_table[i] as usize, layer, self.head)]
    }
}

/// How many positions of a chunk the rows of a tile attend to: each to one more than the one before it.
#[derive(Clone, Copy)]
struct Reach {
    /// Positions before the chunk.
    first: usize,
    /// Positions that the first row attends to, from the sequence's first on.
    common: usize,
    rows: usize,
}

impl Reach {
    /// Of row `r`.
    #[inline(always)]
    fn of(self, r: usize) -> usize {
        (self.common + r).saturating_sub(self.first).min(CHUNK)
    }
}

/// A sequence's part of an attention, and where it is written to.
struct Part<'a, P: Products> {
    cache: &'a [P::Element],
    op: &'a Attention<'a>,
    sequence: &'a Sequence<'a>,
    out: SharedRows<'a>,
}

/// Some neighbouring queries, in one head.
struct AttendTile<'a, P: Products> {
    part: Part<'a, P>,
    head: usize,
    /// Within the sequence.
    rows: Range<usize>,
    scratch: &'a mut [f32],
}

impl<P: Products> Kernel for AttendTile<'_, P> {
    type Output = ();
    const DOTS: Option<Dots> = P::DOTS;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        P::attend(simd, self);
    }
}

impl<P: Products> AttendTile<'_, P> {
    /// Computes the tile as one of ROWS rows, of which the last one is repeated as needed.
    #[inline(always)]
    fn attend<S: Simd, const ROWS: usize>(self, simd: S) {
        let AttendTile {
            part,
            head,
            rows,
            scratch,
        } = self;
        let mut products = P::default();
        let head_dim = part.op.cache.layout.head_dim;
        let share_len = share_len(head_dim);
        // Positions that the first row attends to, and that the last one does.
        let common = part.sequence.past + rows.start + 1;
        let longest = part.sequence.past + rows.end;

        // Queries and scores are in lines; a block's scores are a line of each row.
        let (q, rest) = scratch.split_at_mut(ROWS * width(head_dim));
        let (scores, rest) = rest.split_at_mut(ROWS * CHUNK);
        let (merged, rest) = rest.split_at_mut(ROWS * share_len);
        let of_chunk = &mut rest[..ROWS * share_len];
        for r in 0..ROWS {
            let row = rows.start + r.min(rows.len() - 1);
            part.load_query::<S, ROWS>(simd, row, head, &mut q[r * LINE..]);
        }
        for first in (0..longest).step_by(CHUNK) {
            let positions = first..longest.min(first + CHUNK);
            let cache = part.cache(head);
            products.score_tile::<S, ROWS>(simd, cache, positions, rows.len(), q, scores);

            let shares = match first {
                0 => &mut *merged,
                _ => &mut *of_chunk,
            };
            let reach = Reach {
                first,
                common,
                rows: rows.len(),
            };
            for r in 0..rows.len() {
                let len = reach.of(r);
                if len > 0 {
                    let numbers = softmax::<P, S>(simd, &mut scores[r * LINE..], ROWS, len);
                    shares[r * share_len + width(head_dim)..][..2].copy_from_slice(&numbers);
                }
            }
            products.sum_values::<S, ROWS>(simd, part.cache(head), reach, scores, shares);
            if first > 0 {
                let pairs = merged
                    .chunks_exact_mut(share_len)
                    .zip(of_chunk.chunks(share_len));
                for (r, (merged, share)) in pairs.enumerate().take(rows.len()) {
                    if reach.of(r) > 0 {
                        merge(simd, merged, share);
                    }
                }
            }
        }
        for (r, row) in rows.enumerate() {
            part.finish(simd, row, head, &merged[r * share_len..][..share_len]);
        }
    }
}

/// A sequence's only query, in neighbouring heads, and a chunk of positions.
struct AttendRow<'a, P: Products> {
    part: Part<'a, P>,
    /// Of the chunk.
    positions: Range<usize>,
    heads: Range<usize>,
    scratch: &'a mut [f32],
    /// Where the heads' shares are put if they wait for others.
    shares: Option<&'a mut [f32]>,
}

impl<P: Products> Kernel for AttendRow<'_, P> {
    type Output = ();
    const DOTS: Option<Dots> = P::DOTS;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AttendRow { part, heads, .. } = self;
        let mut products = P::default();
        let head_dim = part.op.cache.layout.head_dim;
        let (share_len, q_len) = (share_len(head_dim), width(head_dim));
        let (first, len) = (self.positions.start, self.positions.len());

        // A block's scores are a line of each head.
        let (q, rest) = self.scratch.split_at_mut(heads.len() * q_len);
        let (scores, rest) = rest.split_at_mut(heads.len() * CHUNK);
        for (i, head) in heads.clone().enumerate() {
            part.load_query::<S, 1>(simd, 0, head, &mut q[i * q_len..]);
        }
        for block in (0..len).step_by(BLOCK_TOKENS) {
            for (i, head) in heads.clone().enumerate() {
                let line = &mut scores[block * heads.len() + i * LINE..];
                let (block, q) = ((first + block) / BLOCK_TOKENS, &q[i * q_len..]);
                products.score_row(simd, part.cache(head), block, q, line);
            }
        }
        let waits = self.shares.is_some();
        let shares = self.shares.unwrap_or(&mut rest[..heads.len() * share_len]);
        for (i, share) in shares.chunks_exact_mut(share_len).enumerate() {
            let numbers = softmax::<P, S>(simd, &mut scores[i * LINE..], heads.len(), len);
            share[q_len..][..2].copy_from_slice(&numbers);
        }
        for block in (0..len).step_by(BLOCK_TOKENS) {
            let positions = first + block..first + len.min(block + BLOCK_TOKENS);
            for (i, head) in heads.clone().enumerate() {
                let weights = &scores[block * heads.len() + i * LINE..];
                let share = &mut shares[i * share_len..][..share_len];
                products.add_values(simd, part.cache(head), positions.clone(), weights, share);
            }
        }
        if !waits {
            for (head, share) in heads.zip(shares.chunks_exact(share_len)) {
                part.finish(simd, 0, head, share);
            }
        }
    }
}

/// Merges the shares of a sequence's only query in one head, and writes its output.
struct MergeShares<'a, P: Products, I> {
    part: Part<'a, P>,
    head: usize,
    /// In the order of the chunks.
    shares: I,
}

impl<'b, P: Products, I: Iterator<Item = &'b mut [f32]>> Kernel for MergeShares<'_, P, I> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let Some(merged) = self.shares.next() else {
            return;
        };
        for share in self.shares {
            merge(simd, merged, share);
        }
        self.part.finish(simd, 0, self.head, merged);
    }
}

/// Takes the share of a later chunk into one of what was before.
#[inline(always)]
fn merge<S: Simd>(simd: S, merged: &mut [f32], share: &[f32]) {
    assert!(merged.len() == share.len() && share.len().is_multiple_of(LANES));
    let maximum_at = share.len() - LANES;
    let [maximum, later] = [merged[maximum_at], share[maximum_at]];
    let both = if maximum > later { maximum } else { later };
    let factor = |maximum: f32| simd.exp(simd.splat(maximum - both));
    let [factor, later_factor] = [factor(maximum), factor(later)];
    // The sums of values and the line of numbers, of which the maximum is put right.
    for d in (0..share.len()).step_by(LANES) {
        // SAFETY: both have these values.
        unsafe {
            let p = merged.as_mut_ptr().add(d);
            let kept = simd.mul(simd.load_f32(p), factor);
            let later = simd.load_f32(share.as_ptr().add(d));
            simd.store_f32(p, simd.fma(later, later_factor, kept));
        }
    }
    merged[maximum_at] = both;
}

impl<P: Products> Part<'_, P> {
    /// A query, scaled, as words of one of ROWS rows in lines.
    #[inline(always)]
    fn load_query<S: Simd, const ROWS: usize>(
        &self,
        simd: S,
        row: usize,
        head: usize,
        words: &mut [f32],
    ) {
        let head_dim = self.op.cache.layout.head_dim;
        let row = self.op.queries.row(self.sequence.first_row + row);
        let query = &row[head * head_dim..][..head_dim];
        for (i, d) in (0..head_dim).step_by(LANES).enumerate() {
            // A vector of values takes a line, or a part of one.
            let (line, part) = (i / P::INPUTS, i % P::INPUTS);
            let words = &mut words[line * ROWS * LINE..][..LINE];
            // SAFETY: these values exist, and the words that they take.
            unsafe {
                let values = norm::load(simd, query.as_ptr().add(d), head_dim - d);
                let values = simd.mul(values, simd.splat(self.op.scale));
                let words = words.as_mut_ptr().add(part * LANES / P::INPUTS);
                P::store(simd, words.cast(), values);
            }
        }
    }

    /// Writes a row of a head, given its share of all positions.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, row: usize, head: usize, share: &[f32]) {
        let head_dim = self.op.cache.layout.head_dim;
        let (sums, numbers) = share.split_at(width(head_dim));
        let factor = simd.splat(1.0 / numbers[1]);
        let row = self.sequence.first_row + row;
        for (d, sums) in (0..).step_by(LANES).zip(sums.chunks_exact(LANES)) {
            // SAFETY: as many sums; this head's columns of the row belong to this task.
            unsafe {
                let out = self.out.at(row, head * head_dim + d);
                let sum = simd.load_f32(sums.as_ptr());
                norm::store(simd, out, simd.mul(sum, factor), head_dim - d);
            }
        }
    }

    /// A head's keys and values.
    #[inline(always)]
    fn cache(&self, head: usize) -> HeadCache<'_, P::Element> {
        HeadCache {
            layer: self.op.cache,
            data: self.cache,
            head,
            block_table: self.sequence.block_table,
        }
    }
}

/// Turns the first `len` scores of one of `rows` rows in lines into words of `exp(score - maximum)`, at the beginning
/// of each line, and returns the maximum and the sum of these weights before they are rounded: by position modulo 16
/// first, then across. What follows them up to a whole line becomes zero.
#[inline(always)]
fn softmax<P: Products, S: Simd>(simd: S, scores: &mut [f32], rows: usize, len: usize) -> [f32; 2] {
    let last = (len - 1) / LINE;
    let tail = len - last * LINE;
    assert!(scores.len() >= last * rows * LINE + LINE);
    let p = scores.as_mut_ptr();
    let line = |i: usize| p.wrapping_add(i * rows * LINE);
    // SAFETY: there are `last + 1` lines.
    unsafe {
        let mut maximum = simd.keep_first(simd.load_f32(line(last)), tail, f32::NEG_INFINITY);
        for i in 0..last {
            maximum = simd.max(maximum, simd.load_f32(line(i)));
        }
        // A chunk of nothing but -inf has weights of 0 beside others.
        let greatest = simd.max_lanes(maximum).max(f32::MIN);
        let maximum = simd.splat(greatest);
        let mut sum = simd.zero();
        for i in 0..last {
            let e = simd.exp(simd.sub(simd.load_f32(line(i)), maximum));
            P::store(simd, line(i).cast(), e);
            sum = simd.add(sum, e);
        }
        let e = simd.exp(simd.sub(simd.load_f32(line(last)), maximum));
        let e = simd.keep_first(e, tail, 0.0);
        P::store(simd, line(last).cast(), e);
        [greatest, simd.sum_lanes(simd.add(sum, e))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::kv_cache::{KvCacheMut, write_kv};
    use crate::cpu::testing::{Elements, Random, bits, cpu, cpus, isas};

    /// Queries, keys and values of a batch, its blocks strewn over a cache full of NaN.
    struct Batch {
        heads: usize,
        head_dim: usize,
        /// KV length of each sequence.
        lens: Vec<usize>,
        block_tables: Vec<Vec<u32>>,
        q: Vec<Vec<f32>>,
        k: Vec<Vec<f32>>,
        v: Vec<Vec<f32>>,
        cache: Elements,
        activations: Option<Activations>,
    }

    /// Of each element type, and of bf16 with rounded queries and weights, as rows of bf16 ask for it and rows of 8 bits.
    const KINDS: usize = 5;
    /// Of the cache, and the one that is looked at.
    const LAYERS: usize = 3;
    const LAYER: usize = 1;

    impl Batch {
        fn new(heads: usize, head_dim: usize, lens: &[usize], kind: usize) -> Batch {
            let mut random = Random::new((heads * 1000 + head_dim + lens.len()) as u64);
            let blocks: usize = lens
                .iter()
                .map(|len| len.div_ceil(BLOCK_TOKENS))
                .sum::<usize>()
                + 3;
            let mut free = random.permutation(blocks);
            let layout = KvLayout::new(LAYERS, heads, head_dim);
            let empty = vec![f32::NAN; blocks * layout.block_len()];
            let mut rows = || -> Vec<Vec<f32>> {
                lens.iter()
                    .map(|len| random.values(len * heads * head_dim))
                    .collect()
            };
            Batch {
                heads,
                head_dim,
                lens: lens.to_vec(),
                q: rows()
                    .into_iter()
                    .map(|q| q.iter().map(|x| x * 3.0).collect())
                    .collect(),
                k: rows(),
                v: rows(),
                block_tables: lens
                    .iter()
                    .map(|len| free.split_off(free.len() - len.div_ceil(BLOCK_TOKENS)))
                    .collect(),
                cache: Elements::each(&empty)[kind.min(2)].clone(),
                activations: match kind {
                    3 => Some(Activations::Bf16),
                    4 => Some(Activations::Int8),
                    _ => None,
                },
            }
        }

        fn cols(&self) -> usize {
            self.heads * self.head_dim
        }

        /// Writes positions into the cache and attends from them; per sequence the range of
        /// positions. Returns the output rows of each sequence.
        fn step(&mut self, cpu: &mut Cpu, steps: &[(usize, Range<usize>)]) -> Vec<Vec<f32>> {
            let cols = self.cols();
            let stride = 3 * cols + 5;
            let t: usize = steps.iter().map(|(_, range)| range.len()).sum();
            let mut qkv = vec![f32::NAN; t * stride];
            let mut slots = Vec::new();
            let mut sequences = Vec::new();
            for (s, range) in steps {
                let table = &self.block_tables[*s];
                sequences.push(Sequence {
                    first_row: slots.len(),
                    rows: range.len(),
                    past: range.start,
                    block_table: table,
                });
                for position in range.clone() {
                    let row = &mut qkv[slots.len() * stride..][..3 * cols];
                    for (part, source) in [&self.q, &self.k, &self.v].into_iter().enumerate() {
                        row[part * cols..][..cols]
                            .copy_from_slice(&source[*s][position * cols..][..cols]);
                    }
                    let block = table[position / BLOCK_TOKENS] as usize;
                    slots.push((block * BLOCK_TOKENS + position % BLOCK_TOKENS) as u32);
                }
            }
            let part = |i: usize| Rows::strided(&qkv[qkv.len().min(i * cols)..], t, cols, stride);
            let layout = KvLayout::new(LAYERS, self.heads, self.head_dim);
            let mut cache = KvCacheMut::new(self.cache.as_storage_mut(), layout, LAYER);
            write_kv(cpu, part(1), part(2), &slots, &mut cache);
            let op = Attention {
                queries: part(0),
                sequences: &sequences,
                cache: KvCache::new(self.cache.as_storage(), layout, LAYER),
                scale: 0.7 / (self.head_dim as f32).sqrt(),
                activations: self.activations,
            };
            let mut out = vec![f32::NAN; t * cols];
            attention(cpu, &op, RowsMut::new(&mut out, t, cols));
            sequences
                .iter()
                .map(|s| out[s.first_row * cols..][..s.rows * cols].to_vec())
                .collect()
        }

        fn prefill(&mut self, cpu: &mut Cpu) -> Vec<Vec<f32>> {
            let steps: Vec<_> = self.lens.iter().map(|&len| 0..len).enumerate().collect();
            self.step(cpu, &steps)
        }

        /// Output of sequence `s` at `position`, in `f64` from what is rounded; and how far it may be off because a
        /// weight that lies between two of bf16 is rounded to the other one.
        fn reference(&self, s: usize, position: usize) -> Vec<(f64, f64)> {
            let (cols, d) = (self.cols(), self.head_dim);
            let bf16 = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
            let scale = 0.7 / (d as f32).sqrt();
            let query = |x: f32| match self.activations {
                Some(_) => bf16(x * scale),
                None => f64::from(x) * 0.7 / (d as f64).sqrt(),
            };
            let rounded = |x: f32| -> f64 {
                f64::from(match &self.cache {
                    Elements::F32(_) => x,
                    Elements::F16(_) => half::f16::from_f32(x).to_f32(),
                    Elements::Bf16(_) => half::bf16::from_f32(x).to_f32(),
                })
            };
            let mut out = vec![(0.0, 0.0); cols];
            for head in 0..self.heads {
                let at = |p: usize, i: usize| p * cols + head * d + i;
                let scores: Vec<f64> = (0..=position)
                    .map(|p| {
                        let dot: f64 = (0..d)
                            .map(|i| {
                                query(self.q[s][at(position, i)]) * rounded(self.k[s][at(p, i)])
                            })
                            .sum();
                        dot
                    })
                    .collect();
                let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - maximum).exp()).sum();
                for (p, score) in scores.iter().enumerate() {
                    let chunk = scores.chunks(CHUNK).nth(p / CHUNK).unwrap_or_default();
                    let of_chunk = chunk.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let (weight, off) = match (score - of_chunk).exp() {
                        weight if self.activations.is_none() => (weight, 0.0),
                        weight => (bf16(weight as f32), 1.0 / 256.0),
                    };
                    let weight = weight * (of_chunk - maximum).exp();
                    for i in 0..d {
                        let (out, may_be_off) = &mut out[head * d + i];
                        *out += weight / total * rounded(self.v[s][at(p, i)]);
                        *may_be_off = off / total;
                    }
                }
            }
            out
        }
    }

    #[test]
    fn matches_the_definition() {
        let short: &[usize] = &[1, 7, 16, 17, 45];
        let long: &[usize] = &[CHUNK, CHUNK + 1, 2 * CHUNK + 19];
        let shapes = [16, 64, 80, 128, 3, 20].map(|head_dim| (head_dim, short));
        for (head_dim, lens) in shapes.into_iter().chain([(20, long), (272, &[33])]) {
            for kind in 0..KINDS {
                let mut expected = None;
                for mut cpu in cpus() {
                    let mut batch = Batch::new(3, head_dim, lens, kind);
                    let out = batch.prefill(&mut cpu);
                    // Of long sequences the positions about the ends of chunks.
                    let looked_at = |position: &usize| {
                        *position < 50 || (*position + 2) % CHUNK < 5 || *position > 2 * CHUNK
                    };
                    let rows = lens.iter().enumerate().flat_map(|(s, &len)| {
                        (0..len)
                            .filter(looked_at)
                            .map(move |position| (s, position))
                    });
                    let expected = expected.get_or_insert_with(|| -> Vec<_> {
                        let reference = |(s, position)| batch.reference(s, position);
                        rows.clone().map(reference).collect()
                    });
                    for ((s, position), expected) in rows.zip(expected) {
                        let found = &out[s][position * batch.cols()..][..batch.cols()];
                        for (found, (expect, may_be_off)) in found.iter().zip(expected) {
                            let error = (f64::from(*found) - *expect).abs();
                            assert!(
                                error < 2e-6 + *may_be_off,
                                "D {head_dim}, kind {kind}, {s} at {position}: {found} for {expect}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        let shapes = [
            (64, 0),
            (80, 1),
            (16, 2),
            (20, 2),
            (64, 3),
            (80, 3),
            (3, 3),
            (18, 4),
        ];
        let shapes = shapes.map(|(head_dim, kind)| (head_dim, kind, 75));
        let long = [0, 2, 3].map(|kind| (16, kind, 2 * CHUNK + 75));
        for (head_dim, kind, longest) in shapes.into_iter().chain(long) {
            for isa in isas() {
                let lens = [longest, 20, 3];
                let mut batch = Batch::new(2, head_dim, &lens, kind);
                let whole = batch.prefill(&mut cpu(isa, 1));
                let cols = batch.cols();
                for threads in 1..=3 {
                    let mut cpu = cpu(isa, threads);
                    assert!(batch.prefill(&mut cpu) == whole, "{threads} threads");

                    // One sequence in chunks, in blocks elsewhere and in a fresh cache.
                    for chunk in [1, 2, 5, 6, 16, 31, 74, CHUNK + 40] {
                        let mut alone = Batch::new(2, head_dim, &lens, kind);
                        alone.block_tables[0].reverse();
                        for first in (0..lens[0]).step_by(chunk) {
                            let range = first..lens[0].min(first + chunk);
                            let out = alone.step(&mut cpu, &[(0, range.clone())]);
                            let expect = &whole[0][range.start * cols..range.end * cols];
                            assert_eq!(bits(&out[0]), bits(expect), "chunks of {chunk}");
                        }
                    }

                    // Decoding beside a sequence that is still being prefilled.
                    let mut mixed = Batch::new(2, head_dim, &lens, kind);
                    mixed.step(&mut cpu, &[(1, 0..19), (2, 0..2)]);
                    let out = mixed.step(&mut cpu, &[(1, 19..20), (0, 0..longest), (2, 2..3)]);
                    assert_eq!(bits(&out[0]), bits(&whole[1][19 * cols..]));
                    assert_eq!(bits(&out[1]), bits(&whole[0]));
                    assert_eq!(bits(&out[2]), bits(&whole[2][2 * cols..]));
                }
            }
        }
    }

    #[test]
    fn what_follows_a_row_never_shows_in_it() {
        let (len, changed) = (75, 37);
        for (head_dim, kind) in [(64, 0), (20, 2), (64, 3), (80, 3), (272, 3)] {
            for isa in isas() {
                let mut cpu = cpu(isa, 1);
                let mut batch = Batch::new(2, head_dim, &[len], kind);
                let before = batch.prefill(&mut cpu);
                let cols = batch.cols();
                for wrong in [f32::NAN, f32::INFINITY, 1e30] {
                    batch.k[0][changed * cols..].fill(wrong);
                    batch.v[0][changed * cols..].fill(wrong);
                    let after = batch.prefill(&mut cpu);
                    let [before, after] =
                        [&before, &after].map(|out| out[0].split_at(changed * cols));
                    let same = bits(before.0) == bits(after.0);
                    assert!(same, "{isa}, D {head_dim}, kind {kind}: {wrong}");
                    assert_ne!(bits(before.1), bits(after.1));
                }
            }
        }
    }

    #[test]
    fn long_rows_decode_together_as_they_were_prefilled() {
        let lens = [2 * CHUNK + 75, CHUNK + 1, CHUNK, 3, 3 * CHUNK];
        for (heads, kind) in [(2, 0), (3, 2), (5, 3)] {
            for threads in 1..=5 {
                let mut cpu = cpu(Isa::of_machine(), threads);
                let mut batch = Batch::new(heads, 16, &lens, kind);
                let whole = batch.prefill(&mut cpu);
                let last = lens.iter().map(|len| len - 1..*len).enumerate();
                let out = batch.step(&mut cpu, &last.collect::<Vec<_>>());
                for (s, out) in out.iter().enumerate() {
                    let expect = &whole[s][(lens[s] - 1) * batch.cols()..];
                    assert_eq!(bits(out), bits(expect), "{threads} threads, {s}");
                }
            }
        }
    }

    #[test]
    fn no_sequences_are_no_work() {
        for mut cpu in cpus() {
            let mut batch = Batch::new(2, 16, &[4], 0);
            assert!(batch.step(&mut cpu, &[]).is_empty());
            assert_eq!(batch.step(&mut cpu, &[(0, 0..0)]), [Vec::<f32>::new()]);
        }
    }
}
