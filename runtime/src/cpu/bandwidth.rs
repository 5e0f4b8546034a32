//! How fast this machine reads memory: the yardstick of everything that is bound by it.

use super::ThreadPool;
use super::pool::partition;
use super::scratch::Shards;
use super::simd::{Isa, Kernel, LANES, Simd};
use memmap2::MmapMut;
use std::hint::black_box;
use std::io;
use std::time::Instant;

/// Read bandwidth in GB/s (10^9 bytes a second) over several passes.
#[derive(Clone, Copy, Debug)]
pub struct Bandwidth {
    /// Of the passes' middle one.
    pub median: f64,
    /// Of the fastest pass.
    pub best: f64,
}

/// Bytes to read for it: far more than caches hold.
pub const BANDWIDTH_BYTES: usize = 512 << 20;

const PASSES: usize = 9;

/// Reads a buffer of `bytes` bytes, which should be far larger than the caches, with all threads of
/// `pool`, each its own contiguous part.
///
/// # Errors
/// When the system has no memory for the buffer.
pub fn read_bandwidth(pool: &ThreadPool, isa: Isa, bytes: usize) -> io::Result<Bandwidth> {
    let len = (bytes / size_of::<f32>()).next_multiple_of(LANES);
    let mut buffer = MmapMut::map_anon(len * size_of::<f32>())?;
    // With small pages a thread waits at the beginning of each.
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage);
    let values: &mut [f32] = bytemuck::cast_slice_mut(&mut buffer);
    // A page that was never written is not memory yet.
    let shards = Shards::new(values);
    pool.run(|thread| {
        let range = partition(len, pool.threads(), thread);
        // SAFETY: each thread writes its own part.
        unsafe { shards.range(range.start, range.len()) }.fill(1.0);
    });
    let values = &*values;
    read_once(pool, isa, values);
    let mut rates: Vec<f64> = (0..PASSES).map(|_| read_once(pool, isa, values)).collect();
    rates.sort_unstable_by(f64::total_cmp);
    Ok(Bandwidth {
        median: rates[PASSES / 2],
        best: rates[PASSES - 1],
    })
}

/// Reads `values` with all threads of `pool`, each its own contiguous part, and returns the rate in GB/s.
pub fn read_once(pool: &ThreadPool, isa: Isa, values: &[f32]) -> f64 {
    let start = Instant::now();
    pool.run(|thread| {
        let range = partition(values.len(), pool.threads(), thread);
        black_box(isa.run(Sum(&values[range])));
    });
    size_of_val(values) as f64 / start.elapsed().as_secs_f64() / 1e9
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        const UNROLL: usize = 4;
        let mut sums = [simd.zero(); UNROLL];
        for chunk in self.0.chunks_exact(UNROLL * LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                let p = chunk.as_ptr().wrapping_add(i * LANES);
                simd.prefetch_stream(p.cast());
                // SAFETY: the chunk has UNROLL vectors.
                *sum = simd.add(*sum, unsafe { simd.load_f32(p) });
            }
        }
        let [a, b, c, d] = sums;
        simd.sum_lanes(simd.add(simd.add(a, b), simd.add(c, d)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_a_rate() {
        for threads in [1, 2, 3] {
            let pool = ThreadPool::new(threads).unwrap();
            let rate = read_bandwidth(&pool, Isa::Portable, 4 << 20).unwrap();
            assert!(rate.best >= rate.median && rate.median > 0.0);
        }
    }
}
