//! Layer normalisation.

use super::simd::{Element, Isa, Kernel, LANES, Simd};
use super::{Cpu, Rows, RowsMut};

/// LayerNorm over the C values of a row: `(x - mean) / sqrt(variance + eps) * weight + bias`, with
/// the biased variance.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// (C); one where absent.
    pub weight: Option<&'a [f32]>,
    /// (C); zero where absent.
    pub bias: Option<&'a [f32]>,
    /// Added to the variance.
    pub eps: f32,
}

impl Norm<'_> {
    /// Asserts that the parameters are those of rows of `cols` values.
    pub(super) fn check(&self, cols: usize) {
        for parameter in [self.weight, self.bias].into_iter().flatten() {
            assert_eq!(parameter.len(), cols, "a norm's parameters and its rows");
        }
    }
}

/// `out[t] = norm(x[t])`; both (T, C).
pub fn layer_norm(cpu: &mut Cpu, x: Rows<'_>, norm: &Norm<'_>, mut out: RowsMut<'_>) {
    assert_eq!(
        (x.rows(), x.cols()),
        (out.rows(), out.cols()),
        "rows in and rows out"
    );
    norm.check(x.cols());
    /// Below this, waking the workers costs more than the work.
    const VALUES_A_TASK: usize = 8192;
    let isa = cpu.isa;
    let rows_a_task = VALUES_A_TASK.div_ceil(x.cols().max(1));
    let rows = out.shared();
    cpu.pool
        .parallel_for(x.rows().div_ceil(rows_a_task), |_, task| {
            let first = task * rows_a_task;
            for t in first..x.rows().min(first + rows_a_task) {
                // SAFETY: row t belongs to this task alone.
                let out = unsafe { rows.row(t) };
                normalize(isa, x.row(t), norm, out);
            }
        });
}

/// `out = norm(row)`; both (C).
pub(super) fn normalize(isa: Isa, row: &[f32], norm: &Norm<'_>, out: &mut [f32]) {
    struct Normalize<'a>(&'a [f32], &'a Norm<'a>, &'a mut [f32]);
    impl Kernel for Normalize<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let Normalize(row, norm, out) = self;
            let stats = Stats::new(simd, row, norm.eps);
            for col in (0..row.len()).step_by(LANES) {
                let width = LANES.min(row.len() - col);
                // SAFETY: `width` values are left in the row and, as asserted, in the output.
                unsafe {
                    let x = load(simd, row.as_ptr().add(col), width);
                    let y = stats.apply(simd, x, norm, col, width);
                    store(simd, out.as_mut_ptr().add(col), y, width);
                }
            }
        }
    }
    assert_eq!(row.len(), out.len(), "a row and its norm");
    norm.check(row.len());
    isa.run(Normalize(row, norm, out));
}

/// Mean and inverse deviation of `row`.
pub(super) fn stats(isa: Isa, row: &[f32], eps: f32) -> Stats {
    struct Compute<'a>(&'a [f32], f32);
    impl Kernel for Compute<'_> {
        type Output = Stats;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Stats {
            Stats::new(simd, self.0, self.1)
        }
    }
    isa.run(Compute(row, eps))
}

/// What normalising a row takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Stats {
    mean: f32,
    /// 1 / sqrt(variance + eps)
    inverse_deviation: f32,
}

impl Stats {
    /// Two passes; sums by lane first, then across lanes.
    #[inline(always)]
    fn new<S: Simd>(simd: S, row: &[f32], eps: f32) -> Stats {
        let count = row.len() as f32;
        let mut sum = simd.zero();
        for col in (0..row.len()).step_by(LANES) {
            // SAFETY: as many values as are loaded are left in the row.
            let x = unsafe { load(simd, row.as_ptr().add(col), row.len() - col) };
            sum = simd.add(sum, x);
        }
        let mean = simd.sum_lanes(sum) / count;
        let mut squares = simd.zero();
        for col in (0..row.len()).step_by(LANES) {
            let left = row.len() - col;
            // SAFETY: as above.
            let x = unsafe { load(simd, row.as_ptr().add(col), left) };
            let mut deviation = simd.sub(x, simd.splat(mean));
            if left < LANES {
                deviation = simd.keep_first(deviation, left, 0.0);
            }
            squares = simd.fma(deviation, deviation, squares);
        }
        let variance = simd.sum_lanes(squares) / count;
        Stats {
            mean,
            inverse_deviation: 1.0 / (variance + eps).sqrt(),
        }
    }

    /// The normalised form of the values `x` that stand at `col..col + width` of their row.
    ///
    /// # Safety
    /// The norm's parameters have at least `col + width` values.
    #[inline(always)]
    pub(super) unsafe fn apply<S: Simd>(
        &self,
        simd: S,
        x: S::V,
        norm: &Norm<'_>,
        col: usize,
        width: usize,
    ) -> S::V {
        let centered = simd.sub(x, simd.splat(self.mean));
        let mut y = simd.mul(centered, simd.splat(self.inverse_deviation));
        // SAFETY: the caller's.
        unsafe {
            if let Some(weight) = norm.weight {
                y = simd.mul(y, load(simd, weight.as_ptr().add(col), width));
            }
            if let Some(bias) = norm.bias {
                y = simd.add(y, load(simd, bias.as_ptr().add(col), width));
            }
        }
        y
    }
}

/// A vector of which only the first `width` lanes exist in memory; zero in the others.
///
/// # Safety
/// `p` is valid for reading `min(width, 16)` values.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(simd: S, p: *const f32, width: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        if width >= LANES {
            simd.load_f32(p)
        } else {
            f32::load_first(simd, p, width)
        }
    }
}

/// Stores a vector of which only the first `width` lanes exist in memory.
///
/// # Safety
/// `p` is valid for writing `min(width, 16)` values.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(simd: S, p: *mut f32, v: S::V, width: usize) {
    // SAFETY: the caller's.
    unsafe {
        if width >= LANES {
            simd.store_f32(p, v)
        } else {
            f32::store_first(simd, p, v, width)
        }
    }
}

#[cfg(test)]
pub(super) use tests::reference;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Random, cpus};

    #[test]
    fn matches_the_definition() {
        let mut random = Random::new(7);
        for (t, c) in [(1, 1), (1, 16), (3, 33), (40, 768), (2, 2049)] {
            let x: Vec<f32> = random.values(t * c).iter().map(|x| 3.0 * x + 1.5).collect();
            let (weight, bias) = (random.values(c), random.values(c));
            for affine in [false, true] {
                let norm = Norm {
                    weight: affine.then_some(&weight),
                    bias: affine.then_some(&bias),
                    eps: 1e-5,
                };
                for mut cpu in cpus() {
                    let mut out = vec![0.0; t * c];
                    layer_norm(
                        &mut cpu,
                        Rows::new(&x, t, c),
                        &norm,
                        RowsMut::new(&mut out, t, c),
                    );
                    for row in 0..t {
                        let x = &x[row * c..][..c];
                        let expect = reference(x, &norm);
                        for i in 0..c {
                            let error = (f64::from(out[row * c + i]) - expect[i]).abs();
                            assert!(error < 3e-6, "({t}, {c}) at {row}, {i}: {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        for mut cpu in cpus() {
            let norm = Norm {
                weight: None,
                bias: None,
                eps: 0.0,
            };
            layer_norm(
                &mut cpu,
                Rows::new(&[], 0, 8),
                &norm,
                RowsMut::new(&mut [], 0, 8),
            );
        }
    }

    pub(crate) fn reference(x: &[f32], norm: &Norm<'_>) -> Vec<f64> {
        let count = x.len() as f64;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = x
            .iter()
            .map(|&x| (f64::from(x) - mean).powi(2))
            .sum::<f64>()
            / count;
        let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
        let parameter = |p: Option<&[f32]>, i: usize, none| p.map_or(none, |p| f64::from(p[i]));
        (0..x.len())
            .map(|i| {
                let y = (f64::from(x[i]) - mean) * scale;
                y * parameter(norm.weight, i, 1.0) + parameter(norm.bias, i, 0.0)
            })
            .collect()
    }
}
