//! Which device runs a bundle.

use super::cuda::{self, DriverError, NvidiaDriver, NvidiaGpu};
use super::{CpuDevice, CpuOptions, CudaDevice, CudaOptions, Device, DeviceError};
use kiln_bundle::{Bundle, Target};
use std::str::FromStr;

/// The device asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that the bundle has machine code for, else the CPU if the bundle has a target
    /// for it.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU with this number.
    Cuda(u32),
}

impl FromStr for DeviceChoice {
    type Err = String;

    /// Reads `auto`, `cpu`, `cuda` (the first) or `cuda:N`.
    fn from_str(text: &str) -> Result<DeviceChoice, String> {
        let number = |ordinal: &str| ordinal.parse().ok().map(DeviceChoice::Cuda);
        match text {
            "auto" => Some(DeviceChoice::Auto),
            "cpu" => Some(DeviceChoice::Cpu),
            "cuda" => Some(DeviceChoice::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(number),
        }
        .ok_or_else(|| "it must be auto, cpu, cuda or cuda:N".to_owned())
    }
}

/// How a device is chosen and set up.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// Which device.
    pub device: DeviceChoice,
    /// If it is the CPU.
    pub cpu: CpuOptions,
    /// If it is a GPU; its ordinal is that of the choice.
    pub cuda: CudaOptions,
    /// Gets the bytes of weights that are copied to the device and the bytes in all. The CPU copies
    /// none.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

/// Loads a bundle onto the device of choice.
///
/// # Errors
/// Any of [`DeviceError`] but [`DeviceError::Step`].
pub fn load(bundle: &Bundle, options: &LoadOptions<'_>) -> Result<Box<dyn Device>, DeviceError> {
    let targets = &bundle.manifest().targets;
    let chosen = match options.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(ordinal) => Some(select(targets, ordinal)?),
        // Where there is nothing for GPUs the driver is not even loaded.
        DeviceChoice::Auto if !targets.iter().any(|t| cuda::is_cuda_target(&t.name)) => None,
        DeviceChoice::Auto => detect(targets, NvidiaGpu::list())?,
    };
    let Some((ordinal, target)) = chosen else {
        return Ok(Box::new(CpuDevice::load(bundle, &options.cpu)?));
    };
    let driver = NvidiaDriver::open(ordinal)?;
    let cuda = CudaOptions {
        ordinal,
        ..options.cuda
    };
    let mut progress = |done, total| {
        if let Some(progress) = options.progress {
            progress(done, total);
        }
    };
    let device = CudaDevice::load(bundle, target, driver, &cuda, &mut progress)?;
    Ok(Box::new(device))
}

/// The target for the GPU that was asked for.
fn select(targets: &[Target], ordinal: u32) -> Result<(u32, &Target), DeviceError> {
    let gpus = NvidiaGpu::list()?;
    let Some(gpu) = gpus.iter().find(|gpu| gpu.ordinal == ordinal) else {
        return Err(DeviceError::NoGpu {
            ordinal,
            found: gpus,
        });
    };
    match cuda::best_target(targets, gpu.compute_capability) {
        Some(target) => Ok((ordinal, target)),
        None => Err(DeviceError::WrongGpu {
            gpu: gpu.clone(),
            found: names(targets),
        }),
    }
}

/// The first GPU that a target has machine code for; none where the CPU is to be used.
fn detect(
    targets: &[Target],
    gpus: Result<Vec<NvidiaGpu>, DriverError>,
) -> Result<Option<(u32, &Target)>, DeviceError> {
    let matching = gpus.iter().flatten().find_map(|gpu| {
        let target = cuda::best_target(targets, gpu.compute_capability)?;
        let compiled = target.images.iter().all(|image| image.cubin.is_some());
        compiled.then_some((gpu.ordinal, target))
    });
    if matching.is_some() || targets.iter().any(|target| target.name == "cpu") {
        return Ok(matching);
    }
    Err(DeviceError::NoDevice {
        found: names(targets),
        gpus,
    })
}

fn names(targets: &[Target]) -> Vec<String> {
    targets.iter().map(|target| target.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::manifest;
    use kiln_bundle::Image;

    #[test]
    fn devices_are_spelled() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    fn targets(names: &[&str]) -> Vec<Target> {
        let target = |name: &&str| {
            let mut target = manifest(20, 4, 64).targets.remove(0);
            target.name = (*name).to_owned();
            target
        };
        names.iter().map(target).collect()
    }

    fn gpu(ordinal: u32, compute_capability: (u32, u32)) -> NvidiaGpu {
        NvidiaGpu {
            ordinal,
            name: "NVIDIA Test".to_owned(),
            compute_capability,
        }
    }

    fn no_driver() -> Result<Vec<NvidiaGpu>, DriverError> {
        Err(DriverError {
            call: "loading libcuda",
            place: String::new(),
            problem: "no NVIDIA driver was found".to_owned(),
        })
    }

    fn detected(names: &[&str], gpus: Result<Vec<NvidiaGpu>, DriverError>) -> String {
        match detect(&targets(names), gpus) {
            Ok(Some((ordinal, target))) => format!("cuda:{ordinal} {}", target.name),
            Ok(None) => "cpu".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_gpu_with_machine_code_comes_first() {
        let both = ["cpu", "sm_80", "sm_90a"];
        let gpus = vec![gpu(0, (7, 5)), gpu(1, (9, 0))];
        assert_eq!(detected(&both, Ok(gpus)), "cuda:1 sm_90a");
        assert_eq!(detected(&both, Ok(vec![gpu(0, (12, 0))])), "cpu");
        assert_eq!(detected(&both, Ok(Vec::new())), "cpu");
        assert_eq!(detected(&both, no_driver()), "cpu");
    }

    #[test]
    fn sources_alone_do_not_run() {
        let mut targets = targets(&["cpu", "sm_80"]);
        targets[1].images.push(Image {
            entry: "kernel".to_owned(),
            source: "kernel.cu".to_owned(),
            cubin: None,
            block_threads: 32,
            dynamic_smem_bytes: 0,
        });
        let chosen = detect(&targets, Ok(vec![gpu(0, (8, 0))])).unwrap();
        assert!(chosen.is_none());
    }

    #[test]
    fn what_fits_nothing_names_both_sides() {
        let error = detected(&["sm_90a"], no_driver());
        assert!(
            error.contains("compiled for sm_90a") && error.contains("no NVIDIA driver was found"),
            "{error}"
        );
        assert!(error.contains("--target cpu"), "{error}");
        let error = detected(&["sm_90a"], Ok(vec![gpu(0, (8, 9))]));
        assert!(
            error.contains("cuda:0 (NVIDIA Test, compute capability 8.9)"),
            "{error}"
        );
        assert!(error.contains("or `--target sm_89`"), "{error}");
        let error = DeviceError::WrongGpu {
            gpu: gpu(0, (8, 9)),
            found: vec!["cpu".to_owned(), "sm_90a".to_owned()],
        };
        let error = error.to_string();
        assert!(
            error.contains("compute capability 8.9")
                && error.contains("cpu, sm_90a")
                && error.contains("`--target sm_89`"),
            "{error}"
        );
    }
}
