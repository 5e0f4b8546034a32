//! The driver's library and its devices: found, asked, and their errors put in words.

use super::super::DriverError;
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use std::ffi::{CStr, c_char, c_int};
use std::fmt;

/// The least CUDA version that the driver must support: that of the compiler which makes kiln's
/// machine code, 13.0. It has every function that is called here, too.
const MIN_CUDA_VERSION: i32 = 13_000;
/// The least major compute capability: kernels use `cp.async` and bf16 `mma`.
const MIN_CAPABILITY_MAJOR: u32 = 8;

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvidiaGpu {
    /// The driver's number for it.
    pub ordinal: u32,
    /// Product name.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
}

impl fmt::Display for NvidiaGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(
            f,
            "cuda:{} ({}, compute capability {major}.{minor})",
            self.ordinal, self.name
        )
    }
}

impl NvidiaGpu {
    /// The GPUs that the driver shows, by ordinal. Nothing is allocated on them.
    ///
    /// # Errors
    /// There is no driver, it is too old, or it fails.
    pub fn list() -> Result<Vec<NvidiaGpu>, DriverError> {
        init()?;
        let mut count: c_int = 0;
        // SAFETY: the library is there and initialised; `count` is written.
        let result = unsafe { sys::cuDeviceGetCount(&raw mut count) };
        if result == CUresult::CUDA_ERROR_NO_DEVICE {
            return Ok(Vec::new());
        }
        check(result, "cuDeviceGetCount", "")?;
        (0..u32::try_from(count).unwrap_or(0))
            .map(|ordinal| Ok(find(ordinal)?.1))
            .collect()
    }

    /// Whether kiln has kernels for GPUs of this age.
    pub(super) fn check_age(&self) -> Result<(), DriverError> {
        if self.compute_capability.0 >= MIN_CAPABILITY_MAJOR {
            return Ok(());
        }
        Err(DriverError {
            call: "opening the GPU",
            place: self.to_string(),
            problem: format!("kiln needs compute capability {MIN_CAPABILITY_MAJOR}.0 or higher"),
        })
    }
}

/// Initialises the driver.
///
/// # Errors
/// It is missing, too old, or fails.
pub(super) fn init() -> Result<(), DriverError> {
    // SAFETY: this loads libcuda, whose initialisers are trusted as the machine's driver is. It has
    // to be asked first: any other call would panic where the library is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(DriverError {
            call: "loading libcuda",
            place: String::new(),
            problem: "no NVIDIA driver was found on this machine".to_owned(),
        });
    }
    let mut version: c_int = 0;
    // SAFETY: every libcuda has this function, and it may be called before all others.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check(result, "cuDriverGetVersion", "")?;
    // Before anything else is called: an older library may lack functions.
    if version < MIN_CUDA_VERSION {
        return Err(DriverError {
            call: "cuDriverGetVersion",
            place: String::new(),
            problem: format!(
                "the NVIDIA driver supports CUDA {}, kiln needs one for CUDA {} or newer",
                spell(version),
                spell(MIN_CUDA_VERSION)
            ),
        });
    }
    // SAFETY: flags must be 0.
    let result = unsafe { sys::cuInit(0) };
    check(result, "cuInit", "")
}

fn spell(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A GPU by its number, after [`init`].
pub(super) fn find(ordinal: u32) -> Result<(sys::CUdevice, NvidiaGpu), DriverError> {
    let place = format!("cuda:{ordinal}");
    let mut device = 0;
    let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: the driver is initialised; `device` is written.
    let result = unsafe { sys::cuDeviceGet(&raw mut device, number) };
    check(result, "cuDeviceGet", &place)?;
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: `name` has as many bytes as it is said to have.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) };
    check(result, "cuDeviceGetName", &place)?;
    let name: Vec<u8> = name
        .iter()
        .map(|&c| c.to_ne_bytes()[0])
        .take_while(|&c| c != 0)
        .collect();
    let major = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let minor = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
    let gpu = NvidiaGpu {
        ordinal,
        name: String::from_utf8_lossy(&name).into_owned(),
        compute_capability: (attribute(device, major)?, attribute(device, minor)?),
    };
    Ok((device, gpu))
}

/// A figure of a device, after [`init`].
pub(super) fn attribute(
    device: sys::CUdevice,
    attribute: CUdevice_attribute,
) -> Result<u32, DriverError> {
    let mut value: c_int = 0;
    // SAFETY: the driver is initialised; `value` is written.
    let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
    check(result, "cuDeviceGetAttribute", "")?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// The error of a call that did not succeed, in the driver's words.
pub(super) fn check(result: CUresult, call: &'static str, place: &str) -> Result<(), DriverError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: a result came from the library, so it is loaded; `text` is written.
        let known = unsafe { get(result, &raw mut text) } == CUresult::CUDA_SUCCESS;
        // SAFETY: for a code that it knows the driver gives a string that is never freed.
        (known && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
    };
    let name = text(sys::cuGetErrorName).unwrap_or("unknown error".into());
    let meaning = text(sys::cuGetErrorString).unwrap_or("no description".into());
    Err(DriverError {
        call,
        place: place.to_owned(),
        problem: format!("{name}: {meaning}"),
    })
}
