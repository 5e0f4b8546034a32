//! Products by the tile registers of AMX: sixteen rows by sixteen outputs, of 32 inputs in bf16 or 64 in 8 bits, are one
//! instruction.
//!
//! What is packed for other instructions is what these read: sixteen words of a panel's outputs are a tile of weights,
//! a line of each prepared row is one of rows. A part of a product takes up to 32 rows by the 32 outputs of a panel.
//!
//! **Integers** are summed exactly, and so have the bits that they have everywhere. Rows of 16 bits are two pieces of
//! 8 bits, whose products are tiles of their own.
//!
//! Attention multiplies bf16 too ([`Sums`]): queries with a block's keys, and what values are weighted with with values,
//! of which a block has half as many as a tile takes.
//!
//! **bf16** is summed in an order of its own: of 32 inputs the products of those of even number are a chain of fused
//! multiply-adds from zero, and so are the others; both are added to each other, then to the sum. Any number of rows is
//! multiplied so, and so the bits of a row still depend on that row alone. Rows of `f32` are two pieces of bf16, of which
//! the products of the greater ones come first. What is left out of a value is at most 2^-18 of it: sums of thousands
//! of products are off by as much where each is rounded to `f32`. (Beyond 3.39e38 a value becomes infinite, and pieces
//! below 1.2e-38 are nothing to a tile.)

use super::fixed::RUN;
use super::matrix::{Ahead, Block, Floats, Integers, Matrix, Part, PreparedRow};
use super::norm::load;
use super::simd::{Codes, Dots, Isa, LANES, Simd};
use super::tile::{Bf16Pairs, Halves, IntRows, Quads, add_run};
use half::bf16;
use kiln_bundle::packing::PANEL;
use std::mem::MaybeUninit;

/// Rows of a tile, and words of a panel that are one.
pub(super) const TILE: usize = 16;
/// Bytes of a row of a tile.
pub(super) const ROW_BYTES: usize = 64;
/// Bytes of a panel's words that make up two tiles.
const STEP_BYTES: usize = TILE * PANEL * size_of::<u32>();
/// Inputs of a tile of bf16.
pub(super) const BF16_INPUTS: usize = 2 * TILE;
/// Inputs of a tile of bytes.
const BYTE_INPUTS: usize = 4 * TILE;
const _: () = assert!(RUN.is_multiple_of(BYTE_INPUTS));
/// Bytes of a panel in a block: those of a tile's rows find room beside them in the L1 cache.
const BLOCK_BYTES: usize = 16 * 1024;
/// Rows of one piece that meet a panel before the next is read.
const CHUNK_ROWS: usize = 256;
/// Rows from which integers are multiplied so: vectors are as fast with fewer.
const FEWEST_INTEGER_ROWS: usize = 8;

/// Whether this machine has tiles of bf16 and of bytes, and the system lets this process use them.
pub(super) fn is_supported() -> bool {
    registers::are_there()
}

/// Pieces of a row that is rounded to bf16, for [`TiledFloats`].
pub(super) const ROUNDED: usize = 1;
/// Pieces of a row of `f32`: the value rounded to bf16, and what that leaves, rounded likewise.
pub(super) const WHOLE: usize = 2;

/// Panels of bf16, and rows of so many pieces: of each line of a row, its pieces lie in lines one after the
/// other.
#[derive(Clone, Copy)]
pub(super) struct TiledFloats<'a, const PIECES: usize>(Floats<'a, Bf16Pairs>);

impl<'a, const PIECES: usize> TiledFloats<'a, PIECES> {
    /// Panels of `k` inputs, if there are tiles and the inputs make up whole ones.
    pub(super) fn new(isa: Isa, weight: &'a [bf16], k: usize) -> Option<Self> {
        let suits = isa.multiplies_tiles() && k.is_multiple_of(BF16_INPUTS);
        suits.then(|| TiledFloats(Floats::new(weight, k)))
    }
}

impl<const PIECES: usize> Matrix for TiledFloats<'_, PIECES> {
    type State = Configuration;

    const STEP_INPUTS: usize = BF16_INPUTS;
    const CHUNK_ROWS: usize = CHUNK_ROWS / PIECES;

    fn tile_rows<S: Simd>() -> usize {
        2 * TILE
    }

    fn direct_rows<S: Simd>() -> usize {
        Self::tile_rows::<S>()
    }

    fn values(&self, k: usize) -> usize {
        PIECES * self.0.values(k)
    }

    fn runs(&self, _: usize) -> usize {
        0
    }

    fn block_inputs(&self) -> usize {
        BLOCK_BYTES / self.bytes(1)
    }

    fn bytes(&self, inputs: usize) -> usize {
        self.0.bytes(inputs)
    }

    #[inline(always)]
    fn block(&self, panel: usize, k: usize) -> Block {
        self.0.block(panel, k)
    }

    #[inline(always)]
    fn prepare<S: Simd>(&self, simd: S, row: &[f32], prepared: PreparedRow<'_>) {
        let mut lines = prepared.parts().0;
        for part in row.chunks(BF16_INPUTS) {
            let mut left = [simd.zero(); 2];
            for (i, left) in left.iter_mut().enumerate() {
                // SAFETY: the row has as many values.
                *left = unsafe { load(simd, part.as_ptr().add(i * LANES), LANES) };
            }
            for line in lines.by_ref().take(PIECES) {
                let line: &mut [bf16] = bytemuck::cast_slice_mut(line);
                for (left, piece) in left.iter_mut().zip(line.chunks_exact_mut(LANES)) {
                    // SAFETY: a piece of so many values.
                    unsafe {
                        simd.store_bf16(piece.as_mut_ptr(), *left);
                        *left = simd.sub(*left, simd.load_bf16(piece.as_ptr()));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd, const VECTORS: usize>(
        &self,
        _: S,
        part: &Part,
        configuration: &mut Configuration,
    ) {
        assert_eq!(VECTORS * LANES, PANEL, "a whole panel");
        let weights = part.block.address();
        let (ahead, ahead_step) = part.ahead.from(weights, STEP_BYTES);
        let heights = heights(part.rows);
        let product = Product {
            rows: part.x.cast(),
            row_bytes: heights.map(|rows| rows * ROW_BYTES),
            pieces: PIECES,
            weights,
            steps: part.inputs.len() / BF16_INPUTS,
            resume: usize::from(part.inputs.start > 0),
            sums: part.sums.cast(),
            ahead,
            ahead_step,
        };
        configuration.set(Shapes::OfPanels(heights));
        // SAFETY: the caller's; tiles are of these heights.
        unsafe { product.of_bf16() };
    }
}

/// Panels of integers in words of C, and rows of integers in words of R, of which different pieces lie in different
/// lines.
#[derive(Clone, Copy)]
pub(super) struct TiledIntegers<'a, C, R>(Integers<'a, C, R>);

impl<'a, C: Codes, R: TiledRows> TiledIntegers<'a, C, R> {
    /// The same panels for `rows` rows, if there are tiles, runs make up whole ones, and this is faster.
    pub(super) fn new(isa: Isa, panels: Integers<'a, C, R>, rows: usize) -> Option<Self> {
        let suits = isa.multiplies_tiles()
            && rows >= FEWEST_INTEGER_ROWS
            && panels.runs_are_of(BYTE_INPUTS);
        suits.then(|| TiledIntegers(panels.with_pieces_apart()))
    }
}

/// Rows of quads, in one piece or two.
pub(super) trait TiledRows: IntRows<Piece = i8> {}

impl TiledRows for Quads {}
impl TiledRows for Halves {}

impl<C: Codes, R: TiledRows> Matrix for TiledIntegers<'_, C, R> {
    type State = Configuration;

    const STEP_INPUTS: usize = BYTE_INPUTS;
    const CHUNK_ROWS: usize = CHUNK_ROWS / R::PIECES;

    fn tile_rows<S: Simd>() -> usize {
        2 * TILE / R::PIECES
    }

    fn direct_rows<S: Simd>() -> usize {
        Self::tile_rows::<S>()
    }

    fn values(&self, k: usize) -> usize {
        self.0.values(k)
    }

    fn runs(&self, k: usize) -> usize {
        self.0.runs(k)
    }

    fn block_inputs(&self) -> usize {
        self.0.block_inputs_in(BLOCK_BYTES)
    }

    fn bytes(&self, inputs: usize) -> usize {
        self.0.bytes(inputs)
    }

    #[inline(always)]
    fn block(&self, panel: usize, k: usize) -> Block {
        self.0.block(panel, k)
    }

    #[inline(always)]
    fn prepare<S: Simd>(&self, simd: S, row: &[f32], prepared: PreparedRow<'_>) {
        self.0.prepare(simd, row, prepared);
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd, const VECTORS: usize>(
        &self,
        simd: S,
        part: &Part,
        configuration: &mut Configuration,
    ) {
        assert_eq!(VECTORS * LANES, PANEL, "a whole panel");
        let step_bytes = self.bytes(BYTE_INPUTS);
        let heights = match R::PIECES {
            1 => heights(part.rows),
            _ => [part.rows; 2],
        };
        configuration.set(Shapes::OfPanels(heights));
        let mut x = part.x.cast::<u8>();
        let mut asked = 0;
        let mut weights = Bytes64([MaybeUninit::<u32>::uninit(); RUN_WORDS]);
        // Of one run products are made while those of the run before are added up.
        let mut products = [Bytes64([MaybeUninit::<u32>::uninit(); 2 * TILE * PANEL]); 2];
        let mut before = None;
        for (i, (codes, scales, inputs)) in self.0.runs_of(part).enumerate() {
            let steps = inputs / BYTE_INPUTS;
            let (ahead, ahead_step) = match part.ahead {
                Ahead::Behind(bytes) => (codes.cast::<u8>().wrapping_add(bytes), step_bytes),
                Ahead::At(ahead, share) => (ahead.wrapping_add(asked * share), share),
            };
            asked += steps;
            let weights = match C::INPUTS {
                4 => codes.cast(),
                _ => {
                    let to = weights.0.as_mut_ptr().cast();
                    // SAFETY: the caller's: these codes exist; a run has so many words of quads at most.
                    unsafe { quads::<C, S>(simd, codes, inputs / C::INPUTS, to) };
                    to.cast_const().cast()
                }
            };
            let sums = products[i % 2].0.as_mut_ptr().cast::<u32>();
            let product = Product {
                rows: x,
                row_bytes: heights.map(|rows| rows * ROW_BYTES),
                pieces: 1,
                weights,
                steps,
                resume: 0,
                sums: sums.cast(),
                ahead,
                ahead_step,
            };
            let run = Run {
                resume: i > 0 || part.inputs.start > 0,
                products: sums,
                scales,
                numbers: part.runs.wrapping_add(2 * i * part.rows),
            };
            // SAFETY: the caller's: as many lines of rows exist, and the runs' numbers, and the sums.
            unsafe {
                product.of_bytes();
                if let Some(before) = before.replace(run) {
                    self.add_run(simd, part, before);
                }
            }
            x = x.wrapping_add(steps * (heights[0] + heights[1]) * ROW_BYTES);
        }
        if let Some(last) = before {
            // SAFETY: as above.
            unsafe { self.add_run(simd, part, last) };
        }
    }
}

/// Products of a run, (pieces, rows, PANEL), which are to be added to a part's sums.
struct Run {
    /// Whether to continue from the sums, instead of from zero.
    resume: bool,
    products: *const u32,
    /// Of the outputs, and behind them their minima, where there are any.
    scales: *const bf16,
    /// Of each row.
    numbers: *const f32,
}

impl<C: Codes, R: TiledRows> TiledIntegers<'_, C, R> {
    /// Adds a run's products to the sums of `part`.
    ///
    /// # Safety
    /// All exist.
    #[inline(always)]
    unsafe fn add_run<S: Simd>(&self, simd: S, part: &Part, run: Run) {
        for first in (0..PANEL).step_by(LANES) {
            // SAFETY: the caller's.
            unsafe {
                let scale = simd.load_bf16(run.scales.add(first));
                let minimum = match C::HAVE_MINIMA {
                    true => simd.load_bf16(run.scales.add(PANEL + first)),
                    false => simd.zero(),
                };
                for row in 0..part.rows {
                    let products = run.products.add(row * PANEL + first);
                    let mut total = simd.load_words(products);
                    if const { R::PIECES == 2 } {
                        let lower = simd.load_words(products.add(part.rows * PANEL));
                        total = simd.add_times_256(lower, total);
                    }
                    let sums = part.sums.add(row * PANEL + first);
                    let before = match run.resume {
                        true => simd.load_f32(sums),
                        false => simd.zero(),
                    };
                    let numbers = run.numbers.add(2 * row);
                    let after = add_run::<C, S>(simd, before, total, scale, minimum, numbers);
                    simd.store_f32(sums, after);
                }
            }
        }
    }
}

/// Multiplies tiles that stay in the L1 cache so many times, and gives the number of multiplications and additions.
pub(super) fn multiply_in_cache(dots: Dots, times: usize) -> usize {
    assert!(is_supported(), "this machine has no tiles");
    const STEPS: usize = 8;
    let operand = Bytes64([0_u8; STEPS * STEP_BYTES]);
    let mut sums = Bytes64([0_u32; 2 * TILE * PANEL]);
    let mut configuration = Configuration::default();
    let heights = [TILE; 2];
    configuration.set(Shapes::OfPanels(heights));
    for _ in 0..times {
        let product = Product {
            rows: operand.0.as_ptr(),
            row_bytes: heights.map(|rows| rows * ROW_BYTES),
            pieces: 1,
            weights: operand.0.as_ptr(),
            steps: STEPS,
            resume: 0,
            sums: sums.0.as_mut_ptr().cast(),
            ahead: operand.0.as_ptr(),
            ahead_step: 0,
        };
        // SAFETY: tiles are of these heights; rows and weights are (STEPS, 2, TILE, ROW_BYTES) both, sums (2 * TILE, PANEL).
        unsafe {
            match dots {
                Dots::Bf16 => product.of_bf16(),
                Dots::Integers => product.of_bytes(),
            }
        }
    }
    let inputs = match dots {
        Dots::Bf16 => BF16_INPUTS,
        Dots::Integers => BYTE_INPUTS,
    };
    times * STEPS * 2 * TILE * PANEL * inputs * 2
}

/// Words of a panel that a run takes in quads.
const RUN_WORDS: usize = RUN / 4 * PANEL;

/// Aligned to a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bytes64<T>(T);

/// The rows of two tiles: all in the first where it holds them, else equal shares.
fn heights(rows: usize) -> [usize; 2] {
    match rows {
        ..=TILE => [rows, 0],
        _ => [rows.div_ceil(2), rows / 2],
    }
}

/// Writes so many words of codes of each output of a panel as quads.
///
/// # Safety
/// `codes` exist, and `to` is valid for writing the quads.
#[inline(always)]
unsafe fn quads<C: Codes, S: Simd>(simd: S, codes: *const C, words: usize, to: *mut u32) {
    for word in 0..words {
        for v in (0..PANEL).step_by(LANES) {
            // SAFETY: the caller's.
            unsafe {
                let words = simd.load_words(codes.add(word * PANEL + v).cast());
                let to = to.add(2 * word * PANEL + v);
                simd.store_words(to, C::quad::<S, 0>(simd, words));
                simd.store_words(to.add(PANEL), C::quad::<S, 1>(simd, words));
            }
        }
    }
}

/// What a thread's tiles hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shapes {
    /// Those of a [`Product`]: rows of two tiles, of which the second may have none.
    OfPanels([usize; 2]),
    /// Those of [`Sums`]: rows of a tile.
    OfSums(usize),
}

/// The shapes of a thread's tiles, which are given back when it goes.
#[derive(Default)]
pub(super) struct Configuration(Option<Shapes>);

impl Configuration {
    /// Tiles of these shapes.
    #[inline(always)]
    pub(super) fn set(&mut self, shapes: Shapes) {
        if self.0 != Some(shapes) {
            registers::configure(shapes);
            self.0 = Some(shapes);
        }
    }
}

impl Drop for Configuration {
    #[inline(always)]
    fn drop(&mut self) {
        if self.0.is_some() {
            registers::release();
        }
    }
}

/// Sums of products of tiles of bf16: sixteen outputs of a tile of rows, or of two. Rows lie [`ROW_BYTES`] apart, those of
/// a second tile behind the first [`TILE`].
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "there are no tiles that would read it")
)]
pub(super) struct Sums<'a> {
    /// Of each product where its rows are, and its weights: words of sixteen outputs.
    pub(super) factors: &'a [[*const u8; 2]],
    /// From one word of weights to the next.
    pub(super) weights_row_bytes: usize,
    /// Whether to continue from the sums, instead of from zero.
    pub(super) resume: bool,
    pub(super) sums: *mut f32,
    /// From a row to the next.
    pub(super) sums_row_bytes: usize,
}

/// Two tiles of rows, the second of which may have none, by those of a panel. `sums` are (rows, PANEL).
#[repr(C)]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "there are no tiles that would read it")
)]
struct Product {
    /// Of each step and piece, a line of each row of the first tile, then of the second.
    rows: *const u8,
    /// Of these.
    row_bytes: [usize; 2],
    /// Pieces of rows that meet the same weights.
    pieces: usize,
    weights: *const u8,
    /// Tiles of weights one after the other, at least one.
    steps: usize,
    /// Whether to continue from the sums, instead of from zero.
    resume: usize,
    sums: *mut u8,
    /// Memory that will be wanted next: `ahead_step` bytes of it is asked for in each step.
    ahead: *const u8,
    ahead_step: usize,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod registers {
    use super::{PANEL, Product, ROW_BYTES, STEP_BYTES, Shapes, Sums, TILE};
    use std::arch::{asm, x86_64::__cpuid_count};
    use std::mem::offset_of;
    use std::sync::OnceLock;

    pub(super) fn are_there() -> bool {
        static FOUND: OnceLock<bool> = OnceLock::new();
        /// Of leaf 7: tiles, and their products of bf16 and of bytes.
        const FEATURES: u32 = 1 << 24 | 1 << 22 | 1 << 25;
        /// Of `arch_prctl`: asks for a part of the processor's state, here the contents of tiles.
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        *FOUND.get_or_init(|| {
            // SAFETY: changes nothing but what this process may do.
            __cpuid_count(0, 0).eax >= 7
                && __cpuid_count(7, 0).edx & FEATURES == FEATURES
                && unsafe {
                    libc::syscall(
                        libc::SYS_arch_prctl,
                        ARCH_REQ_XCOMP_PERM,
                        XFEATURE_XTILEDATA,
                    )
                } == 0
        })
    }

    /// What `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Memory {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Of panels, tiles 0 and 1 are sums of the first rows, 2 and 3 of the second, 4 and 5 these rows, 6 and 7 weights. Of
    /// sums, 0 and 1 are sums of the first rows and of the second, 2 and 3 rows and weights, 4 and 5 those of half as
    /// many inputs.
    #[inline(always)]
    pub(super) fn configure(shapes: Shapes) {
        let mut memory = Memory {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        memory.row_bytes[..8].fill(ROW_BYTES as u16);
        let rows = match shapes {
            Shapes::OfPanels([first, second]) => {
                let (a, b) = (first, second.max(1));
                [a, a, b, b, a, b, TILE, TILE]
            }
            Shapes::OfSums(rows) => {
                memory.row_bytes[4] /= 2;
                [rows, rows, rows, TILE, rows, TILE / 2, 1, 1]
            }
        };
        assert!(rows.iter().all(|rows| (1..=TILE).contains(rows)));
        memory.rows[..8].copy_from_slice(&rows.map(|rows| rows as u8));
        // SAFETY: the machine has tiles, or there would be no configuration of theirs; the compiler uses none.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &memory,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
    }

    #[inline(always)]
    pub(super) fn release() {
        // SAFETY: as above.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
    }

    /// A product by `$dot`; with an empty text for `$second`, which repeats what is in brackets, there is a second tile of
    /// rows.
    macro_rules! product {
        ($product:expr, $dot:literal, [$($second:literal)?]) => {
            asm!(
                // The sums: those of before, or zero.
                "mov {t}, [{op} + {SUMS}]",
                "mov {u}, [{op} + {FIRST}]",
                // A row of sums is two of a tile.
                "lea {u}, [{t} + {u}*2]",
                "cmp qword ptr [{op} + {RESUME}], 0",
                "je 2f",
                "tileloadd tmm0, [{t} + {row}*2]",
                "tileloadd tmm1, [{t} + {row}*2 + 64]",
                $(concat!("tileloadd tmm2, [{u} + {row}*2]", $second),
                "tileloadd tmm3, [{u} + {row}*2 + 64]",)?
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                $(concat!("tilezero tmm2", $second),
                "tilezero tmm3",)?
                "3:",
                "tileloadd tmm6, [{weights} + {row}*2]",
                "tileloadd tmm7, [{weights} + {row}*2 + 64]",
                "mov {u}, [{op} + {PIECES}]",
                "4:",
                "tileloadd tmm4, [{rows} + {row}]",
                "add {rows}, [{op} + {FIRST}]",
                concat!($dot, " tmm0, tmm4, tmm6"),
                concat!($dot, " tmm1, tmm4, tmm7"),
                $(concat!("tileloadd tmm5, [{rows} + {row}]", $second),
                concat!($dot, " tmm2, tmm5, tmm6"),
                concat!($dot, " tmm3, tmm5, tmm7"),)?
                "add {rows}, [{op} + {SECOND}]",
                "dec {u}",
                "jnz 4b",
                // Four lines at a time.
                "mov {t}, {ahead}",
                "add {ahead}, [{op} + {AHEAD_STEP}]",
                "5:",
                "prefetcht0 [{t}]",
                "prefetcht0 [{t} + 64]",
                "prefetcht0 [{t} + 128]",
                "prefetcht0 [{t} + 192]",
                "add {t}, 256",
                "cmp {t}, {ahead}",
                "jb 5b",
                "add {weights}, {STEP}",
                "dec {steps}",
                "jnz 3b",
                "mov {t}, [{op} + {SUMS}]",
                "mov {u}, [{op} + {FIRST}]",
                "lea {u}, [{t} + {u}*2]",
                "tilestored [{t} + {row}*2], tmm0",
                "tilestored [{t} + {row}*2 + 64], tmm1",
                $(concat!("tilestored [{u} + {row}*2], tmm2", $second),
                "tilestored [{u} + {row}*2 + 64], tmm3",)?
                op = in(reg) $product,
                row = in(reg) ROW_BYTES,
                rows = inout(reg) $product.rows => _,
                weights = inout(reg) $product.weights => _,
                steps = inout(reg) $product.steps => _,
                ahead = inout(reg) $product.ahead => _,
                t = out(reg) _,
                u = out(reg) _,
                SUMS = const offset_of!(Product, sums),
                FIRST = const offset_of!(Product, row_bytes),
                SECOND = const offset_of!(Product, row_bytes) + size_of::<usize>(),
                RESUME = const offset_of!(Product, resume),
                PIECES = const offset_of!(Product, pieces),
                AHEAD_STEP = const offset_of!(Product, ahead_step),
                STEP = const STEP_BYTES,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }

    /// Sums, where rows and weights are tiles `$rows` and `$weights`; with an empty text for `$second`, which repeats what
    /// is in brackets, of two tiles of rows.
    macro_rules! sums {
        ($sums:expr, $rows:literal, $weights:literal, [$($second:literal)?]) => {
            asm!(
                "test {resume}, {resume}",
                "jz 2f",
                "tileloadd tmm0, [{first} + {sums_row}]",
                $(concat!("tileloadd tmm1, [{second} + {sums_row}]", $second),)?
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                $(concat!("tilezero tmm1", $second),)?
                "3:",
                "mov {t}, [{factors} + 8]",
                concat!("tileloadd ", $weights, ", [{t} + {weights_row}]"),
                "mov {t}, [{factors}]",
                concat!("tileloadd ", $rows, ", [{t} + {row}]"),
                concat!("tdpbf16ps tmm0, ", $rows, ", ", $weights),
                $(concat!("tileloadd ", $rows, ", [{t} + {row} + {SECOND}]", $second),
                concat!("tdpbf16ps tmm1, ", $rows, ", ", $weights),)?
                "add {factors}, 16",
                "dec {count}",
                "jnz 3b",
                "tilestored [{first} + {sums_row}], tmm0",
                $(concat!("tilestored [{second} + {sums_row}], tmm1", $second),)?
                // Not read of a single tile of rows.
                "/* {second} {SECOND} */",
                resume = in(reg) usize::from($sums.resume),
                factors = inout(reg) $sums.factors.as_ptr() => _,
                count = inout(reg) $sums.factors.len() => _,
                weights_row = in(reg) $sums.weights_row_bytes,
                row = in(reg) ROW_BYTES,
                first = in(reg) $sums.sums,
                second = in(reg) $sums.sums.wrapping_byte_add(TILE * $sums.sums_row_bytes),
                sums_row = in(reg) $sums.sums_row_bytes,
                t = out(reg) _,
                SECOND = const TILE * ROW_BYTES,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }

    impl Sums<'_> {
        /// Adds products of [`BF16_INPUTS`](super::BF16_INPUTS) inputs, or of HALF as many, of a tile of rows or of two.
        ///
        /// # Safety
        /// Tiles have the shapes of [`Shapes::OfSums`], of [`TILE`] rows if there are `two`; what is read and written
        /// exists.
        #[inline(always)]
        pub(in crate::cpu) unsafe fn add<const HALF: bool>(&self, two: bool) {
            assert!(!self.factors.is_empty(), "a product");
            // SAFETY: the caller's.
            unsafe {
                match (two, HALF) {
                    (false, false) => sums!(self, "tmm2", "tmm3", []),
                    (true, false) => sums!(self, "tmm2", "tmm3", [""]),
                    (false, true) => sums!(self, "tmm4", "tmm5", []),
                    (true, true) => sums!(self, "tmm4", "tmm5", [""]),
                }
            }
        }
    }

    // A row of sums is two of a tile.
    const _: () = assert!(PANEL * size_of::<f32>() == 2 * ROW_BYTES);

    impl Product {
        /// Multiplies tiles of bf16.
        ///
        /// # Safety
        /// Tiles are configured for these rows, and what is read and written exists.
        #[inline(always)]
        pub(super) unsafe fn of_bf16(&self) {
            // SAFETY: the caller's.
            unsafe {
                match self.row_bytes[1] {
                    0 => product!(self, "tdpbf16ps", []),
                    _ => product!(self, "tdpbf16ps", [""]),
                }
            }
        }

        /// Multiplies tiles of signed bytes.
        ///
        /// # Safety
        /// As [`Product::of_bf16`].
        #[inline(always)]
        pub(super) unsafe fn of_bytes(&self) {
            // SAFETY: the caller's.
            unsafe {
                match self.row_bytes[1] {
                    0 => product!(self, "tdpbssd", []),
                    _ => product!(self, "tdpbssd", [""]),
                }
            }
        }
    }
}

/// Where there are no tiles.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod registers {
    use super::{Product, Shapes, Sums};

    pub(super) fn are_there() -> bool {
        false
    }

    pub(super) fn configure(_: Shapes) {
        unreachable!("no tiles")
    }

    pub(super) fn release() {}

    impl Sums<'_> {
        pub(in crate::cpu) unsafe fn add<const HALF: bool>(&self, _: bool) {
            unreachable!("no tiles")
        }
    }

    impl Product {
        pub(super) unsafe fn of_bf16(&self) {
            unreachable!("no tiles")
        }

        pub(super) unsafe fn of_bytes(&self) {
            unreachable!("no tiles")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Packed, Random, bits, cpu};
    use crate::cpu::{Linear, Rows, RowsMut, linear};
    use kiln_bundle::Activations;

    /// The sum of a row's products with weights, as the head of this file says.
    fn sum_of_products(row: &[f32], weights: impl Fn(usize) -> f32, pieces: usize) -> f32 {
        let mut sum = 0.0_f32;
        for (first, inputs) in (0..).step_by(BF16_INPUTS).zip(row.chunks(BF16_INPUTS)) {
            let mut left = inputs.to_vec();
            for _ in 0..pieces {
                let mut chains = [0.0_f32; 2];
                for (i, left) in left.iter_mut().enumerate() {
                    let piece = bf16::from_f32(*left).to_f32();
                    *left -= piece;
                    chains[i % 2] = piece.mul_add(weights(first + i), chains[i % 2]);
                }
                sum += chains[0] + chains[1];
            }
        }
        sum
    }

    #[test]
    fn bf16_is_summed_in_the_order_of_tiles() {
        if !Isa::Amx.is_supported() {
            return;
        }
        let n = 40;
        // One tile, and several blocks.
        for k in [32, 96, 1088] {
            let mut random = Random::new(k as u64);
            let packed = &Packed::each(&random.values(n * k), n, k)[2];
            for t in [1, 2, 16, 17, 33, 100] {
                let x = random.values(t * k);
                for (activations, pieces) in [(Some(Activations::Bf16), 1), (None, 2)] {
                    let op = Linear {
                        activations,
                        ..Linear::new(packed.matrix())
                    };
                    let mut found = vec![0.0; t * n];
                    let out = RowsMut::new(&mut found, t, n);
                    linear(&mut cpu(Isa::Amx, 2), &op, Rows::new(&x, t, k), out);
                    for (row, found) in x.chunks(k).zip(found.chunks(n)) {
                        let expect: Vec<f32> = (0..n)
                            .map(|n| sum_of_products(row, |k| packed.get(n, k), pieces))
                            .collect();
                        assert_eq!(
                            bits(found),
                            bits(&expect),
                            "{t} rows of {k}, {pieces} pieces"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_lost() {
        if !Isa::Amx.is_supported() {
            return;
        }
        let (n, k) = (32, 64);
        let packed = &Packed::each(&vec![1.0; n * k], n, k)[2];
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; k];
            x[k - 1] = wrong;
            let mut out = vec![0.0; n];
            let op = Linear::new(packed.matrix());
            let rows = RowsMut::new(&mut out, 1, n);
            linear(&mut cpu(Isa::Amx, 1), &op, Rows::new(&x, 1, k), rows);
            assert!(out.iter().all(|y| !y.is_finite()), "{out:?}");
        }
    }
}
