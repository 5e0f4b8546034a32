//! Two tables of one machine, row by row: what became slower, beyond noise.
//!
//! A row and its like of the other table are compared by the ratio of their medians. How sure that ratio
//! is, resampling tells (the bootstrap of B. Efron, "Bootstrap Methods: Another Look at the Jackknife",
//! 1979): samples are drawn again and again from those that were measured, and the middle 95% of the
//! ratios of their medians are the interval. A row is slower when all of its interval lies above the
//! threshold, so that noise, which widens the interval, does not fail a comparison.

use crate::table::{ModelTable, Source, StepTable, Table, Times};
use fastrand::Rng;
use serde::Serialize;
use std::{collections::BTreeMap, fmt};

/// Fewest samples of a measured time that are compared.
const MIN_SAMPLES: usize = 8;
/// Ratios that are resampled for an interval.
const RESAMPLES: usize = 1000;
/// Part of the ratios outside the interval, at each end.
const TAIL: f64 = 0.025;
/// Two comparisons of the same tables say the same.
const SEED: u64 = 6;

/// How tables are compared.
#[derive(Clone, Copy, Debug)]
pub struct CompareOptions {
    /// By which share a time may grow: 0.05 is 5%.
    pub threshold: f64,
    /// Whether times of different machines may be compared.
    pub across_machines: bool,
}

/// What a table says of another.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// By which share a time may grow.
    pub threshold: f64,
    /// Steps and rows of both, in the order of the new table.
    pub changes: Vec<Change>,
    /// Only in the old table.
    pub gone: Vec<Key>,
    /// Only in the new table.
    pub new: Vec<Key>,
}

impl Comparison {
    /// Whether there is anything slower.
    pub fn is_slower(&self) -> bool {
        self.count(Verdict::Slower) > 0
    }

    /// How many have become so.
    pub fn count(&self, verdict: Verdict) -> usize {
        let alike = self.changes.iter().filter(|c| c.verdict == verdict);
        alike.count()
    }
}

/// A step or a row in both tables.
#[derive(Debug, Serialize)]
pub struct Change {
    /// Which.
    #[serde(flatten)]
    pub key: Key,
    /// Median of the old table.
    pub old_us: f64,
    /// Median of the new table.
    pub new_us: f64,
    /// How they differ.
    pub ratio: Ratio,
    /// What that means.
    pub verdict: Verdict,
}

/// New over old, with the interval that holds it with a probability of 95%.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the medians.
    pub median: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// What a ratio means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// By more than the threshold, for all of the interval.
    Slower,
    /// The same the other way round.
    Faster,
    /// Not by more, or not surely.
    Same,
}

/// What makes two steps or rows the same thing, whenever they are measured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Key {
    model: String,
    target: String,
    weights: String,
    dtype: String,
    executable: String,
    sequences: usize,
    tokens: usize,
    kv_len: usize,
    logit_rows: usize,
    /// None: the whole step.
    row: Option<RowKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct RowKey {
    spec: String,
    shapes: String,
    format: String,
}

impl Key {
    /// The bundle that it is of: `opt-125m cpu int8`.
    pub fn bundle(&self) -> String {
        format!("{} {} {}", self.model, self.target, self.weights)
    }

    /// The step that it is of.
    pub fn step(&self) -> String {
        let (sequences, tokens, kv_len) = (self.sequences, self.tokens, self.kv_len);
        let executable = &self.executable;
        format!("{executable} (B {sequences}, T {tokens}, KV {kv_len})")
    }

    /// What it is in its step.
    pub fn part(&self) -> String {
        match &self.row {
            None => "whole step".to_owned(),
            Some(row) => format!("{}, {}, {}", row.spec, row.shapes, row.format),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.bundle(), self.step(), self.part())
    }
}

/// Why two tables are not compared: the caller's mistake.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum CompareError {
    /// Times of different machines, or of another profile of Cargo's, say nothing of the program.
    #[error(
        "the tables are of different machines or builds: the old one of {old}, the new one of {new}; \
         measure both alike, or allow it with --across-machines"
    )]
    Machines {
        /// Of the old table.
        old: String,
        /// Of the new table.
        new: String,
    },
    /// A prediction is no measurement.
    #[error("{bundle} is {} in one table and {} in the other", name(*old), name(*new))]
    Sources {
        /// The bundle.
        bundle: String,
        /// How times of the old table came about.
        old: Source,
        /// And those of the new table.
        new: Source,
    },
    /// Which of them to compare with is not known.
    #[error("the {table} table has two rows of {key}")]
    Twice {
        /// `old` or `new`.
        table: &'static str,
        /// What there are two of.
        key: String,
    },
    /// Of few samples, an interval means nothing.
    #[error(
        "{key} has {found} samples; needed are {MIN_SAMPLES} at least: measure with a greater --repeat"
    )]
    FewSamples {
        /// What.
        key: String,
        /// Samples of it in one of the tables.
        found: usize,
    },
    /// A comparison of nothing would pass.
    #[error("the tables have no step in common: the old one has {old}, the new one {new}")]
    NothingInCommon {
        /// Bundles of the old table.
        old: String,
        /// Bundles of the new table.
        new: String,
    },
}

const fn name(source: Source) -> &'static str {
    match source {
        Source::Measured => "measured",
        Source::Predicted => "predicted",
    }
}

/// Compares what both tables have.
///
/// # Errors
/// Tables that cannot be compared, with the reason.
pub fn compare(
    old: &Table,
    new: &Table,
    options: CompareOptions,
) -> Result<Comparison, CompareError> {
    let machines = [old, new].map(|table| {
        let machine = &table.machine;
        let threads = machine.threads.map(|n| format!(" with {n} threads"));
        let profile = Some(&machine.profile).filter(|profile| !profile.is_empty());
        let profile = profile.map(|profile| format!(", a {profile} build"));
        let (threads, profile) = (threads.unwrap_or_default(), profile.unwrap_or_default());
        format!("{:?}{threads}{profile}", machine.device)
    });
    if machines[0] != machines[1] && !options.across_machines {
        let [old, new] = machines;
        return Err(CompareError::Machines { old, new });
    }
    let old_entries = entries(old);
    let new_entries = entries(new);
    let mut unmatched = index("old", &old_entries)?;
    index("new", &new_entries)?;

    let mut changes = Vec::new();
    let mut only_new = Vec::new();
    for entry in &new_entries {
        let Some(like) = unmatched.remove(&entry.key) else {
            only_new.push(entry.key.clone());
            continue;
        };
        if like.source != entry.source {
            return Err(CompareError::Sources {
                bundle: entry.key.bundle(),
                old: like.source,
                new: entry.source,
            });
        }
        if entry.source == Source::Measured {
            let samples = [like, entry].map(|entry| entry.time.samples_us.len());
            let found = samples[0].min(samples[1]);
            if found < MIN_SAMPLES {
                let key = entry.key.to_string();
                return Err(CompareError::FewSamples { key, found });
            }
        }
        let ratio = ratio(like.time, entry.time);
        changes.push(Change {
            key: entry.key.clone(),
            old_us: like.time.median_us,
            new_us: entry.time.median_us,
            ratio,
            verdict: verdict(ratio, options.threshold),
        });
    }
    if changes.is_empty() {
        let [old, new] = [old, new].map(bundles);
        return Err(CompareError::NothingInCommon { old, new });
    }
    Ok(Comparison {
        threshold: options.threshold,
        changes,
        gone: unmatched.into_keys().cloned().collect(),
        new: only_new,
    })
}

/// A step or a row with its time.
struct Entry<'a> {
    key: Key,
    source: Source,
    time: &'a Times,
}

/// Steps with their rows behind them, as the table has them.
fn entries(table: &Table) -> Vec<Entry<'_>> {
    let mut entries = Vec::new();
    for model in &table.models {
        for step in &model.steps {
            let key = step_key(model, step);
            let source = model.source;
            entries.push(Entry {
                key: key.clone(),
                source,
                time: &step.time,
            });
            entries.extend(step.rows.iter().map(|row| Entry {
                key: Key {
                    row: Some(RowKey {
                        spec: row.spec.clone(),
                        shapes: row.shapes.clone(),
                        format: row.format.clone(),
                    }),
                    ..key.clone()
                },
                source,
                time: &row.time,
            }));
        }
    }
    entries
}

fn step_key(model: &ModelTable, step: &StepTable) -> Key {
    Key {
        model: model.model.clone(),
        target: model.target.clone(),
        weights: model.formats(),
        dtype: model.dtype.to_string(),
        executable: step.executable.clone(),
        sequences: step.sequences,
        tokens: step.tokens,
        kv_len: step.kv_len,
        logit_rows: step.logit_rows,
        row: None,
    }
}

fn index<'a>(
    table: &'static str,
    entries: &'a [Entry<'a>],
) -> Result<BTreeMap<&'a Key, &'a Entry<'a>>, CompareError> {
    let mut index = BTreeMap::new();
    for entry in entries {
        if index.insert(&entry.key, entry).is_some() {
            let key = entry.key.to_string();
            return Err(CompareError::Twice { table, key });
        }
    }
    Ok(index)
}

fn bundles(table: &Table) -> String {
    let names = table.models.iter().map(|m| {
        let (model, target, weights) = (&m.model, &m.target, m.formats());
        format!("{model} {target} {weights}")
    });
    let names: Vec<String> = names.collect();
    match names.is_empty() {
        true => "nothing".to_owned(),
        false => names.join(", "),
    }
}

/// New over old. Where samples lack there is no interval but the ratio itself.
fn ratio(old: &Times, new: &Times) -> Ratio {
    let median = over(new.median_us, old.median_us);
    if old.samples_us.is_empty() || new.samples_us.is_empty() {
        return Ratio {
            median,
            low: median,
            high: median,
        };
    }
    let mut rng = Rng::with_seed(SEED);
    let mut buffer = Vec::new();
    let mut ratios: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let new = resampled_median(&new.samples_us, &mut buffer, &mut rng);
            over(
                new,
                resampled_median(&old.samples_us, &mut buffer, &mut rng),
            )
        })
        .collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let tail = (RESAMPLES as f64 * TAIL) as usize;
    Ratio {
        median,
        low: ratios[tail],
        high: ratios[RESAMPLES - 1 - tail],
    }
}

/// A kernel may be faster than the clock can tell.
fn over(new: f64, old: f64) -> f64 {
    if new == old { 1.0 } else { new / old }
}

fn resampled_median(samples: &[f64], buffer: &mut Vec<f64>, rng: &mut Rng) -> f64 {
    buffer.clear();
    buffer.extend(samples.iter().map(|_| samples[rng.usize(..samples.len())]));
    let middle = buffer.len() / 2;
    let (below, upper, _) = buffer.select_nth_unstable_by(middle, f64::total_cmp);
    match samples.len() % 2 {
        0 => (below.iter().copied().fold(0.0, f64::max) + *upper) / 2.0,
        _ => *upper,
    }
}

fn verdict(ratio: Ratio, threshold: f64) -> Verdict {
    if ratio.low > 1.0 + threshold {
        Verdict::Slower
    } else if ratio.high < 1.0 / (1.0 + threshold) {
        Verdict::Faster
    } else {
        Verdict::Same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const OPTIONS: CompareOptions = CompareOptions {
        threshold: 0.05,
        across_machines: false,
    };

    /// The part of the steps whose name is this in both.
    fn slower(comparison: &Comparison) -> Vec<String> {
        let slower = comparison
            .changes
            .iter()
            .filter(|c| c.verdict == Verdict::Slower);
        slower.map(|c| c.key.to_string()).collect()
    }

    #[test]
    fn a_planted_slowdown_of_one_row_is_found() {
        let old = testing::table(1);
        let mut new = testing::table(2);
        testing::slow_down(&mut new.models[0].steps[0].rows[2].time, 1.12);
        let comparison = compare(&old, &new, OPTIONS).unwrap();
        assert_eq!(
            slower(&comparison),
            [
                "opt-125m cpu int8 decode-b1-kv2048 (B 1, T 1, KV 16): attention 12 x 64, \
              (1, 768) x KV 16, bf16"
            ]
        );
        let back = compare(&new, &old, OPTIONS).unwrap();
        assert!(!back.is_slower());
        assert_eq!(back.count(Verdict::Faster), 1);
    }

    #[test]
    fn a_slower_step_is_found() {
        let old = testing::table(1);
        let mut new = testing::table(2);
        testing::slow_down(&mut new.models[0].steps[1].time, 1.12);
        let found = slower(&compare(&old, &new, OPTIONS).unwrap());
        assert!(
            found.len() == 1 && found[0].ends_with("whole step"),
            "{found:?}"
        );
    }

    #[test]
    fn noise_is_no_slowdown() {
        let old = testing::table(1);
        for seed in 2..30 {
            let comparison = compare(&old, &testing::table(seed), OPTIONS).unwrap();
            assert_eq!(slower(&comparison), [""; 0], "noise {seed}");
        }
    }

    #[test]
    fn wide_noise_hides_a_slowdown_and_narrow_noise_shows_it() {
        let times = |noise: f64, factor: f64| {
            let sample = |i: usize| factor * (100.0 + noise * ((i * 7) % 20) as f64);
            Times::of((0..20).map(sample).collect())
        };
        let judge = |noise| verdict(ratio(&times(noise, 1.0), &times(noise, 1.1)), 0.05);
        assert_eq!(judge(0.1), Verdict::Slower);
        assert_eq!(judge(10.0), Verdict::Same);
    }

    #[test]
    fn predictions_are_compared_by_their_ratio() {
        let [old, new] = [10.0, 10.6].map(Times::predicted);
        let found = ratio(&old, &new);
        assert_eq!((found.low, found.high), (1.06, 1.06));
        assert_eq!(verdict(found, 0.05), Verdict::Slower);
        assert_eq!(verdict(found, 0.07), Verdict::Same);
        assert_eq!(
            ratio(&Times::predicted(0.0), &Times::predicted(0.0)).low,
            1.0
        );
    }

    #[test]
    fn what_one_table_has_alone_is_listed() {
        let mut old = testing::table(1);
        let mut new = testing::table(2);
        old.models[0].steps[0].rows.remove(0);
        new.models[0].steps.remove(1);
        let comparison = compare(&old, &new, OPTIONS).unwrap();
        assert_eq!(comparison.new.len(), 1);
        assert_eq!(comparison.gone.len(), 1 + old.models[0].steps[1].rows.len());
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let old = testing::table(1);
        let refused = |change: fn(&mut Table)| {
            let mut new = testing::table(1);
            change(&mut new);
            compare(&old, &new, OPTIONS).unwrap_err().to_string()
        };
        for (change, expected) in [
            (
                (|t: &mut Table| t.machine.device = "other".into()) as fn(&mut Table),
                "different machines",
            ),
            (|t| t.machine.threads = Some(7), "7 threads"),
            (
                |t| t.models[0].source = Source::Predicted,
                "opt-125m cpu int8 is measured in one table and predicted in the other",
            ),
            (
                |t| t.models.push(t.models[0].clone()),
                "the new table has two rows of opt-125m",
            ),
            (|t| t.models.clear(), "no step in common"),
        ] {
            let message = refused(change);
            assert!(message.contains(expected), "{message}");
        }
        let mut elsewhere = testing::table(1);
        elsewhere.machine.device = "other".into();
        let across_machines = CompareOptions {
            across_machines: true,
            ..OPTIONS
        };
        assert!(compare(&old, &elsewhere, across_machines).is_ok());
    }
}
