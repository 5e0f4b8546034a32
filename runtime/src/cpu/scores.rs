//! Passes over a row of scores (V), for the choice of a token.

use super::simd::{Isa, Kernel, LANES, Simd};

/// Values whose sum is rounded in `f32` before it is added in `f64`.
pub const BLOCK: usize = 32 * LANES;

/// The largest of a row's values; none where one is no finite number, or there are none.
pub fn finite_max(isa: Isa, row: &[f32]) -> Option<f32> {
    let max = isa.run(FiniteMax(row));
    max.filter(|max| max.is_finite())
}

/// The largest of a row's values, which may be -inf but no NaN; -inf where there are none.
pub fn max(isa: Isa, row: &[f32]) -> f32 {
    isa.run(Max(row))
}

/// The sum of `exp((value - max) * scale)`: that of the sums of blocks of [`BLOCK`] values.
pub fn exp_sum(isa: Isa, row: &[f32], max: f32, scale: f32) -> f64 {
    isa.run(ExpSum { row, max, scale })
}

struct FiniteMax<'a>(&'a [f32]);

impl Kernel for FiniteMax<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Option<f32> {
        let (vectors, rest) = self.0.as_chunks::<LANES>();
        let mut max = [simd.splat(f32::NEG_INFINITY); 2];
        // Of a finite number the difference from itself is 0, of all others it is none.
        let mut zero = [simd.zero(); 2];
        for (i, vector) in vectors.iter().enumerate() {
            // SAFETY: a chunk has sixteen values.
            let v = unsafe { simd.load_f32(vector.as_ptr()) };
            max[i % 2] = simd.max(max[i % 2], v);
            zero[i % 2] = simd.add(zero[i % 2], simd.sub(v, v));
        }
        let zero = simd.sum_lanes(simd.add(zero[0], zero[1]));
        let max = simd.max_lanes(simd.max(max[0], max[1]));
        let max = rest.iter().copied().fold(max, f32::max);
        (zero == 0.0 && rest.iter().all(|value| value.is_finite())).then_some(max)
    }
}

struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = self.0.as_chunks::<LANES>();
        let mut max = [simd.splat(f32::NEG_INFINITY); 2];
        for (i, vector) in vectors.iter().enumerate() {
            // SAFETY: a chunk has sixteen values.
            let v = unsafe { simd.load_f32(vector.as_ptr()) };
            max[i % 2] = simd.max(max[i % 2], v);
        }
        let max = simd.max_lanes(simd.max(max[0], max[1]));
        rest.iter().copied().fold(max, f32::max)
    }
}

struct ExpSum<'a> {
    row: &'a [f32],
    max: f32,
    scale: f32,
}

impl Kernel for ExpSum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let mut total = 0.0;
        for block in self.row.chunks(BLOCK) {
            let (vectors, rest) = block.as_chunks::<LANES>();
            let mut sum = simd.zero();
            for vector in vectors {
                // SAFETY: a chunk has sixteen values.
                let v = unsafe { simd.load_f32(vector.as_ptr()) };
                sum = simd.add(sum, shifted_exp(simd, v, self.max, self.scale));
            }
            if !rest.is_empty() {
                let mut last = [f32::NEG_INFINITY; LANES];
                last[..rest.len()].copy_from_slice(rest);
                // SAFETY: sixteen values.
                let v = unsafe { simd.load_f32(last.as_ptr()) };
                sum = simd.add(sum, shifted_exp(simd, v, self.max, self.scale));
            }
            total += f64::from(simd.sum_lanes(sum));
        }
        total
    }
}

/// `exp((v - max) * scale)`. [`Simd::exp`] stops at the smallest normal number, which is taken off
/// again, so that what cannot be has no weight.
#[inline(always)]
fn shifted_exp<S: Simd>(simd: S, v: S::V, max: f32, scale: f32) -> S::V {
    let shifted = simd.mul(simd.sub(v, simd.splat(max)), simd.splat(scale));
    let floor = simd.exp(simd.splat(f32::MIN));
    simd.sub(simd.exp(shifted), floor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Random, isas};

    fn row(len: usize) -> Vec<f32> {
        let mut random = Random::new(len as u64);
        random.values(len).iter().map(|value| value * 9.0).collect()
    }

    #[test]
    fn the_largest_is_found_and_what_is_no_number() {
        for isa in isas() {
            for len in [1, 15, 16, 17, 33, 1000] {
                let mut row = row(len);
                let largest = row.iter().copied().fold(f32::MIN, f32::max);
                assert_eq!(
                    (finite_max(isa, &row), max(isa, &row)),
                    (Some(largest), largest)
                );
                for place in [0, len / 2, len - 1] {
                    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        let kept = std::mem::replace(&mut row[place], bad);
                        assert_eq!(finite_max(isa, &row), None, "{isa} {len} {place} {bad}");
                        row[place] = kept;
                    }
                }
            }
            assert_eq!(finite_max(isa, &[]), None);
            assert_eq!(max(isa, &[f32::NEG_INFINITY; 20]), f32::NEG_INFINITY);
        }
    }

    #[test]
    fn sums_are_exact_enough() {
        for isa in isas() {
            for (len, scale) in [(1, 1.0), (16, 2.0), (50_272, 0.7)] {
                let mut row = row(len);
                if len > 1 {
                    row[3] = f32::NEG_INFINITY;
                }
                let max = max(isa, &row);
                let weight = |&value: &f32| (f64::from(value - max) * f64::from(scale)).exp();
                let total: f64 = row.iter().map(weight).sum();
                let sum = exp_sum(isa, &row, max, scale);
                assert!(
                    (sum / total - 1.0).abs() < 1e-6,
                    "{isa} {len}: {sum} for {total}"
                );
                let blocks = row
                    .chunks(BLOCK)
                    .map(|block| exp_sum(isa, block, max, scale));
                assert_eq!(blocks.sum::<f64>(), sum);
            }
            // What cannot be has no weight.
            assert_eq!(exp_sum(isa, &[f32::NEG_INFINITY; 40], 1.0, 1.0), 0.0);
        }
    }
}
