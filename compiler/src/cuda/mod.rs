//! The CUDA targets: from KernelSpecs to what a GPU loads.
//!
//! ```text
//! KernelSpec --lower--> Launch + Kernel --NVRTC, or the cache--> cubin + log --package--> Image
//! ```
//!
//! No GPU and no CUDA toolkit takes part: NVRTC is one library, found or fetched by itself, and the
//! sources include nothing but kiln's own headers.

mod build;
mod cache;
mod emit;
mod images;
mod lower;
mod nvrtc;
mod resources;
mod target;

pub use build::{BuildError, BuiltKernel, EmittedKernel, build_with};
pub use cache::{Cache, Key};
pub use emit::HEADERS;
pub use images::{build_images, lower_all};
pub use lower::{Formats, Kernel, Kernels, Launches, LowerError, check, copy_blocks, lower};
pub use nvrtc::{Compiled, Nvrtc, NvrtcError, Source};
pub use resources::Resources;
pub use target::{CudaTarget, UnknownCudaTarget, native_gpu};
