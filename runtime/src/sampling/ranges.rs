//! Which values parameters may have: one table for the library and the command line.

/// The values that a number may have.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// In words, behind "it must be".
    pub needed: &'static str,
    holds: fn(f32) -> bool,
}

impl Range {
    /// Whether `value` is one of them.
    pub fn contains(&self, value: f32) -> bool {
        (self.holds)(value)
    }
}

/// [`super::SamplingParams::temperature`], and
/// [`BeamParams::diversity_penalty`](crate::BeamParams::diversity_penalty).
pub const NOT_NEGATIVE: Range = Range {
    needed: "a number from 0 up",
    holds: |value| value >= 0.0 && value.is_finite(),
};

/// [`super::SamplingParams::top_p`] and [`super::SamplingParams::typical_p`].
pub const TOP_P: Range = Range {
    needed: "above 0 and at most 1",
    holds: |value| value > 0.0 && value <= 1.0,
};

/// [`super::SamplingParams::min_p`].
pub const MIN_P: Range = Range {
    needed: "from 0 to 1",
    holds: |value| (0.0..=1.0).contains(&value),
};

/// [`super::SamplingParams::epsilon_cutoff`] and [`super::SamplingParams::eta_cutoff`].
pub const CUTOFF: Range = Range {
    needed: "from 0 up and below 1",
    holds: |value| (0.0..1.0).contains(&value),
};

/// [`super::Processors::repetition_penalty`], and the factor of
/// [`super::Processors::exponential_decay_length_penalty`].
pub const FACTOR: Range = Range {
    needed: "a number above 0",
    holds: |value| value > 0.0 && value.is_finite(),
};

/// [`super::Processors::presence_penalty`] and [`super::Processors::frequency_penalty`].
pub const PENALTY: Range = Range {
    needed: "from -2 to 2",
    holds: |value| (-2.0..=2.0).contains(&value),
};

/// [`BeamParams::length_penalty`](crate::BeamParams::length_penalty): no power of a length overflows.
pub const EXPONENT: Range = Range {
    needed: "from -8 to 8",
    holds: |value| (-8.0..=8.0).contains(&value),
};

/// [`super::SequenceBias::bias`].
pub const FINITE: Range = Range {
    needed: "a finite number",
    holds: f32::is_finite,
};
