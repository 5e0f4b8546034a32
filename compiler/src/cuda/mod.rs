//! From CUDA sources to what a GPU loads.
//!
//! ```text
//! EmittedKernel --NVRTC, or the cache--> cubin + log --parse--> BuiltKernel
//! ```
//!
//! No GPU and no CUDA toolkit takes part: NVRTC is one library, found or fetched by itself.

mod build;
mod cache;
mod nvrtc;
mod resources;

pub use build::{BuildError, BuiltKernel, EmittedKernel, build, build_with};
pub use cache::{Cache, Key};
pub use nvrtc::{Compiled, Nvrtc, NvrtcError, Source};
pub use resources::Resources;
