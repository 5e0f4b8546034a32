//! The kernels of CUDA targets inside a bundle: sources, machine code, resource reports.
//!
//! ```text
//! cuda/<entry>.cu              one source for all targets
//! cuda/kiln/*.cuh              what the sources include
//! cuda/<target>/<entry>.cubin
//! cuda/<target>/resources.json registers, memory and spills of each kernel
//! ```

use super::{
    Cache, CudaTarget, EmittedKernel, Formats, HEADERS, Kernel, Kernels, LowerError, Nvrtc,
    Resources, build_with, check, copy_blocks, lower,
};
use crate::{CompileError, Progress};
use kiln_bundle::{
    BundleWriter, CopyLaunch, DType, Executable, Image, ModelInfo, Program, WriteError,
};
use std::collections::BTreeMap;

/// Gives every executable its launches. Returns the kernels that they name, and the launch that copies
/// blocks.
///
/// # Errors
/// A model that the kernels cannot run.
pub fn lower_all(
    programs: &[Program],
    executables: &mut [Executable],
    model: &ModelInfo,
    dtype: DType,
    formats: &Formats,
) -> Result<(Vec<Kernel>, CopyLaunch), LowerError> {
    check(model, dtype, programs)?;
    let mut kernels = Kernels::default();
    for executable in executables {
        let program = &programs[executable.program as usize];
        let (phase, bounds) = (executable.phase, &executable.bounds);
        let lowered = lower(program, phase, bounds, model, dtype, formats, &mut kernels)?;
        executable.launches = lowered.launches;
        executable.workspace_bytes = lowered.workspace_bytes;
        executable.counters = lowered.counters;
    }
    let copy_blocks = copy_blocks(model, dtype, &mut kernels)?;
    Ok((kernels.into_vec(), copy_blocks))
}

/// Compiles the kernels for each target and writes them into the bundle. Without a toolchain, only
/// sources are written. Returns the images of each target.
///
/// # Errors
/// NVRTC, or the output.
pub fn build_images(
    writer: &mut BundleWriter,
    kernels: &[Kernel],
    targets: &[CudaTarget],
    toolchain: Option<&Nvrtc>,
    progress: &dyn Progress,
) -> Result<Vec<Vec<Image>>, CompileError> {
    for (name, text) in HEADERS {
        writer.add_file(&format!("cuda/{name}"), text.as_bytes())?;
    }
    for kernel in kernels {
        writer.add_file(&source_path(kernel), kernel.source.as_bytes())?;
    }
    let mut cubins = match toolchain {
        None => BTreeMap::new(),
        Some(toolchain) => build_cubins(writer, kernels, targets, toolchain, progress)?,
    };
    let mut images = vec![];
    for &target in targets {
        let of_target = kernels.iter().map(|kernel| Image {
            entry: kernel.entry.clone(),
            source: source_path(kernel),
            cubin: cubins.remove(&(target, kernel.entry.as_str())),
            block_threads: kernel.block_threads,
            dynamic_smem_bytes: kernel.dynamic_smem_bytes,
        });
        images.push(of_target.collect());
    }
    Ok(images)
}

fn source_path(kernel: &Kernel) -> String {
    format!("cuda/{}.cu", kernel.entry)
}

/// Paths of the cubins, by target and entry point.
fn build_cubins<'a>(
    writer: &mut BundleWriter,
    kernels: &'a [Kernel],
    targets: &[CudaTarget],
    toolchain: &Nvrtc,
    progress: &dyn Progress,
) -> Result<BTreeMap<(CudaTarget, &'a str), String>, CompileError> {
    let emitted: Vec<EmittedKernel> = kernels.iter().map(EmittedKernel::from).collect();
    let names: Vec<&str> = targets.iter().map(|target| target.name()).collect();
    let cache = Cache::from_env();
    let built = build_with(toolchain, &cache, &emitted, &HEADERS, &names, progress)?;
    let mut paths = BTreeMap::new();
    for (target, built) in targets.iter().zip(built.chunks(kernels.len().max(1))) {
        let mut reports: BTreeMap<&str, &Resources> = BTreeMap::new();
        for (kernel, built) in kernels.iter().zip(built) {
            let path = format!("cuda/{target}/{}.cubin", kernel.entry);
            writer.add_file(&path, &built.cubin)?;
            paths.insert((*target, kernel.entry.as_str()), path);
            reports.insert(&kernel.entry, &built.resources);
        }
        let path = format!("cuda/{target}/resources.json");
        let text = serde_json::to_vec_pretty(&reports).map_err(|error| WriteError::Io {
            action: "write",
            path: path.clone().into(),
            source: error.into(),
        })?;
        writer.add_file(&path, &text)?;
    }
    Ok(paths)
}
