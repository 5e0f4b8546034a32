//! Arrays, for the compiler to vectorise.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};

/// Needs nothing of the machine.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Runs the portable form of `kernel`.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Portable)
}

/// Whether the target surely has a fused multiply-add; elsewhere it would be a function call.
pub(in crate::cpu) const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Simd for Portable {
    type V = [f32; LANES];
    type Words = [u32; LANES];

    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;
    const INT_TILE_ROWS: usize = 4;
    const DIRECT_ROWS: usize = 2;

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        run(kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut out = c;
        for i in 0..LANES {
            out[i] = if FUSED {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        out
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction: exact for what fits in 22 bits, which
        // is all that is asked of it, and unlike `round_ties_even` never a function call.
        const SHIFT: f32 = 12_582_912.0;
        v.map(|x| (x + SHIFT) - SHIFT)
    }

    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    fn keep_first(self, v: Self::V, n: usize, fill: f32) -> Self::V {
        std::array::from_fn(|i| if i < n { v[i] } else { fill })
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        v
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's: sixteen values are readable.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: the caller's: sixteen values are readable.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: the caller's: sixteen values are readable.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn load_words(self, p: *const u32) -> Self::Words {
        // SAFETY: sixteen values are readable.
        unsafe { p.cast::<[u32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> Self::Words {
        [word; LANES]
    }

    #[inline(always)]
    fn byte_quad(self, words: Self::Words) -> Self::Words {
        words.map(|word| word ^ 0x8080_8080)
    }

    #[inline(always)]
    fn nibble_quad<const P: usize>(self, words: Self::Words) -> Self::Words {
        words.map(|word| word >> (4 * P) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let byte = |half: u32| u32::from(i16::from((half >> (8 * P)) as i8).cast_unsigned());
        words.map(|word| byte(word) | byte(word >> 16) << 16)
    }

    #[inline(always)]
    fn nibble_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        words.map(|word| word >> (4 * P) & 0x000f_000f)
    }

    #[inline(always)]
    fn add_pair_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        let low = |word: u32| i32::from(word as i16);
        let high = |word: u32| word.cast_signed() >> 16;
        std::array::from_fn(|i| {
            let products = (low(a[i]) * low(b[i])).wrapping_add(high(a[i]) * high(b[i]));
            sums[i].wrapping_add(products.cast_unsigned())
        })
    }

    #[inline(always)]
    fn unsigned_byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        words.map(|word| word >> (8 * P) & 0x00ff_00ff)
    }

    #[inline(always)]
    fn lower_bf16(self, words: Self::Words) -> Self::V {
        words.map(|word| f32::from_bits(word << 16))
    }

    #[inline(always)]
    fn upper_bf16(self, words: Self::Words) -> Self::V {
        words.map(|word| f32::from_bits(word & 0xffff_0000))
    }

    #[inline(always)]
    fn words_to_f32(self, words: Self::Words) -> Self::V {
        words.map(|word| word.cast_signed() as f32)
    }

    #[inline(always)]
    fn add_times_256(self, a: Self::Words, b: Self::Words) -> Self::Words {
        std::array::from_fn(|i| a[i].wrapping_add(b[i] << 8))
    }

    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's: sixteen values are writable.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: Self::V) {
        // SAFETY: the caller's: sixteen values are writable.
        unsafe {
            p.cast::<[f16; LANES]>()
                .write_unaligned(v.map(f16::from_f32))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V) {
        // SAFETY: the caller's: sixteen values are writable.
        unsafe {
            p.cast::<[bf16; LANES]>()
                .write_unaligned(v.map(bf16::from_f32))
        }
    }

    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, v: Self::V) {
        let rounded = self.round(v).map(|x| x as i16);
        // SAFETY: the caller's: sixteen values are writable.
        unsafe { p.cast::<[i16; LANES]>().write_unaligned(rounded) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        let rounded = self.round(v).map(|x| x as i8);
        // SAFETY: the caller's: sixteen values are writable.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(rounded) }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
