//! One AVX-512 register a vector.

use super::{Dots, Isa, Kernel, LANES, Simd, bf16_products_by_fma, quad_products_by_pairs};
use half::{bf16, f16};
use std::arch::{asm, x86_64::*};
use std::mem::transmute;

/// Proof that the machine has AVX-512 F, BW and VL, all that `Avx2` asks for, and what LEVEL names. It
/// knows what else the machine has.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const LEVEL: u8>(Isa);

/// Nothing more.
const PLAIN: u8 = 0;
/// VNNI.
const VNNI: u8 = 1;
/// VNNI and BF16.
const BF16: u8 = 2;

/// Runs the AVX-512 form of `kernel`, on a machine that has `isa`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Avx512::<PLAIN>(isa))
}

#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn run_vnni<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Avx512::<VNNI>(isa))
}

#[target_feature(enable = "avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn run_bf16<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    kernel.run(Avx512::<BF16>(isa))
}

impl<const LEVEL: u8> Simd for Avx512<LEVEL> {
    type V = __m512;
    type Words = __m512i;

    const TILE_ROWS: usize = 12;
    const TILE_VECTORS: usize = 2;
    const INT_TILE_ROWS: usize = 12;
    const DIRECT_ROWS: usize = 12;

    #[inline(always)]
    fn stream_ahead(self) -> usize {
        // Of a processor that has tiles a core reads half as much again with asking; one of Zen 4 reads less.
        match self.0 {
            Isa::Amx => 4096,
            _ => 0,
        }
    }

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value of `Avx512` exists only where the machine has the features, and its own.
        unsafe {
            match const { K::DOTS } {
                Some(Dots::Integers) if self.0 >= Isa::Avx512Vnni => run_vnni(self.0, kernel),
                Some(Dots::Bf16) if self.0 >= Isa::Avx512Bf16 => run_bf16(self.0, kernel),
                _ => run(self.0, kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        proven!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        proven!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        proven!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        proven!(_mm512_roundscale_ps::<NEAREST>(v))
    }

    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        proven!({
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn keep_first(self, v: Self::V, n: usize, fill: f32) -> Self::V {
        let kept = ((1u32 << n.min(LANES)) - 1) as __mmask16;
        proven!(_mm512_mask_blend_ps(kept, _mm512_set1_ps(fill), v))
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
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn load_words(self, p: *const u32) -> Self::Words {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> Self::Words {
        proven!(_mm512_set1_epi32(word.cast_signed()))
    }

    #[inline(always)]
    fn byte_quad(self, words: Self::Words) -> Self::Words {
        proven!(_mm512_xor_si512(words, _mm512_set1_epi8(i8::MIN)))
    }

    #[inline(always)]
    fn nibble_quad<const P: usize>(self, words: Self::Words) -> Self::Words {
        let low = match P {
            0 => words,
            _ => proven!(_mm512_srli_epi32::<4>(words)),
        };
        proven!(_mm512_and_si512(low, _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let high = match P {
            0 => proven!(_mm512_slli_epi16::<8>(words)),
            _ => words,
        };
        proven!(_mm512_srai_epi16::<8>(high))
    }

    #[inline(always)]
    fn nibble_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        let low = match P {
            0 => words,
            1 => proven!(_mm512_srli_epi32::<4>(words)),
            2 => proven!(_mm512_srli_epi32::<8>(words)),
            _ => proven!(_mm512_srli_epi32::<12>(words)),
        };
        proven!(_mm512_and_si512(low, _mm512_set1_epi32(0x000f_000f)))
    }

    #[inline(always)]
    fn add_pair_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        proven!(pinned(_mm512_add_epi32(sums, _mm512_madd_epi16(a, b))))
    }

    #[inline(always)]
    fn unsigned_byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        match P {
            0 => proven!(_mm512_and_si512(words, _mm512_set1_epi16(0xff))),
            _ => proven!(_mm512_srli_epi16::<8>(words)),
        }
    }

    #[inline(always)]
    fn lower_bf16(self, words: Self::Words) -> Self::V {
        proven!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
    }

    #[inline(always)]
    fn upper_bf16(self, words: Self::Words) -> Self::V {
        const UPPER: i32 = i32::MIN >> 15;
        proven!(_mm512_castsi512_ps(_mm512_and_si512(
            words,
            _mm512_set1_epi32(UPPER)
        )))
    }

    #[inline(always)]
    fn add_quad_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        if const { LEVEL >= VNNI } {
            return proven!(_mm512_dpbusd_epi32(sums, a, b));
        }
        quad_products_by_pairs(self, sums, a, b)
    }

    #[inline(always)]
    fn add_bf16_products(self, sums: Self::V, a: Self::Words, b: Self::Words) -> Self::V {
        if const { LEVEL >= BF16 } {
            // SAFETY: sixteen words are as good as 32 bf16.
            let bf16s = |words| unsafe { transmute::<__m512i, __m512bh>(words) };
            return proven!(_mm512_dpbf16_ps(sums, bf16s(a), bf16s(b)));
        }
        bf16_products_by_fma(self, sums, a, b)
    }

    #[inline(always)]
    fn words_to_f32(self, words: Self::Words) -> Self::V {
        proven!(_mm512_cvtepi32_ps(words))
    }

    #[inline(always)]
    fn add_times_256(self, a: Self::Words, b: Self::Words) -> Self::Words {
        proven!(_mm512_add_epi32(a, _mm512_slli_epi32::<8>(b)))
    }

    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: Self::V) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let not_a_number = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let rounded = _mm512_mask_blend_epi32(not_a_number, rounded, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }

    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    fn prefetch_write(self, p: *mut f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast_const().cast()) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// `v`, of which the compiler cannot tell; see AVX2's.
#[inline]
#[target_feature(enable = "avx512f")]
fn pinned(mut v: __m512i) -> __m512i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {v} */", v = inout(zmm_reg) v, options(pure, nomem, nostack, preserves_flags))
    };
    v
}
