//! The inner loop of every matrix product: a tile of outputs kept in registers.

use super::fixed::{Piece, RUN};
use super::simd::{Codes, Dots, Element, Kernel, LANES, Simd};
use half::bf16;
use kiln_bundle::packing::PANEL;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

/// Repeats the body for each constant below the limit: ROWS, at most 12, VECTORS, at most 4, WORDS of a step, at
/// most 2, the PARTS of a word, at most 4, or the PIECES of a number, at most 2. A loop would do the same if the
/// compiler could be relied on to unroll it before it decides what lives in registers.
macro_rules! unrolled {
    ($i:ident in ROWS $body:block) => {
        unrolled!($i in (ROWS) $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($i:ident in VECTORS $body:block) => {
        unrolled!($i in (VECTORS) $body 0 1 2 3)
    };
    ($i:ident in WORDS $body:block) => {
        unrolled!($i in (F::WORDS) $body 0 1)
    };
    ($i:ident in PARTS $body:block) => {
        unrolled!($i in (C::INPUTS / I::INPUTS) $body 0 1 2 3)
    };
    ($i:ident in PIECES $body:block) => {
        unrolled!($i in (I::PIECES) $body 0 1)
    };
    ($i:ident in ($limit:expr) $body:block $($value:literal)*) => {
        $(if const { $value < $limit } {
            const $i: usize = $value;
            $body
        })*
    };
}

/// Values of a row that lie together where the rows of a tile are in *lines*: (values / LINE, ROWS, LINE).
/// It is a line of the cache.
pub(super) const LINE: usize = 16;

/// Values of a row, of which it has `values`, that lie together beside ROWS - 1 others.
#[inline(always)]
fn line_of<const ROWS: usize>(values: usize) -> usize {
    // The lines of a single row lie one after the other.
    if const { ROWS == 1 } {
        values.max(1)
    } else {
        LINE
    }
}

/// What a tile of floating-point numbers multiplies: in each step one word of a row or two, each of one input or of
/// two, with the elements of as many inputs of `b`.
pub(super) trait Factors: Copy + Send + Sync {
    type Element: Element;
    /// A vector of elements, or of pairs.
    type Column<S: Simd>: Copy;

    /// Inputs of a word.
    const INPUTS: usize;
    /// Words of a row that a step takes.
    const WORDS: usize = 1;
    /// Inputs that lie together in `b`.
    const TOGETHER: usize = 1;
    /// Whether words are the values themselves.
    const AS_THEY_ARE: bool;
    /// As [`Kernel::DOTS`].
    const DOTS: Option<Dots>;

    /// Rows of the tallest tile.
    fn tile_rows<S: Simd>() -> usize;

    /// Writes a vector of values as they are in words, which may be fewer.
    ///
    /// # Safety
    /// `p` is valid for writing as many.
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V);

    /// The vectors of the inputs of word WORD of a step.
    ///
    /// # Safety
    /// The step exists.
    unsafe fn columns<S: Simd, const VECTORS: usize, const WORD: usize>(
        simd: S,
        step: Step<Self::Element>,
    ) -> [Self::Column<S>; VECTORS];

    /// To `sums` the products of a column and of a row's word.
    fn add_products<S: Simd>(simd: S, sums: S::V, column: Self::Column<S>, word: u32) -> S::V;

    /// To `sums` the products of a step's first input alone, whatever lies with it, and of its part of a row's word.
    ///
    /// # Safety
    /// The step exists.
    #[inline(always)]
    unsafe fn add_first<S: Simd>(
        simd: S,
        sums: S::V,
        step: Step<Self::Element>,
        word: u32,
    ) -> S::V {
        // SAFETY: the caller's.
        let [column] = unsafe { Self::columns::<S, 1, 0>(simd, step) };
        Self::add_products(simd, sums, column, word)
    }
}

/// A step of `b`: its first vector, and from a vector to the next.
#[derive(Clone, Copy)]
pub(super) struct Step<E> {
    pub(super) at: *const E,
    pub(super) to_vector: isize,
}

impl Step<bf16> {
    /// Vector V of inputs that lie together, in words.
    ///
    /// # Safety
    /// It exists.
    #[inline(always)]
    unsafe fn words<S: Simd, const V: usize>(self, simd: S) -> S::Words {
        // SAFETY: the caller's.
        unsafe { simd.load_words(self.at.offset(V as isize * self.to_vector).cast()) }
    }
}

/// Rows of `f32`: a chain of fused multiply-adds `c[r][j] += a[r][i] * b[i][j]` for i = 0, 1 ..
#[derive(Clone, Copy)]
pub(super) struct Singles<E>(PhantomData<E>);

impl<E: Element> Factors for Singles<E> {
    type Element = E;
    type Column<S: Simd> = S::V;

    const INPUTS: usize = 1;
    const AS_THEY_ARE: bool = true;
    const DOTS: Option<Dots> = None;

    fn tile_rows<S: Simd>() -> usize {
        S::TILE_ROWS
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_f32(p.cast(), values) }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const VECTORS: usize, const WORD: usize>(
        simd: S,
        step: Step<E>,
    ) -> [S::V; VECTORS] {
        let mut columns = [simd.zero(); VECTORS];
        unrolled!(V in VECTORS {
            // SAFETY: the caller's.
            columns[V] = unsafe { E::load(simd, step.at.offset(V as isize * step.to_vector)) };
        });
        columns
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::V, column: S::V, word: u32) -> S::V {
        simd.fma(simd.splat(f32::from_bits(word)), column, sums)
    }
}

/// Rows of `f32` beside bf16 whose inputs lie together in twos, the first in the lower half of a word: as [`Singles`].
#[derive(Clone, Copy)]
pub(super) struct Bf16Singles;

impl Factors for Bf16Singles {
    type Element = bf16;
    type Column<S: Simd> = S::V;

    const INPUTS: usize = 1;
    const WORDS: usize = 2;
    const TOGETHER: usize = 2;
    const AS_THEY_ARE: bool = true;
    const DOTS: Option<Dots> = None;

    fn tile_rows<S: Simd>() -> usize {
        S::TILE_ROWS
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_f32(p.cast(), values) }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const VECTORS: usize, const WORD: usize>(
        simd: S,
        step: Step<bf16>,
    ) -> [S::V; VECTORS] {
        let mut columns = [simd.zero(); VECTORS];
        unrolled!(V in VECTORS {
            // SAFETY: the caller's.
            let words = unsafe { step.words::<S, V>(simd) };
            columns[V] = match WORD {
                0 => simd.lower_bf16(words),
                _ => simd.upper_bf16(words),
            };
        });
        columns
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::V, column: S::V, word: u32) -> S::V {
        simd.fma(simd.splat(f32::from_bits(word)), column, sums)
    }
}

/// Rows of bf16 in pairs, the first in the lower half of a word, beside bf16 that lie likewise:
/// `c[r][j] += a[r][i + 1] * b[i + 1][j]`, then `c[r][j] += a[r][i] * b[i][j]`, for i = 0, 2 ..
#[derive(Clone, Copy)]
pub(super) struct Bf16Pairs;

impl Factors for Bf16Pairs {
    type Element = bf16;
    type Column<S: Simd> = S::Words;

    const INPUTS: usize = 2;
    const TOGETHER: usize = 2;
    const AS_THEY_ARE: bool = false;
    const DOTS: Option<Dots> = Some(Dots::Bf16);

    fn tile_rows<S: Simd>() -> usize {
        S::BF16_TILE_ROWS
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut u32, values: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_bf16(p.cast(), values) }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const VECTORS: usize, const WORD: usize>(
        simd: S,
        step: Step<bf16>,
    ) -> [S::Words; VECTORS] {
        let mut columns = [simd.splat_word(0); VECTORS];
        unrolled!(V in VECTORS {
            // SAFETY: the caller's.
            columns[V] = unsafe { step.words::<S, V>(simd) };
        });
        columns
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::V, column: S::Words, word: u32) -> S::V {
        simd.add_bf16_products(sums, column, simd.splat_word(word))
    }

    #[inline(always)]
    unsafe fn add_first<S: Simd>(simd: S, sums: S::V, step: Step<bf16>, word: u32) -> S::V {
        // SAFETY: the caller's.
        let column = simd.lower_bf16(unsafe { step.words::<S, 0>(simd) });
        simd.fma(simd.splat(f32::from_bits(word << 16)), column, sums)
    }
}

/// Where a tile finds its operands, and what it does with them: see [`Factors`].
#[derive(Clone, Copy)]
pub(super) struct Tile<F: Factors> {
    /// Length of the sum.
    pub(super) k: usize,
    /// Rows in lines of words; zeros make up whole steps.
    pub(super) a: *const u32,
    /// `b[i]` at `b + i * b_step`, its vectors `b_vector` apart.
    pub(super) b: *const F::Element,
    pub(super) b_step: usize,
    pub(super) b_vector: isize,
    /// `c[r]` at `c + r * c_stride`, its vectors `c_vector` apart.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) c_vector: usize,
    /// Continue from the sums in `c` instead of from zero.
    pub(super) resume: bool,
    /// Memory that will be wanted next: `ahead + i * ahead_step` bytes is asked for in each step.
    pub(super) ahead: *const u8,
    pub(super) ahead_step: usize,
}

impl<F: Factors> Tile<F> {
    /// Computes a tile of ROWS rows and VECTORS vectors: each element one chain in the order of i.
    ///
    /// # Safety
    /// The operands exist, and `c` overlaps neither.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let mut sums = [[simd.zero(); VECTORS]; ROWS];
        let c = |r: usize, v: usize| self.c.wrapping_add(r * self.c_stride + v * self.c_vector);
        if self.resume {
            unrolled!(R in ROWS {
                unrolled!(V in VECTORS {
                    // SAFETY: within `c`.
                    sums[R][V] = unsafe { simd.load_f32(c(R, V)) };
                });
            });
        }
        // Inputs of a step, and lines of the cache that they take.
        let inputs = F::INPUTS * F::WORDS;
        let lines = (inputs * VECTORS * LANES * size_of::<F::Element>()).div_ceil(64);
        let (mut a, mut b, mut ahead) = (self.a, self.b, self.ahead);
        let line = line_of::<ROWS>(self.k.div_ceil(F::INPUTS));
        for first in (0..self.k).step_by(F::INPUTS * line) {
            let left = self.k - first;
            let words = line.min(left.div_ceil(F::INPUTS));
            for i in (0..words.div_ceil(F::WORDS)).map(|step| step * F::WORDS) {
                for line in 0..lines {
                    simd.prefetch(ahead.wrapping_add(64 * line));
                }
                let step = Step {
                    at: b,
                    to_vector: self.b_vector,
                };
                unrolled!(W in WORDS {
                    // SAFETY: this step of `b`.
                    let columns = unsafe { F::columns::<S, VECTORS, W>(simd, step) };
                    unrolled!(R in ROWS {
                        // SAFETY: a word of `a`.
                        let word = unsafe { *a.add(R * LINE + i + W) };
                        unrolled!(V in VECTORS {
                            sums[R][V] = F::add_products(simd, sums[R][V], columns[V], word);
                        });
                    });
                });
                b = b.wrapping_add(inputs * self.b_step);
                ahead = ahead.wrapping_add(self.ahead_step);
            }
            a = a.wrapping_add(ROWS * LINE);
        }
        unrolled!(R in ROWS {
            unrolled!(V in VECTORS {
                // SAFETY: within `c`.
                unsafe { simd.store_f32(c(R, V), sums[R][V]) };
            });
        });
    }
}

/// How rows of integers lie in words, to be multiplied with codes.
pub(super) trait IntRows: Copy + Send + Sync {
    /// What lies in a word: an integer, or a piece of one.
    type Piece: Piece;

    /// The greatest integer that is used.
    const LARGEST: f32;
    /// Pieces of an integer, each in a word of its own: one, or an upper byte and a lower one.
    const PIECES: usize = 1;
    /// Inputs of a word.
    const INPUTS: usize = size_of::<u32>() / size_of::<Self::Piece>();

    /// Words of a row that meet a word of codes: for each piece, one for each of its parts, at most 4.
    fn words<C: Codes>() -> usize {
        C::INPUTS / Self::INPUTS * Self::PIECES
    }

    /// Piece `i` of integers: they themselves where there is but one.
    #[inline(always)]
    fn piece<S: Simd>(_: S, integers: S::V, _: usize) -> S::V {
        integers
    }

    /// Brings pieces of the inputs of each word of C together by the parts that they meet: a part takes inputs that
    /// are as far apart as there are parts.
    fn in_turn<C: Codes>(pieces: &mut [Self::Piece; RUN]);

    /// Part P of each word of codes.
    fn part<C: Codes, S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words;

    /// What a run's sums start from, given its second number.
    fn start<C: Codes, S: Simd>(simd: S, second: f32) -> S::Words;

    /// To `sums` the products of a part and of a row's word.
    fn add_products<S: Simd>(simd: S, sums: S::Words, part: S::Words, x: S::Words) -> S::Words;
}

/// Pairs of 16 bits.
#[derive(Clone, Copy)]
pub(super) struct Pairs;

impl IntRows for Pairs {
    type Piece = i16;

    const LARGEST: f32 = Halves::LARGEST;

    #[inline(always)]
    fn in_turn<C: Codes>(pieces: &mut [i16; RUN]) {
        let parts = C::INPUTS / Self::INPUTS;
        for pieces in pieces.chunks_exact_mut(C::INPUTS) {
            let mut turned = [0; 8];
            for (i, turned) in turned.iter_mut().enumerate().take(C::INPUTS) {
                *turned = pieces[i % Self::INPUTS * parts + i / Self::INPUTS];
            }
            pieces.copy_from_slice(&turned[..C::INPUTS]);
        }
    }

    #[inline(always)]
    fn part<C: Codes, S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        C::pair::<S, P>(simd, words)
    }

    #[inline(always)]
    fn start<C: Codes, S: Simd>(simd: S, _: f32) -> S::Words {
        simd.splat_word(0)
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::Words, part: S::Words, x: S::Words) -> S::Words {
        simd.add_pair_products(sums, part, x)
    }
}

/// Quads of 8 bits. Where products want codes without sign, these are raised, and a run's sums start from what
/// that adds.
#[derive(Clone, Copy)]
pub(super) struct Quads;

impl IntRows for Quads {
    type Piece = i8;

    const LARGEST: f32 = 127.0;

    #[inline(always)]
    fn in_turn<C: Codes>(pieces: &mut [i8; RUN]) {
        const { assert!(C::INPUTS == 4 || C::INPUTS == 8) };
        if C::INPUTS == 8 {
            // The compiler makes vectors of this, as it would not of bytes one by one.
            for bytes in bytemuck::cast_slice_mut(pieces).chunks_exact_mut(8) {
                let x = bytemuck::pod_read_unaligned(bytes);
                bytes.copy_from_slice(bytemuck::bytes_of(&evens_first(x)));
            }
        }
    }

    #[inline(always)]
    fn part<C: Codes, S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        C::quad::<S, P>(simd, words)
    }

    #[inline(always)]
    fn start<C: Codes, S: Simd>(simd: S, second: f32) -> S::Words {
        match C::quad_offset::<S>() {
            0 => simd.splat_word(0),
            _ => simd.splat_word(second.to_bits()),
        }
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::Words, part: S::Words, x: S::Words) -> S::Words {
        simd.add_quad_products(sums, part, x)
    }
}

/// The bytes of `x`, first those of even number.
#[inline(always)]
fn evens_first(x: u64) -> u64 {
    // Bytes 1 and 2 of each four change places, then 2 and 3 with 4 and 5.
    let swap = |x: u64, mask: u64, by: u32| {
        let differ = (x ^ x >> by) & mask;
        x ^ differ ^ differ << by
    };
    swap(swap(x, 0x0000_ff00_0000_ff00, 8), 0xffff_0000, 16)
}

/// Numbers of 16 bits as 256 times one of 8 bits and another, in quads of either: where products of bytes are an
/// instruction, codes need not become 16 bits.
#[derive(Clone, Copy)]
pub(super) struct Halves;

impl IntRows for Halves {
    type Piece = i8;

    const LARGEST: f32 = 127.0 * 256.0 + 127.0;
    const PIECES: usize = 2;

    #[inline(always)]
    fn piece<S: Simd>(simd: S, integers: S::V, i: usize) -> S::V {
        // Rounded up where it is in the middle: the byte that is left is from -128 to 127.
        let upper = simd.add(integers, simd.splat(0.25));
        let upper = simd.round(simd.mul(upper, simd.splat(1.0 / 256.0)));
        match i {
            0 => upper,
            _ => simd.fma(upper, simd.splat(-256.0), integers),
        }
    }

    #[inline(always)]
    fn in_turn<C: Codes>(pieces: &mut [i8; RUN]) {
        Quads::in_turn::<C>(pieces);
    }

    #[inline(always)]
    fn part<C: Codes, S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        Quads::part::<C, S, P>(simd, words)
    }

    #[inline(always)]
    fn start<C: Codes, S: Simd>(simd: S, second: f32) -> S::Words {
        Quads::start::<C, S>(simd, second)
    }

    #[inline(always)]
    fn add_products<S: Simd>(simd: S, sums: S::Words, part: S::Words, x: S::Words) -> S::Words {
        Quads::add_products(simd, sums, part, x)
    }
}

/// Whole groups of a panel of integers ([`kiln_bundle::packing`]) against the rows of a tile, which are
/// integers too ([`super::fixed`]). Of each run of inputs a product of integers is made, exactly, then
/// `c[r] += scale * run's scale * product + minimum * run's sum`.
#[derive(Clone, Copy)]
pub(super) struct IntTile<C, R> {
    /// Inputs of all groups.
    pub(super) k: usize,
    /// Inputs of a group; the last may have fewer.
    pub(super) group: usize,
    /// From a group to the next.
    pub(super) group_bytes: usize,
    /// Rows in lines of words of R; a run begins a line.
    pub(super) x: *const u32,
    /// Of each run of `x`, (runs, ROWS, 2): its scale, and its sum where there are minima, else the word
    /// that [`IntRows::start`] takes.
    pub(super) runs: *const f32,
    /// The codes of the first group.
    pub(super) codes: *const C,
    /// Of the first group.
    pub(super) scales: *const bf16,
    /// Of the first group, where [`Codes::HAVE_MINIMA`].
    pub(super) minima: *const bf16,
    /// Sums, (ROWS, PANEL).
    pub(super) c: *mut f32,
    /// Continue from the sums in `c` instead of from zero.
    pub(super) resume: bool,
    /// As in [`Tile`], a step being a word of each output; `ahead_group` is added with each group.
    pub(super) ahead: *const u8,
    pub(super) ahead_step: usize,
    pub(super) ahead_group: usize,
    pub(super) form: PhantomData<R>,
}

impl<C: Codes, I: IntRows> IntTile<C, I> {
    /// Computes ROWS rows and VECTORS vectors, run after run.
    ///
    /// # Safety
    /// The operands exist, and `c` overlaps none of them.
    #[inline(always)]
    unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(mut self, simd: S) {
        if !self.resume {
            unrolled!(R in ROWS {
                unrolled!(V in VECTORS {
                    // SAFETY: within `c`.
                    unsafe { simd.store_f32(self.c.add(R * PANEL + V * LANES), simd.zero()) };
                });
            });
        }
        let mut inputs_left = self.k;
        while inputs_left > 0 {
            let mut group_left = inputs_left.min(self.group);
            inputs_left -= group_left;
            let mut codes = self.codes;
            while group_left > 0 {
                let run = group_left.min(RUN);
                group_left -= run;
                let words = run.div_ceil(C::INPUTS);
                // SAFETY: the caller's.
                unsafe {
                    let products = self.products::<S, ROWS, VECTORS>(simd, codes, words);
                    self.add_run::<S, ROWS, VECTORS>(simd, products);
                }
                codes = codes.wrapping_add(words * PANEL);
                let lines = (words * I::words::<C>()).div_ceil(LINE);
                self.x = self.x.wrapping_add(lines * ROWS * LINE);
                self.runs = self.runs.wrapping_add(2 * ROWS);
                self.ahead = self.ahead.wrapping_add(words * self.ahead_step);
            }
            let group_bytes = self.group_bytes;
            self.ahead = self.ahead.wrapping_add(self.ahead_group);
            self.codes = self.codes.wrapping_byte_add(group_bytes);
            self.scales = self.scales.wrapping_byte_add(group_bytes);
            self.minima = self.minima.wrapping_byte_add(group_bytes);
        }
    }

    /// The products of the next run: so many words of each output.
    ///
    /// # Safety
    /// `x`, the run's numbers and `codes` exist.
    #[inline(always)]
    unsafe fn products<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        mut codes: *const C,
        words: usize,
    ) -> [[S::Words; VECTORS]; ROWS] {
        // Of each piece of the rows' integers; where these are whole, in the last.
        let mut sums = [[[simd.splat_word(0); VECTORS]; ROWS]; 2];
        unrolled!(R in ROWS {
            // SAFETY: the run's numbers exist.
            sums[1][R] = [I::start::<C, S>(simd, unsafe { *self.runs.add(2 * R + 1) }); VECTORS];
        });
        let (mut x, mut ahead) = (self.x, self.ahead);
        let parts = const { C::INPUTS / I::INPUTS };
        let words_a_line = line_of::<ROWS>(words * I::words::<C>()) / I::words::<C>();
        let mut left = words;
        while left > 0 {
            // One at least, which the compiler is to know: else it keeps a copy of the sums.
            let mut line = left.min(words_a_line);
            left -= line;
            let mut next = x;
            loop {
                for line in 0..VECTORS {
                    simd.prefetch(ahead.wrapping_add(64 * line));
                }
                let mut step = [simd.splat_word(0); VECTORS];
                unrolled!(V in VECTORS {
                    // SAFETY: this word of each output.
                    step[V] = unsafe { simd.load_words(codes.add(V * LANES).cast()) };
                });
                unrolled!(P in PARTS {
                    let mut column = step;
                    unrolled!(V in VECTORS {
                        column[V] = I::part::<C, S, P>(simd, step[V]);
                    });
                    unrolled!(R in ROWS {
                        unrolled!(W in PIECES {
                            // SAFETY: the step of `x`.
                            let x = unsafe { *next.add(R * LINE + W * parts + P) };
                            let x = simd.splat_word(x);
                            unrolled!(V in VECTORS {
                                let sums = &mut sums[2 - I::PIECES + W][R][V];
                                *sums = I::add_products(simd, *sums, column[V], x);
                            });
                        });
                    });
                });
                codes = codes.wrapping_add(PANEL);
                next = next.wrapping_add(I::words::<C>());
                ahead = ahead.wrapping_add(self.ahead_step);
                line -= 1;
                if line == 0 {
                    break;
                }
            }
            x = x.wrapping_add(ROWS * LINE);
        }
        let [upper, mut totals] = sums;
        if const { I::PIECES == 2 } {
            unrolled!(R in ROWS {
                unrolled!(V in VECTORS {
                    totals[R][V] = simd.add_times_256(totals[R][V], upper[R][V]);
                });
            });
        }
        totals
    }

    /// Adds a run's products to `c`.
    ///
    /// # Safety
    /// Scales, minima, the run's numbers and `c` exist.
    #[inline(always)]
    unsafe fn add_run<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        products: [[S::Words; VECTORS]; ROWS],
    ) {
        unrolled!(V in VECTORS {
            // SAFETY: the caller's.
            unsafe {
                let scale = simd.load_bf16(self.scales.add(V * LANES));
                unrolled!(R in ROWS {
                    let c = self.c.add(R * PANEL + V * LANES);
                    // Loaded for each row: it is to take no register from the products.
                    let minimum = match C::HAVE_MINIMA {
                        true => simd.load_bf16(self.minima.add(V * LANES)),
                        false => simd.zero(),
                    };
                    let run = self.runs.add(2 * R);
                    let total = simd.load_f32(c);
                    let total = add_run::<C, S>(simd, total, products[R][V], scale, minimum, run);
                    simd.store_f32(c, total);
                    // One after the other: many at once would push the products out of registers.
                    compiler_fence(Ordering::SeqCst);
                });
            }
        });
    }
}

/// To `sums` the products of a run: times the outputs' scale and the run's, and where there are minima, these times the
/// run's sum.
///
/// # Safety
/// The run's two numbers exist.
#[inline(always)]
pub(super) unsafe fn add_run<C: Codes, S: Simd>(
    simd: S,
    mut sums: S::V,
    products: S::Words,
    scale: S::V,
    minimum: S::V,
    run: *const f32,
) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        if const { C::HAVE_MINIMA } {
            sums = simd.fma(simd.splat(*run.add(1)), minimum, sums);
        }
        let products = simd.mul(scale, simd.words_to_f32(products));
        simd.fma(simd.splat(*run), products, sums)
    }
}

/// A tile of a number of rows known at run time; a [`Tile`] is taken to be one of a panel.
pub(super) trait AnyRows: Copy {
    /// As [`Kernel::DOTS`].
    const DOTS: Option<Dots> = None;

    /// # Safety
    /// The operands exist for ROWS rows and VECTORS vectors, and `c` overlaps none of them.
    unsafe fn run_lines<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S);

    /// Computes at most `S::TILE_ROWS` rows, or `S::DIRECT_ROWS` where the tile is wider than others.
    ///
    /// # Safety
    /// As `run_lines`.
    #[inline(always)]
    unsafe fn run_rows<S: Simd, const VECTORS: usize>(self, simd: S, rows: usize) {
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match rows {
                    $($rows => simd.outlined(FixedTile::<Self, $rows, VECTORS>(self)),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        if const { VECTORS > S::TILE_VECTORS } {
            by_rows!(1, 2)
        } else if const { S::TILE_ROWS <= 6 } {
            by_rows!(1, 2, 3, 4, 5, 6)
        } else {
            by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
        }
    }
}

impl<F: Factors> AnyRows for Tile<F> {
    const DOTS: Option<Dots> = F::DOTS;

    #[inline(always)]
    unsafe fn run_lines<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        // Constants to the compiler.
        let tile = Tile {
            b_step: PANEL,
            b_vector: (F::TOGETHER * LANES) as isize,
            c_stride: PANEL,
            c_vector: LANES,
            ..self
        };
        // SAFETY: the caller's.
        unsafe { tile.run::<S, ROWS, VECTORS>(simd) };
    }
}

impl<C: Codes, I: IntRows> AnyRows for IntTile<C, I> {
    const DOTS: Option<Dots> = Some(Dots::Integers);

    #[inline(always)]
    unsafe fn run_lines<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        // SAFETY: the caller's.
        unsafe { self.run::<S, ROWS, VECTORS>(simd) };
    }
}

/// A tile whose loop is compiled by itself: among others the compiler would not keep the sums of each
/// in registers. Made only where [`AnyRows::run_lines`] may be called.
struct FixedTile<T, const ROWS: usize, const VECTORS: usize>(T);

impl<T: AnyRows, const ROWS: usize, const VECTORS: usize> Kernel for FixedTile<T, ROWS, VECTORS> {
    type Output = ();
    const DOTS: Option<Dots> = T::DOTS;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: that of `run_rows`, which alone makes these.
        unsafe { self.0.run_lines::<S, ROWS, VECTORS>(simd) };
    }
}

/// The cut of rows into tiles of nearly equal height.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    pub(super) rows: usize,
    pub(super) count: usize,
}

impl Tiles {
    pub(super) fn new(rows: usize, tallest: usize) -> Tiles {
        Tiles {
            rows,
            count: rows.div_ceil(tallest),
        }
    }

    /// Rows of the tallest tile.
    pub(super) fn tallest(&self) -> usize {
        self.rows.div_ceil(self.count)
    }

    /// Rows of tile `i`.
    #[inline(always)]
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        super::pool::partition(self.rows, self.count, i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Bytes, Nibbles};

    #[test]
    fn parts_take_inputs_that_lie_apart() {
        let bytes: [i8; RUN] = std::array::from_fn(|i| i as i8);
        let numbers: [i16; RUN] = std::array::from_fn(|i| 100 * i as i16 - 700);
        let (mut of_8, mut of_4, mut pairs) = (bytes, bytes, numbers);
        Quads::in_turn::<Nibbles>(&mut of_8);
        Quads::in_turn::<Bytes>(&mut of_4);
        Pairs::in_turn::<Nibbles>(&mut pairs);
        assert_eq!(of_8[8..16], [0, 2, 4, 6, 1, 3, 5, 7].map(|i| bytes[8 + i]));
        assert_eq!(of_4, bytes);
        assert_eq!(
            pairs[8..16],
            [0, 4, 1, 5, 2, 6, 3, 7].map(|i| numbers[8 + i])
        );
    }
}
