//! Four NEON registers a vector.

use super::{Dots, Isa, Kernel, LANES, Simd, bf16_products_by_fma};
use half::{bf16, f16};
use std::arch::{aarch64::*, asm};

/// Proof that the machine has NEON and what LEVEL names. It knows what else the machine has.
#[derive(Clone, Copy)]
pub(super) struct Neon<const LEVEL: u8>(Isa);

/// Nothing more.
const PLAIN: u8 = 0;
/// DotProd.
const DOT: u8 = 1;
/// DotProd and BF16.
const BF16: u8 = 2;

/// Runs the NEON form of `kernel`, on a machine that has `isa`.
#[target_feature(enable = "neon")]
pub(super) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Neon::<PLAIN>(isa))
}

#[target_feature(enable = "neon,dotprod")]
fn run_dot<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Neon::<DOT>(isa))
}

#[target_feature(enable = "neon,dotprod,bf16")]
fn run_bf16<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Neon::<BF16>(isa))
}

/// An instruction applied to each quarter.
macro_rules! quarters {
    ($instruction:ident $(::<$n:literal>)? ($($v:ident),*)) => {
        proven!([
            $instruction$(::<$n>)?($($v[0]),*),
            $instruction$(::<$n>)?($($v[1]),*),
            $instruction$(::<$n>)?($($v[2]),*),
            $instruction$(::<$n>)?($($v[3]),*),
        ])
    };
}

impl<const LEVEL: u8> Simd for Neon<LEVEL> {
    type V = [float32x4_t; 4];
    type Words = [uint32x4_t; 4];

    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;
    const INT_TILE_ROWS: usize = 4;
    // Without BF16 both halves of a column's words are registers too.
    const BF16_TILE_ROWS: usize = 4;
    const DIRECT_ROWS: usize = 2;
    const QUAD_OFFSET: i32 = 0;

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value of `Neon` exists only where the machine has NEON, and what its `Isa` says.
        unsafe {
            match const { K::DOTS } {
                Some(Dots::Integers) if self.0 >= Isa::NeonDot => run_dot(self.0, kernel),
                Some(Dots::Bf16) if self.0 >= Isa::NeonBf16 => run_bf16(self.0, kernel),
                _ => run(self.0, kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        proven!([vdupq_n_f32(x); 4])
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // Not FMAX, which gives no number where either is none.
        let greater = quarters!(vcgtq_f32(a, b));
        quarters!(vbslq_f32(greater, a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        let less = quarters!(vcltq_f32(a, b));
        quarters!(vbslq_f32(less, a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        quarters!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        quarters!(vrndnq_f32(v))
    }

    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        let n = quarters!(vcvtq_s32_f32(n));
        let bias = proven!([vdupq_n_s32(127); 4]);
        let exponent = quarters!(vaddq_s32(n, bias));
        let bits = quarters!(vshlq_n_s32::<23>(exponent));
        quarters!(vreinterpretq_f32_s32(bits))
    }

    #[inline(always)]
    fn keep_first(self, v: Self::V, n: usize, fill: f32) -> Self::V {
        const LANE: [u32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        // SAFETY: the array has sixteen values.
        let lane = unsafe { self.load_words(LANE.as_ptr()) };
        let n = self.splat_word(n.min(LANES) as u32);
        let kept = quarters!(vcltq_u32(lane, n));
        let fill = self.splat(fill);
        quarters!(vbslq_f32(kept, v, fill))
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has sixteen values.
        unsafe { self.store_f32(lanes.as_mut_ptr(), v) };
        lanes
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            [
                vld1q_f32(p),
                vld1q_f32(p.add(4)),
                vld1q_f32(p.add(8)),
                vld1q_f32(p.add(12)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        let [first, second] = unsafe { load_halves(p.cast()) };
        proven!({
            let (first, second) = (vreinterpretq_f16_u16(first), vreinterpretq_f16_u16(second));
            [
                vcvt_f32_f16(vget_low_f16(first)),
                vcvt_high_f32_f16(first),
                vcvt_f32_f16(vget_low_f16(second)),
                vcvt_high_f32_f16(second),
            ]
        })
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        let [first, second] = unsafe { load_halves(p.cast()) };
        let words = proven!([
            vshll_n_u16::<16>(vget_low_u16(first)),
            vshll_high_n_u16::<16>(first),
            vshll_n_u16::<16>(vget_low_u16(second)),
            vshll_high_n_u16::<16>(second),
        ]);
        quarters!(vreinterpretq_f32_u32(words))
    }

    #[inline(always)]
    unsafe fn load_words(self, p: *const u32) -> Self::Words {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            [
                vld1q_u32(p),
                vld1q_u32(p.add(4)),
                vld1q_u32(p.add(8)),
                vld1q_u32(p.add(12)),
            ]
        }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> Self::Words {
        proven!([vdupq_n_u32(word); 4])
    }

    #[inline(always)]
    fn byte_quad(self, words: Self::Words) -> Self::Words {
        words
    }

    #[inline(always)]
    fn nibble_quad<const P: usize>(self, words: Self::Words) -> Self::Words {
        let bytes = quarters!(vreinterpretq_u8_u32(words));
        let nibbles = match P {
            0 => {
                let mask = proven!([vdupq_n_u8(15); 4]);
                quarters!(vandq_u8(bytes, mask))
            }
            _ => quarters!(vshrq_n_u8::<4>(bytes)),
        };
        quarters!(vreinterpretq_u32_u8(nibbles))
    }

    #[inline(always)]
    fn byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let halves = quarters!(vreinterpretq_s16_u32(words));
        let high = match P {
            0 => quarters!(vshlq_n_s16::<8>(halves)),
            _ => halves,
        };
        let numbers = quarters!(vshrq_n_s16::<8>(high));
        quarters!(vreinterpretq_u32_s16(numbers))
    }

    #[inline(always)]
    fn nibble_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let low = match P {
            0 => words,
            1 => quarters!(vshrq_n_u32::<4>(words)),
            2 => quarters!(vshrq_n_u32::<8>(words)),
            _ => quarters!(vshrq_n_u32::<12>(words)),
        };
        let mask = self.splat_word(0x000f_000f);
        quarters!(vandq_u32(low, mask))
    }

    #[inline(always)]
    fn add_pair_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        let mut sums = quarters!(vreinterpretq_s32_u32(sums));
        let a = quarters!(vreinterpretq_s16_u32(a));
        let b = quarters!(vreinterpretq_s16_u32(b));
        // Lower and upper halves apart, of two quarters at a time: a multiply-add then ends in the right
        // words. They are parted once for all products that they are factors of.
        for i in [0, 2] {
            proven!({
                let (low, x) = (vuzp1q_s16(a[i], a[i + 1]), vuzp1q_s16(b[i], b[i + 1]));
                sums[i] = pinned(vmlal_s16(sums[i], vget_low_s16(low), vget_low_s16(x)));
                sums[i + 1] = pinned(vmlal_high_s16(sums[i + 1], low, x));
                let (high, x) = (vuzp2q_s16(a[i], a[i + 1]), vuzp2q_s16(b[i], b[i + 1]));
                sums[i] = pinned(vmlal_s16(sums[i], vget_low_s16(high), vget_low_s16(x)));
                sums[i + 1] = pinned(vmlal_high_s16(sums[i + 1], high, x));
            });
        }
        quarters!(vreinterpretq_u32_s32(sums))
    }

    #[inline(always)]
    fn unsigned_byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let halves = quarters!(vreinterpretq_u16_u32(words));
        let numbers = match P {
            0 => {
                let mask = proven!([vdupq_n_u16(0xff); 4]);
                quarters!(vandq_u16(halves, mask))
            }
            _ => quarters!(vshrq_n_u16::<8>(halves)),
        };
        quarters!(vreinterpretq_u32_u16(numbers))
    }

    #[inline(always)]
    fn lower_bf16(self, words: Self::Words) -> Self::V {
        let bits = quarters!(vshlq_n_u32::<16>(words));
        quarters!(vreinterpretq_f32_u32(bits))
    }

    #[inline(always)]
    fn upper_bf16(self, words: Self::Words) -> Self::V {
        let mask = self.splat_word(0xffff_0000);
        let bits = quarters!(vandq_u32(words, mask));
        quarters!(vreinterpretq_f32_u32(bits))
    }

    #[inline(always)]
    fn words_to_f32(self, words: Self::Words) -> Self::V {
        let numbers = quarters!(vreinterpretq_s32_u32(words));
        quarters!(vcvtq_f32_s32(numbers))
    }

    #[inline(always)]
    fn add_times_256(self, a: Self::Words, b: Self::Words) -> Self::Words {
        let b = quarters!(vshlq_n_u32::<8>(b));
        quarters!(vaddq_u32(a, b))
    }

    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
            vst1q_f32(p.add(8), v[2]);
            vst1q_f32(p.add(12), v[3]);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            let first = vcvt_high_f16_f32(vcvt_f16_f32(v[0]), v[1]);
            let second = vcvt_high_f16_f32(vcvt_f16_f32(v[2]), v[3]);
            vst1q_u16(p.cast(), vreinterpretq_u16_f16(first));
            vst1q_u16(p.add(8).cast(), vreinterpretq_u16_f16(second));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V) {
        let bits = quarters!(vreinterpretq_u32_f32(v));
        let odd = quarters!(vshrq_n_u32::<16>(bits));
        let one = self.splat_word(1);
        let odd = quarters!(vandq_u32(odd, one));
        let half = self.splat_word(0x7fff);
        let half = quarters!(vaddq_u32(odd, half));
        let rounded = quarters!(vaddq_u32(bits, half));
        let number = quarters!(vceqq_f32(v, v));
        let no_number = self.splat_word(0x7fc0_0000);
        let r = quarters!(vbslq_u32(number, rounded, no_number));
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            let first = vshrn_high_n_u32::<16>(vshrn_n_u32::<16>(r[0]), r[1]);
            let second = vshrn_high_n_u32::<16>(vshrn_n_u32::<16>(r[2]), r[3]);
            vst1q_u16(p.cast(), first);
            vst1q_u16(p.add(8).cast(), second);
        }
    }

    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, v: Self::V) {
        let [first, second] = round_i16(self, v);
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            vst1q_s16(p, first);
            vst1q_s16(p.add(8), second);
        }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        let [first, second] = round_i16(self, v);
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(first), second)) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe {
            asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn add_quad_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        let sums = quarters!(vreinterpretq_s32_u32(sums));
        let a = quarters!(vreinterpretq_s8_u32(a));
        let b = quarters!(vreinterpretq_s8_u32(b));
        let sums = if const { LEVEL >= DOT } {
            quarters!(add_dot_products(sums, a, b))
        } else {
            quarters!(add_products_of_four(sums, a, b))
        };
        quarters!(vreinterpretq_u32_s32(sums))
    }

    #[inline(always)]
    fn add_bf16_products(self, sums: Self::V, a: Self::Words, b: Self::Words) -> Self::V {
        if const { LEVEL >= BF16 } {
            return quarters!(add_bf16_pairs(sums, a, b));
        }
        bf16_products_by_fma(self, sums, a, b)
    }
}

/// To each sum the products of four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_dot_products(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: an instruction of DotProd, whose intrinsic is not stable, on registers alone.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// [`Simd::add_bf16_products`]: of BF16's instructions these round as a multiply-add does, once and with
/// subnormal numbers; those of pairs do not.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn add_bf16_pairs(mut sums: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    // SAFETY: instructions of BF16, whose intrinsics are not stable, on registers alone.
    unsafe {
        asm!(
            "bfmlalt {sums:v}.4s, {a:v}.8h, {b:v}.8h",
            "bfmlalb {sums:v}.4s, {a:v}.8h, {b:v}.8h",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// [`add_dot_products`] without an instruction for it. Two products fit in 16 bits, since no byte of `b` is -128. As
/// intrinsics, LLVM makes most of a tile's products before it adds them, and has no registers for so many.
#[inline]
#[target_feature(enable = "neon")]
fn add_products_of_four(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: instructions of NEON on registers alone.
    unsafe {
        asm!(
            "smull {low:v}.8h, {a:v}.8b, {b:v}.8b",
            "smull2 {high:v}.8h, {a:v}.16b, {b:v}.16b",
            "addp {low:v}.8h, {low:v}.8h, {high:v}.8h",
            "sadalp {sums:v}.4s, {low:v}.8h",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            low = out(vreg) _, high = out(vreg) _,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// `v`, of which the compiler cannot tell; see AVX2's.
#[inline]
#[target_feature(enable = "neon")]
fn pinned(mut v: int32x4_t) -> int32x4_t {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {v:v} */", v = inout(vreg) v, options(pure, nomem, nostack, preserves_flags));
    }
    v
}

/// Sixteen numbers of 16 bits.
///
/// # Safety
/// The machine has NEON, and `p` is valid for reading them.
#[inline(always)]
unsafe fn load_halves(p: *const u16) -> [uint16x8_t; 2] {
    // SAFETY: the caller's.
    unsafe { [vld1q_u16(p), vld1q_u16(p.add(8))] }
}

/// The nearest integers of 16 bits.
#[inline(always)]
fn round_i16<const LEVEL: u8>(_: Neon<LEVEL>, v: [float32x4_t; 4]) -> [int16x8_t; 2] {
    let words = quarters!(vcvtnq_s32_f32(v));
    proven!([
        vqmovn_high_s32(vqmovn_s32(words[0]), words[1]),
        vqmovn_high_s32(vqmovn_s32(words[2]), words[3]),
    ])
}
