//! The GPUs that kiln compiles for.

use cudarc::driver::sys;
use std::{fmt, str::FromStr};

/// A CUDA target: an architecture for which machine code is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CudaTarget {
    /// A100.
    Sm80,
    /// GeForce 30, A40.
    Sm86,
    /// GeForce 40, L4, L40.
    Sm89,
    /// H100, H200.
    Sm90a,
    /// B200.
    Sm100a,
    /// GeForce 50, RTX PRO Blackwell.
    Sm120a,
}

impl CudaTarget {
    /// All of them.
    pub const ALL: [CudaTarget; 6] = [
        CudaTarget::Sm80,
        CudaTarget::Sm86,
        CudaTarget::Sm89,
        CudaTarget::Sm90a,
        CudaTarget::Sm100a,
        CudaTarget::Sm120a,
    ];

    /// The spelling of the command line, the manifest and NVRTC.
    pub const fn name(self) -> &'static str {
        match self {
            CudaTarget::Sm80 => "sm_80",
            CudaTarget::Sm86 => "sm_86",
            CudaTarget::Sm89 => "sm_89",
            CudaTarget::Sm90a => "sm_90a",
            CudaTarget::Sm100a => "sm_100a",
            CudaTarget::Sm120a => "sm_120a",
        }
    }

    /// The target for a GPU of this compute capability: the closest that runs on it.
    pub const fn of_capability(major: u32, minor: u32) -> Option<CudaTarget> {
        match (major, minor) {
            (8, 0..=5) => Some(CudaTarget::Sm80),
            (8, 6..=8) => Some(CudaTarget::Sm86),
            (8, _) => Some(CudaTarget::Sm89),
            (9, 0) => Some(CudaTarget::Sm90a),
            (10, 0) => Some(CudaTarget::Sm100a),
            (12, 0) => Some(CudaTarget::Sm120a),
            _ => None,
        }
    }
}

/// The target of the machine's first GPU; none without a GPU that kiln compiles for.
pub fn native_gpu() -> Option<CudaTarget> {
    // SAFETY: asks the loader for the driver's library; its initialisation is the driver's own.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut device, mut major, mut minor) = (0, 0, 0);
    let attribute = |value: &mut i32, attribute, device| {
        // SAFETY: `value` is one i32 to be written, `device` came from the driver.
        unsafe { sys::cuDeviceGetAttribute(value, attribute, device) }.result()
    };
    // SAFETY: the driver is present; `device` is one handle to be written.
    let opened = unsafe {
        sys::cuInit(0)
            .result()
            .and_then(|()| sys::cuDeviceGet(&mut device, 0).result())
    };
    opened.ok()?;
    let [major_of, minor_of] = [
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    ];
    attribute(&mut major, major_of, device).ok()?;
    attribute(&mut minor, minor_of, device).ok()?;
    CudaTarget::of_capability(major.try_into().ok()?, minor.try_into().ok()?)
}

impl fmt::Display for CudaTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no [`CudaTarget`]: the caller's mistake.
#[derive(Debug, thiserror::Error)]
#[error("unknown CUDA target {0:?}; known are sm_80, sm_86, sm_89, sm_90a, sm_100a and sm_120a")]
pub struct UnknownCudaTarget(String);

impl FromStr for CudaTarget {
    type Err = UnknownCudaTarget;

    fn from_str(name: &str) -> Result<CudaTarget, UnknownCudaTarget> {
        CudaTarget::ALL
            .into_iter()
            .find(|target| target.name() == name)
            .ok_or_else(|| UnknownCudaTarget(name.to_owned()))
    }
}
