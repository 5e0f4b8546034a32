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
use super::tile::IntRows;

/// Inputs of a run, where its group of weights has as many left. A run's sum of products of 8 and 16
/// bits takes 30 bits.
pub(super) const RUN: usize = 128;

/// What rows of integers consist of: integers, or pieces of them.
pub(super) trait Piece: bytemuck::Pod {
    /// Writes pieces.
    ///
    /// # Safety
    /// `p` is valid for writing sixteen values.
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V);
}

impl Piece for i16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut i16, v: S::V) {
        // SAFETY: the caller's.
        unsafe { simd.store_i16(p, v) }
    }
}

impl Piece for i8 {
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

/// Writes the pieces of a run of at most [`RUN`] values as integers, and gives their scale and the integers' sum. (The
/// sum of the values themselves would not go with products of the rounded ones.)
///
/// A value that is not finite makes the scale not a number.
#[inline(always)]
pub(super) fn round<S: Simd, R: IntRows>(
    simd: S,
    run: &[f32],
    pieces: &mut [[R::Piece; RUN]; 2],
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
        true => R::LARGEST / largest,
        false => 0.0,
    };
    let mut sum = simd.zero();
    for i in (0..run.len()).step_by(LANES) {
        // SAFETY: as above; and the arrays' length is a multiple of LANES.
        unsafe {
            let x = load(simd, run.as_ptr().add(i), run.len() - i);
            let integer = simd.round(simd.mul(x, simd.splat(inverse)));
            // Below 2^24, and so exact.
            sum = simd.add(sum, integer);
            for (piece, pieces) in pieces.iter_mut().take(R::PIECES).enumerate() {
                let piece = R::piece(simd, integer, piece);
                R::Piece::store(simd, pieces.as_mut_ptr().add(i), piece);
            }
        }
    }
    let sum = simd.sum_lanes(sum);
    // Times a finite inverse, or zero, what is not finite has made the sum not a number.
    [largest / R::LARGEST + 0.0 * sum, sum]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, Kernel};
    use crate::cpu::testing::{Random, isas};
    use crate::cpu::tile::{Halves, Pairs, Quads};
    use bytemuck::Zeroable;

    /// The integers of a run as numbers, their scale and their sum.
    fn rounded<R: IntRows>(isa: Isa, run: &[f32]) -> (Vec<f32>, f32, f32)
    where
        R::Piece: Into<f32>,
    {
        struct Round<'a, R: IntRows>(&'a [f32], &'a mut [[R::Piece; RUN]; 2]);
        impl<R: IntRows> Kernel for Round<'_, R> {
            type Output = [f32; 2];
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> [f32; 2] {
                round::<S, R>(simd, self.0, self.1)
            }
        }
        let mut pieces = [[R::Piece::zeroed(); RUN]; 2];
        let [scale, sum] = isa.run(Round::<R>(run, &mut pieces));
        let [first, second] = pieces.map(|pieces| pieces.map(Into::<f32>::into));
        let integer = |i: usize| match R::PIECES {
            1 => first[i],
            _ => 256.0 * first[i] + second[i],
        };
        ((0..run.len()).map(integer).collect(), scale, sum)
    }

    fn are_the_values<R: IntRows<Piece: Into<f32>>>() {
        let mut random = Random::new(3);
        for len in [1, 15, 16, 33, 127, 128] {
            for magnitude in [1e-38, 1e-20, 1.0, 1e30] {
                let run: Vec<f32> = random.values(len).iter().map(|x| x * magnitude).collect();
                let largest = run.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                for isa in isas() {
                    let (integers, scale, sum) = rounded::<R>(isa, &run);
                    for (x, integer) in run.iter().zip(&integers) {
                        assert!(integer.abs() <= R::LARGEST);
                        let error = (scale * integer - x).abs();
                        let half_a_step = largest / (2.0 * R::LARGEST);
                        assert!(error <= half_a_step * 1.01 + 1e-30, "{x}");
                    }
                    assert_eq!(sum, integers.iter().sum::<f32>());
                }
            }
        }
    }

    #[test]
    fn integers_times_scale_are_the_values() {
        are_the_values::<Pairs>();
        are_the_values::<Quads>();
        are_the_values::<Halves>();
    }

    #[test]
    fn every_number_of_16_bits_has_halves() {
        let largest = Halves::LARGEST as i32;
        let numbers: Vec<f32> = (-largest..=largest).map(|number| number as f32).collect();
        for isa in isas() {
            for numbers in numbers.chunks(RUN - 1) {
                // The largest makes the scale one.
                let run = [numbers, &[Halves::LARGEST]].concat();
                let (integers, scale, _) = rounded::<Halves>(isa, &run);
                assert_eq!((scale, integers), (1.0, run));
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
                    assert!(rounded::<Pairs>(isa, &run).1.is_nan());
                    assert!(rounded::<Quads>(isa, &run).1.is_nan());
                }
            }
            let (_, scale, sum) = rounded::<Quads>(isa, &[0.0; 40]);
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
