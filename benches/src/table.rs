//! The table: its rows, steps and ceilings, as they are written to a file and read again.
//!
//! Times are in microseconds, sizes in bytes, rates in GB/s (10^9 bytes a second) and GFLOP/s.

use kiln_bundle::{DType, Phase, WeightFormat};
use serde::{Deserialize, Serialize};

/// Version of the file; a reader refuses any other.
pub const TABLE_VERSION: u32 = 1;

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

/// Where figures come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The device that ran the kernels, or the GPU that times are predicted for.
    pub device: String,
    /// Threads of the CPU device.
    pub threads: Option<usize>,
    /// Measured in the same run, or the datasheet's of a prediction.
    pub ceilings: Ceilings,
}

/// What a machine can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bandwidth of reading memory.
    pub read_gb_per_s: f64,
    /// Multiplications and additions of floating-point kernels: f32 on a CPU, tensor cores on a GPU.
    pub float_gflop_per_s: f64,
    /// Of kernels with integer weights, where these multiply integers.
    pub integer_gop_per_s: Option<f64>,
}

/// How times came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A clock around each kernel of real steps.
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
    /// Of the KV cache, and of activations on a GPU.
    pub dtype: DType,
    /// How times came about.
    pub source: Source,
    /// One for each step that was timed.
    pub steps: Vec<StepTable>,
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
    /// What the median step takes beyond the sum of its kernels: launch gaps, barriers, the host.
    pub remainder_us: f64,
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
            p95_us: at((last * 19).div_ceil(20)),
            samples_us,
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
        assert_eq!(Times::of(vec![3.0, 1.0]).median_us, 2.0);
        assert!(Times::of(vec![]).median_us.is_nan());
    }
}
