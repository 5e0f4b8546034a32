//! Causal attention over a paged KV cache, for prefill and decode alike.
//!
//! A block holds [`BLOCK_TOKENS`] positions of every head. Keys lie as (D, 16), so that a vector
//! holds one component of sixteen neighbouring keys and scores need no sums across lanes; values lie
//! as (16, D). Queries are taken in tiles of a few rows, which share what is loaded of the keys and
//! values; their scores are the only thing kept, never a (T, T) matrix.
//!
//! A row's bits depend on its own query and on the positions up to its own: scores are chains over
//! d, the softmax has an exact maximum and sums by position modulo 16, the output is a chain over
//! positions. Tiles, chunks of a prompt, batches and threads change none of these. Slots behind a
//! row's last position are masked before they can take part, whatever they hold.

use super::norm;
use super::rows::SharedRows;
use super::scratch::Shards;
use super::simd::{Dots, Element, Kernel, LANES, Outlined, Simd};
use super::storage::{Storage, StorageMut};
use super::tile::{Bf16Pairs, Factors, LINE, Singles, Step, Tile, Tiles};
use super::{Cpu, Rows, RowsMut};
use bytemuck::Zeroable;
use kiln_bundle::{Activations, BLOCK_TOKENS};
use std::cmp::Reverse;
use std::marker::PhantomData;
use std::ops::Range;

// A vector of scores is a block.
const _: () = assert!(BLOCK_TOKENS == LANES);

/// One layer's keys and values, to read.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a> {
    keys: Storage<'a>,
    values: Storage<'a>,
    heads: usize,
    head_dim: usize,
}

impl<'a> KvCache<'a> {
    /// The cache of `heads` heads of dimension `head_dim`: `keys` (blocks, H, D, 16) and `values`
    /// (blocks, H, 16, D), of one element type.
    pub fn new(
        keys: Storage<'a>,
        values: Storage<'a>,
        heads: usize,
        head_dim: usize,
    ) -> KvCache<'a> {
        check_cache(keys.len(), values.len(), heads, head_dim);
        KvCache {
            keys,
            values,
            heads,
            head_dim,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.keys.len() / (self.heads * self.head_dim * BLOCK_TOKENS)
    }
}

/// One layer's keys and values, to write.
#[derive(Debug)]
pub struct KvCacheMut<'a> {
    keys: StorageMut<'a>,
    values: StorageMut<'a>,
    heads: usize,
    head_dim: usize,
}

impl<'a> KvCacheMut<'a> {
    /// As [`KvCache::new`].
    pub fn new(
        keys: StorageMut<'a>,
        values: StorageMut<'a>,
        heads: usize,
        head_dim: usize,
    ) -> KvCacheMut<'a> {
        check_cache(keys.len(), values.len(), heads, head_dim);
        KvCacheMut {
            keys,
            values,
            heads,
            head_dim,
        }
    }
}

fn check_cache(keys: usize, values: usize, heads: usize, head_dim: usize) {
    assert!(heads > 0 && head_dim > 0, "heads and their dimension");
    assert_eq!(keys, values, "keys and values");
    assert_eq!(
        keys % (heads * head_dim * BLOCK_TOKENS),
        0,
        "a whole number of blocks"
    );
}

const ONE_TYPE: &str = "keys and values are of one element type";

/// Writes new keys and values, both (T, H*D), into the cache, rounded to nearest even. Row t goes to
/// slot `slot_mapping[t]`, which is `block * BLOCK_TOKENS + offset`; of rows for the same slot the
/// last one stays.
pub fn write_kv(
    cpu: &Cpu,
    keys: Rows<'_>,
    values: Rows<'_>,
    slot_mapping: &[u32],
    cache: &mut KvCacheMut<'_>,
) {
    let (heads, head_dim) = (cache.heads, cache.head_dim);
    for rows in [&keys, &values] {
        assert_eq!(rows.rows(), slot_mapping.len(), "a slot for each row");
        assert_eq!(rows.cols(), heads * head_dim, "columns of keys and values");
    }
    let slots = cache.keys.len() / (heads * head_dim);
    assert!(
        slot_mapping.iter().all(|&slot| (slot as usize) < slots),
        "slots that exist"
    );
    match (&mut cache.keys, &mut cache.values) {
        (StorageMut::F32(k), StorageMut::F32(v)) => {
            scatter(cpu, keys, values, slot_mapping, k, v, [heads, head_dim]);
        }
        (StorageMut::F16(k), StorageMut::F16(v)) => {
            scatter(cpu, keys, values, slot_mapping, k, v, [heads, head_dim]);
        }
        (StorageMut::Bf16(k), StorageMut::Bf16(v)) => {
            scatter(cpu, keys, values, slot_mapping, k, v, [heads, head_dim]);
        }
        _ => unreachable!("{ONE_TYPE}"),
    }
}

/// Values of keys below which the caller writes the cache alone.
const WRITE_ALONE: usize = 1024;
/// Rows from the one being written to the cache to the one being asked for.
const ROWS_AHEAD: usize = 8;

fn scatter<E: Element>(
    cpu: &Cpu,
    keys: Rows<'_>,
    values: Rows<'_>,
    slot_mapping: &[u32],
    key_cache: &mut [E],
    value_cache: &mut [E],
    [heads, head_dim]: [usize; 2],
) {
    let block_len = head_dim * BLOCK_TOKENS;
    let (key_cache, value_cache) = (Shards::new(key_cache), Shards::new(value_cache));
    let write_head = |_: usize, head: usize| {
        let columns = head * head_dim..(head + 1) * head_dim;
        for (t, &slot) in slot_mapping.iter().enumerate() {
            let (block, offset) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            let first = (block * heads + head) * block_len;
            // SAFETY: this head's part of the block belongs to this task.
            let (key_block, value_block) = unsafe {
                (
                    key_cache.range(first, block_len),
                    value_cache.range(first, block_len),
                )
            };
            // A head's part of a row is too short for the processor to look ahead by itself.
            let ahead = t + ROWS_AHEAD;
            let ahead = (ahead < slot_mapping.len())
                .then(|| [&keys, &values].map(|rows| &rows.row(ahead)[columns.clone()]));
            cpu.isa.run(WriteSlot {
                key: &keys.row(t)[columns.clone()],
                value: &values.row(t)[columns.clone()],
                ahead,
                key_block,
                value_block,
                offset,
            });
        }
    };
    if slot_mapping.len() * heads * head_dim <= WRITE_ALONE {
        (0..heads).for_each(|head| write_head(0, head));
    } else {
        cpu.pool.parallel_for(heads, write_head);
    }
}

/// One position of one head.
struct WriteSlot<'a, E> {
    /// (D).
    key: &'a [f32],
    /// (D).
    value: &'a [f32],
    /// A key and a value that are to be read soon.
    ahead: Option<[&'a [f32]; 2]>,
    /// (D, 16).
    key_block: &'a mut [E],
    /// (16, D).
    value_block: &'a mut [E],
    offset: usize,
}

impl<E: Element> Kernel for WriteSlot<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let head_dim = self.key.len();
        let value_row = &mut self.value_block[self.offset * head_dim..][..head_dim];
        for d in (0..head_dim).step_by(LANES) {
            for row in self.ahead.into_iter().flatten() {
                simd.prefetch(row[d..].as_ptr().cast());
            }
            let width = LANES.min(head_dim - d);
            let mut key = [E::zeroed(); LANES];
            // SAFETY: `width` values from d exist in the key, the value and the value's row.
            unsafe {
                E::store(
                    simd,
                    key.as_mut_ptr(),
                    norm::load(simd, self.key.as_ptr().add(d), width),
                );
                let value = norm::load(simd, self.value.as_ptr().add(d), width);
                if width == LANES {
                    E::store(simd, value_row.as_mut_ptr().add(d), value);
                } else {
                    E::store_first(simd, value_row.as_mut_ptr().add(d), value, width);
                }
            }
            let components = self.key_block[d * BLOCK_TOKENS..].chunks_exact_mut(BLOCK_TOKENS);
            for (positions, key) in components.zip(key).take(width) {
                positions[self.offset % BLOCK_TOKENS] = key;
            }
        }
    }
}

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
    /// What queries, and what values are weighted with, are rounded to where the cache is of the same kind of
    /// numbers; else they stay `f32`.
    pub activations: Option<Activations>,
}

/// A sequence in the order of attention's tasks.
pub(super) struct Work {
    sequence: usize,
    first_task: usize,
}

/// Computes `op` into `out`, (T, H*D).
pub fn attention(cpu: &mut Cpu, op: &Attention<'_>, mut out: RowsMut<'_>) {
    let KvCache {
        heads, head_dim, ..
    } = op.cache;
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
    match (op.cache.keys, op.cache.values) {
        (Storage::F32(k), Storage::F32(v)) => attend::<Singles<_>>(cpu, op, k, v, &mut out),
        (Storage::F16(k), Storage::F16(v)) => attend::<Singles<_>>(cpu, op, k, v, &mut out),
        (Storage::Bf16(k), Storage::Bf16(v)) => match op.activations {
            Some(Activations::Bf16) => attend::<Bf16Pairs>(cpu, op, k, v, &mut out),
            _ => attend::<Singles<_>>(cpu, op, k, v, &mut out),
        },
        _ => unreachable!("{ONE_TYPE}"),
    }
}

fn attend<F: Factors>(
    cpu: &mut Cpu,
    op: &Attention<'_>,
    keys: &[F::Element],
    values: &[F::Element],
    out: &mut RowsMut<'_>,
) {
    let (isa, heads, head_dim) = (cpu.isa, op.cache.heads, op.cache.head_dim);
    let tile_rows = isa.run(TileRows::<F>(PhantomData));
    let cut = |sequence: &Sequence<'_>| Tiles::new(sequence.rows, tile_rows);

    // Long sequences first, and the last tiles of each first: where a thread helps another, the long tasks are
    // done. Tiles of one head follow each other, because they share its keys and values.
    let work = &mut cpu.scratch.work;
    work.clear();
    work.extend((0..op.sequences.len()).map(|sequence| Work {
        sequence,
        first_task: 0,
    }));
    work.sort_unstable_by_key(|w| (Reverse(op.sequences[w.sequence].kv_len()), w.sequence));
    let mut tasks = 0;
    for w in work.iter_mut() {
        w.first_task = tasks;
        tasks += heads * cut(&op.sequences[w.sequence]).count;
    }

    let longest = op.sequences.iter().map(Sequence::kv_len).max().unwrap_or(0);
    let scratch_len = tile_rows * (pad(head_dim) + pad(longest) + pad(head_dim));
    let threads = &mut cpu.scratch.threads;
    for buffer in threads.iter_mut() {
        buffer.reserve(scratch_len);
    }
    let threads = Shards::new(threads);
    let out = out.shared();
    cpu.pool.parallel_for(tasks, |thread, task| {
        let w = &work[work.partition_point(|w| w.first_task <= task) - 1];
        let sequence = &op.sequences[w.sequence];
        let (tiles, task) = (cut(sequence), task - w.first_task);
        isa.run(Outlined(AttendTile::<F> {
            keys,
            values,
            op,
            sequence,
            head: task / tiles.count,
            rows: tiles.range(tiles.count - 1 - task % tiles.count),
            // SAFETY: a thread uses the buffer of its own number.
            scratch: unsafe { threads.get(thread) }.reserve(0),
            out,
        }));
    });
}

/// Rounds up to whole vectors.
const fn pad(len: usize) -> usize {
    len.next_multiple_of(LANES)
}

/// Queries in the tiles of an instruction set.
struct TileRows<F>(PhantomData<F>);

impl<F: Factors> Kernel for TileRows<F> {
    type Output = usize;

    fn run<S: Simd>(self, _: S) -> usize {
        F::tile_rows::<S>()
    }
}

/// Some neighbouring queries of one sequence, in one head.
struct AttendTile<'a, F: Factors> {
    keys: &'a [F::Element],
    values: &'a [F::Element],
    op: &'a Attention<'a>,
    sequence: &'a Sequence<'a>,
    head: usize,
    /// Within the sequence.
    rows: Range<usize>,
    scratch: &'a mut [f32],
    out: SharedRows<'a>,
}

impl<F: Factors> Kernel for AttendTile<'_, F> {
    type Output = ();
    const DOTS: Option<Dots> = F::DOTS;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        match F::tile_rows::<S>() {
            _ if self.rows.len() == 1 => self.attend::<S, 1>(simd),
            ..=4 => self.attend::<S, 4>(simd),
            5..=6 => self.attend::<S, 6>(simd),
            _ => self.attend::<S, 12>(simd),
        }
    }
}

impl<F: Factors> AttendTile<'_, F> {
    /// Computes the tile as one of ROWS rows, of which the last one is repeated as needed.
    #[inline(always)]
    fn attend<S: Simd, const ROWS: usize>(&mut self, simd: S) {
        let head_dim = self.op.cache.head_dim;
        let rows = self.rows.clone();
        let first_row = self.sequence.first_row + rows.start;
        let columns = self.head * head_dim..(self.head + 1) * head_dim;
        // Positions that every row attends to, and that the last one does.
        let common = self.sequence.past + rows.start + 1;
        let longest = self.sequence.past + rows.end;

        // Queries and scores are in lines; a block's scores are a line of each row.
        let (q, rest) = std::mem::take(&mut self.scratch).split_at_mut(ROWS * pad(head_dim));
        let (scores, rest) = rest.split_at_mut(ROWS * pad(longest));
        let sums = &mut rest[..ROWS * pad(head_dim)]; // (ROWS, pad(D))
        for r in 0..ROWS {
            let row = &self.op.queries.row(first_row + r.min(rows.len() - 1))[columns.clone()];
            for (i, d) in (0..head_dim).step_by(LANES).enumerate() {
                // A vector of values takes a line, or a part of one.
                let (line, part) = (i / F::INPUTS, i % F::INPUTS);
                let words = &mut q[(line * ROWS + r) * LINE..][..LINE];
                // SAFETY: these values exist, and the words that they take.
                unsafe {
                    let values = norm::load(simd, row.as_ptr().add(d), head_dim - d);
                    let values = simd.mul(values, simd.splat(self.op.scale));
                    let words = words.as_mut_ptr().add(part * LANES / F::INPUTS);
                    F::store(simd, words.cast(), values);
                }
            }
        }

        let blocks = longest.div_ceil(BLOCK_TOKENS);
        if ROWS == 1 {
            let q = &bytemuck::cast_slice(q)[..head_dim.div_ceil(F::INPUTS)];
            self.score_row(simd, q, &mut scores[..blocks * BLOCK_TOKENS]);
        } else {
            for first in (0..blocks).step_by(S::TILE_VECTORS) {
                // Within all keys, since a tile goes from one block to another.
                let place = |block: usize| self.block_range(block.min(blocks - 1));
                let keys = |block: usize| self.keys[place(block).start..].as_ptr();
                let [one, next] = [first, first + S::TILE_VECTORS].map(keys);
                let to_other = place(first + 1).start as isize - place(first).start as isize;
                let tile = Tile::<F> {
                    k: head_dim,
                    a: q.as_ptr().cast(),
                    b: one,
                    b_step: BLOCK_TOKENS,
                    b_vector: to_other,
                    c: scores[first * ROWS * LINE..].as_mut_ptr(),
                    c_stride: LINE,
                    c_vector: ROWS * LINE,
                    resume: false,
                    // Of two blocks only the first is asked for.
                    ahead: next.cast(),
                    ahead_step: F::INPUTS * BLOCK_TOKENS * size_of::<F::Element>(),
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

        let mut totals = [0.0; ROWS];
        for (r, total) in totals.iter_mut().enumerate().take(rows.len()) {
            *total = softmax::<F, S, ROWS>(simd, &mut scores[r * LINE..], common + r);
        }

        // A word of two positions is multiplied at once.
        let together = match rows.len() {
            1 => common,
            _ => common / F::INPUTS * F::INPUTS,
        };
        for first in (0..together).step_by(BLOCK_TOKENS) {
            let positions = first..together.min(first + BLOCK_TOKENS);
            self.accumulate::<S, ROWS>(simd, positions, &scores[first * ROWS..], sums);
        }
        for r in 0..rows.len() {
            let mut first = together;
            while first < common + r {
                let positions = first..(common + r).min((first + 1).next_multiple_of(BLOCK_TOKENS));
                let line = (first / BLOCK_TOKENS * ROWS + r) * LINE;
                let weights = &scores[line + first % BLOCK_TOKENS / F::INPUTS..];
                first = positions.end;
                let sums = &mut sums[r * pad(head_dim)..][..pad(head_dim)];
                self.accumulate::<S, 1>(simd, positions, weights, sums);
            }
        }

        for (r, total) in totals.iter().enumerate().take(rows.len()) {
            let factor = simd.splat(1.0 / total);
            for d in (0..head_dim).step_by(LANES) {
                // SAFETY: in the sums; this head's columns of the row belong to this task.
                unsafe {
                    let sum = simd.load_f32(sums[r * pad(head_dim) + d..].as_ptr());
                    let out = self.out.at(first_row + r, columns.start + d);
                    norm::store(simd, out, simd.mul(sum, factor), head_dim - d);
                }
            }
        }
    }

    /// `scores[p] = q . k[p]` for whole blocks of positions, given the query's words; several blocks at once,
    /// because a chain alone would wait for each of its multiply-adds.
    #[inline(always)]
    fn score_row<S: Simd>(&self, simd: S, q: &[u32], scores: &mut [f32]) {
        const TOGETHER: usize = 4;
        let blocks = scores.len() / BLOCK_TOKENS;
        for first in (0..blocks).step_by(TOGETHER) {
            // Behind the last block, it is computed again.
            let block = |i: usize| (first + i).min(blocks - 1);
            let keys: [*const F::Element; TOGETHER] =
                std::array::from_fn(|i| self.key_block(block(i)).as_ptr());
            let mut sums = [simd.zero(); TOGETHER];
            for (d, &word) in (0..).step_by(F::INPUTS).zip(q) {
                for i in 0..TOGETHER {
                    let step = Step {
                        at: keys[i].wrapping_add(d * BLOCK_TOKENS),
                        to_vector: 0,
                        to_step: BLOCK_TOKENS,
                    };
                    // SAFETY: row d of a block's keys, (D, 16), and the next where there is one.
                    let [key] =
                        unsafe { F::columns::<S, 1, 0>(simd, step, self.op.cache.head_dim - d) };
                    sums[i] = F::add_products(simd, sums[i], key, word);
                }
            }
            for i in 0..TOGETHER {
                let scores = &mut scores[block(i) * BLOCK_TOKENS..][..BLOCK_TOKENS];
                // SAFETY: a block has sixteen scores.
                unsafe { simd.store_f32(scores.as_mut_ptr(), sums[i]) };
            }
        }
    }

    /// `sums[r] += sum over positions of weights[r][position] * v[position]`, where the positions lie
    /// in one block and begin a word; from zero where they begin the sequence. The weights are a line of each row,
    /// from the first of the positions on.
    #[inline(always)]
    fn accumulate<S: Simd, const ROWS: usize>(
        &self,
        simd: S,
        positions: Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
    ) {
        let head_dim = self.op.cache.head_dim;
        let (block, offset) = (
            positions.start / BLOCK_TOKENS,
            positions.start % BLOCK_TOKENS,
        );
        let values = &self.value_block(block)[offset * head_dim..][..positions.len() * head_dim];
        let tile = Tile::<F> {
            k: positions.len(),
            a: weights.as_ptr().cast(),
            b: values.as_ptr(),
            b_step: head_dim,
            b_vector: LANES as isize,
            c: sums.as_mut_ptr(),
            c_stride: pad(head_dim),
            c_vector: LANES,
            resume: positions.start > 0,
            ahead: values.as_ptr().cast(),
            ahead_step: 0,
        };
        assert!(sums.len() >= ROWS * pad(head_dim));
        assert!(weights.len() >= (ROWS - 1) * LINE + positions.len().div_ceil(F::INPUTS));
        let at = |d: usize| Tile {
            b: tile.b.wrapping_add(d),
            c: tile.c.wrapping_add(d),
            ..tile
        };
        let mut d = 0;
        // SAFETY (of all four): the columns lie within the values, (positions, D), and the sums,
        // (ROWS, pad(D)); the weights are as asserted.
        if ROWS == 1 {
            while d + 4 * LANES <= head_dim {
                // SAFETY: as above.
                unsafe { at(d).run::<S, ROWS, 4>(simd) };
                d += 4 * LANES;
            }
        }
        if ROWS > 1 && S::TILE_VECTORS == 2 {
            while d + 2 * LANES <= head_dim {
                // SAFETY: as above.
                unsafe { at(d).run::<S, ROWS, 2>(simd) };
                d += 2 * LANES;
            }
        }
        while d + LANES <= head_dim {
            // SAFETY: as above.
            unsafe { at(d).run::<S, ROWS, 1>(simd) };
            d += LANES;
        }
        if d < head_dim {
            // The last columns, with zeros to make up a vector.
            let mut columns = [[F::Element::zeroed(); LANES]; BLOCK_TOKENS];
            for (to, from) in columns.iter_mut().zip(values.chunks_exact(head_dim)) {
                to[..head_dim - d].copy_from_slice(&from[d..]);
            }
            let tile = Tile {
                b: columns.as_ptr().cast(),
                b_step: LANES,
                ..at(d)
            };
            // SAFETY: as above.
            unsafe { tile.run::<S, ROWS, 1>(simd) };
        }
    }

    /// This head's keys in the sequence's block `i`: (D, 16).
    fn key_block(&self, i: usize) -> &[F::Element] {
        self.block(self.keys, i)
    }

    /// This head's values in the sequence's block `i`: (16, D).
    fn value_block(&self, i: usize) -> &[F::Element] {
        self.block(self.values, i)
    }

    #[inline(always)]
    fn block<'b>(&self, cache: &'b [F::Element], i: usize) -> &'b [F::Element] {
        &cache[self.block_range(i)]
    }

    /// Where this head's part of the sequence's block `i` lies in keys and in values.
    #[inline(always)]
    fn block_range(&self, i: usize) -> Range<usize> {
        let len = self.op.cache.head_dim * BLOCK_TOKENS;
        let block = self.sequence.block_table[i] as usize;
        let start = (block * self.op.cache.heads + self.head) * len;
        start..start + len
    }
}

/// Turns the first `len` scores of one of ROWS rows in lines into words of `exp(score - maximum)`, at the beginning of
/// each line, and returns their sum: by position modulo 16 first, then across. What follows them up to a whole line
/// becomes zero.
#[inline(always)]
fn softmax<F: Factors, S: Simd, const ROWS: usize>(simd: S, scores: &mut [f32], len: usize) -> f32 {
    let last = (len - 1) / LINE;
    let tail = len - last * LINE;
    assert!(scores.len() >= last * ROWS * LINE + LINE);
    let p = scores.as_mut_ptr();
    let line = |i: usize| p.wrapping_add(i * ROWS * LINE);
    // SAFETY: there are `last + 1` lines.
    unsafe {
        let mut maximum = simd.keep_first(simd.load_f32(line(last)), tail, f32::NEG_INFINITY);
        for i in 0..last {
            maximum = simd.max(maximum, simd.load_f32(line(i)));
        }
        let maximum = simd.splat(simd.max_lanes(maximum));
        let mut sum = simd.zero();
        for i in 0..last {
            let e = simd.exp(simd.sub(simd.load_f32(line(i)), maximum));
            F::store(simd, line(i).cast(), e);
            sum = simd.add(sum, e);
        }
        let e = simd.exp(simd.sub(simd.load_f32(line(last)), maximum));
        let e = simd.keep_first(e, tail, 0.0);
        F::store(simd, line(last).cast(), e);
        simd.sum_lanes(simd.add(sum, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
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
        keys: Elements,
        values: Elements,
        activations: Option<Activations>,
    }

    /// Of each element type, and of bf16 with rounded queries and weights.
    const KINDS: usize = 4;

    impl Batch {
        fn new(heads: usize, head_dim: usize, lens: &[usize], kind: usize) -> Batch {
            let mut random = Random::new((heads * 1000 + head_dim + lens.len()) as u64);
            let blocks: usize = lens
                .iter()
                .map(|len| len.div_ceil(BLOCK_TOKENS))
                .sum::<usize>()
                + 3;
            let mut free = random.permutation(blocks);
            let empty = vec![f32::NAN; blocks * heads * head_dim * BLOCK_TOKENS];
            let empty = Elements::each(&empty)[kind.min(2)].clone();
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
                keys: empty.clone(),
                values: empty,
                activations: (kind == 3).then_some(Activations::Bf16),
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
            let mut cache = KvCacheMut::new(
                self.keys.as_storage_mut(),
                self.values.as_storage_mut(),
                self.heads,
                self.head_dim,
            );
            write_kv(cpu, part(1), part(2), &slots, &mut cache);
            let op = Attention {
                queries: part(0),
                sequences: &sequences,
                cache: KvCache::new(
                    self.keys.as_storage(),
                    self.values.as_storage(),
                    self.heads,
                    self.head_dim,
                ),
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
                f64::from(match &self.keys {
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
                    let (weight, off) = match (score - maximum).exp() {
                        weight if self.activations.is_none() => (weight, 0.0),
                        weight => (bf16(weight as f32), 1.0 / 256.0),
                    };
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
        for head_dim in [16, 64, 80, 128, 3, 20] {
            for kind in 0..KINDS {
                let lens = [1, 7, 16, 17, 45];
                for mut cpu in cpus() {
                    let mut batch = Batch::new(3, head_dim, &lens, kind);
                    let out = batch.prefill(&mut cpu);
                    for (s, len) in lens.into_iter().enumerate() {
                        for position in 0..len {
                            let found = &out[s][position * batch.cols()..][..batch.cols()];
                            for (found, expect) in found.iter().zip(batch.reference(s, position)) {
                                let (expect, may_be_off) = expect;
                                let error = (f64::from(*found) - expect).abs();
                                assert!(
                                    error < 2e-6 + may_be_off,
                                    "D {head_dim}, kind {kind}: {found} for {expect}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        for (head_dim, kind) in [(64, 0), (80, 1), (16, 2), (20, 2), (64, 3), (80, 3), (3, 3)] {
            for isa in isas() {
                let lens = [75, 20, 3];
                let mut batch = Batch::new(2, head_dim, &lens, kind);
                let whole = batch.prefill(&mut cpu(isa, 1));
                let cols = batch.cols();
                for threads in 1..=3 {
                    let mut cpu = cpu(isa, threads);
                    assert!(batch.prefill(&mut cpu) == whole, "{threads} threads");

                    // One sequence in chunks, in blocks elsewhere and in a fresh cache.
                    for chunk in [1, 2, 5, 6, 16, 31, 74] {
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
                    let out = mixed.step(&mut cpu, &[(1, 19..20), (0, 0..75), (2, 2..3)]);
                    assert_eq!(bits(&out[0]), bits(&whole[1][19 * cols..]));
                    assert_eq!(bits(&out[1]), bits(&whole[0]));
                    assert_eq!(bits(&out[2]), bits(&whole[2][2 * cols..]));
                }
            }
        }
    }

    #[test]
    fn the_cache_is_laid_out_as_said() {
        let (heads, head_dim) = (2, 18);
        let mut batch = Batch::new(heads, head_dim, &[21], 2);
        batch.prefill(&mut cpu(Isa::Portable, 1));
        for position in 0..21 {
            let block = batch.block_tables[0][position / BLOCK_TOKENS] as usize;
            let offset = position % BLOCK_TOKENS;
            for head in 0..heads {
                for d in 0..head_dim {
                    let row = (position * heads + head) * head_dim + d;
                    let base = (block * heads + head) * head_dim * BLOCK_TOKENS;
                    let round = |x: f32| half::bf16::from_f32(x).to_f32();
                    let key = batch.keys.get(base + d * BLOCK_TOKENS + offset);
                    assert_eq!(key, round(batch.k[0][row]));
                    let value = batch.values.get(base + offset * head_dim + d);
                    assert_eq!(value, round(batch.v[0][row]));
                }
            }
        }
        let unwritten = (0..)
            .map(|i| batch.keys.get(i))
            .take(batch.keys.as_storage().len());
        assert_eq!(
            unwritten.filter(|x| !x.is_nan()).count(),
            21 * heads * head_dim,
            "nothing else is written"
        );
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
