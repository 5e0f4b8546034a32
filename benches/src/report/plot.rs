//! Figures with two axes, laid out in the units of an SVG of [`WIDTH`] by [`HEIGHT`], which is as wide as
//! a phone, so that text keeps its size there.

use std::fmt::Write;

/// Of the whole figure.
pub const WIDTH: f64 = 340.0;
/// Of the whole figure.
pub const HEIGHT: f64 = 260.0;
/// Around the plot; room for the numbers of the axes.
const LEFT: f64 = 44.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 40.0;
/// Least distance of the numbers of the horizontal axis.
const TICK_SPACE: f64 = 32.0;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// By themselves.
    Linear,
    /// By their logarithm.
    Log,
}

/// One of the two axes.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    /// Of `low` and `high`.
    from: f64,
    to: f64,
}

impl Axis {
    /// The horizontal axis, for values of a range; a linear one begins at 0, a logarithmic one at a power
    /// of ten.
    pub fn horizontal(scale: Scale, values: impl IntoIterator<Item = f64>) -> Axis {
        Axis::new(scale, values, LEFT, WIDTH - RIGHT)
    }

    /// The vertical axis, upwards.
    pub fn vertical(scale: Scale, values: impl IntoIterator<Item = f64>) -> Axis {
        Axis::new(scale, values, HEIGHT - BOTTOM, TOP)
    }

    fn new(scale: Scale, values: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Axis {
        let values = values.into_iter().filter(|value| value.is_finite());
        let (low, high) = match scale {
            Scale::Linear => {
                let high = values.fold(0.0, f64::max);
                (0.0, if high > 0.0 { high * 1.06 } else { 1.0 })
            }
            Scale::Log => {
                let (low, high) = values
                    .filter(|&value| value > 0.0)
                    .fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), value| {
                        (low.min(value), high.max(value))
                    });
                match low <= high {
                    true => (decade(low * 0.8).floor(), decade(high * 1.25).ceil()),
                    false => (0.0, 1.0),
                }
            }
        };
        let (low, high) = match scale {
            Scale::Linear => (low, high),
            Scale::Log => (10f64.powf(low), 10f64.powf(high)),
        };
        Axis {
            scale,
            low,
            high,
            from,
            to,
        }
    }

    /// The least value.
    pub fn low(&self) -> f64 {
        self.low
    }

    /// The greatest value.
    pub fn high(&self) -> f64 {
        self.high
    }

    /// Where a value lies.
    pub fn at(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<Tick> {
        let values: Vec<f64> = match self.scale {
            Scale::Linear => {
                let step = round_step(self.high / 5.0);
                let steps = (self.high / step) as usize;
                (0..=steps).map(|i| i as f64 * step).collect()
            }
            Scale::Log => {
                let (low, high) = (decade(self.low).round() as i32, decade(self.high).round());
                // Some are left out of a wide range.
                let step = ((high as i32 - low) as usize).div_ceil(7).max(1);
                let decades = (low..=high as i32).step_by(step);
                decades.map(|power| 10f64.powi(power)).collect()
            }
        };
        values.into_iter().map(|value| self.tick(value)).collect()
    }

    fn tick(&self, value: f64) -> Tick {
        Tick {
            at: self.at(value),
            label: short(value),
        }
    }
}

fn decade(value: f64) -> f64 {
    value.log10()
}

/// 1, 2 or 5 times a power of ten, at least as great.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power);
    steps
        .into_iter()
        .find(|&step| step >= least)
        .unwrap_or(least)
}

/// A number of an axis: `0.1`, `20`, `1.5k`, `2M`.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e4 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let text = format!("{value:.4}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A number at an axis.
pub struct Tick {
    /// In the direction of its axis.
    pub at: f64,
    /// The number.
    pub label: String,
}

/// A point.
pub struct Mark {
    /// Its place.
    pub x: f64,
    /// Its place.
    pub y: f64,
    /// Class of its colour.
    pub class: String,
    /// A square stands for prefill, a circle for decode.
    pub square: bool,
    /// What it is.
    pub title: String,
    /// What it leads to.
    pub href: String,
}

/// A line.
pub struct Line {
    /// `x,y x,y`.
    pub points: String,
    /// Class of its look.
    pub class: &'static str,
}

/// A figure.
pub struct Plot {
    /// What it shows.
    pub title: String,
    /// What goes to the right.
    pub x_label: String,
    /// What goes up.
    pub y_label: String,
    /// Numbers below.
    pub x_ticks: Vec<Tick>,
    /// Numbers at the left.
    pub y_ticks: Vec<Tick>,
    /// From the back to the front.
    pub lines: Vec<Line>,
    /// Above the lines.
    pub marks: Vec<Mark>,
    x: Axis,
    y: Axis,
}

impl Plot {
    /// An empty figure.
    pub fn new(title: &str, x: (&str, Axis), y: (&str, Axis)) -> Plot {
        Plot {
            title: title.to_owned(),
            x_label: x.0.to_owned(),
            y_label: y.0.to_owned(),
            x_ticks: x.1.ticks(),
            y_ticks: y.1.ticks(),
            lines: vec![],
            marks: vec![],
            x: x.1,
            y: y.1,
        }
    }

    /// Numbers at these values of the horizontal axis, as far as they have room, and no others.
    pub fn set_x_ticks(&mut self, values: impl IntoIterator<Item = f64>) {
        self.x_ticks.clear();
        for tick in values.into_iter().map(|value| self.x.tick(value)) {
            let room = |last: &Tick| tick.at - last.at >= TICK_SPACE;
            if self.x_ticks.last().is_none_or(room) {
                self.x_ticks.push(tick);
            }
        }
    }

    /// Adds a line through points.
    pub fn line(&mut self, class: &'static str, points: impl IntoIterator<Item = (f64, f64)>) {
        let mut text = String::new();
        for (x, y) in points {
            let _ = write!(text, "{:.1},{:.1} ", self.x.at(x), self.y.at(y));
        }
        self.lines.push(Line {
            points: text,
            class,
        });
    }

    /// Adds a point.
    pub fn mark(
        &mut self,
        (x, y): (f64, f64),
        class: String,
        square: bool,
        title: String,
        href: String,
    ) {
        self.marks.push(Mark {
            x: self.x.at(x),
            y: self.y.at(y),
            class,
            square,
            title,
            href,
        });
    }

    /// Where the plot itself is: left, top, right, bottom.
    pub fn frame(&self) -> [f64; 4] {
        [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM]
    }
}

/// A straight line through points.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// Rise for each unit to the right.
    pub slope: f64,
    /// At 0.
    pub intercept: f64,
    /// Share of the variance that it explains.
    pub r_squared: f64,
}

impl Fit {
    /// By least squares; none for fewer than three different places, of which every two lie on a line.
    pub fn of(points: &[(f64, f64)]) -> Option<Fit> {
        let mut places: Vec<f64> = points.iter().map(|point| point.0).collect();
        places.sort_unstable_by(f64::total_cmp);
        places.dedup();
        if places.len() < 3 {
            return None;
        }
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            points
                .iter()
                .map(|point| of(point.0 - x, point.1 - y))
                .sum()
        };
        let (xx, xy, yy) = (sum(&|x, _| x * x), sum(&|x, y| x * y), sum(&|_, y| y * y));
        let slope = xy / xx;
        Some(Fit {
            slope,
            intercept: y - slope * x,
            r_squared: if yy > 0.0 { xy * xy / (xx * yy) } else { 1.0 },
        })
    }

    /// Its height at a place.
    pub fn at(&self, x: f64) -> f64 {
        self.intercept + self.slope * x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: &[Tick]) -> Vec<&str> {
        ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn axes_have_round_numbers() {
        let axis = Axis::horizontal(Scale::Linear, [16.0, 2048.0]);
        assert_eq!(labels(&axis.ticks()), ["0", "500", "1000", "1500", "2000"]);
        let axis = Axis::vertical(Scale::Log, [0.3, 989_000.0]);
        let every_other = ["0.1", "10", "1000", "100k", "10M"];
        assert_eq!(labels(&axis.ticks()), every_other);
        let axis = Axis::horizontal(Scale::Log, [0.3, 130.0]);
        assert_eq!(labels(&axis.ticks()), ["0.1", "1", "10", "100", "1000"]);
        assert_eq!((axis.at(0.1), axis.at(1000.0)), (LEFT, WIDTH - RIGHT));
    }

    #[test]
    fn numbers_have_room() {
        let x = Axis::horizontal(Scale::Linear, [64.0]);
        let mut plot = Plot::new("", ("", x), ("", x));
        plot.set_x_ticks([1.0, 2.0, 4.0, 32.0, 64.0]);
        assert_eq!(labels(&plot.x_ticks), ["1", "32", "64"]);
    }

    #[test]
    fn a_line_is_fitted() {
        let fit = Fit::of(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]).unwrap();
        assert_eq!((fit.slope, fit.intercept, fit.r_squared), (2.0, 1.0, 1.0));
        let fit = Fit::of(&[(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)]).unwrap();
        assert_eq!((fit.slope, fit.intercept, fit.r_squared), (0.0, 1.0, 0.0));
        assert!(Fit::of(&[(0.0, 1.0), (1.0, 3.0), (1.0, 5.0)]).is_none());
    }
}
