//! Rows as integers of 16 bits, for products with integer weights.
//!
//! A row is cut into runs, and each rounded to multiples of its greatest magnitude over 32767. Products
//! with weights of 8 bits or less are then made two at a time in 32 bits, exactly and so in any order, and
//! weights need not become `f32`. The error is at most 2^-16 of the run's greatest magnitude (runs of
//! magnitudes below 1e-30 are zero): for most values less than that of `f16`.

use super::norm::load;
use super::simd::{Isa, Kernel, LANES, Simd};

/// Inputs of a run, where its group of weights has as many left. A run's sum of products of 8 and 16
/// bits takes 30 bits.
pub(super) const RUN: usize = 128;

/// The greatest integer.
const LARGEST: f32 = 32767.0;

/// Runs of `k` inputs whose weights are in groups of `group`; `k` ends a run.
pub(super) fn runs(k: usize, group: usize) -> usize {
    k / group * group.div_ceil(RUN) + (k % group).div_ceil(RUN)
}

/// Writes a run of at most [`RUN`] values as integers, and gives their scale and the sum of what they stand
/// for. (The sum of the values themselves would not go with products of the rounded ones.)
///
/// A value that is not finite makes the scale not a number.
pub(super) fn round(isa: Isa, run: &[f32], integers: &mut [f32; RUN]) -> [f32; 2] {
    struct Round<'a>(&'a [f32], &'a mut [f32; RUN]);
    impl Kernel for Round<'_> {
        type Output = [f32; 2];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; 2] {
            let Round(run, integers) = self;
            let (mut largest, mut not_finite) = (simd.zero(), simd.zero());
            for i in (0..run.len()).step_by(LANES) {
                // SAFETY: as many values as are loaded are left in the run.
                let x = unsafe { load(simd, run.as_ptr().add(i), run.len() - i) };
                largest = simd.max(simd.max(x, simd.sub(simd.zero(), x)), largest);
                not_finite = simd.fma(x, simd.zero(), not_finite);
            }
            let largest = simd.max_lanes(largest);
            // Smaller values come near to having no finite inverse; they are nothing.
            let inverse = match largest > 1e-30 {
                true => LARGEST / largest,
                false => 0.0,
            };
            let mut sum = simd.zero();
            for i in (0..run.len()).step_by(LANES) {
                // SAFETY: as above; and the array's length is a multiple of LANES.
                unsafe {
                    let x = load(simd, run.as_ptr().add(i), run.len() - i);
                    let integer = simd.round(simd.mul(x, simd.splat(inverse)));
                    // Below 2^24, and so exact.
                    sum = simd.add(sum, integer);
                    simd.store_f32(integers.as_mut_ptr().add(i), integer);
                }
            }
            let scale = largest / LARGEST + simd.sum_lanes(not_finite);
            [scale, scale * simd.sum_lanes(sum)]
        }
    }
    assert!(run.len() <= RUN);
    isa.run(Round(run, integers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Random, isas};

    #[test]
    fn integers_times_scale_are_the_values() {
        let mut random = Random::new(3);
        for len in [1, 15, 16, 33, 127, 128] {
            for magnitude in [1e-38, 1e-20, 1.0, 1e30] {
                let run: Vec<f32> = random.values(len).iter().map(|x| x * magnitude).collect();
                let largest = run.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                for isa in isas() {
                    let mut integers = [f32::NAN; RUN];
                    let [scale, sum] = round(isa, &run, &mut integers);
                    for (x, integer) in run.iter().zip(integers) {
                        assert!(integer.abs() <= LARGEST && integer.fract() == 0.0);
                        let error = (scale * integer - x).abs();
                        assert!(error <= largest * 2f32.powi(-16) * 1.01 + 1e-30, "{x}");
                    }
                    let exact: f32 = integers[..len].iter().sum();
                    assert_eq!(sum, scale * exact);
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_lost() {
        for isa in isas() {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in 0..20 {
                    let mut run = [1.0; 20];
                    run[at] = wrong;
                    assert!(round(isa, &run, &mut [0.0; RUN])[0].is_nan());
                }
            }
            let [scale, sum] = round(isa, &[0.0; 40], &mut [0.0; RUN]);
            assert_eq!((scale, sum), (0.0, 0.0));
        }
    }

    #[test]
    fn runs_end_with_their_groups() {
        assert_eq!(runs(768, 64), 12);
        assert_eq!(runs(768, 768), 6);
        assert_eq!(runs(160 * 3 + 130, 160), 8);
        assert_eq!(runs(512, 768), 4);
        assert_eq!(runs(0, 64), 0);
    }
}
