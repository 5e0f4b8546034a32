//! Two AVX2 registers a vector.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::arch::{asm, x86_64::*};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs the AVX2 form of `kernel`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// An instruction applied to both halves, or several to those of one value. (Closures that an array is mapped by
/// may not be inlined, and are functions without the features then.)
macro_rules! halves {
    ($instruction:ident($($v:ident),*)) => {
        proven!([$instruction($($v[0]),*), $instruction($($v[1]),*)])
    };
    (for $half:ident in $v:expr => $instructions:expr) => {{
        let [low, high] = $v;
        proven!([
            { let $half = low; $instructions },
            { let $half = high; $instructions },
        ])
    }};
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    type Words = [__m256i; 2];

    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;
    const INT_TILE_ROWS: usize = 4;
    const BF16_TILE_ROWS: usize = 4;
    const DIRECT_ROWS: usize = 2;

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value of `Avx2` exists only where the machine has the features.
        unsafe { run(kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: as in `proven!`.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        halves!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        halves!(for v in v => _mm256_round_ps::<NEAREST>(v))
    }

    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        halves!(for n in n => {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }

    #[inline(always)]
    fn keep_first(self, v: Self::V, n: usize, fill: f32) -> Self::V {
        // SAFETY: as in `proven!`.
        unsafe {
            let n = _mm256_set1_epi32(n.min(LANES) as i32);
            let fill = _mm256_set1_ps(fill);
            let keep = |v, first: i32| {
                let lane = _mm256_add_epi32(
                    _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                    _mm256_set1_epi32(first),
                );
                _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, lane)))
            };
            [keep(v[0], 0), keep(v[1], 8)]
        }
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
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            [
                widen_bf16(_mm_loadu_si128(p.cast())),
                widen_bf16(_mm_loadu_si128(p.add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_words(self, p: *const u32) -> Self::Words {
        // SAFETY: as in `proven!`; sixteen values are readable.
        unsafe {
            [
                _mm256_loadu_si256(p.cast()),
                _mm256_loadu_si256(p.add(8).cast()),
            ]
        }
    }

    #[inline(always)]
    fn splat_word(self, word: u32) -> Self::Words {
        // SAFETY: as in `proven!`.
        unsafe { [_mm256_set1_epi32(word.cast_signed()); 2] }
    }

    #[inline(always)]
    fn byte_quad(self, words: Self::Words) -> Self::Words {
        halves!(for words in words => _mm256_xor_si256(words, _mm256_set1_epi8(i8::MIN)))
    }

    #[inline(always)]
    fn nibble_quad<const P: usize>(self, words: Self::Words) -> Self::Words {
        halves!(for words in words => {
            let low = match P {
                0 => words,
                _ => _mm256_srli_epi32::<4>(words),
            };
            _mm256_and_si256(low, _mm256_set1_epi8(15))
        })
    }

    #[inline(always)]
    fn byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        halves!(for words in words => {
            let high = match P {
                0 => _mm256_slli_epi16::<8>(words),
                _ => words,
            };
            _mm256_srai_epi16::<8>(high)
        })
    }

    #[inline(always)]
    fn nibble_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        halves!(for words in words => {
            let low = match P {
                0 => words,
                1 => _mm256_srli_epi32::<4>(words),
                2 => _mm256_srli_epi32::<8>(words),
                _ => _mm256_srli_epi32::<12>(words),
            };
            _mm256_and_si256(low, _mm256_set1_epi32(0x000f_000f))
        })
    }

    #[inline(always)]
    fn add_pair_products(self, sums: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words {
        let products = halves!(_mm256_madd_epi16(a, b));
        let sums = halves!(_mm256_add_epi32(sums, products));
        halves!(for sums in sums => pinned(sums))
    }

    #[inline(always)]
    fn unsigned_byte_pair<const P: usize>(self, words: Self::Words) -> Self::Words {
        halves!(for words in words => match P {
            0 => _mm256_and_si256(words, _mm256_set1_epi16(0xff)),
            _ => _mm256_srli_epi16::<8>(words),
        })
    }

    #[inline(always)]
    fn lower_bf16(self, words: Self::Words) -> Self::V {
        halves!(for words in words => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)))
    }

    #[inline(always)]
    fn upper_bf16(self, words: Self::Words) -> Self::V {
        const UPPER: i32 = i32::MIN >> 15;
        halves!(for words in words => {
            _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(UPPER)))
        })
    }

    #[inline(always)]
    fn words_to_f32(self, words: Self::Words) -> Self::V {
        halves!(_mm256_cvtepi32_ps(words))
    }

    #[inline(always)]
    fn add_times_256(self, a: Self::Words, b: Self::Words) -> Self::Words {
        let b = halves!(for half in b => _mm256_slli_epi32::<8>(half));
        halves!(_mm256_add_epi32(a, b))
    }

    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: Self::V) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(v[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<NEAREST>(v[1]));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            // Packing works within 128-bit lanes; the permutation puts their parts in order.
            let packed = _mm256_packus_epi32(round_bf16(v[0]), round_bf16(v[1]));
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }

    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe { _mm256_storeu_si256(p.cast(), round_i16(v)) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        // SAFETY: as in `proven!`; sixteen values are writable.
        unsafe {
            let halves = round_i16(v);
            let (low, high) = (
                _mm256_castsi256_si128(halves),
                _mm256_extracti128_si256::<1>(halves),
            );
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// `v`, of which the compiler cannot tell. It would add up a chain of sums in another order, which needs
/// more products at a time than there are registers for.
#[inline]
#[target_feature(enable = "avx2")]
fn pinned(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {v} */", v = inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags))
    };
    v
}

/// Eight `bf16` as `f32`.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn widen_bf16(bits: __m128i) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
}

/// The nearest integers of 16 bits.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn round_i16(v: [__m256; 2]) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        // Packing works within 128-bit lanes; the permutation puts their parts in order.
        let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
        _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
    }
}

/// The bits of the nearest `bf16` in the lower half of each lane.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn round_bf16(v: __m256) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        let not_a_number = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), not_a_number)
    }
}
