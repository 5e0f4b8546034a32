//! How long an executable should take on a GPU that is not there.
//!
//! A kernel takes as long as the slower of two things: its bytes at the GPU's read bandwidth, or its
//! floating-point operations at the tensor cores' dense rate. To the sum over kernels comes a fixed
//! time for each launch, since each waits for the one before. This is a floor with an allowance, made
//! to compare buckets and plans with; it is no measurement.

use crate::cuda::CudaTarget;
use kiln_bundle::{
    Executable, Target,
    work::{StepSize, kernel_work},
};
use std::iter::Sum;

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

/// What a kernel or a step moves and computes, and how long that should take.
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

impl Sum for Prediction {
    fn sum<I: Iterator<Item = Prediction>>(parts: I) -> Prediction {
        parts.fold(Prediction::default(), |sum, part| Prediction {
            bytes: sum.bytes + part.bytes,
            flops: sum.flops + part.flops,
            floor_us: sum.floor_us + part.floor_us,
            launch_us: sum.launch_us + part.launch_us,
        })
    }
}

/// Predicts a step at the executable's bounds ([`StepSize::at_bounds`]).
pub fn predict(target: &Target, executable: &Executable, gpu: &Gpu) -> Option<Prediction> {
    let size = StepSize::at_bounds(executable.phase, &executable.bounds);
    let kernels = predict_kernels(target, executable, &size, gpu)?;
    Some(kernels.into_iter().sum())
}

/// Predicts each kernel of a step of this size, in the program's order.
pub fn predict_kernels(
    target: &Target,
    executable: &Executable,
    size: &StepSize,
    gpu: &Gpu,
) -> Option<Vec<Prediction>> {
    let program = target.programs.get(executable.program as usize)?;
    let mut launches = vec![0.0; program.kernels.len()];
    for launch in &executable.launches {
        if let Some(count) = launches.get_mut(launch.kernel as usize) {
            *count += 1.0;
        }
    }
    let kernels = program.kernels.iter().zip(launches);
    let predictions = kernels.map(|(kernel, launches)| {
        let work = kernel_work(target, program, kernel, size);
        Prediction {
            bytes: work.bytes,
            flops: work.flops,
            floor_us: work.floor_us(gpu.gb_per_s, gpu.tflops * 1e3),
            launch_us: launches * gpu.launch_us(),
        }
    });
    Some(predictions.collect())
}
