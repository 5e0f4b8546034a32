//! How long an executable should take on a GPU that is not there.
//!
//! A kernel takes as long as the slower of two things: its bytes at the GPU's read bandwidth, or its
//! floating-point operations at the tensor cores' dense rate. To the sum over kernels comes a fixed
//! time for each launch, since each waits for the one before. This is a floor with an allowance, made
//! to compare buckets and plans with; it is no measurement.

use crate::cuda::CudaTarget;
use kiln_bundle::{Executable, KernelSpec, Linear, Phase, Program, Target};

/// A GPU as its vendor describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// As `--gpu` takes it.
    pub name: &'static str,
    /// What it runs.
    pub target: CudaTarget,
    /// Memory bandwidth of the datasheet, GB/s.
    pub gb_per_s: f64,
    /// Dense f16 rate with f32 sums of the datasheet, TFLOP/s.
    pub tflops: f64,
}

/// The GPUs that predictions can be asked for; the first of a target stands for it.
pub const GPUS: [Gpu; 10] = [
    gpu("A100", CudaTarget::Sm80, 2039.0, 312.0),
    gpu("A40", CudaTarget::Sm86, 696.0, 150.0),
    gpu("RTX3090", CudaTarget::Sm86, 936.0, 71.0),
    gpu("L40S", CudaTarget::Sm89, 864.0, 362.0),
    gpu("L4", CudaTarget::Sm89, 300.0, 121.0),
    gpu("RTX4090", CudaTarget::Sm89, 1008.0, 165.0),
    gpu("H200", CudaTarget::Sm90a, 4800.0, 989.0),
    gpu("H100", CudaTarget::Sm90a, 3352.0, 989.0),
    gpu("B200", CudaTarget::Sm100a, 8000.0, 2250.0),
    gpu("RTX5090", CudaTarget::Sm120a, 1792.0, 209.0),
];

const fn gpu(name: &'static str, target: CudaTarget, gb_per_s: f64, tflops: f64) -> Gpu {
    Gpu {
        name,
        target,
        gb_per_s,
        tflops,
    }
}

impl Gpu {
    /// A GPU by name, in any case.
    pub fn named(name: &str) -> Option<Gpu> {
        GPUS.into_iter()
            .find(|gpu| gpu.name.eq_ignore_ascii_case(name))
    }

    /// The GPU that stands for a target.
    pub fn of_target(target: &str) -> Option<Gpu> {
        GPUS.into_iter().find(|gpu| gpu.target.name() == target)
    }

    /// Microseconds that a launch adds to the work of its kernel, inside a graph: its ramp and tail,
    /// about 2.2 us where it overlaps with the one before (programmatic dependent launch, sm_90 and
    /// up), and a gap of 1.3 us more where it does not. From published measurements on Hopper.
    pub fn launch_us(&self) -> f64 {
        if self.target >= CudaTarget::Sm90a {
            2.2
        } else {
            3.5
        }
    }
}

/// What an executable moves and computes at its bounds, and how long that should take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Bytes of weights, activations, keys and values.
    pub bytes: f64,
    /// Multiplications and additions.
    pub flops: f64,
    /// Sum of the kernels' floors.
    pub floor_us: f64,
    /// Sum of the launches' own times.
    pub launch_us: f64,
}

impl Prediction {
    /// Both sums.
    pub fn total_us(&self) -> f64 {
        self.floor_us + self.launch_us
    }
}

/// Predicts a step at the executable's bounds: in prefill, one prompt of all its tokens and the
/// logits of the last; in decode, every sequence at its longest.
pub fn predict(target: &Target, executable: &Executable, gpu: &Gpu) -> Option<Prediction> {
    let program = target.programs.get(executable.program as usize)?;
    let mut sum = Prediction::default();
    for kernel in &program.kernels {
        let (bytes, flops) = work(target, program, executable, kernel);
        let memory_us = bytes / gpu.gb_per_s / 1e3;
        let compute_us = flops / gpu.tflops / 1e6;
        sum.bytes += bytes;
        sum.flops += flops;
        sum.floor_us += memory_us.max(compute_us);
    }
    sum.launch_us = executable.launches.len() as f64 * gpu.launch_us();
    Some(sum)
}

/// Bytes and operations of a kernel.
fn work(
    target: &Target,
    program: &Program,
    executable: &Executable,
    kernel: &KernelSpec,
) -> (f64, f64) {
    let bounds = &executable.bounds;
    let logit_rows = match executable.phase {
        Phase::Prefill => 1,
        Phase::Decode => bounds.max_logit_rows,
    };
    let row_bytes = |id: kiln_bundle::BufferId| {
        let buffer = &program.buffers[id.0 as usize];
        f64::from(buffer.width) * buffer.dtype.size_bytes() as f64
    };
    let rows_of = |id: kiln_bundle::BufferId| match program.buffers[id.0 as usize].rows {
        kiln_bundle::RowKind::Tokens => f64::from(bounds.max_tokens),
        kiln_bundle::RowKind::Logits => f64::from(logit_rows),
    };
    let touched: f64 = kernel
        .reads()
        .into_iter()
        .chain(kernel.writes())
        .map(|id| rows_of(id) * row_bytes(id))
        .sum();
    match kernel {
        KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => {
            let rows = rows_of(linear.out);
            let (n, k) = (
                f64::from(linear.out_features),
                f64::from(linear.in_features),
            );
            (touched + weight_bytes(target, linear), 2.0 * rows * n * k)
        }
        KernelSpec::Attention {
            heads, head_dim, ..
        } => {
            let width = f64::from(heads * head_dim);
            let tokens = f64::from(bounds.max_tokens);
            // Pairs of a query and a position that it sees, and positions that are read.
            let (pairs, positions) = match executable.phase {
                Phase::Prefill => (tokens * (tokens + 1.0) / 2.0, tokens),
                Phase::Decode => {
                    let positions = tokens * f64::from(bounds.max_kv_len);
                    (positions, positions)
                }
            };
            let kv = 2.0 * positions * width * target.dtype.size_bytes() as f64;
            (touched + kv, 4.0 * pairs * width)
        }
        KernelSpec::Embed { out, .. } => {
            let rows = rows_of(*out) * f64::from(program.buffers[out.0 as usize].width);
            (
                touched + 2.0 * rows * target.tables.size_bytes() as f64,
                rows,
            )
        }
        KernelSpec::Sample { .. } => (touched, 0.0),
    }
}

fn weight_bytes(target: &Target, linear: &Linear) -> f64 {
    let (n, k) = (linear.out_features as usize, linear.in_features as usize);
    target.format(&linear.weight).bytes(target.layout, n, k) as f64
}
