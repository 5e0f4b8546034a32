//! Rounds rows of matrices to integers with a scale (int8), or a scale and a minimum (int4), for each
//! group of inputs.
//!
//! The scale that spans all values of a group is not the one of the least error: the extremes are few,
//! and giving them up makes the steps of all others smaller. So some narrower spans are tried, each
//! followed by the least squares fit to the codes that it gives, and the one with the smallest squared
//! error is kept. Scales and minima are rounded to bf16 first, so that the codes fit what is stored.

use half::bf16;
use kiln_bundle::{IntFormat, packing::Layout};
use rayon::prelude::*;

/// Shares of a group's span that are tried.
const SPANS: [f32; 6] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75];
/// Where a narrower span lies in the whole: at its low end, in the middle, at its high end.
const PLACES: [f32; 3] = [0.0, 0.5, 1.0];

/// Rows of a matrix as integers.
#[derive(Clone, Debug, PartialEq)]
pub struct IntRows {
    format: IntFormat,
    k: usize,
    /// (rows, K).
    codes: Vec<i8>,
    /// (rows, groups).
    scales: Vec<bf16>,
    /// (rows, groups); empty in formats without.
    minima: Vec<bf16>,
}

/// What codes of a group stand for: `scale * code + minimum`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    pub(crate) scale: bf16,
    /// Zero in formats without.
    pub(crate) minimum: bf16,
}

impl IntRows {
    /// No rows of `k` inputs.
    pub fn empty(format: IntFormat, k: usize) -> IntRows {
        IntRows {
            format,
            k,
            codes: vec![],
            scales: vec![],
            minima: vec![],
        }
    }

    /// Rows of these codes, (rows, K), on these grids, (rows, groups).
    pub(crate) fn of(format: IntFormat, k: usize, codes: Vec<i8>, grids: &[Grid]) -> IntRows {
        let mut rows = IntRows::empty(format, k);
        rows.codes = codes;
        grids.iter().for_each(|&grid| rows.push_grid(grid));
        rows
    }

    /// Rounds rows, (rows, K), each value to the nearest of its group's grid.
    pub fn round(rows: &[f32], k: usize, format: IntFormat) -> IntRows {
        /// Rows of a task: enough work to be worth one.
        const TOGETHER: usize = 16;
        let parts: Vec<IntRows> = rows
            .par_chunks(TOGETHER * k.max(1))
            .map(|rows| IntRows::round_alone(rows, k, format))
            .collect();
        let mut rounded = IntRows::empty(format, k);
        parts.into_iter().for_each(|part| rounded.append(part));
        rounded
    }

    /// As [`IntRows::round`], on this thread.
    fn round_alone(rows: &[f32], k: usize, format: IntFormat) -> IntRows {
        let mut rounded = IntRows::empty(format, k);
        rounded.codes.reserve(rows.len());
        for group in rows
            .chunks(k.max(1))
            .flat_map(|row| row.chunks(format.group(k)))
        {
            let grid = Grid::fit(group, format);
            rounded.push_grid(grid);
            let codes = group.iter().map(|&value| grid.code(value, format));
            rounded.codes.extend(codes);
        }
        rounded
    }

    /// Appends the rows of `other`, of the same format and inputs.
    pub fn append(&mut self, mut other: IntRows) {
        self.codes.append(&mut other.codes);
        self.scales.append(&mut other.scales);
        self.minima.append(&mut other.minima);
    }

    /// Some of the rows.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> IntRows {
        let part = |list: &[bf16]| match list.is_empty() {
            true => vec![],
            false => {
                let groups = self.format.groups(self.k);
                list[rows.start * groups..rows.end * groups].to_vec()
            }
        };
        IntRows {
            format: self.format,
            k: self.k,
            codes: self.codes[rows.start * self.k..rows.end * self.k].to_vec(),
            scales: part(&self.scales),
            minima: part(&self.minima),
        }
    }

    /// What the rows stand for, (rows, K).
    pub fn values(&self) -> Vec<f32> {
        let group = self.format.group(self.k);
        let groups = self
            .codes
            .chunks(self.k.max(1))
            .flat_map(|row| row.chunks(group));
        let minima = self.minima.iter().copied();
        groups
            .zip(&self.scales)
            .zip(minima.chain(std::iter::repeat(bf16::ZERO)))
            .flat_map(|((codes, &scale), minimum)| {
                let grid = Grid { scale, minimum };
                codes.iter().map(move |&code| grid.value(code))
            })
            .collect()
    }

    /// The rows in whole groups of outputs of a layout.
    pub fn pack(&self, layout: Layout) -> Vec<u8> {
        let bits = |list: &[bf16]| list.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let (scales, minima) = (bits(&self.scales), bits(&self.minima));
        match layout {
            Layout::Panels => self.format.pack(&self.codes, &scales, &minima, self.k),
            Layout::Tiles => self
                .format
                .pack_strips(&self.codes, &scales, &minima, self.k),
        }
    }

    fn push_grid(&mut self, grid: Grid) {
        self.scales.push(grid.scale);
        if self.format.has_minimum() {
            self.minima.push(grid.minimum);
        }
    }
}

impl Grid {
    /// The grid of the least squared error among those tried.
    pub(crate) fn fit(group: &[f32], format: IntFormat) -> Grid {
        let (_, highest) = format.codes();
        let highest = f32::from(highest);
        let extreme = |start: f32, better: fn(f32, f32) -> f32| {
            group.iter().fold(start, |a, &b| better(a, b))
        };
        let (low, span) = match format.has_minimum() {
            true => {
                let low = extreme(f32::INFINITY, f32::min);
                (low, extreme(f32::NEG_INFINITY, f32::max) - low)
            }
            false => (0.0, extreme(0.0, |a, b| a.abs().max(b.abs()))),
        };
        // Kept where squares overflow.
        let mut best = (f32::INFINITY, Grid::of(span / highest, low));
        let mut attempt = |scale: f32, minimum: f32| {
            let grid = Grid::of(scale, minimum);
            let fit = Fit::new(group, grid, format);
            if fit.error < best.0 {
                best = (fit.error, grid);
            }
            fit
        };
        for share in SPANS {
            if !format.has_minimum() {
                let fit = attempt(share * span / highest, 0.0);
                attempt(fit.linear(), 0.0);
                continue;
            }
            for place in PLACES.into_iter().take(if share < 1.0 { 3 } else { 1 }) {
                let minimum = low + (1.0 - share) * span * place;
                let fit = attempt(share * span / highest, minimum);
                let (scale, minimum) = fit.affine(group.len());
                attempt(scale, minimum);
            }
        }
        best.1
    }

    /// The grid on which given codes are nearest to `scale * (code - zero)`: scale and minimum must be
    /// rounded to bf16, and the minimum makes up for what that changes in the scale.
    pub(crate) fn nearest(codes: &[i8], scale: f64, zero: f64, format: IntFormat) -> Grid {
        let (n, q, qq) = codes.iter().fold((0.0, 0.0, 0.0), |(n, q, qq), &code| {
            let code = f64::from(code);
            (n + 1.0, q + code, qq + code * code)
        });
        let rounded = bf16::from_f64(scale);
        let step = if rounded.to_f64() < scale { 1 } else { -1 };
        let other = bf16::from_bits(rounded.to_bits().saturating_add_signed(step));
        let grids = [rounded, other].map(|near| {
            // Each value is off by slope * code + offset.
            let slope = near.to_f64() - scale;
            let minimum = match format.has_minimum() {
                true => bf16::from_f64(-scale * zero - slope * q / n),
                false => bf16::ZERO,
            };
            let offset = minimum.to_f64() + scale * zero;
            let error = slope * slope * qq + 2.0 * slope * offset * q + n * offset * offset;
            let grid = Grid {
                scale: near,
                minimum,
            };
            (error, grid)
        });
        match grids[1].0 < grids[0].0 {
            true => grids[1].1,
            false => grids[0].1,
        }
    }

    /// A scale that would vanish is made the smallest there is, so that a group can be divided by it.
    fn of(scale: f32, minimum: f32) -> Grid {
        let scale = bf16::from_f32(scale);
        let smallest = bf16::MIN_POSITIVE;
        Grid {
            scale: if scale >= smallest { scale } else { smallest },
            minimum: bf16::from_f32(minimum),
        }
    }

    /// The code of the nearest value.
    pub(crate) fn code(self, value: f32, format: IntFormat) -> i8 {
        let (lowest, highest) = format.codes();
        let code = (value - self.minimum.to_f32()) / self.scale.to_f32();
        nearest(code.clamp(lowest.into(), highest.into())) as i8
    }

    /// What a code stands for.
    pub(crate) fn value(self, code: i8) -> f32 {
        self.scale.to_f32() * f32::from(code) + self.minimum.to_f32()
    }
}

/// The nearest integer of a value up to 2^22; ties go to even ones. As a sum it is vectorised, unlike
/// the function of the library.
#[inline(always)]
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// How a grid fits a group, and sums over the group's codes q for the least squares fit to them.
#[derive(Default)]
struct Fit {
    error: f32,
    q: f32,
    qq: f32,
    qx: f32,
    x: f32,
}

impl Fit {
    fn new(group: &[f32], grid: Grid, format: IntFormat) -> Fit {
        let (lowest, highest) = format.codes();
        fit(group, grid, f32::from(lowest), f32::from(highest))
    }

    /// The scale of the least squared error for these codes, without a minimum.
    fn linear(&self) -> f32 {
        if self.qq > 0.0 {
            self.qx / self.qq
        } else {
            0.0
        }
    }

    /// Scale and minimum of the least squared error for these codes.
    fn affine(&self, len: usize) -> (f32, f32) {
        let n = len as f32;
        let determinant = n * self.qq - self.q * self.q;
        if determinant <= 0.0 {
            return (0.0, self.x / n);
        }
        let scale = (n * self.qx - self.q * self.x) / determinant;
        (scale, (self.x - scale * self.q) / n)
    }
}

/// Values that are summed side by side.
const LANES: usize = 8;

/// The fit of codes from `lowest` to `highest`, in loops that are vectorised. Wider vectors change none of
/// its bits: sums are of eight lanes on every machine, and no product is fused with a sum.
#[multiversion::multiversion(targets("x86_64+avx2"))]
fn fit(group: &[f32], grid: Grid, lowest: f32, highest: f32) -> Fit {
    const BLOCK: usize = 64;
    const ONES: [f32; BLOCK] = [1.0; BLOCK];
    let (scale, minimum) = (grid.scale.to_f32(), grid.minimum.to_f32());
    let inverse = 1.0 / scale;
    let (mut codes, mut off) = ([0.0; BLOCK], [0.0; BLOCK]);
    let mut sums = [[0.0; LANES]; 5];
    for x in group.chunks(BLOCK) {
        let (codes, off) = (&mut codes[..x.len()], &mut off[..x.len()]);
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest(((x - minimum) * inverse).clamp(lowest, highest));
        }
        for ((off, code), x) in off.iter_mut().zip(&*codes).zip(x) {
            *off = scale * code + minimum - x;
        }
        let factors: [[&[f32]; 2]; 5] = [
            [off, off],
            [codes, &ONES],
            [codes, codes],
            [codes, x],
            [x, &ONES],
        ];
        for (sum, [a, b]) in sums.iter_mut().zip(factors) {
            *sum = add_products(*sum, a, b);
        }
    }
    let [error, q, qq, qx, x] = sums.map(|lanes| lanes.into_iter().fold(0.0, |a, b| a + b));
    Fit {
        error,
        q,
        qq,
        qx,
        x,
    }
}

/// Adds the product of each pair to the sum of its lane.
#[inline(always)]
fn add_products(mut sums: [f32; LANES], a: &[f32], b: &[f32]) -> [f32; LANES] {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_bundle::WeightFormat;

    const FORMATS: [&str; 5] = ["int8", "int8:g32", "int4:g32", "int4:g64", "int4:g128"];

    fn format(text: &str) -> IntFormat {
        let format: WeightFormat = text.parse().unwrap();
        format.int().unwrap()
    }

    /// Values of a bell curve, a few of them far out.
    fn weights(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..len)
            .map(|at| {
                let bell = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
                if at % 97 == 5 { 4.0 * bell } else { bell }
            })
            .collect()
    }

    /// Squared error of the plainest rounding: each group between its extremes, in f64.
    fn plain_error(rows: &[f32], k: usize, format: IntFormat) -> f64 {
        let (lowest, highest) = format.codes();
        let mut error = 0.0;
        for group in rows.chunks(k).flat_map(|row| row.chunks(format.group(k))) {
            let low = group.iter().fold(f64::MAX, |a, &b| a.min(f64::from(b)));
            let high = group.iter().fold(f64::MIN, |a, &b| a.max(f64::from(b)));
            let (scale, minimum) = match format.has_minimum() {
                true => ((high - low) / f64::from(highest), low),
                false => (high.max(-low) / f64::from(highest), 0.0),
            };
            for &value in group {
                let value = f64::from(value);
                let code = ((value - minimum) / scale).round();
                let code = code.clamp(f64::from(lowest), f64::from(highest));
                error += (scale * code + minimum - value).powi(2);
            }
        }
        error
    }

    fn error(rows: &[f32], values: &[f32]) -> f64 {
        assert_eq!(rows.len(), values.len());
        let squares = rows.iter().zip(values);
        squares
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum()
    }

    #[test]
    fn rounding_is_better_than_between_the_extremes() {
        let k = 300;
        let rows = weights(64 * k, 3);
        for (text, share) in FORMATS.into_iter().zip([1.01, 1.03, 0.90, 0.85, 0.85]) {
            let format = format(text);
            let values = IntRows::round(&rows, k, format).values();
            let (found, plain) = (error(&rows, &values), plain_error(&rows, k, format));
            assert!(found < share * plain, "{text}: {found} for {plain}");
        }
    }

    #[test]
    fn no_value_is_off_by_more_than_its_step_and_what_is_clipped() {
        let k = 130;
        let rows = weights(32 * k, 9);
        for text in FORMATS {
            let format = format(text);
            let values = IntRows::round(&rows, k, format).values();
            let group = format.group(k);
            let groups = rows.chunks(k).zip(values.chunks(k));
            for (exact, values) in groups.flat_map(|(a, b)| a.chunks(group).zip(b.chunks(group))) {
                let largest = exact.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                // A span is narrowed by a quarter at most, and then fitted.
                let steps = if format.has_minimum() {
                    0.6 * largest
                } else {
                    0.3 * largest
                };
                for (a, b) in exact.iter().zip(values) {
                    assert!((a - b).abs() <= steps, "{text}: {b} for {a}");
                }
            }
        }
    }

    #[test]
    fn extraordinary_groups_stay_finite() {
        let mut outlier = vec![1e-3; 64];
        outlier[7] = -50.0;
        let groups = [
            vec![0.0; 64],
            vec![-0.25; 64],
            vec![1e-30; 64],
            vec![1e25; 64],
            outlier,
        ];
        for text in FORMATS {
            for rows in &groups {
                let values = IntRows::round(rows, 64, format(text)).values();
                let largest = rows.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (found, exact) in values.iter().zip(rows) {
                    let off = (found - exact).abs();
                    assert!(
                        off <= 0.02 * largest,
                        "{text}: {found} for {exact} of {largest}"
                    );
                }
            }
        }
        let huge = [f32::MAX, -f32::MAX].repeat(32);
        for text in FORMATS {
            let values = IntRows::round(&huge, 64, format(text)).values();
            assert_eq!(values.len(), huge.len());
        }
    }

    #[test]
    fn parts_of_rows_are_rounded_alike() {
        let k = 96;
        let rows = weights(10 * k, 4);
        for text in FORMATS {
            let whole = IntRows::round(&rows, k, format(text));
            let mut parts = IntRows::empty(format(text), k);
            for part in rows.chunks(3 * k) {
                parts.append(IntRows::round(part, k, format(text)));
            }
            assert_eq!(parts, whole);
            assert_eq!(whole.rows(2..5).values(), whole.values()[2 * k..5 * k]);
        }
    }
}
