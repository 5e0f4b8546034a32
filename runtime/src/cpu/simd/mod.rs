//! Vectors of sixteen `f32`, whatever the machine's registers: one of AVX-512, two of AVX2, four of
//! NEON, or an array. Kernels are written once over [`Simd`]; because the lanes are always sixteen, reductions
//! have the same order everywhere.

/// Instructions of a set, or what is made of them, where there is a value of its type.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! proven {
    ($instructions:expr) => {
        // SAFETY: a value of a set's type exists only where the machine has its instructions.
        unsafe { $instructions }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::amx;
use half::{bf16, f16};
#[cfg(test)]
pub(super) use portable::FUSED;
#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::{env, fmt, str::FromStr, sync::OnceLock};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// Instruction sets that kernels are compiled for, of a processor's the slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the build's target has at least.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VL, besides those of [`Isa::Avx2`].
    Avx512,
    /// Besides that, dot products of integers (VNNI).
    Avx512Vnni,
    /// Besides that, dot products of bf16.
    Avx512Bf16,
    /// Besides that, products of tiles of bf16 and of bytes (AMX).
    Amx,
    /// AArch64 with NEON.
    Neon,
    /// Besides that, dot products of bytes (DotProd).
    NeonDot,
    /// Besides that, products of bf16.
    NeonBf16,
}

impl Isa {
    /// All of them, of a processor's the slowest first.
    pub const ALL: [Isa; 9] = [
        Isa::Portable,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Amx,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonBf16,
    ];

    /// The best that this machine has, or the one that the environment variable `KILN_ISA` names.
    ///
    /// # Errors
    /// When `KILN_ISA` names none, or one that this machine lacks.
    pub fn detect() -> Result<Isa, IsaError> {
        match env::var("KILN_ISA") {
            Ok(name) => name.parse::<Isa>()?.supported(),
            Err(env::VarError::NotPresent) => {
                let best = Isa::ALL.into_iter().rev().find(|isa| isa.is_supported());
                Ok(best.unwrap_or(Isa::Portable))
            }
            Err(env::VarError::NotUnicode(name)) => {
                Err(IsaError::Unknown(name.to_string_lossy().into_owned()))
            }
        }
    }

    /// What [`Isa::detect`] finds, looked for once; the portable form where that is an error, which
    /// whoever loads a device gets to see.
    pub fn of_machine() -> Isa {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| Isa::detect().unwrap_or(Isa::Portable))
    }

    /// Whether this machine has it.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Isa::Avx512.is_supported() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Isa::Avx512Vnni.is_supported() && is_x86_feature_detected!("avx512bf16")
            }
            Isa::Amx => Isa::Avx512Bf16.is_supported() && amx::is_supported(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => Isa::Neon.is_supported() && is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16 => Isa::NeonDot.is_supported() && is_aarch64_feature_detected!("bf16"),
            _ => false,
        }
    }

    /// Itself.
    ///
    /// # Errors
    /// [`IsaError::Unsupported`] when this machine lacks it.
    pub fn supported(self) -> Result<Isa, IsaError> {
        if self.is_supported() {
            Ok(self)
        } else {
            Err(IsaError::Unsupported(self))
        }
    }

    /// The spelling that `KILN_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::NeonDot => "neondot",
            Isa::NeonBf16 => "neonbf16",
        }
    }

    /// Whether it has [`Simd::add_quad_products`] as one instruction.
    pub(super) fn multiplies_quads(self) -> bool {
        use Isa::{Amx, Avx512Bf16, Avx512Vnni, NeonBf16, NeonDot};
        matches!(self, Avx512Vnni | Avx512Bf16 | Amx | NeonDot | NeonBf16)
    }

    /// Whether it has products of tiles ([`amx`]).
    pub(super) fn multiplies_tiles(self) -> bool {
        self == Isa::Amx
    }

    /// Runs the form of `kernel` that is compiled for this instruction set.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_supported(), "this machine has no {self}");
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine has the features, as just asserted.
            Isa::Avx2 => unsafe { avx2::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => unsafe {
                avx512::run(self, kernel)
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon | Isa::NeonDot | Isa::NeonBf16 => unsafe { neon::run(self, kernel) },
            _ => portable::run(kernel),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Isa, IsaError> {
        let found = Isa::ALL.into_iter().find(|isa| isa.name() == name);
        found.ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

/// An instruction set that cannot be used: a mistake in the environment.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error(
        "KILN_ISA is {0:?}; known are portable, avx2, avx512, avx512vnni, avx512bf16, amx, neon, neondot and neonbf16"
    )]
    Unknown(String),
    /// Known, but this machine cannot run it.
    #[error("this machine has no {0}; unset KILN_ISA to use the best that it has")]
    Unsupported(Isa),
}

/// Dot products that an instruction set may have by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dots {
    /// Of integers: [`Simd::add_pair_products`], [`Simd::add_quad_products`].
    Integers,
    /// Of bf16: [`Simd::add_bf16_products`].
    Bf16,
}

/// A computation to be compiled for every instruction set. Its parts must be `#[inline(always)]`,
/// down to the vector operations, to be compiled with the set's features.
pub(super) trait Kernel {
    type Output;

    /// Dot products that it gains from, if it is run by [`Simd::outlined`]. Levels of AVX-512 and of
    /// NEON differ in nothing else, and so in no other code.
    const DOTS: Option<Dots> = None;

    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A kernel as a function of its own, with the dot products that it gains from.
pub(super) struct Outlined<K>(pub(super) K);

impl<K: Kernel> Kernel for Outlined<K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> K::Output {
        simd.outlined(self.0)
    }
}

/// Operations on vectors of sixteen `f32`. A value of the type is proof that the machine has the
/// instructions.
pub(super) trait Simd: Copy {
    /// Sixteen lanes.
    type V: Copy;
    /// Sixteen `u32`.
    type Words: Copy;

    /// Rows of a register tile of matrix products: 6 or 12.
    const TILE_ROWS: usize;
    /// Vectors across a register tile of matrix products: 1 or 2.
    const TILE_VECTORS: usize;
    /// Rows of a register tile of products of integers, at most `TILE_ROWS`.
    const INT_TILE_ROWS: usize;
    /// Rows of a register tile of products of bf16, at most `TILE_ROWS`.
    const BF16_TILE_ROWS: usize = Self::TILE_ROWS;
    /// Rows up to which a tile is a whole panel of weights across: 2, or more where others are too.
    const DIRECT_ROWS: usize;
    /// What signed bytes are raised by to be factors of [`Simd::add_quad_products`]: 128, so that they have no
    /// sign, or nothing.
    const QUAD_OFFSET: i32 = 128;

    /// Bytes of a stream from memory, from what is being read to what it pays to ask for: none where the processor looks
    /// ahead better by itself.
    #[inline(always)]
    fn stream_ahead(self) -> usize {
        0
    }

    /// Asks, where that pays, for what a stream from memory that is read at `p` will want.
    #[inline(always)]
    fn prefetch_stream(self, p: *const u8) {
        let ahead = self.stream_ahead();
        if ahead > 0 {
            self.prefetch(p.wrapping_add(ahead));
        }
    }

    /// Runs `kernel` as a function of its own. Implementations are `#[inline(never)]` themselves, and
    /// without target features, because rustc drops that attribute from functions that have some.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where it is greater, else `b`; so `b` where either is no number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where it is less, else `b`; so `b` where either is no number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instruction set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The nearest integers, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// 2^n for integral n in -126..=127.
    fn exp2_integral(self, n: Self::V) -> Self::V;
    /// The first `n` lanes of `v`, `fill` in the others.
    fn keep_first(self, v: Self::V, n: usize, fill: f32) -> Self::V;
    fn to_array(self, v: Self::V) -> [f32; LANES];

    /// # Safety
    /// `p` is valid for reading sixteen values.
    unsafe fn load_f32(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` is valid for reading sixteen values.
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    /// # Safety
    /// `p` is valid for reading sixteen values.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// # Safety
    /// `p` is valid for reading sixteen values.
    unsafe fn load_words(self, p: *const u32) -> Self::Words;
    fn splat_word(self, word: u32) -> Self::Words;
    /// Signed bytes plus QUAD_OFFSET.
    fn byte_quad(self, words: Self::Words) -> Self::Words;
    /// Of each byte, the four bits from `4 * P`; P is 0 or 1.
    fn nibble_quad<const P: usize>(self, words: Self::Words) -> Self::Words;
    /// Of each half of each word, byte P as a number of 16 bits; P is 0 or 1.
    fn byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words;
    /// Of each half of each word, the four bits from `4 * P`; P is below 4.
    fn nibble_pair<const P: usize>(self, words: Self::Words) -> Self::Words;
    /// To each word of `sums` the products of the halves of `a` and `b`, as signed numbers.
    fn add_pair_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Of each half of each word, byte P without sign as a number of 16 bits; P is 0 or 1.
    fn unsigned_byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words;
    /// Of each word the lower half, a bf16, as `f32`.
    fn lower_bf16(self, words: Self::Words) -> Self::V;
    /// Of each word the upper half, a bf16, as `f32`.
    fn upper_bf16(self, words: Self::Words) -> Self::V;
    /// Words as signed numbers, rounded to the nearest.
    fn words_to_f32(self, words: Self::Words) -> Self::V;
    /// `a + 256 * b`
    fn add_times_256(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store_f32(self, p: *mut f32, v: Self::V);
    /// Rounds to the nearest, ties to even.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store_f16(self, p: *mut f16, v: Self::V);
    /// Rounds to the nearest, ties to even.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V);
    /// Rounds to the nearest, ties to even; the values are from -32767 to 32767.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store_i16(self, p: *mut i16, v: Self::V);
    /// Rounds to the nearest, ties to even; the values are from -128 to 127.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);
    /// Asks for the cache line at `p`, which need not be valid.
    fn prefetch(self, p: *const u8);
    /// # Safety
    /// `p` is valid for writing sixteen values.
    #[inline(always)]
    unsafe fn store_words(self, p: *mut u32, words: Self::Words) {
        // SAFETY: the caller's; lanes lie in order, whatever registers they are in.
        unsafe { p.cast::<Self::Words>().write_unaligned(words) }
    }
    /// Asks for the cache line at `p`, which need not be valid, to write to it.
    #[inline(always)]
    fn prefetch_write(self, p: *mut f32) {
        self.prefetch(p.cast_const().cast());
    }

    /// To each word of `sums` the products of the bytes of `a`, without sign where there is a QUAD_OFFSET, and of
    /// `b`, signed and from -127. To be replaced where there is no QUAD_OFFSET.
    #[inline(always)]
    fn add_quad_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        quad_products_by_pairs(self, sums, a, b)
    }

    /// To each of `sums` the products of the halves of `a` and `b` as bf16: that of the upper halves first,
    /// then the other, each rounded when it is added.
    #[inline(always)]
    fn add_bf16_products(self, sums: Self::V, a: Self::Words, b: Self::Words) -> Self::V {
        bf16_products_by_fma(self, sums, a, b)
    }

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Sum of the lanes, by halves.
    #[inline(always)]
    fn sum_lanes(self, v: Self::V) -> f32 {
        fold_lanes(self.to_array(v), |a, b| a + b)
    }

    /// Greatest of the lanes.
    #[inline(always)]
    fn max_lanes(self, v: Self::V) -> f32 {
        fold_lanes(self.to_array(v), |a, b| if a > b { a } else { b })
    }

    /// e^v to two units in the last place, for v clamped to the range of normal numbers; a polynomial
    /// on [-ln 2 / 2, ln 2 / 2], as in Cephes' `expf`.
    #[inline(always)]
    fn exp(self, v: Self::V) -> Self::V {
        let v = self.min(self.splat(88.376_26), self.max(self.splat(-87.336_54), v));
        let n = self.round(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that the remainder is exact.
        let r = self.fma(n, self.splat(-0.693_359_4), v);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = self.fma(p, r, self.splat(c));
        }
        let p = self.fma(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.mul(p, self.exp2_integral(n))
    }
}

/// [`Simd::add_quad_products`] without an instruction for it.
#[inline(always)]
fn quad_products_by_pairs<S: Simd>(simd: S, sums: S::Words, a: S::Words, b: S::Words) -> S::Words {
    let (even, odd) = (
        simd.unsigned_byte_pair::<0>(a),
        simd.unsigned_byte_pair::<1>(a),
    );
    let sums = simd.add_pair_products(sums, even, simd.byte_pair::<0>(b));
    simd.add_pair_products(sums, odd, simd.byte_pair::<1>(b))
}

/// [`Simd::add_bf16_products`] without an instruction for it.
#[inline(always)]
fn bf16_products_by_fma<S: Simd>(simd: S, sums: S::V, a: S::Words, b: S::Words) -> S::V {
    let sums = simd.fma(simd.upper_bf16(a), simd.upper_bf16(b), sums);
    simd.fma(simd.lower_bf16(a), simd.lower_bf16(b), sums)
}

#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let a: [f32; 8] = std::array::from_fn(|i| f(lanes[i], lanes[i + 8]));
    let a: [f32; 4] = std::array::from_fn(|i| f(a[i], a[i + 4]));
    f(f(a[0], a[2]), f(a[1], a[3]))
}

/// A type that tensors are stored in.
pub(super) trait Element: bytemuck::Pod + Send + Sync {
    /// # Safety
    /// `p` is valid for reading sixteen elements.
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V;

    /// # Safety
    /// `p` is valid for writing sixteen elements.
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V);

    /// The first `n` lanes from `p`, zero in the others.
    ///
    /// # Safety
    /// `p` is valid for reading `n` elements.
    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, p: *const Self, n: usize) -> S::V {
        let mut lanes = [Self::zeroed(); LANES];
        // SAFETY: `n` elements are readable, and the array has as many.
        unsafe { p.copy_to_nonoverlapping(lanes.as_mut_ptr(), n.min(LANES)) };
        // SAFETY: the array has sixteen elements.
        unsafe { Self::load(simd, lanes.as_ptr()) }
    }

    /// Writes the first `n` lanes to `p`.
    ///
    /// # Safety
    /// `p` is valid for writing `n` elements.
    #[inline(always)]
    unsafe fn store_first<S: Simd>(simd: S, p: *mut Self, v: S::V, n: usize) {
        let mut lanes = [Self::zeroed(); LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { Self::store(simd, lanes.as_mut_ptr(), v) };
        // SAFETY: `n` elements are writable, and the array has as many.
        unsafe { lanes.as_ptr().copy_to_nonoverlapping(p, n.min(LANES)) };
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_f32(p) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut f32, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_f32(p, v) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f16) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_f16(p) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut f16, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_f16(p, v) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_bf16(p) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut bf16, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_bf16(p, v) }
    }
}

/// Integers as tiles read them: words of several inputs of one output, taken apart into pairs of 16-bit
/// or quads of 8-bit numbers. Part P of N is of the inputs P, P + N .. of the word.
pub(super) trait Codes: Copy + Send + Sync {
    /// Inputs of a word.
    const INPUTS: usize;
    /// Whether groups have a minimum besides their scale.
    const HAVE_MINIMA: bool;

    /// Pair P of each word.
    fn pair<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words;

    /// What the numbers of quads are too large by.
    fn quad_offset<S: Simd>() -> i32;

    /// Quad P of each word.
    fn quad<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words;
}

/// A word of four bytes, lowest first.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bytes(u32);

impl Codes for Bytes {
    const INPUTS: usize = 4;
    const HAVE_MINIMA: bool = false;

    #[inline(always)]
    fn pair<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        simd.byte_pair::<P>(words)
    }

    #[inline(always)]
    fn quad_offset<S: Simd>() -> i32 {
        S::QUAD_OFFSET
    }

    #[inline(always)]
    fn quad<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        simd.byte_quad(words)
    }
}

/// A word of eight codes of four bits, lowest first.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Nibbles(u32);

impl Codes for Nibbles {
    const INPUTS: usize = 8;
    const HAVE_MINIMA: bool = true;

    #[inline(always)]
    fn pair<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        simd.nibble_pair::<P>(words)
    }

    #[inline(always)]
    fn quad_offset<S: Simd>() -> i32 {
        0
    }

    #[inline(always)]
    fn quad<S: Simd, const P: usize>(simd: S, words: S::Words) -> S::Words {
        simd.nibble_quad::<P>(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Random, fused_isas, isas};

    /// Applies a function of vectors to sixteen values.
    macro_rules! lanes {
        ($isa:expr, $input:expr, |$simd:ident, $v:ident| $body:expr) => {{
            struct Apply([f32; LANES]);
            impl Kernel for Apply {
                type Output = [f32; LANES];
                #[inline(always)]
                fn run<S: Simd>(self, $simd: S) -> [f32; LANES] {
                    // SAFETY: the array has sixteen values.
                    let $v = unsafe { $simd.load_f32(self.0.as_ptr()) };
                    $simd.to_array($body)
                }
            }
            $isa.run(Apply($input))
        }};
    }

    #[test]
    fn names_are_parsed_and_unknown_ones_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(
            error,
            "KILN_ISA is \"sse9\"; known are portable, avx2, avx512, avx512vnni, avx512bf16, amx, neon, neondot and neonbf16"
        );
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_supported()) {
            assert_eq!(isa.supported(), Err(IsaError::Unsupported(isa)));
        }
    }

    #[test]
    fn exp_is_accurate() {
        for isa in isas() {
            let mut x = -87.0f32;
            while x < 88.0 {
                let input = std::array::from_fn(|i| x + i as f32 * 1e-3);
                let output = lanes!(isa, input, |s, v| s.exp(v));
                for (x, y) in input.into_iter().zip(output) {
                    let exact = f64::from(x).exp();
                    assert!(
                        (f64::from(y) / exact - 1.0).abs() < 2.5e-7,
                        "{isa}: exp({x}) = {y}"
                    );
                }
                x += 0.0171;
            }
            let output = lanes!(isa, [f32::NEG_INFINITY; LANES], |s, v| s.exp(v));
            assert!(output.iter().all(|&y| (0.0..1.2e-38).contains(&y)));
            assert!(
                lanes!(isa, [f32::NAN; LANES], |s, v| s.exp(v))
                    .iter()
                    .all(|y| y.is_nan())
            );
            assert_eq!(lanes!(isa, [0.0; LANES], |s, v| s.exp(v)), [1.0; LANES]);
        }
    }

    #[test]
    fn arithmetic_is_by_lane() {
        let x: [f32; LANES] = std::array::from_fn(|i| i as f32 - 7.5);
        for isa in isas() {
            assert_eq!(
                lanes!(isa, x, |s, v| s.add(v, s.splat(1.0))),
                x.map(|x| x + 1.0)
            );
            assert_eq!(
                lanes!(isa, x, |s, v| s.sub(s.splat(1.0), v)),
                x.map(|x| 1.0 - x)
            );
            assert_eq!(lanes!(isa, x, |s, v| s.mul(v, v)), x.map(|x| x * x));
            assert_eq!(
                lanes!(isa, x, |s, v| s.div(s.splat(1.0), v)),
                x.map(|x| 1.0 / x)
            );
            assert_eq!(
                lanes!(isa, x, |s, v| s.max(v, s.zero())),
                x.map(|x| x.max(0.0))
            );
            assert_eq!(
                lanes!(isa, x, |s, v| s.min(v, s.zero())),
                x.map(|x| x.min(0.0))
            );
            assert_eq!(lanes!(isa, x, |s, v| s.fma(v, v, v)), x.map(|x| x * x + x));
            assert_eq!(
                lanes!(isa, x, |s, v| s.round(v)),
                x.map(|x| x.round_ties_even())
            );
            assert_eq!(
                lanes!(isa, x, |s, v| s.exp2_integral(s.round(v))),
                x.map(|x| x.round_ties_even().exp2())
            );
            // The second where either is no number.
            let nan = [f32::NAN; LANES];
            for output in [
                lanes!(isa, x, |s, v| s.max(v, s.splat(f32::NAN))),
                lanes!(isa, x, |s, v| s.min(v, s.splat(f32::NAN))),
            ] {
                assert!(output.iter().all(|y| y.is_nan()), "{isa}");
            }
            assert_eq!(
                lanes!(isa, nan, |s, v| s.max(v, s.splat(1.0))),
                [1.0; LANES]
            );
            assert_eq!(
                lanes!(isa, nan, |s, v| s.min(v, s.splat(1.0))),
                [1.0; LANES]
            );
            assert_eq!(lanes!(isa, x, |s, v| s.splat(s.sum_lanes(v))), [0.0; LANES]);
            assert_eq!(lanes!(isa, x, |s, v| s.splat(s.max_lanes(v))), [7.5; LANES]);
            for n in 0..=LANES {
                struct Keep([f32; LANES], usize);
                impl Kernel for Keep {
                    type Output = [f32; LANES];
                    #[inline(always)]
                    fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
                        // SAFETY: the array has sixteen values.
                        let v = unsafe { simd.load_f32(self.0.as_ptr()) };
                        simd.to_array(simd.keep_first(v, self.1, 9.0))
                    }
                }
                let kept = isa.run(Keep(x, n));
                assert_eq!(
                    kept,
                    std::array::from_fn(|i| if i < n { x[i] } else { 9.0 })
                );
            }
        }
    }

    #[test]
    fn conversions_round_to_nearest_even() {
        struct RoundTrip<E>([f32; LANES], std::marker::PhantomData<E>);
        impl<E: Element> Kernel for RoundTrip<E> {
            type Output = ([E; LANES], [f32; LANES]);
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                let mut stored = [E::zeroed(); LANES];
                // SAFETY: both arrays have sixteen elements.
                unsafe {
                    E::store(simd, stored.as_mut_ptr(), simd.load_f32(self.0.as_ptr()));
                    (stored, simd.to_array(E::load(simd, stored.as_ptr())))
                }
            }
        }
        let bits = |x: f32| if x.is_nan() { None } else { Some(x.to_bits()) };
        for isa in isas() {
            let mut random = Random::new(1);
            for round in 0..2000 {
                let input: [f32; LANES] = std::array::from_fn(|i| match (round, i % 4) {
                    (0, 0) => f32::NAN,
                    (0, 1) => f32::INFINITY,
                    (0, 2) => -0.0,
                    (0, _) => f32::from_bits(0x3f80_8000 + 0x1_0000 * i as u32),
                    _ => f32::from_bits(random.next_u32()),
                });
                let (stored, loaded) = isa.run(RoundTrip::<bf16>(input, Default::default()));
                assert_eq!(
                    input.map(|x| bits(bf16::from_f32(x).to_f32())),
                    loaded.map(bits)
                );
                assert_eq!(stored.map(|x| bits(x.to_f32())), loaded.map(bits));
                let (stored, loaded) = isa.run(RoundTrip::<f16>(input, Default::default()));
                assert_eq!(
                    input.map(|x| bits(f16::from_f32(x).to_f32())),
                    loaded.map(bits)
                );
                assert_eq!(stored.map(|x| bits(x.to_f32())), loaded.map(bits));
            }
        }
    }

    #[test]
    fn integers_are_stored() {
        struct Store([f32; LANES]);
        impl Kernel for Store {
            type Output = ([i16; LANES], [i8; LANES]);
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                let (mut halves, mut bytes) = ([0; LANES], [0; LANES]);
                // SAFETY: the arrays have sixteen values.
                unsafe {
                    let v = simd.load_f32(self.0.as_ptr());
                    simd.store_i16(halves.as_mut_ptr(), v);
                    simd.store_i8(bytes.as_mut_ptr(), v);
                }
                (halves, bytes)
            }
        }
        let x: [f32; LANES] = std::array::from_fn(|i| (i as f32 - 7.5) * 17.0 + 0.25);
        for isa in isas() {
            let (halves, bytes) = isa.run(Store(x));
            assert_eq!(halves.map(f32::from), x.map(f32::round_ties_even), "{isa}");
            let within = x.map(|x| x.abs() <= 127.0);
            for i in (0..LANES).filter(|&i| within[i]) {
                assert_eq!(f32::from(bytes[i]), x[i].round_ties_even(), "{isa}");
            }
            let wide = isa.run(Store(x.map(|x| x * 200.0))).0;
            assert_eq!(
                wide.map(f32::from),
                x.map(|x| (x * 200.0).round_ties_even()),
                "{isa}"
            );
        }
    }

    #[test]
    fn words_are_taken_apart_and_multiplied() {
        struct Products([u32; LANES], u32);
        impl Kernel for Products {
            type Output = Vec<[f32; LANES]>;
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                // SAFETY: the array has sixteen values.
                let words = unsafe { simd.load_words(self.0.as_ptr()) };
                let x = simd.splat_word(self.1);
                let product = |pair| {
                    let sums = simd.add_pair_products(simd.splat_word(-7_i32 as u32), pair, x);
                    simd.to_array(simd.words_to_f32(sums))
                };
                let sum: i32 = self
                    .1
                    .to_le_bytes()
                    .map(|byte| i32::from(byte as i8))
                    .iter()
                    .sum();
                let quads = |quad, offset: i32| {
                    let start = (-7 - offset * sum).cast_unsigned();
                    let sums = simd.add_quad_products(simd.splat_word(start), quad, x);
                    simd.to_array(simd.words_to_f32(sums))
                };
                let (bytes, nibbles) = (Bytes::quad_offset::<S>(), Nibbles::quad_offset::<S>());
                vec![
                    product(Bytes::pair::<S, 0>(simd, words)),
                    product(Bytes::pair::<S, 1>(simd, words)),
                    product(Nibbles::pair::<S, 0>(simd, words)),
                    product(Nibbles::pair::<S, 1>(simd, words)),
                    product(Nibbles::pair::<S, 2>(simd, words)),
                    product(Nibbles::pair::<S, 3>(simd, words)),
                    quads(Bytes::quad::<S, 0>(simd, words), bytes),
                    quads(Nibbles::quad::<S, 0>(simd, words), nibbles),
                    quads(Nibbles::quad::<S, 1>(simd, words), nibbles),
                ]
            }
        }
        let mut random = Random::new(5);
        for round in 0..100 {
            let (words, x): ([u32; LANES], u32) = match round {
                // The largest sums of products.
                0 => ([0x8080_8080; LANES], 0x8181_8181),
                1 => ([0x8080_8080; LANES], 0x7f7f_7f7f),
                _ => (
                    std::array::from_fn(|_| random.next_u32()),
                    random.next_u32(),
                ),
            };
            let (low, high) = (i32::from(x as i16), i32::from((x >> 16) as i16));
            let byte = |word: u32, i: usize| i32::from((word >> (8 * i)) as i8);
            let nibble = |word: u32, i: usize| (word >> (4 * i) & 15) as i32;
            let sum = |of: &dyn Fn(usize) -> i32| (0..4).map(|i| of(i) * byte(x, i)).sum::<i32>();
            for isa in isas() {
                for (p, found) in isa.run(Products(words, x)).into_iter().enumerate() {
                    let expect = words.map(|word| match p {
                        0 | 1 => byte(word, p) * low + byte(word, p + 2) * high - 7,
                        2..6 => nibble(word, p - 2) * low + nibble(word, p + 2) * high - 7,
                        6 => sum(&|i| byte(word, i)) - 7,
                        _ => sum(&|i| nibble(word, p - 7 + 2 * i)) - 7,
                    });
                    assert_eq!(found, expect.map(|sum| sum as f32), "{isa}: part {p}");
                }
            }
        }
    }

    #[test]
    fn pairs_of_bf16_are_multiplied_one_after_the_other() {
        struct Products<'a>(&'a [[bf16; LANES]; 2], [bf16; 2], [f32; LANES]);
        impl Kernel for Products<'_> {
            type Output = [f32; LANES];
            const DOTS: Option<Dots> = Some(Dots::Bf16);
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Self::Output {
                let Products(rows, [low, high], sums) = self;
                let x = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
                let pairs: [u32; LANES] = std::array::from_fn(|i| {
                    u32::from(rows[0][i].to_bits()) | u32::from(rows[1][i].to_bits()) << 16
                });
                // SAFETY: the arrays have sixteen values.
                let (pairs, sums) = unsafe {
                    (
                        simd.load_words(pairs.as_ptr()),
                        simd.load_f32(sums.as_ptr()),
                    )
                };
                simd.to_array(simd.add_bf16_products(sums, pairs, simd.splat_word(x)))
            }
        }
        let mut random = Random::new(9);
        for round in 0..2000 {
            // Every second time of all magnitudes, of which subnormal numbers are zero to AVX-512.
            let any = round % 2 == 1;
            let mut row = || -> [bf16; LANES] {
                std::array::from_fn(|_| match any {
                    true => bf16::from_bits(random.next_u32() as u16),
                    false => bf16::from_f32(random.values(1)[0]),
                })
            };
            let (rows, x) = ([row(), row()], row());
            let sums = row().map(|x| x.to_f32() * 1.2345);
            let expect: [f32; LANES] = std::array::from_fn(|i| {
                let sum = rows[1][i].to_f32().mul_add(x[1].to_f32(), sums[i]);
                rows[0][i].to_f32().mul_add(x[0].to_f32(), sum)
            });
            let bits = |x: f32| if x.is_nan() { None } else { Some(x.to_bits()) };
            for isa in fused_isas().filter(|isa| !any || !matches!(isa, Isa::Avx512Bf16 | Isa::Amx))
            {
                let found = isa.run(Outlined(Products(&rows, [x[0], x[1]], sums)));
                assert_eq!(found.map(bits), expect.map(bits), "{isa}");
            }
        }
    }
}
