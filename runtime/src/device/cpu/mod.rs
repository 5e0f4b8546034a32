//! The CPU: executes KernelSpecs on the host, within `submit`.
//!
//! Weights stay in their mapped file, but where they are to be near the threads that read them, on machines
//! with several memory nodes. The activation arena and the KV cache are anonymous maps,
//! which take memory as they are touched.

mod execute;
mod kv_memory;
#[cfg(test)]
mod tests;
mod weights;

use super::check::{Ground, check_step};
use super::memory::{Room, available_bytes, plan_memory};
use super::{Device, DeviceError, DeviceFacts, Step, StepId, StepOutput, SubmitPart};
use crate::cpu::{BANDWIDTH_BYTES, Cpu, Isa, Nodes, ThreadPool, physical_cores, read_bandwidth};
use crate::sampling::Sampler;
use execute::{Batch, Clock};
use kiln_bundle::packing::Layout;
use kiln_bundle::{ALIGN_BYTES, Bundle, DType, Executable, KernelSpec, Manifest, Target};
use kv_memory::KvMemory;
use memmap2::MmapMut;
use std::collections::VecDeque;
use std::io;
use weights::Weights;

/// Name of the target that this device runs.
const TARGET: &str = "cpu";
/// The part of the memory left beside weights and activations that the KV cache takes at most,
/// unless a size is asked for.
const KV_CACHE_SHARE: f64 = 0.5;

/// How the CPU device is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads of the kernels; none: one for each physical core.
    pub threads: Option<usize>,
    /// Size of the KV cache; none: enough for a full batch of full sequences, within limits.
    pub kv_cache_bytes: Option<u64>,
    /// Keep the weights from being paged out.
    pub lock_weights: bool,
    /// Keep each thread on a core of its own, the one that loads the device included.
    pub pin_threads: bool,
    /// Where the machine has several memory nodes, keep threads on them in order, and copy the weights, so
    /// that what a thread reads in decode steps is in the memory of its node.
    pub by_node: bool,
}

/// See the module.
pub struct CpuDevice {
    facts: DeviceFacts,
    manifest: Manifest,
    target: Target,
    weights: Weights,
    cpu: Cpu,
    /// f32 activations of the executable that runs.
    arena: MmapMut,
    kv: KvMemory,
    sampler: Sampler,
    /// By slot.
    last_sampled: Vec<Option<u32>>,
    batch: Batch,
    submit_parts: Vec<SubmitPart>,
    next_step: u64,
    outputs: VecDeque<(StepId, StepOutput)>,
}

impl CpuDevice {
    /// Loads the `cpu` target of a bundle.
    ///
    /// # Errors
    /// Any of [`DeviceError`] but [`DeviceError::Step`], before anything large is allocated.
    pub fn load(bundle: &Bundle, options: &CpuOptions) -> Result<CpuDevice, DeviceError> {
        let nodes = options.by_node.then(Nodes::of_machine);
        CpuDevice::load_on(nodes.as_ref(), bundle, options)
    }

    /// On the nodes of a machine, where they are to be looked at.
    fn load_on(
        nodes: Option<&Nodes>,
        bundle: &Bundle,
        options: &CpuOptions,
    ) -> Result<CpuDevice, DeviceError> {
        let manifest = bundle.manifest();
        let found = manifest.targets.iter().find(|target| target.name == TARGET);
        let target = found.ok_or_else(|| DeviceError::NoTarget {
            wanted: TARGET,
            found: manifest
                .targets
                .iter()
                .map(|target| target.name.clone())
                .collect(),
        })?;
        check_plan(target).map_err(plan_error)?;
        let mut weights = Weights::new(bundle.weights(target)?, target)?;

        let available = available_bytes();
        let arena_bytes = target.executables.iter().map(|e| e.arena_bytes).max();
        let room = Room {
            place: "this machine",
            weight_bytes: weights.bytes(),
            arena_bytes: arena_bytes.unwrap_or(0),
            block_bytes: KvMemory::block_bytes(&manifest.model, target.dtype),
            available_bytes: available,
            kv_share: KV_CACHE_SHARE,
            asked_bytes: options.kv_cache_bytes,
        };
        let (kv_blocks, memory) = plan_memory(&manifest.limits, &room)?;
        let threads = options.threads.unwrap_or_else(|| physical_cores().len());
        let pool = ThreadPool::new(threads).map_err(|source| DeviceError::Refused {
            what: format!("{threads} threads"),
            source,
        })?;
        let isa = Isa::detect().map_err(|error| plan_error(error.to_string()))?;
        let cpu = Cpu::new(pool, isa).map_err(|error| plan_error(error.to_string()))?;
        let refused = |what: &str| {
            let what = what.to_owned();
            move |source: io::Error| DeviceError::Refused { what, source }
        };
        let place = |nodes: &Nodes| nodes.place(&physical_cores(), threads, options.pin_threads);
        if let Some(places) = nodes.and_then(place) {
            let what = "to keep threads on memory nodes";
            cpu.pool().bind(&places).map_err(refused(what))?;
            let copied = weights.copied_by(target, cpu.pool());
            weights = copied.map_err(refused("memory for the weights"))?;
        } else if options.pin_threads {
            let what = format!("to pin {threads} threads to cores of their own");
            cpu.pool().pin().map_err(refused(&what))?;
        }
        if options.lock_weights {
            let what = "to lock the weights in memory (`ulimit -l` is the most it allows)";
            weights.lock().map_err(refused(what))?;
        }
        let arena = map_zeros(memory.arena_bytes).map_err(refused("memory for activations"))?;
        let kv = KvMemory::new(&manifest.model, target.dtype, kv_blocks as usize)
            .map_err(refused("memory for the KV cache"))?;
        let slots = manifest.limits.max_batch;
        let name = format!(
            "cpu ({isa}, {threads} thread{})",
            if threads == 1 { "" } else { "s" }
        );
        Ok(CpuDevice {
            facts: DeviceFacts {
                name,
                target: TARGET.to_owned(),
                gpu: None,
                slots,
                kv_blocks,
                memory,
                available_bytes: available,
            },
            manifest: manifest.clone(),
            target: target.clone(),
            weights,
            cpu,
            arena,
            kv,
            sampler: Sampler::default(),
            last_sampled: vec![None; slots as usize],
            batch: Batch::default(),
            submit_parts: Vec::new(),
            next_step: 0,
            outputs: VecDeque::new(),
        })
    }

    /// The instruction set that its kernels use.
    pub fn isa(&self) -> Isa {
        self.cpu.isa()
    }

    /// The threads that its kernels run on.
    pub fn threads(&self) -> usize {
        self.cpu.pool().threads()
    }
}

impl Device for CpuDevice {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn executables(&self) -> &[Executable] {
        &self.target.executables
    }

    fn pipeline_depth(&self) -> usize {
        0
    }

    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
        let clock = Clock::new(step.observe.times || step.observe.kernel_times);
        self.submit_parts.clear();
        let ground = Ground {
            executables: &self.target.executables,
            facts: &self.facts,
            vocab_size: self.manifest.model.vocab_size,
        };
        check_step(step, &ground, |slot| {
            self.last_sampled[slot as usize].is_some()
        })?;
        self.batch.fill(step, &self.last_sampled);
        let output = self.execute(step, clock)?;
        let id = StepId(self.next_step);
        self.next_step += 1;
        self.outputs.push_back((id, output));
        Ok(id)
    }

    fn submit_parts(&self) -> &[SubmitPart] {
        &self.submit_parts
    }

    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError> {
        match self.outputs.pop_front() {
            Some((oldest, output)) if oldest == id => Ok(output),
            _ => Err(DeviceError::Step(format!(
                "{id:?} is not the oldest step in flight"
            ))),
        }
    }

    fn times_in_passing(&self) -> bool {
        true
    }

    /// Of reading alone, with the threads and vectors of the kernels.
    fn read_bandwidth(&mut self) -> Option<f64> {
        let bandwidth = read_bandwidth(self.cpu.pool(), self.cpu.isa(), BANDWIDTH_BYTES).ok()?;
        Some(bandwidth.median)
    }
}

fn plan_error(problem: String) -> DeviceError {
    DeviceError::Plan {
        target: TARGET.to_owned(),
        problem,
    }
}

/// Whether the target keeps to what this device can do, beyond what every sound manifest does.
fn check_plan(target: &Target) -> Result<(), String> {
    if target.layout != Layout::Panels {
        return Err("its matrices do not lie in panels".to_owned());
    }
    if !target.dtype.is_float() {
        return Err("its KV cache is of integers".to_owned());
    }
    for program in &target.programs {
        let narrow = program
            .buffers
            .iter()
            .find(|buffer| buffer.dtype != DType::F32);
        if let Some(buffer) = narrow {
            return Err(format!(
                "it stores activations as {}, the CPU as f32",
                buffer.dtype
            ));
        }
        let samples = program.kernels.iter().any(
            |kernel| matches!(kernel, KernelSpec::Sample { logits } if *logits == program.logits),
        );
        if !samples {
            return Err(format!("program {} chooses no token", program.name));
        }
    }
    Ok(())
}

/// Zeroed memory that is not taken before it is touched.
fn map_zeros(bytes: u64) -> io::Result<MmapMut> {
    let bytes = usize::try_from(bytes).ok();
    let bytes = bytes.and_then(|bytes| bytes.max(1).checked_next_multiple_of(ALIGN_BYTES));
    MmapMut::map_anon(bytes.ok_or(io::ErrorKind::OutOfMemory)?)
}
