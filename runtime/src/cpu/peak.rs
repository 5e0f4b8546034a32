//! How fast this machine multiplies and adds: the yardstick of everything that is bound by it.

use super::ThreadPool;
use super::simd::{Isa, Kernel, LANES, Simd};
use std::hint::black_box;
use std::time::Instant;

/// Multiplications and additions a second, in units of 10^9, that never leave the registers; of the
/// fastest of several passes.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Of fused multiply-adds of f32.
    pub float_gflop_per_s: f64,
    /// Of products of integers in pairs, as kernels with integer weights make them.
    pub integer_gop_per_s: f64,
}

const PASSES: usize = 9;
/// Rounds of a pass: a millisecond or so.
const ROUNDS: usize = 100_000;
/// Chains that a core needs under way at once: latency times operations a cycle, where registers
/// are vectors (AVX-512), or halves of one.
const CHAINS: usize = 12;
const CHAINS_OF_HALVES: usize = 6;

/// Measures both with all threads of `pool`.
pub fn peak(pool: &ThreadPool, isa: Isa) -> Peak {
    Peak {
        float_gflop_per_s: rate(pool, isa, Arithmetic::Float),
        integer_gop_per_s: rate(pool, isa, Arithmetic::Integer),
    }
}

fn rate(pool: &ThreadPool, isa: Isa, arithmetic: Arithmetic) -> f64 {
    let operations = isa.run(arithmetic) * pool.threads();
    let passes = (0..PASSES).map(|_| {
        let start = Instant::now();
        pool.run(|_| {
            black_box(isa.run(black_box(arithmetic)));
        });
        start.elapsed().as_secs_f64()
    });
    operations as f64 / passes.fold(f64::INFINITY, f64::min) / 1e9
}

#[derive(Clone, Copy)]
enum Arithmetic {
    Float,
    Integer,
}

/// Gives the number of multiplications and additions that it has made.
impl Kernel for Arithmetic {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let registers_are_vectors = S::TILE_VECTORS > 1;
        match (self, registers_are_vectors) {
            (Arithmetic::Float, true) => floats::<S, CHAINS>(simd),
            (Arithmetic::Float, false) => floats::<S, CHAINS_OF_HALVES>(simd),
            (Arithmetic::Integer, true) => integers::<S, CHAINS>(simd),
            (Arithmetic::Integer, false) => integers::<S, CHAINS_OF_HALVES>(simd),
        }
    }
}

#[inline(always)]
fn floats<S: Simd, const N: usize>(simd: S) -> usize {
    let (a, b) = (simd.splat(black_box(0.5)), simd.splat(black_box(1.0)));
    let mut sums = [simd.zero(); N];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = simd.fma(*sum, a, b);
        }
    }
    black_box(sums.map(|sum| simd.sum_lanes(sum)));
    // A product and its addition.
    ROUNDS * N * LANES * 2
}

/// Each sum is a factor of its next product, which could be made once for all rounds otherwise.
#[inline(always)]
fn integers<S: Simd, const N: usize>(simd: S) -> usize {
    let x = simd.splat_word(black_box(0x0003_0005));
    let mut sums = [simd.splat_word(black_box(0x0001_0001)); N];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = simd.add_pair_products(*sum, *sum, x);
        }
    }
    black_box(sums.map(|sum| simd.sum_lanes(simd.words_to_f32(sum))));
    // Two products and their additions.
    ROUNDS * N * LANES * 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::isas;

    #[test]
    fn gives_rates_that_a_core_can_have() {
        let pool = ThreadPool::new(1).unwrap();
        for isa in isas() {
            let Peak {
                float_gflop_per_s,
                integer_gop_per_s,
            } = peak(&pool, isa);
            // Two registers a cycle of 16 lanes, at less than 6 GHz; products that were made once for
            // all rounds would be faster than that.
            for rate in [float_gflop_per_s, integer_gop_per_s] {
                assert!(
                    rate > 0.01 && rate < 6.0 * 2.0 * 16.0 * 4.0,
                    "{isa}: {rate}"
                );
            }
        }
    }
}
