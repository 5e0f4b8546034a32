//! The table: its rows, steps and ceilings, as they are written to a file and read again.
//!
//! Times are in microseconds, sizes in bytes, rates in GB/s (10^9 bytes a second) and GFLOP/s.

pub(crate) mod cublaslt;
mod error;
pub(crate) mod kinds;
pub(crate) mod measure;
pub(crate) mod predicted;
pub(crate) mod references;
pub(crate) mod steps;
pub(crate) mod text;

pub use error::TableError;

use kiln_bundle::{Activations, DType, Phase, WeightFormat};
use kinds::Arithmetic;
use serde::{Deserialize, Serialize};
use std::{fs::File, io, io::Read, path::Path};

/// Version of the file; a reader refuses any other.
pub const TABLE_VERSION: u32 = 1;
/// The target of a processor.
pub(crate) const CPU: &str = "cpu";
/// Most bytes of a file that is read.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Most samples of one thing.
pub(crate) const MAX_SAMPLES: usize = 10_000;

/// Figures of one run on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// [`TABLE_VERSION`] of the writer.
    pub version: u32,
    /// Of kiln, as it prints it.
    pub kiln_version: String,
    /// Commit of kiln, where it was told.
    pub commit: Option<String>,
    /// When it was made, RFC 3339.
    pub made: String,
    /// What it was made on.
    pub machine: Machine,
    /// One for each bundle and target.
    pub models: Vec<ModelTable>,
}

impl Table {
    /// Reads a table that `kiln-perf table` has written.
    ///
    /// # Errors
    /// A file that cannot be read, is none of this version, or holds figures that no run has.
    pub fn read(path: &Path) -> Result<Table, ReadError> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
            .and_then(|bytes| match bytes as u64 > MAX_FILE_BYTES {
                true => Err(io::ErrorKind::FileTooLarge.into()),
                false => Ok(()),
            })
            .map_err(|source| ReadError::Read {
                path: path.display().to_string(),
                source,
            })?;
        Table::parse(&text).map_err(|problem| ReadError::Malformed {
            path: path.display().to_string(),
            problem,
        })
    }

    /// The file of it.
    ///
    /// # Errors
    /// What [`Table::read`] would refuse.
    pub fn to_json(&self) -> Result<String, String> {
        self.check()?;
        let json = serde_json::to_string_pretty(self).map_err(|e| e.to_string())?;
        match json.len() as u64 > MAX_FILE_BYTES {
            true => Err(format!(
                "the table has {} bytes, and {MAX_FILE_BYTES} are read at most; give a smaller --repeat",
                json.len()
            )),
            false => Ok(json),
        }
    }

    fn parse(text: &str) -> Result<Table, String> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
            kiln_version: String,
        }
        let not_json = |e: serde_json::Error| format!("it is no table of kiln-perf: {e}");
        let head: Head = serde_json::from_str(text).map_err(not_json)?;
        if head.version != TABLE_VERSION {
            return Err(format!(
                "kiln {} wrote it as version {}, this kiln-perf reads version {TABLE_VERSION}; \
                 make it again with `kiln-perf table`",
                head.kiln_version, head.version
            ));
        }
        let table: Table = serde_json::from_str(text).map_err(not_json)?;
        table.check()?;
        Ok(table)
    }

    /// Whether its figures can be computed with.
    fn check(&self) -> Result<(), String> {
        let ceilings = &self.machine.ceilings;
        let peaks = ceilings.peaks().map(|(_, rate)| rate);
        if peaks
            .chain([ceilings.read_gb_per_s])
            .any(|rate| !is_positive(rate))
        {
            return Err("a ceiling of the machine is not above 0".to_owned());
        }
        for model in &self.models {
            for step in &model.steps {
                let place = format!("{} {}, {}", model.model, model.target, step.executable);
                step.check().map_err(|e| format!("{place}: {e}"))?;
            }
        }
        Ok(())
    }
}

/// Why a table is not read: a mistake in the file, or in its name.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not there, not text, or more than 64 MiB.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// Not of this version, or its figures are none.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Of a size that a plot can show.
fn is_positive(value: f64) -> bool {
    (1e-9..=1e18).contains(&value)
}

fn is_amount(value: f64) -> bool {
    value == 0.0 || is_positive(value)
}

/// Where figures come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The device that ran the kernels, or the GPU that times are predicted for.
    pub device: String,
    /// Threads of the CPU device.
    pub threads: Option<usize>,
    /// The instruction set of the CPU device's kernels.
    #[serde(default)]
    pub isa: Option<String>,
    /// The build of kiln that made it, [`profile`]; empty where an older one did not say.
    #[serde(default)]
    pub profile: String,
    /// The GPU whose datasheet has the rate of operations, where the bandwidth alone was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datasheet: Option<String>,
    /// Measured in the same run, or the datasheet's of a prediction.
    pub ceilings: Ceilings,
}

/// What a machine can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bandwidth of reading memory; of copying it, reads and writes together, where a GPU's was measured.
    pub read_gb_per_s: f64,
    /// Multiplications and additions of floating-point kernels: f32 on a CPU, tensor cores on a GPU.
    pub float_gflop_per_s: f64,
    /// Of kernels with integer weights, where these multiply integers of 16 bits.
    pub integer_gop_per_s: Option<f64>,
    /// Of kernels with weights of bf16 and rows of f32, where these are multiplied as pieces of bf16.
    #[serde(default)]
    pub bf16_pieces_gflop_per_s: Option<f64>,
    /// Of kernels that round rows to bf16.
    #[serde(default)]
    pub bf16_gflop_per_s: Option<f64>,
    /// Of kernels that round rows to integers of 8 bits.
    #[serde(default)]
    pub int8_gop_per_s: Option<f64>,
}

impl Ceilings {
    /// Multiplications and additions of each kind of kernels, in units of 10^9 a second.
    pub(crate) fn peaks(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let peaks = [
            ("float", Some(self.float_gflop_per_s)),
            ("bf16 in pieces", self.bf16_pieces_gflop_per_s),
            ("bf16", self.bf16_gflop_per_s),
            ("integer", self.integer_gop_per_s),
            ("int8", self.int8_gop_per_s),
        ];
        (peaks.into_iter()).filter_map(|(name, peak)| Some((name, peak?)))
    }

    /// Multiplications and additions of such products; those of floating-point kernels where a device has
    /// no others.
    pub(crate) fn operations_per_ns(&self, arithmetic: Arithmetic) -> f64 {
        let own = match arithmetic {
            Arithmetic::Float => None,
            Arithmetic::FloatByBf16 => self.bf16_pieces_gflop_per_s,
            Arithmetic::Bf16 => self.bf16_gflop_per_s,
            Arithmetic::Int16 => self.integer_gop_per_s,
            Arithmetic::Int8 => self.int8_gop_per_s,
        };
        own.unwrap_or(self.float_gflop_per_s)
    }

    /// Of two measurements the better, in each figure.
    pub(crate) fn max(self, other: Ceilings) -> Ceilings {
        let better = |of: fn(&Ceilings) -> Option<f64>| match (of(&self), of(&other)) {
            (Some(one), Some(two)) => Some(one.max(two)),
            (one, two) => one.or(two),
        };
        Ceilings {
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            float_gflop_per_s: self.float_gflop_per_s.max(other.float_gflop_per_s),
            integer_gop_per_s: better(|ceilings| ceilings.integer_gop_per_s),
            bf16_pieces_gflop_per_s: better(|ceilings| ceilings.bf16_pieces_gflop_per_s),
            bf16_gflop_per_s: better(|ceilings| ceilings.bf16_gflop_per_s),
            int8_gop_per_s: better(|ceilings| ceilings.int8_gop_per_s),
        }
    }
}

/// Cargo's profile of this program: `dev` or `release`.
pub(crate) fn profile() -> &'static str {
    match cfg!(debug_assertions) {
        true => "dev",
        false => "release",
    }
}

/// How times came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A clock around each kernel of real steps; on a GPU, events.
    Measured,
    /// From bytes, operations and a datasheet: no measurement.
    Predicted,
}

/// A bundle's target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelTable {
    /// Such as `opt-125m`.
    pub model: String,
    /// `cpu`, `sm_90a`, ...
    pub target: String,
    /// Of the matrices.
    pub weights: WeightFormat,
    /// What the CPU rounds rows to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<Activations>,
    /// Of the KV cache, and of activations on a GPU.
    pub dtype: DType,
    /// How times came about.
    pub source: Source,
    /// One for each step that was timed.
    pub steps: Vec<StepTable>,
}

impl ModelTable {
    /// Whether kernels were timed one after another, which overlap in the steps that they are of.
    pub fn is_timed_apart(&self) -> bool {
        self.source == Source::Measured && self.target != CPU
    }
}

impl ModelTable {
    /// Its weights, and what rows are rounded to: `int8`, `int8 with int8 activations`.
    pub(crate) fn formats(&self) -> String {
        match self.activations {
            Some(activations) => {
                format!("{} with {} activations", self.weights, activations.name())
            }
            None => self.weights.to_string(),
        }
    }
}

/// A step of an executable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTable {
    /// Such as `decode-b1-kv256`.
    pub executable: String,
    /// Its phase.
    pub phase: Phase,
    /// B.
    pub sequences: usize,
    /// T, of all sequences.
    pub tokens: usize,
    /// Past and new positions of each sequence.
    pub kv_len: usize,
    /// Rows of logits.
    pub logit_rows: usize,
    /// One for each kind of kernel, in order of first use.
    pub rows: Vec<Row>,
    /// The whole step, as the host sees it: measured without a clock around kernels.
    pub time: Times,
    /// Sum over rows of floors.
    pub floor_us: f64,
    /// What a step takes beyond the sum of its kernels: launch gaps, barriers, the host. Measured on a CPU,
    /// the median over the steps with a clock around kernels. A GPU runs kernels one after another to time
    /// them, and overlaps them otherwise: there it is the median of what steps without events take beyond
    /// the kernels of those with, and may be negative.
    pub remainder_us: f64,
}

impl StepTable {
    /// B, T and KV length: `B 1, T 1, KV 256`.
    pub fn size(&self) -> String {
        let (sequences, tokens, kv_len) = (self.sequences, self.tokens, self.kv_len);
        format!("B {sequences}, T {tokens}, KV {kv_len}")
    }

    /// All kernels, by the medians of their rows.
    pub fn kernels_us(&self) -> f64 {
        self.rows.iter().map(Row::total_us).sum()
    }

    /// Of the step's time, what its kernels and the remainder sum to: 1 but for noise. Measured, the median of
    /// the shares of turns, each of a step with a clock around kernels and one without.
    pub fn explained(&self) -> f64 {
        let turns = self.time.samples_us.iter().enumerate().map(|(turn, step)| {
            let of_turn = |row: &Row| Some(row.count as f64 * row.time.samples_us.get(turn)?);
            let kernels: Option<f64> = self.rows.iter().map(of_turn).sum();
            Some((kernels? + self.remainder_us) / step)
        });
        match turns.collect::<Option<Vec<f64>>>() {
            Some(shares) if !shares.is_empty() => Times::of(shares).median_us,
            _ => (self.kernels_us() + self.remainder_us) / self.time.median_us,
        }
    }

    fn check(&self) -> Result<(), String> {
        self.time.check().map_err(|e| format!("the step: {e}"))?;
        if !is_positive(self.time.median_us) {
            return Err("the step takes no time".to_owned());
        }
        if !is_amount(self.floor_us) || !is_amount(self.remainder_us.abs()) {
            return Err("the step's floor or remainder is no time".to_owned());
        }
        if self.rows.is_empty() {
            return Err("the step has no kernels".to_owned());
        }
        if self.sequences == 0 || self.tokens < self.sequences || self.kv_len == 0 {
            return Err(format!("a step of {} does not exist", self.size()));
        }
        for row in &self.rows {
            row.check().map_err(|e| format!("{:?}: {e}", row.spec))?;
        }
        Ok(())
    }
}

/// Kernels of a step that are alike: of one spec and shape, whatever their layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Such as `linear`.
    pub kernel: String,
    /// The spec in words: `layernorm + linear 768 -> 3072 + bias + relu`.
    pub spec: String,
    /// Shapes of its operands: `(8, 768) x (3072, 768)`.
    pub shapes: String,
    /// How its matrix is stored; the KV cache's type for attention.
    pub format: String,
    /// How many of them a step has.
    pub count: usize,
    /// Of one, from and to memory.
    pub bytes: f64,
    /// Of one: multiplications and additions.
    pub flops: f64,
    /// Of one.
    pub time: Times,
    /// The least time of one at the ceilings: the longer of bytes and operations.
    pub floor_us: f64,
    /// Of the time of the step, all of them.
    pub share_of_step: f64,
    /// What else runs the same, by name: `gemm`, `torch`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<Reference>,
    /// What a compiled kernel takes, for CUDA targets: of its last launch, which makes the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<KernelResources>,
    /// Of launches before it, which prepare its rows. They are part of the row's time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepared_by: Vec<KernelResources>,
}

impl Row {
    /// What it launches on a GPU, in order.
    pub fn launches(&self) -> impl Iterator<Item = &KernelResources> {
        self.prepared_by.iter().chain(&self.resources)
    }

    /// Of all of them in a step.
    pub fn total_us(&self) -> f64 {
        self.count as f64 * self.time.median_us
    }

    /// Bytes over time.
    pub fn gb_per_s(&self) -> f64 {
        self.bytes / self.time.median_us / 1e3
    }

    /// Operations over time.
    pub fn gflop_per_s(&self) -> f64 {
        self.flops / self.time.median_us / 1e3
    }

    /// Of the limit: the floor over the time, 1 at the best.
    pub fn share_of_limit(&self) -> f64 {
        self.floor_us / self.time.median_us
    }

    fn check(&self) -> Result<(), String> {
        let amounts = [self.bytes, self.flops, self.floor_us, self.share_of_step];
        if self.count == 0 || !amounts.into_iter().all(is_amount) {
            return Err(format!(
                "count is {}, bytes, flops, floor and share are {amounts:?}; none can be negative, \
                 and the count not 0",
                self.count
            ));
        }
        let references = self.references.iter().map(|reference| &reference.time);
        references.chain([&self.time]).try_for_each(Times::check)
    }
}

/// Repeated measurements of one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// The middle one.
    pub median_us: f64,
    /// The shortest.
    pub min_us: f64,
    /// One in twenty is longer.
    pub p95_us: f64,
    /// In order of measurement: of a row, the mean over its kernels of each repeat. Empty where predicted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples_us: Vec<f64>,
}

impl Times {
    /// Of samples, in order of measurement; nothing is known of none.
    pub fn of(samples_us: Vec<f64>) -> Times {
        let mut sorted = samples_us.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        Times {
            median_us: (at(last / 2) + at(sorted.len() / 2)) / 2.0,
            min_us: at(0),
            // The nearest rank, counted from 1.
            p95_us: at((sorted.len() * 19).div_ceil(20).saturating_sub(1)),
            samples_us,
        }
    }

    fn check(&self) -> Result<(), String> {
        let summary = [self.min_us, self.median_us, self.p95_us];
        let in_order = summary.is_sorted() && self.samples_us.len() <= MAX_SAMPLES;
        let mut all = summary.iter().chain(&self.samples_us);
        match in_order && all.all(|&us| is_amount(us)) {
            true => Ok(()),
            false => Err(format!(
                "minimum, median and 95th percentile are {summary:?} of {} samples; needed are times \
                 in this order, of {MAX_SAMPLES} samples at most",
                self.samples_us.len()
            )),
        }
    }

    /// A time that was computed.
    pub fn predicted(us: f64) -> Times {
        Times {
            median_us: us,
            min_us: us,
            p95_us: us,
            samples_us: Vec::new(),
        }
    }
}

/// The same work by another program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Whose.
    pub name: String,
    /// In what precision.
    pub format: String,
    /// Of one kernel.
    pub time: Times,
}

/// What a kernel of a CUDA target takes, by its compiler, and what its machine code is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KernelResources {
    /// Its source in the bundle.
    pub source: String,
    /// 32-bit registers of a thread.
    pub registers: u32,
    /// Shared memory of a block, static and dynamic.
    pub smem_bytes: u32,
    /// Stores and loads of spilled registers.
    pub spill_bytes: u32,
    /// Blocks of a grid, threads of a block.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks that run on a multiprocessor at once.
    pub blocks_per_multiprocessor: u32,
    /// Share of a multiprocessor's warps.
    pub occupancy: f64,
    /// Instructions by kind, where a disassembler is there: `HMMA`, `LDG.128`, ...
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instructions: Vec<(String, u32)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_samples() {
        let times = Times::of((1..=21).rev().map(f64::from).collect());
        assert_eq!(
            (times.min_us, times.median_us, times.p95_us),
            (1.0, 11.0, 20.0)
        );
        let twenty = Times::of((1..=20).map(f64::from).collect());
        assert_eq!((twenty.median_us, twenty.p95_us), (10.5, 19.0));
        assert_eq!(Times::of(vec![3.0, 1.0]).median_us, 2.0);
        assert!(Times::of(vec![]).median_us.is_nan());
    }

    /// What reading says of a table that was changed.
    fn problem(change: impl FnOnce(&mut Table)) -> String {
        let mut table = crate::testing::table(1);
        change(&mut table);
        Table::parse(&serde_json::to_string(&table).unwrap()).unwrap_err()
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        use crate::testing::{predicted_table, table, table_of_a_gpu};
        // Kernels of the last sum to more than their steps.
        assert!(table_of_a_gpu().models[0].steps[0].remainder_us < 0.0);
        for table in [table(1), predicted_table(), table_of_a_gpu()] {
            let text = serde_json::to_string(&table).unwrap();
            let read = Table::parse(&text).unwrap();
            // The last bit of a number may differ.
            assert_eq!(format!("{read:.6?}"), format!("{table:.6?}"));
        }
    }

    #[test]
    fn what_would_not_be_read_is_not_written() {
        let mut table = crate::testing::table(1);
        let text = table.to_json().unwrap();
        assert!(Table::parse(&text).is_ok());
        table.models[0].steps[0].rows[0].time.samples_us = vec![1.0; MAX_SAMPLES + 1];
        assert!(table.to_json().unwrap_err().contains("at most"));
    }

    #[test]
    fn other_versions_are_refused_whatever_they_hold() {
        let text = r#"{"version": 9, "kiln_version": "7.0", "models": 3}"#;
        let problem = Table::parse(text).unwrap_err();
        assert!(
            problem.contains("kiln 7.0 wrote it as version 9"),
            "{problem}"
        );
    }

    #[test]
    fn figures_that_no_run_has_are_refused() {
        let row = |change: fn(&mut Row)| problem(|t| change(&mut t.models[0].steps[0].rows[1]));
        let step = |change: fn(&mut StepTable)| problem(|t| change(&mut t.models[0].steps[0]));
        for (problem, expected) in [
            (row(|row| row.count = 0), "count is 0"),
            (row(|row| row.bytes = -1.0), "-1.0"),
            (
                row(|row| row.time.min_us = 2.0 * row.time.p95_us),
                "in this order",
            ),
            (row(|row| row.time.samples_us[3] = -1.0), "in this order"),
            (
                row(|row| row.time.samples_us = vec![1.0; MAX_SAMPLES + 1]),
                "at most",
            ),
            (
                step(|step| step.time = Times::predicted(0.0)),
                "takes no time",
            ),
            (step(|step| step.tokens = 0), "does not exist"),
            (step(|step| step.remainder_us = -1e30), "no time"),
            (
                problem(|t| t.machine.ceilings.read_gb_per_s = 0.0),
                "ceiling",
            ),
            // JSON has no such number.
            (row(|row| row.flops = f64::NAN), "null"),
        ] {
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
