//! Rounds rows of matrices to integers with a scale (int8), or a scale and a minimum (int4), for each
//! group of inputs.
//!
//! The scale that spans all values of a group is not the one of the least error: the extremes are few,
//! and giving them up makes the steps of all others smaller. So some narrower spans are tried, each
//! followed by the least squares fit to the codes that it gives, and the one with the smallest squared
//! error is kept. Scales and minima are rounded to bf16 first, so that the codes fit what is stored.

use half::bf16;
use kiln_bundle::IntFormat;

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

    /// Rounds rows, (rows, K), each value to the nearest of its group's grid.
    pub fn round(rows: &[f32], k: usize, format: IntFormat) -> IntRows {
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

    /// The rows in panels.
    pub fn pack(&self) -> Vec<u8> {
        let bits = |list: &[bf16]| list.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let (scales, minima) = (bits(&self.scales), bits(&self.minima));
        self.format.pack(&self.codes, &scales, &minima, self.k)
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
        let mut best = (f32::INFINITY, Grid::of(0.0, 0.0));
        let mut attempt = |scale: f32, minimum: f32| {
            let grid = Grid::of(scale, minimum);
            let fit = Fit::new(group, grid, format);
            if fit.error < best.0 {
                best = (fit.error, grid);
            }
            fit
        };
        let extreme = |start: f32, better: fn(f32, f32) -> f32| {
            group.iter().fold(start, |a, &b| better(a, b))
        };
        if format.has_minimum() {
            let low = extreme(f32::INFINITY, f32::min);
            let span = extreme(f32::NEG_INFINITY, f32::max) - low;
            let (_, highest) = format.codes();
            for share in SPANS {
                for place in PLACES.into_iter().take(if share < 1.0 { 3 } else { 1 }) {
                    let minimum = low + (1.0 - share) * span * place;
                    let fit = attempt(share * span / f32::from(highest), minimum);
                    let (scale, minimum) = fit.affine(group.len());
                    attempt(scale, minimum);
                }
            }
        } else {
            let (_, highest) = format.codes();
            let largest = extreme(0.0, |a, b| a.abs().max(b.abs()));
            for share in SPANS {
                let fit = attempt(share * largest / f32::from(highest), 0.0);
                attempt(fit.linear(), 0.0);
            }
        }
        best.1
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
        const LANES: usize = 8;
        let (lowest, highest) = format.codes();
        let (lowest, highest) = (f32::from(lowest), f32::from(highest));
        let (scale, minimum) = (grid.scale.to_f32(), grid.minimum.to_f32());
        let inverse = 1.0 / scale;
        let mut sums = [[0.0; LANES]; 5];
        let mut add = |lane: usize, x: f32| {
            let q = nearest(((x - minimum) * inverse).clamp(lowest, highest));
            let difference = scale * q + minimum - x;
            sums[0][lane] += difference * difference;
            sums[1][lane] += q;
            sums[2][lane] += q * q;
            sums[3][lane] += q * x;
            sums[4][lane] += x;
        };
        let chunks = group.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, &x) in chunk.iter().enumerate() {
                add(lane, x);
            }
        }
        for (lane, &x) in rest.iter().enumerate() {
            add(lane, x);
        }
        let [error, q, qq, qx, x] = sums.map(|lanes| lanes.iter().sum());
        Fit {
            error,
            q,
            qq,
            qx,
            x,
        }
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
