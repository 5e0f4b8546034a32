//! Linear layers with what surrounds them: `out = act(norm(x) * W^T + b) + residual`.
//!
//! Every output is one chain of fused multiply-adds over k = 0, 1, .. K-1 from zero (with integer
//! weights, over runs of inputs; of bf16 in the tiles of [`super::amx`], in their order), then the bias, the
//! activation, the residual. Blocking never splits a chain: partial sums are kept in `f32` and resumed. So a
//! row has the same bits whatever it is computed together with.
//!
//! W is taken panel by panel. Up to a few rows, a tile of all the rows and a whole panel across streams
//! through memory. For more, a block of a panel that stays in the L2 cache (that of AMX in L1) meets all rows
//! of a chunk before the next is read, as in BLIS (Van Zee and van de Geijn 2015), while the next one is
//! being fetched. Weights are converted in registers.

use super::amx::{ROUNDED, TiledFloats, TiledIntegers, WHOLE};
use super::matrix::{Ahead, Floats, Integers, Matrix, Part, PreparedRow};
use super::norm::{self, Stats};
use super::pool::partition;
use super::rows::SharedRows;
use super::scratch::Shards;
use super::simd::{Bytes, Codes, Isa, Kernel, LANES, Nibbles, Simd};
use super::storage::{IntPanels, PackedMatrix, Panels, Storage};
use super::tile::{Bf16Pairs, Bf16Singles, Halves, Pairs, Quads, Singles, Tiles};
use super::{Cpu, Norm, Rows, RowsMut};
use kiln_bundle::packing::{PANEL, panels};
use kiln_bundle::{Activations, IntFormat};
use std::marker::PhantomData;
use std::ops::Range;

/// What follows the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The identity.
    None,
    /// max(x, 0)
    Relu,
    /// GPT-2's GELU: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    GeluNew,
}

/// Rows (T, N) to be added after the activation.
#[derive(Clone, Copy, Debug)]
pub struct Residual<'a> {
    /// As many as there are input rows, of N values; the former contents of the output where absent.
    pub rows: Option<Rows<'a>>,
    /// Applied to the rows before they are added, over their N values.
    pub norm: Option<Norm<'a>>,
}

/// A linear layer and what is fused into it.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// W: (N, K).
    pub weight: PackedMatrix<'a>,
    /// (N).
    pub bias: Option<&'a [f32]>,
    /// Applied to the input rows, over their K values.
    pub norm: Option<Norm<'a>>,
    /// Row of the input, and of the residual's rows, for each output row; that of the same number where absent.
    pub row_map: Option<&'a [u32]>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Added last.
    pub residual: Option<Residual<'a>>,
    /// What rows are rounded to, where W is of the same kind of numbers; else they stay `f32`, or become
    /// integers of 16 bits beside integers, and two pieces of bf16 beside bf16 where products are of tiles
    /// ([`super::Isa::Amx`]).
    pub activations: Option<Activations>,
}

impl<'a> Linear<'a> {
    /// The product alone.
    pub fn new(weight: PackedMatrix<'a>) -> Linear<'a> {
        Linear {
            weight,
            bias: None,
            norm: None,
            row_map: None,
            activation: Activation::None,
            residual: None,
            activations: None,
        }
    }

    /// The row of the input, and of the residual's rows, for output row `t`.
    fn row(&self, t: usize) -> usize {
        self.row_map.map_or(t, |map| map[t] as usize)
    }

    /// What is added to output row `t`, unless it is what the output holds.
    fn added(&self, t: usize) -> Option<&'a [f32]> {
        let rows = self.residual?.rows?;
        Some(rows.row(self.row(t)))
    }

    fn check(&self, x: &Rows<'_>, out: &RowsMut<'_>) {
        let (n, k) = (self.weight.n(), self.weight.k());
        assert_eq!(x.cols(), k, "columns of x and of W");
        assert_eq!(out.cols(), n, "columns of out and rows of W");
        assert!(
            self.bias.is_none_or(|bias| bias.len() == n),
            "a bias of {n} values"
        );
        match self.row_map {
            None => assert_eq!(x.rows(), out.rows(), "rows in and rows out"),
            Some(map) => {
                assert_eq!(map.len(), out.rows(), "an input row for each output row");
                assert!(
                    map.iter().all(|&t| (t as usize) < x.rows()),
                    "input rows that exist"
                );
            }
        }
        if let Some(norm) = self.norm {
            norm.check(k);
        }
        if let Some(residual) = self.residual {
            if let Some(rows) = residual.rows {
                assert_eq!(
                    (rows.rows(), rows.cols()),
                    (x.rows(), n),
                    "rows of the residual"
                );
            }
            if let Some(norm) = residual.norm {
                norm.check(n);
            }
        }
    }
}

/// Up to this many rows a chunk is not cut for the sake of more threads: W would be read more than once.
const STREAMED_ROWS: usize = 32;
/// Values of x up to which every thread prepares them for itself: it need not wait for another.
const PREPARED_BY_EACH: usize = 16 * 1024;

/// Computes `op` for the rows of `x`, (T, K), into `out`, (T, N).
pub fn linear(cpu: &mut Cpu, op: &Linear<'_>, x: Rows<'_>, mut out: RowsMut<'_>) {
    op.check(&x, &out);
    if out.rows() == 0 || out.cols() == 0 {
        return;
    }
    let k = op.weight.k();
    match op.weight.data {
        Panels::Float(Storage::F32(weight)) => {
            multiply(cpu, op, Floats::<Singles<_>>::new(weight, k), x, &mut out);
        }
        Panels::Float(Storage::F16(weight)) => {
            multiply(cpu, op, Floats::<Singles<_>>::new(weight, k), x, &mut out);
        }
        Panels::Float(Storage::Bf16(weight)) => match op.activations {
            Some(Activations::Bf16) => {
                let tiled = TiledFloats::<ROUNDED>::new(cpu.isa, weight, k);
                let vectors = Floats::<Bf16Pairs>::new(weight, k);
                multiply_either(cpu, op, tiled, vectors, x, &mut out);
            }
            _ => {
                let tiled = TiledFloats::<WHOLE>::new(cpu.isa, weight, k);
                let vectors = Floats::<Bf16Singles>::new(weight, k);
                multiply_either(cpu, op, tiled, vectors, x, &mut out);
            }
        },
        Panels::Int(panels) => match panels.format {
            IntFormat::Int8 { .. } => multiply_integers::<Bytes>(cpu, op, panels, x, &mut out),
            IntFormat::Int4 { .. } => multiply_integers::<Nibbles>(cpu, op, panels, x, &mut out),
        },
    }
}

fn multiply_integers<C: Codes>(
    cpu: &mut Cpu,
    op: &Linear<'_>,
    panels: IntPanels<'_>,
    x: Rows<'_>,
    out: &mut RowsMut<'_>,
) {
    let k = op.weight.k();
    match op.activations {
        Some(Activations::Int8) => {
            let vectors = Integers::<C, Quads>::new(panels, k);
            let tiled = TiledIntegers::new(cpu.isa, vectors, out.rows());
            multiply_either(cpu, op, tiled, vectors, x, out);
        }
        _ if cpu.isa.multiplies_quads() => {
            let vectors = Integers::<C, Halves>::new(panels, k);
            let tiled = TiledIntegers::new(cpu.isa, vectors, out.rows());
            multiply_either(cpu, op, tiled, vectors, x, out);
        }
        _ => multiply(cpu, op, Integers::<C, Pairs>::new(panels, k), x, out),
    }
}

/// Multiplies in tiles of AMX where there are any for it, else in vectors.
fn multiply_either(
    cpu: &mut Cpu,
    op: &Linear<'_>,
    tiled: Option<impl Matrix>,
    vectors: impl Matrix,
    x: Rows<'_>,
    out: &mut RowsMut<'_>,
) {
    match tiled {
        Some(tiled) => multiply(cpu, op, tiled, x, out),
        None => multiply(cpu, op, vectors, x, out),
    }
}

fn multiply<M: Matrix>(
    cpu: &mut Cpu,
    op: &Linear<'_>,
    weight: M,
    x: Rows<'_>,
    out: &mut RowsMut<'_>,
) {
    let (isa, pool) = (cpu.isa, &cpu.pool);
    let (t, k) = (out.rows(), op.weight.k());
    let tile_rows = isa.run(TileRows::<M>(PhantomData));
    // No chunk is to be less than a tile.
    assert!(tile_rows <= STREAMED_ROWS);
    let tiles = Tiles::new(t, tile_rows);
    let (values, runs) = (weight.values(k), weight.runs(k));

    let prepare = Prepare {
        isa,
        op,
        x,
        tiles,
        weight,
    };
    let stats = &mut cpu.scratch.stats;
    prepare.residual_stats(stats, out);
    let as_they_are = M::AS_THEY_ARE && k.is_multiple_of(M::STEP_INPUTS);
    let rows_len = t * (values + 2 * runs) + tiles.count * k;
    // Rows that all threads share, and the room in which each prepares its own otherwise.
    let (shared, own_len) = if t == 1 && op.norm.is_none() && as_they_are {
        (Some((prepare.input(0), &[][..])), 0)
    } else if t * k > PREPARED_BY_EACH {
        let rows = cpu.scratch.rows.reserve(rows_len);
        prepare.rows(rows, pool);
        (Some(rows.split_at(t * values)), 0)
    } else {
        (None, rows_len)
    };

    let sums_len = M::CHUNK_ROWS.next_multiple_of(tiles.tallest()) * PANEL;
    let threads = &mut cpu.scratch.threads;
    for buffer in threads.iter_mut() {
        buffer.reserve(sums_len + own_len);
    }
    let threads = Shards::new(threads);
    let product = Product {
        k,
        weight,
        values,
        runs,
        tiles,
        op,
        stats,
        out: out.shared(),
    };
    let panels = panels(op.weight.n());
    let chunks = chunks::<M>(&tiles, panels, pool.threads());
    let (product, prepare) = (&product, &prepare);
    pool.parallel_ranges(chunks * panels, |thread| {
        // SAFETY: a thread uses the buffer of its own number.
        let buffer = unsafe { threads.get(thread) }.reserve(0);
        let (sums, own) = buffer.split_at_mut(sums_len);
        let (rows, row_runs) = shared.unwrap_or_else(|| {
            // The thread is in a job already, and makes all calls itself.
            prepare.rows(own, pool);
            own.split_at(t * values)
        });
        move |tasks| {
            isa.run(MultiplyPanels {
                product,
                rows,
                row_runs,
                panels,
                chunks,
                tasks,
                sums: &mut *sums,
            });
        }
    });
}

/// Rows of the tallest tile.
struct TileRows<M>(PhantomData<M>);

impl<M: Matrix> Kernel for TileRows<M> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        M::tile_rows::<S>()
    }
}

/// Chunks of tiles: few enough to make use of W's blocks, enough to give every thread work.
fn chunks<M: Matrix>(tiles: &Tiles, panels: usize, threads: usize) -> usize {
    let for_cache = tiles.rows.div_ceil(M::CHUNK_ROWS);
    let for_threads = (3 * threads)
        .div_ceil(panels)
        .min(tiles.rows.div_ceil(STREAMED_ROWS));
    if threads == 1 {
        for_cache
    } else {
        for_cache.max(for_threads)
    }
}

/// What is done before the product.
struct Prepare<'a, M> {
    isa: Isa,
    op: &'a Linear<'a>,
    x: Rows<'a>,
    tiles: Tiles,
    weight: M,
}

impl<'a, M: Matrix> Prepare<'a, M> {
    /// The input of output row `t`.
    fn input(&self, t: usize) -> &'a [f32] {
        self.x.row(self.op.row(t))
    }

    /// Mean and deviation of the residual rows, while the output still holds them.
    fn residual_stats(&self, stats: &mut Vec<Stats>, out: &RowsMut<'_>) {
        stats.clear();
        if let Some(Residual {
            norm: Some(norm), ..
        }) = self.op.residual
        {
            let out = out.as_rows();
            let added = |t| self.op.added(t).unwrap_or_else(|| out.row(t));
            stats.extend((0..out.rows()).map(|t| norm::stats(self.isa, added(t), norm.eps)));
        }
    }

    /// Writes the input rows, normalised, in the form that suits the matrix: the values of each tile,
    /// behind them the runs of each. Behind these there is room for a row of each tile.
    fn rows(&self, rows: &mut [f32], pool: &super::ThreadPool) {
        let (t, k) = (self.tiles.rows, self.x.cols());
        let (values, runs) = (self.weight.values(k), 2 * self.weight.runs(k));
        let (rows, rest) = rows.split_at_mut(t * values);
        let (row_runs, spare) = rest.split_at_mut(t * runs);
        let (rows, row_runs, spare) =
            (Shards::new(rows), Shards::new(row_runs), Shards::new(spare));
        pool.parallel_for(self.tiles.count, |_, tile| {
            let range = self.tiles.range(tile);
            for (r, t) in range.clone().enumerate() {
                let mut row = self.input(t);
                if let Some(norm) = self.op.norm {
                    // SAFETY: tile `tile` has its part of the spare memory to itself.
                    let normalized = unsafe { spare.range(tile * k, k) };
                    norm::normalize(self.isa, row, &norm, normalized);
                    row = normalized;
                }
                // SAFETY: tile `tile` has the rows of its range to itself, and their runs.
                let (values, runs) = unsafe {
                    (
                        rows.range(range.start * values, range.len() * values),
                        row_runs.range(range.start * runs, range.len() * runs),
                    )
                };
                let prepared = PreparedRow {
                    r,
                    rows: range.len(),
                    values,
                    runs,
                };
                let weight = self.weight;
                self.isa.run(PrepareRow {
                    weight,
                    row,
                    prepared,
                });
            }
        });
    }
}

/// A row in the form that suits a matrix.
struct PrepareRow<'a, M> {
    weight: M,
    row: &'a [f32],
    prepared: PreparedRow<'a>,
}

impl<M: Matrix> Kernel for PrepareRow<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.weight.prepare(simd, self.row, self.prepared);
    }
}

/// The product at hand, shared by all threads.
struct Product<'a, M> {
    k: usize,
    weight: M,
    /// Values and runs of a prepared row.
    values: usize,
    runs: usize,
    tiles: Tiles,
    op: &'a Linear<'a>,
    /// Of the residual rows, where they are normalised.
    stats: &'a [Stats],
    out: SharedRows<'a>,
}

impl<M: Matrix> Product<'_, M> {
    /// Asks for what finishing `rows` of VECTORS vectors from `col` on will touch: outputs, which are written to, and
    /// rows that are added.
    #[inline(always)]
    fn ask_for_outputs<S: Simd, const VECTORS: usize>(
        &self,
        simd: S,
        rows: Range<usize>,
        col: usize,
    ) {
        for t in rows {
            let added = self.op.added(t);
            for col in (0..VECTORS).map(|v| col + v * LANES) {
                if col >= self.op.weight.n() {
                    break;
                }
                // SAFETY: row and column exist.
                simd.prefetch_write(unsafe { self.out.at(t, col) });
                if let Some(added) = added {
                    simd.prefetch(added.as_ptr().wrapping_add(col).cast());
                }
            }
        }
    }

    /// Finishes and writes `rows` of VECTORS vectors from `col` on, as far as they exist, whose sums are (rows, PANEL).
    ///
    /// # Safety
    /// There are so many rows and sums, and no other thread uses these outputs.
    #[inline(always)]
    unsafe fn finish<S: Simd, const VECTORS: usize>(
        &self,
        simd: S,
        sums: *const f32,
        rows: Range<usize>,
        col: usize,
    ) {
        for (r, t) in rows.enumerate() {
            let added = self.op.added(t);
            for v in 0..VECTORS {
                let col = col + v * LANES;
                let width = self.op.weight.n().saturating_sub(col).min(LANES);
                if width == 0 {
                    break;
                }
                // SAFETY: `width` values from `col` exist in the bias, in what is added and in the output.
                unsafe {
                    let mut y = simd.load_f32(sums.add(r * PANEL + v * LANES));
                    if let Some(bias) = self.op.bias {
                        y = simd.add(y, norm::load(simd, bias.as_ptr().add(col), width));
                    }
                    y = match self.op.activation {
                        Activation::None => y,
                        Activation::Relu => simd.max(simd.zero(), y),
                        Activation::GeluNew => gelu_new(simd, y),
                    };
                    let out = self.out.at(t, col);
                    if let Some(residual) = &self.op.residual {
                        let added = added.map_or(out.cast_const(), |row| row[col..].as_ptr());
                        let mut x = norm::load(simd, added, width);
                        if let Some(norm) = &residual.norm {
                            x = self.stats[t].apply(simd, x, norm, col, width);
                        }
                        y = simd.add(y, x);
                    }
                    norm::store(simd, out, y, width);
                }
            }
        }
    }
}

/// x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh(u)).
#[inline(always)]
fn gelu_new<S: Simd>(simd: S, x: S::V) -> S::V {
    const SCALE: f32 = -2.0 * 0.797_884_6;
    let cubic = simd.fma(
        simd.mul(x, x),
        simd.splat(SCALE * 0.044_715),
        simd.splat(SCALE),
    );
    let e = simd.exp(simd.mul(x, cubic));
    simd.div(x, simd.add(simd.splat(1.0), e))
}

/// Panels, each against the tiles of a chunk, block by block.
struct MultiplyPanels<'a, M> {
    product: &'a Product<'a, M>,
    /// Prepared rows, tile by tile: (values / LINE, rows of the tile, LINE) each.
    rows: &'a [f32],
    /// Their runs, tile by tile: (runs, rows of the tile, 2) each.
    row_runs: &'a [f32],
    panels: usize,
    chunks: usize,
    /// Of (chunks, panels).
    tasks: Range<usize>,
    /// Room for a panel's outputs of a chunk.
    sums: &'a mut [f32],
}

impl<M: Matrix> Kernel for MultiplyPanels<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let few = self.product.tiles.rows <= M::direct_rows::<S>();
        if few || S::TILE_VECTORS * LANES == PANEL {
            self.multiply::<S, { PANEL / LANES }>(simd, few);
        } else {
            self.multiply::<S, 1>(simd, false);
        }
    }
}

impl<M: Matrix> MultiplyPanels<'_, M> {
    /// Where value `first`, which begins a line, of the rows `range` lies.
    fn rows(&self, range: &Range<usize>, first: usize) -> *const f32 {
        self.rows[range.start * self.product.values + first * range.len()..].as_ptr()
    }

    /// Where run `first` of the rows `range` lies.
    fn row_runs(&self, range: &Range<usize>, first: usize) -> *const f32 {
        self.row_runs[2 * (range.start * self.product.runs + first * range.len())..].as_ptr()
    }

    /// Multiplies with tiles of VECTORS vectors, and so in as many slices as make up a panel. With
    /// `once`, the weights are used once, and blocks are of no use.
    #[inline(always)]
    fn multiply<S: Simd, const VECTORS: usize>(mut self, simd: S, once: bool) {
        let mut state = M::State::default();
        for task in self.tasks.clone() {
            let tiles = partition(self.product.tiles.count, self.chunks, task / self.panels);
            self.multiply_panel::<S, VECTORS>(simd, task % self.panels, tiles, once, &mut state);
        }
    }

    #[inline(always)]
    fn multiply_panel<S: Simd, const VECTORS: usize>(
        &mut self,
        simd: S,
        panel: usize,
        tiles: Range<usize>,
        once: bool,
        state: &mut M::State,
    ) {
        let product = self.product;
        let (k, cut, weight) = (product.k, product.tiles, product.weight);
        let first_row = cut.range(tiles.start).start;
        let rows = cut.range(tiles.end - 1).end - first_row;
        assert!(self.sums.len() >= rows * PANEL);
        let block_k = if once { k } else { weight.block_inputs() };
        let slices = PANEL / (VECTORS * LANES);
        let calls = slices * tiles.len();

        let mut block = weight.block(panel, 0);
        for k0 in (0..k).step_by(block_k) {
            let inputs = k0..k.min(k0 + block_k);
            let (first_value, first_run) = (weight.values(k0), weight.runs(k0));
            // Each call asks for its share of the next block.
            let next = weight.block(panel, inputs.end);
            let share = weight.bytes(M::STEP_INPUTS).div_ceil(calls);
            let call_bytes = inputs.len().div_ceil(M::STEP_INPUTS) * share;
            let mut call = 0;
            for slice in 0..slices {
                let column = slice * VECTORS * LANES;
                for range in tiles.clone().map(|tile| cut.range(tile)) {
                    let c = self.sums[(range.start - first_row) * PANEL + column..].as_mut_ptr();
                    let ahead = match once {
                        true => Ahead::Behind(M::prefetch_bytes(simd, range.len())),
                        false => Ahead::At(next.address().wrapping_add(call * call_bytes), share),
                    };
                    call += 1;
                    let part = Part {
                        block,
                        inputs: inputs.clone(),
                        column,
                        rows: range.len(),
                        x: self.rows(&range, first_value),
                        runs: self.row_runs(&range, first_run),
                        sums: c,
                        ahead,
                    };
                    let col = panel * PANEL + column;
                    // Of few rows they are at hand.
                    if inputs.end == k && product.tiles.rows > STREAMED_ROWS {
                        product.ask_for_outputs::<S, VECTORS>(simd, range.clone(), col);
                    }
                    // SAFETY: the panel has these inputs, the prepared rows as many values and sums,
                    // and the sums a row for each row of the chunk.
                    unsafe { weight.multiply::<S, VECTORS>(simd, &part, state) };
                    if inputs.end == k {
                        // SAFETY: the tile has written these sums; the outputs of this chunk and panel belong
                        // to this task.
                        unsafe { product.finish::<S, VECTORS>(simd, c, range, col) };
                    }
                }
            }
            block = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Packed, Random, bits, cpu, cpus, fused_isas, isas};

    /// A layer with everything, and its input.
    struct Case {
        n: usize,
        k: usize,
        t: usize,
        x: Vec<f32>,
        weight: Vec<f32>,
        bias: Vec<f32>,
        norm: [Vec<f32>; 2],
        residual: Vec<f32>,
        residual_norm: [Vec<f32>; 2],
    }

    impl Case {
        fn new(t: usize, n: usize, k: usize) -> Case {
            let mut random = Random::new((t * 1_000_003 + n * 1009 + k) as u64);
            let mut scaled = |len: usize, scale: f32| -> Vec<f32> {
                random.values(len).iter().map(|x| x * scale).collect()
            };
            Case {
                n,
                k,
                t,
                x: scaled(t * k, 1.0),
                weight: scaled(n * k, 3.0 / (k as f32).sqrt()),
                bias: scaled(n, 1.0),
                norm: [scaled(k, 1.0), scaled(k, 1.0)],
                residual: scaled(t * n, 1.0),
                residual_norm: [scaled(n, 1.0), scaled(n, 1.0)],
            }
        }

        fn linear<'a>(&'a self, packed: &'a Packed, variant: Variant) -> Linear<'a> {
            let norm = |[weight, bias]: &'a [Vec<f32>; 2]| Norm {
                weight: Some(weight),
                bias: Some(bias),
                eps: 1e-5,
            };
            Linear {
                weight: packed.matrix(),
                bias: variant.bias.then_some(&self.bias),
                norm: variant.norm.then(|| norm(&self.norm)),
                row_map: None,
                activation: variant.activation,
                residual: variant.residual.then(|| Residual {
                    rows: Some(Rows::new(&self.residual, self.t, self.n)),
                    norm: variant.residual_norm.then(|| norm(&self.residual_norm)),
                }),
                activations: match packed.matrix().data {
                    _ if !variant.narrow => None,
                    Panels::Int(_) => Some(Activations::Int8),
                    Panels::Float(_) => Some(Activations::Bf16),
                },
            }
        }

        fn run(&self, cpu: &mut Cpu, op: &Linear<'_>) -> Vec<f32> {
            let mut out = vec![f32::NAN; self.t * self.n];
            let x = Rows::new(&self.x, self.t, self.k);
            linear(cpu, op, x, RowsMut::new(&mut out, self.t, self.n));
            out
        }

        /// Row `t` as the product sees it, in `f64`.
        fn input(&self, op: &Linear<'_>, t: usize) -> Vec<f64> {
            let x = &self.x[t * self.k..][..self.k];
            match &op.norm {
                Some(norm) => norm::reference(x, norm),
                None => x.iter().map(|&x| f64::from(x)).collect(),
            }
        }

        /// How far the outputs of row `t` may be off because the row is rounded, times the greatest slope
        /// of GELU: by half a unit of its greatest magnitude over the greatest integer for each weight, or
        /// by half a unit of each value in bf16.
        fn rounding(&self, packed: &Packed, op: &Linear<'_>, t: usize) -> Vec<f64> {
            let x = self.input(op, t);
            let largest = x.iter().fold(0.0_f64, |a, x| a.max(x.abs()));
            let off = |x: f64| match (op.weight.data, op.activations) {
                (Panels::Int(_), None) => largest / 65278.0,
                (Panels::Int(_), Some(_)) => largest / 254.0,
                (Panels::Float(Storage::Bf16(_)), Some(_)) => x.abs() / 256.0,
                (Panels::Float(_), _) => 0.0,
            };
            let weight = |n, k| f64::from(packed.get(n, k)).abs();
            (0..self.n)
                .map(|n| 1.13 * (0..self.k).map(|k| weight(n, k) * off(x[k])).sum::<f64>())
                .collect()
        }

        /// Row `t` in `f64`.
        fn reference(&self, packed: &Packed, op: &Linear<'_>, t: usize) -> Vec<f64> {
            let x = self.input(op, t);
            let residual = op.residual.map(|residual| {
                let row = &self.residual[t * self.n..][..self.n];
                match residual.norm {
                    Some(norm) => norm::reference(row, &norm),
                    None => row.iter().map(|&x| f64::from(x)).collect(),
                }
            });
            (0..self.n)
                .map(|n| {
                    let w = |k| f64::from(packed.get(n, k));
                    let mut y: f64 = (0..self.k).map(|k| x[k] * w(k)).sum();
                    y += op.bias.map_or(0.0, |bias| f64::from(bias[n]));
                    y = match op.activation {
                        Activation::None => y,
                        Activation::Relu => y.max(0.0),
                        Activation::GeluNew => {
                            let u =
                                (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y.powi(3));
                            0.5 * y * (1.0 + u.tanh())
                        }
                    };
                    y + residual.as_ref().map_or(0.0, |row| row[n])
                })
                .collect()
        }
    }

    #[derive(Clone, Copy)]
    struct Variant {
        bias: bool,
        norm: bool,
        activation: Activation,
        residual: bool,
        residual_norm: bool,
        /// Whether rows are rounded to what suits the weights.
        narrow: bool,
    }

    const PLAIN: Variant = Variant {
        bias: false,
        norm: false,
        activation: Activation::None,
        residual: false,
        residual_norm: false,
        narrow: false,
    };
    const VARIANTS: [Variant; 7] = [
        PLAIN,
        Variant {
            bias: true,
            norm: true,
            ..PLAIN
        },
        Variant {
            bias: true,
            norm: true,
            activation: Activation::Relu,
            ..PLAIN
        },
        Variant {
            bias: true,
            activation: Activation::GeluNew,
            residual: true,
            ..PLAIN
        },
        Variant {
            norm: true,
            bias: true,
            residual: true,
            residual_norm: true,
            ..PLAIN
        },
        Variant {
            narrow: true,
            ..PLAIN
        },
        Variant {
            bias: true,
            norm: true,
            activation: Activation::Relu,
            narrow: true,
            ..PLAIN
        },
    ];

    #[test]
    fn matches_the_definition() {
        for (t, n, k) in [
            (1, 1, 1),
            (1, 33, 40),
            (2, 95, 17),
            (3, 64, 300),
            (5, 31, 257),
            (7, 40, 64),
        ]
        .into_iter()
        .chain([
            (13, 96, 600),
            (33, 70, 129),
            (200, 65, 90),
            (3, 33, 1111),
            (65, 33, 1088),
        ]) {
            let case = Case::new(t, n, k);
            for packed in Packed::each(&case.weight, n, k) {
                for variant in VARIANTS {
                    let op = case.linear(&packed, variant);
                    let by_row = |f: &dyn Fn(usize) -> Vec<f64>| (0..t).flat_map(f).collect();
                    let expect: Vec<f64> = by_row(&|t| case.reference(&packed, &op, t));
                    let rounding: Vec<f64> = by_row(&|t| case.rounding(&packed, &op, t));
                    for mut cpu in cpus() {
                        let found = case.run(&mut cpu, &op);
                        for ((found, expect), rounding) in found.iter().zip(&expect).zip(&rounding)
                        {
                            let error = (f64::from(*found) - expect).abs();
                            assert!(
                                error < 2e-5 + rounding,
                                "({t}, {n}, {k}): {found} for {expect}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        for (isa, k) in isas().flat_map(|isa| [(isa, 520), (isa, 640)]) {
            let n = 100;
            let all = Case::new(300, n, k);
            for packed in Packed::each(&all.weight, n, k) {
                for variant in VARIANTS {
                    let whole = all.run(&mut cpu(isa, 1), &all.linear(&packed, variant));
                    for threads in 1..=3 {
                        let mut cpu = cpu(isa, threads);
                        for t in [1, 2, 3, 4, 5, 6, 8, 13, 33, 64, 300] {
                            // The last t rows.
                            let first = 300 - t;
                            let op = all.linear(&packed, variant);
                            let op = Linear {
                                residual: op.residual.map(|residual| Residual {
                                    rows: Some(Rows::new(&all.residual[first * n..], t, n)),
                                    ..residual
                                }),
                                ..op
                            };
                            let mut out = vec![0.0; t * n];
                            let x = Rows::new(&all.x[first * k..], t, k);
                            linear(&mut cpu, &op, x, RowsMut::new(&mut out, t, n));
                            assert_eq!(
                                bits(&out),
                                bits(&whole[first * n..]),
                                "{isa}: {t} rows, {threads} threads"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn instruction_sets_agree() {
        for (t, k) in [1, 4, 40].into_iter().flat_map(|t| [(t, 300), (t, 640)]) {
            let case = Case::new(t, 70, k);
            for packed in Packed::each(&case.weight, case.n, case.k) {
                for variant in VARIANTS {
                    let op = case.linear(&packed, variant);
                    // Tiles have an order of their own for sums of bf16.
                    let in_tiles = k.is_multiple_of(32)
                        && matches!(op.weight.data, Panels::Float(Storage::Bf16(_)));
                    let mut found = fused_isas()
                        .filter(|isa| !(in_tiles && isa.multiplies_tiles()))
                        .map(|isa| (isa, bits(&case.run(&mut cpu(isa, 2), &op))));
                    let Some((first, expect)) = found.next() else {
                        return;
                    };
                    for (isa, found) in found {
                        assert_eq!(expect, found, "{first} and {isa}, {t} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_gathered_and_written_with_strides() {
        let (n, k) = (40, 24);
        let case = Case::new(9, n, k);
        let packed = &Packed::each(&case.weight, n, k)[2];
        for variant in VARIANTS {
            let op = case.linear(packed, variant);
            for mut cpu in cpus() {
                let whole = case.run(&mut cpu, &op);
                for map in [vec![4], vec![8, 0], vec![1, 1, 7, 3, 5], vec![]] {
                    let gathered = Linear {
                        row_map: Some(&map),
                        ..op
                    };
                    let mut out = vec![-1.0; map.len() * (n + 3)];
                    let rows = RowsMut::strided(&mut out, map.len(), n, n + 3);
                    linear(&mut cpu, &gathered, Rows::new(&case.x, 9, k), rows);
                    for (row, &t) in out.chunks_exact(n + 3).zip(&map) {
                        assert_eq!(bits(&row[..n]), bits(&whole[t as usize * n..][..n]));
                        assert_eq!(row[n..], [-1.0; 3]);
                    }
                }
            }
        }
    }

    #[test]
    fn the_output_can_hold_the_residual() {
        for t in [1, 3, 7, 40] {
            let case = Case::new(t, 70, 50);
            let packed = &Packed::each(&case.weight, case.n, case.k)[0];
            for variant in VARIANTS.into_iter().filter(|v| v.residual) {
                let op = case.linear(packed, variant);
                for mut cpu in cpus() {
                    let expect = case.run(&mut cpu, &op);
                    let residual = op.residual.map(|residual| Residual {
                        rows: None,
                        ..residual
                    });
                    let mut out = case.residual.clone();
                    let x = Rows::new(&case.x, t, case.k);
                    let rows = RowsMut::new(&mut out, t, case.n);
                    linear(&mut cpu, &Linear { residual, ..op }, x, rows);
                    assert_eq!(bits(&out), bits(&expect));
                }
            }
        }
    }

    #[test]
    fn gelu_is_accurate() {
        struct Gelu([f32; LANES]);
        impl Kernel for Gelu {
            type Output = [f32; LANES];
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
                // SAFETY: the array has sixteen values.
                simd.to_array(gelu_new(simd, unsafe { simd.load_f32(self.0.as_ptr()) }))
            }
        }
        for isa in isas() {
            let mut x = -12.0f32;
            while x < 12.0 {
                let found = isa.run(Gelu([x; LANES]))[0];
                let exact = f64::from(x);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (exact + 0.044715 * exact.powi(3));
                let exact = 0.5 * exact * (1.0 + u.tanh());
                assert!(
                    (f64::from(found) - exact).abs() < 1e-6 * exact.abs().max(0.5),
                    "gelu({x})"
                );
                x += 0.0137;
            }
            assert!(isa.run(Gelu([-1e4; LANES]))[0].abs() < 1e-30);
            assert_eq!(isa.run(Gelu([1e4; LANES]))[0], 1e4);
            assert!(isa.run(Gelu([f32::NAN; LANES]))[0].is_nan());
        }
    }
}
