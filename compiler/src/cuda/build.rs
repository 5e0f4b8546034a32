//! All kernels of a model: sources in, cubins out.

use super::{Cache, Compiled, Kernel, Key, Nvrtc, NvrtcError, Resources, Source};
use crate::Progress;
use kiln_bundle::trace::Label;
use rayon::prelude::*;
use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

/// A kernel as source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmittedKernel {
    /// Its entry point, `extern "C"` in the source.
    pub entry: String,
    /// CUDA C++.
    pub source: String,
}

impl From<&Kernel> for EmittedKernel {
    fn from(kernel: &Kernel) -> EmittedKernel {
        EmittedKernel {
            entry: kernel.entry.clone(),
            source: kernel.source.clone(),
        }
    }
}

/// A kernel as machine code for one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltKernel {
    /// Its entry point.
    pub entry: String,
    /// The target, `sm_90a`.
    pub arch: String,
    /// An ELF image that has the entry point.
    pub cubin: Vec<u8>,
    /// What it takes of a multiprocessor.
    pub resources: Resources,
    /// What the compiler said.
    pub log: String,
    /// Whether the cubin was compiled before.
    pub cached: bool,
}

/// Why kernels were not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The machine's, or the emitter's mistake.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// The emitter's mistake.
    #[error("the source of kernel {entry} has no such entry point; compiled for {arch}:\n{log}")]
    NoEntry {
        /// The kernel.
        entry: String,
        /// The target.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// The caller asked for it through [`Progress::cancelled`].
    #[error("cancelled")]
    Cancelled,
}

/// Builds each kernel for each target.
///
/// Results are in the order of `archs`, and of `kernels` within each. Equal sources are compiled
/// once. Progress is told in bytes of source.
///
/// # Errors
/// Any of [`BuildError`]; of several that of the first result.
pub fn build_with(
    nvrtc: &Nvrtc,
    cache: &Cache,
    kernels: &[EmittedKernel],
    headers: &[(&str, &str)],
    archs: &[&str],
    progress: &dyn Progress,
) -> Result<Vec<BuiltKernel>, BuildError> {
    // What a whole build would fail of is found before its first minute of work.
    for arch in archs {
        nvrtc.check_target(arch)?;
    }
    // Kernels with the same text share one compilation, named after the first.
    let mut units: Vec<&EmittedKernel> = vec![];
    let mut unit_of_text = HashMap::new();
    let unit_of_kernel: Vec<usize> = kernels
        .iter()
        .map(|kernel| {
            *unit_of_text
                .entry(kernel.source.as_str())
                .or_insert_with(|| {
                    units.push(kernel);
                    units.len() - 1
                })
        })
        .collect();
    let jobs: Vec<(&str, &EmittedKernel)> = archs
        .iter()
        .flat_map(|&arch| units.iter().map(move |&unit| (arch, unit)))
        .collect();

    let total_bytes: usize = jobs.iter().map(|(_, unit)| unit.source.len()).sum();
    let done_bytes = AtomicU64::new(0);
    let compiled: Vec<Result<(Compiled, bool), BuildError>> = jobs
        .par_iter()
        // Their times differ by a factor of ten.
        .with_max_len(1)
        .map(|(arch, unit)| {
            if progress.cancelled() {
                return Err(BuildError::Cancelled);
            }
            let source = Source {
                name: &format!("{}.cu", unit.entry),
                text: &unit.source,
                headers,
            };
            let began = Instant::now();
            let compiled = compile(nvrtc, cache, &source, arch)?;
            let label = Label::new(unit.entry.clone()).with("target", *arch);
            let from = if compiled.1 { "the cache" } else { "NVRTC" };
            progress.worked(label.with("from", from), began);
            let bytes = unit.source.len() as u64;
            let done = done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress.advance(done, total_bytes as u64);
            Ok(compiled)
        })
        .collect();
    let compiled: Vec<(Compiled, bool)> = compiled.into_iter().collect::<Result<_, _>>()?;

    let results = archs.iter().enumerate().flat_map(|(at, &arch)| {
        let of_arch = &compiled[at * units.len()..];
        kernels
            .iter()
            .zip(&unit_of_kernel)
            .map(move |(kernel, &unit)| (arch, kernel, &of_arch[unit]))
    });
    results
        .map(|(arch, kernel, (compiled, cached))| {
            let Some(resources) = Resources::parse(&compiled.log, &kernel.entry) else {
                return Err(BuildError::NoEntry {
                    entry: kernel.entry.clone(),
                    arch: arch.to_owned(),
                    log: compiled.log.clone(),
                });
            };
            Ok(BuiltKernel {
                entry: kernel.entry.clone(),
                arch: arch.to_owned(),
                cubin: compiled.cubin.clone(),
                resources,
                log: compiled.log.clone(),
                cached: *cached,
            })
        })
        .collect()
}

/// The result, and whether it was cached.
fn compile(
    nvrtc: &Nvrtc,
    cache: &Cache,
    source: &Source<'_>,
    arch: &str,
) -> Result<(Compiled, bool), NvrtcError> {
    let key = Key::new(nvrtc, source, arch);
    if let Some(compiled) = cache.get(&key) {
        return Ok((compiled, true));
    }
    let compiled = nvrtc.compile(source, arch)?;
    cache.put(&key, &compiled);
    Ok((compiled, false))
}
