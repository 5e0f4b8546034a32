//! Rows as integers of 16 or 8 bits, for products with integer weights.
//!
//! A row is cut into runs, and each rounded to multiples of its greatest magnitude over 32639 or 127.
//! (32639 is 127 times 256 and 127: its halves are integers of 8 bits.)
//! Products with weights of 8 bits or less are then made two or four at a time in 32 bits, exactly and so
//! in any order, and weights need not become `f32`. The error is at most 2^-16 or 2^-8, nearly, of the run's
//! greatest magnitude (runs of magnitudes below 1e-30 are zero): with 16 bits, for most values less than
//! that of `f16`.

use super::norm::load;
use super::simd::{LANES, Simd};

/// Inputs of a run, where its group of weights has as many left. A run's sum of products of 8 and 16
/// bits takes 30 bits.
pub(super) const RUN: usize = 128;

/// A type of integers that runs are rounded to.
pub(super) trait Integer: bytemuck::Pod {
    /// The greatest that is used.
    const LARGEST: f32;

    /// Writes integers.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V);
}

impl Integer for i16 {
    const LARGEST: f32 = 127.0 * 256.0 + 127.0;

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut i16, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_i16(p, v) }
    }
}

impl Integer for i8 {
    const LARGEST: f32 = 127.0;

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut i8, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_i8(p, v) }
    }
}

/// Runs of `k` inputs whose weights are in groups of `group`; `k` ends a run.
pub(super) fn runs(k: usize, group: usize) -> usize {
    k / group * group.div_ceil(RUN) + (k % group).div_ceil(RUN)
}

/// Writes a run of at most [`RUN`] values as integers, and gives their scale and their sum. (The sum of the
/// values themselves would not go with products of the rounded ones.)
///
/// A value that is not finite makes the scale not a number.
#[inline(always)]
pub(super) fn round<S: Simd, I: Integer>(
    simd: S,
    run: &[f32],
    integers: &mut [I; RUN],
) -> [f32; 2] {
    assert!(run.len() <= RUN);
    let mut largest = simd.zero();
    for i in (0..run.len()).step_by(LANES) {
        // SAFETY: as many values as are loaded are left in the run.
        let x = unsafe { load(simd, run.as_ptr().add(i), run.len() - i) };
        largest = simd.max(simd.max(x, simd.sub(simd.zero(), x)), largest);
    }
    let largest = simd.max_lanes(largest);
    // Smaller values come near to having no finite inverse; they are nothing.
    let inverse = match largest > 1e-30 {
        true => I::LARGEST / largest,
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
            I::store(simd, integers.as_mut_ptr().add(i), integer);
        }
    }
    let sum = simd.sum_lanes(sum);
    // Times a finite inverse, or zero, what is not finite has made the sum not a number.
    [largest / I::LARGEST + 0.0 * sum, sum]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, Kernel};
    use crate::cpu::testing::{Random, isas};

    /// The integers of a run as numbers, their scale and their sum.
    fn rounded<I: Integer + Into<f32>>(isa: Isa, run: &[f32]) -> (Vec<f32>, f32, f32) {
        struct Round<'a, I>(&'a [f32], &'a mut [I; RUN]);
        impl<I: Integer> Kernel for Round<'_, I> {
            type Output = [f32; 2];
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> [f32; 2] {
                round(simd, self.0, self.1)
            }
        }
        let mut integers = [I::zeroed(); RUN];
        let [scale, sum] = isa.run(Round(run, &mut integers));
        let numbers = integers[..run.len()].iter().map(|&integer| integer.into());
        (numbers.collect(), scale, sum)
    }

    fn are_the_values<I: Integer + Into<f32>>() {
        let mut random = Random::new(3);
        for len in [1, 15, 16, 33, 127, 128] {
            for magnitude in [1e-38, 1e-20, 1.0, 1e30] {
                let run: Vec<f32> = random.values(len).iter().map(|x| x * magnitude).collect();
                let largest = run.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                for isa in isas() {
                    let (integers, scale, sum) = rounded::<I>(isa, &run);
                    for (x, integer) in run.iter().zip(&integers) {
                        assert!(integer.abs() <= I::LARGEST);
                        let error = (scale * integer - x).abs();
                        let half_a_step = largest / (2.0 * I::LARGEST);
                        assert!(error <= half_a_step * 1.01 + 1e-30, "{x}");
                    }
                    assert_eq!(sum, integers.iter().sum::<f32>());
                }
            }
        }
    }

    #[test]
    fn integers_times_scale_are_the_values() {
        are_the_values::<i16>();
        are_the_values::<i8>();
    }

    #[test]
    fn what_is_no_number_is_not_lost() {
        for isa in isas() {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in 0..20 {
                    let mut run = [1.0; 20];
                    run[at] = wrong;
                    assert!(rounded::<i16>(isa, &run).1.is_nan());
                    assert!(rounded::<i8>(isa, &run).1.is_nan());
                }
            }
            let (_, scale, sum) = rounded::<i8>(isa, &[0.0; 40]);
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
