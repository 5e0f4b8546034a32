//! How fast this machine multiplies and adds: the yardstick of everything that is bound by it.

use super::simd::{Dots, Isa, Kernel, LANES, Outlined, Simd};
use super::{ThreadPool, amx};
use std::hint::black_box;
use std::time::Instant;

/// Multiplications and additions a second, in units of 10^9, that never leave the registers (those of tiles, the L1
/// cache); of the fastest of several passes.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Of fused multiply-adds of f32.
    pub float_gflop_per_s: f64,
    /// Of products of rows of f32 and bf16, where kernels make them of pieces of bf16.
    pub bf16_pieces_gflop_per_s: Option<f64>,
    /// Of products of bf16, as kernels make them that round rows to bf16.
    pub bf16_gflop_per_s: f64,
    /// Of products with integers of 16 bits, as kernels with integer weights make them.
    pub integer_gop_per_s: f64,
    /// Of products of integers of 8 bits, as kernels make them that round rows to 8 bits.
    pub int8_gop_per_s: f64,
}

const PASSES: usize = 9;
/// Rounds of a pass: a millisecond or so.
const ROUNDS: usize = 100_000;
/// The same for tiles.
const TILE_ROUNDS: usize = 4000;
/// Chains that a core needs under way at once: latency times operations a cycle, where registers
/// are vectors (AVX-512), or parts of one.
const CHAINS: usize = 12;
const CHAINS_OF_PARTS: usize = 6;

/// Measures all with all threads of `pool`.
pub fn peak(pool: &ThreadPool, isa: Isa) -> Peak {
    let (bf16, int8) = match isa.multiplies_tiles() {
        true => (
            rate_of(pool, || amx::multiply_in_cache(Dots::Bf16, TILE_ROUNDS)),
            rate_of(pool, || amx::multiply_in_cache(Dots::Integers, TILE_ROUNDS)),
        ),
        false => (rate(pool, isa, Bf16s), rate(pool, isa, Int8s)),
    };
    Peak {
        float_gflop_per_s: rate(pool, isa, Floats),
        bf16_pieces_gflop_per_s: isa.multiplies_tiles().then(|| bf16 / amx::WHOLE as f64),
        bf16_gflop_per_s: bf16,
        // An integer of 16 bits is two of 8 where these are multiplied by one instruction.
        integer_gop_per_s: match isa.multiplies_quads() {
            true => int8 / 2.0,
            false => rate(pool, isa, Int16s),
        },
        int8_gop_per_s: int8,
    }
}

fn rate<A: Arithmetic>(pool: &ThreadPool, isa: Isa, arithmetic: A) -> f64 {
    rate_of(pool, || isa.run(Outlined(Chains(black_box(arithmetic)))))
}

/// Of what gives the number of its multiplications and additions.
fn rate_of(pool: &ThreadPool, pass: impl Fn() -> usize + Sync) -> f64 {
    let operations = pass() * pool.threads();
    let passes = (0..PASSES).map(|_| {
        let start = Instant::now();
        pool.run(|_| {
            black_box(pass());
        });
        start.elapsed().as_secs_f64()
    });
    operations as f64 / passes.fold(f64::INFINITY, f64::min) / 1e9
}

/// What a pass repeats.
trait Arithmetic: Copy + Send + Sync {
    /// As [`Kernel::DOTS`].
    const DOTS: Option<Dots> = None;
    /// Multiplications and additions of a lane.
    const OPERATIONS: usize;

    /// N chains of ROUNDS.
    fn chains<S: Simd, const N: usize>(simd: S);
}

/// Gives the number of multiplications and additions that it has made.
struct Chains<A>(A);

impl<A: Arithmetic> Kernel for Chains<A> {
    type Output = usize;
    const DOTS: Option<Dots> = A::DOTS;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let chains = if const { S::TILE_VECTORS > 1 } {
            A::chains::<S, CHAINS>(simd);
            CHAINS
        } else {
            A::chains::<S, CHAINS_OF_PARTS>(simd);
            CHAINS_OF_PARTS
        };
        ROUNDS * chains * LANES * A::OPERATIONS
    }
}

#[derive(Clone, Copy)]
struct Floats;

impl Arithmetic for Floats {
    const OPERATIONS: usize = 2;

    #[inline(always)]
    fn chains<S: Simd, const N: usize>(simd: S) {
        let (a, b) = (simd.splat(black_box(0.5)), simd.splat(black_box(1.0)));
        let mut sums = [simd.zero(); N];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.fma(*sum, a, b);
            }
        }
        black_box(sums.map(|sum| simd.sum_lanes(sum)));
    }
}

#[derive(Clone, Copy)]
struct Bf16s;

impl Arithmetic for Bf16s {
    const DOTS: Option<Dots> = Some(Dots::Bf16);
    const OPERATIONS: usize = 4;

    #[inline(always)]
    fn chains<S: Simd, const N: usize>(simd: S) {
        let x = simd.splat_word(black_box(0x3f00_3f00));
        let mut sums = [simd.zero(); N];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.add_bf16_products(*sum, x, x);
            }
        }
        black_box(sums.map(|sum| simd.sum_lanes(sum)));
    }
}

/// Chains of sums that are factors of their next products, which could be made once for all rounds
/// otherwise.
#[inline(always)]
fn integer_chains<S: Simd, const N: usize>(
    simd: S,
    add_products: impl Fn(S::Words, S::Words, S::Words) -> S::Words,
) {
    let x = simd.splat_word(black_box(0x0003_0005));
    let mut sums = [simd.splat_word(black_box(0x0001_0001)); N];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = add_products(*sum, *sum, x);
        }
    }
    black_box(sums.map(|sum| simd.sum_lanes(simd.words_to_f32(sum))));
}

#[derive(Clone, Copy)]
struct Int16s;

impl Arithmetic for Int16s {
    const OPERATIONS: usize = 4;

    #[inline(always)]
    fn chains<S: Simd, const N: usize>(simd: S) {
        integer_chains::<S, N>(simd, |sums, a, b| simd.add_pair_products(sums, a, b));
    }
}

#[derive(Clone, Copy)]
struct Int8s;

impl Arithmetic for Int8s {
    const DOTS: Option<Dots> = Some(Dots::Integers);
    const OPERATIONS: usize = 8;

    #[inline(always)]
    fn chains<S: Simd, const N: usize>(simd: S) {
        integer_chains::<S, N>(simd, |sums, a, b| simd.add_quad_products(sums, a, b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::isas;

    #[test]
    fn gives_rates_that_a_core_can_have() {
        let pool = ThreadPool::new(1).unwrap();
        for isa in isas() {
            let peak = peak(&pool, isa);
            // Sixteen lanes a cycle, in one register or in parts, at less than 6 GHz and with twice the room;
            // products that were made once for all rounds would be faster than that. Tiles have sixteen rows.
            let in_tiles = if isa.multiplies_tiles() { 16 } else { 1 };
            for (rate, operations) in [
                (peak.float_gflop_per_s, 2),
                (peak.bf16_gflop_per_s, 4 * in_tiles),
                (peak.integer_gop_per_s, 4 * in_tiles),
                (peak.int8_gop_per_s, 8 * in_tiles),
            ] {
                let most = 6.0 * 2.0 * 16.0 * f64::from(operations);
                assert!(rate > 0.01 && rate < most, "{isa}: {rate}");
            }
        }
    }
}
