//! What launch records name, as addresses.

use super::step_lists::{StepLayout, pointer_bytes};
use super::{BoundLaunch, Copier, CudaPlan, DeviceAddress, Driver, KernelHandle, KernelImage};
use crate::device::DeviceError;
use kiln_bundle::{Argument, Bundle, Executable, StepPointers, WeightFile, kv_layer_bytes};
use std::collections::HashMap;

/// Tensors start at this alignment on the device.
const TENSOR_ALIGN_BYTES: u64 = 256;
/// A tensor is copied in pieces of this size, between which progress is told.
const UPLOAD_BYTES: usize = 4 << 20;

/// Where a target's memory lies on the device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Addresses {
    pub(super) weights: DeviceAddress,
    pub(super) arena: DeviceAddress,
    pub(super) workspace: DeviceAddress,
    pub(super) counters: DeviceAddress,
    pub(super) kv_cache: DeviceAddress,
    /// The lists of the step at hand.
    pub(super) step: DeviceAddress,
    /// u32 by slot.
    pub(super) last_sampled: DeviceAddress,
    /// u32 by draw.
    pub(super) chosen: DeviceAddress,
    /// Behind `chosen`, so that both come to the host in one copy.
    pub(super) continuations: DeviceAddress,
    /// u32, [`SlotGround::history_stride`](super::step_lists::SlotGround) for each slot.
    pub(super) histories: DeviceAddress,
    /// u32 (slots, V).
    pub(super) token_counts: DeviceAddress,
}

/// Where each tensor lies in the memory of the weights.
#[derive(Debug)]
pub(super) struct WeightPlan {
    /// In the order of the file, so that a disk is read in sequence.
    tensors: Vec<(String, u64)>,
    offsets: HashMap<String, u64>,
    /// Bytes in all.
    pub(super) bytes: u64,
}

impl WeightPlan {
    pub(super) fn new(weights: &WeightFile) -> WeightPlan {
        let mut views: Vec<_> = weights
            .names()
            .into_iter()
            .filter_map(|name| Some((name, weights.tensor(name)?.data)))
            .collect();
        views.sort_by_key(|(_, data)| data.as_ptr().addr());
        let mut bytes = 0u64;
        let mut tensors = Vec::with_capacity(views.len());
        for (name, data) in views {
            tensors.push((name.to_owned(), bytes));
            // Sizes of parts of one file do not overflow.
            bytes += (data.len() as u64).next_multiple_of(TENSOR_ALIGN_BYTES);
        }
        WeightPlan {
            offsets: tensors.iter().cloned().collect(),
            tensors,
            bytes,
        }
    }

    /// Copies all tensors to the device. `progress` gets the bytes done and the bytes in all.
    pub(super) fn upload(
        &self,
        weights: &WeightFile,
        to: DeviceAddress,
        driver: &mut impl Driver,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), DeviceError> {
        for (name, offset) in &self.tensors {
            let Some(tensor) = weights.tensor(name) else {
                continue;
            };
            let mut done = *offset;
            for piece in tensor.data.chunks(UPLOAD_BYTES) {
                driver
                    .upload(to.offset(done), piece)
                    .map_err(|error| error.at(|| format!("tensor {name}")))?;
                done += piece.len() as u64;
                progress(done, self.bytes);
            }
        }
        progress(self.bytes, self.bytes);
        Ok(())
    }
}

/// Loads the images that launches name, each once, by their index.
pub(super) fn load_kernels(
    bundle: &Bundle,
    plan: &CudaPlan<'_>,
    driver: &mut impl Driver,
) -> Result<Vec<Option<KernelHandle>>, DeviceError> {
    let target = plan.target;
    let mut kernels = vec![None; target.images.len()];
    let launches = target.executables.iter().flat_map(|e| &e.launches);
    let images = launches.map(|launch| launch.image);
    let copies = target.copy_blocks.iter().map(|launch| launch.image);
    for index in images.chain(copies) {
        let index = index as usize;
        if kernels[index].is_some() {
            continue;
        }
        let image = &target.images[index];
        let loaded = driver.load(&KernelImage {
            entry: image.entry.clone(),
            source: bundle.dir().join(&image.source),
            cubin: image.cubin.as_ref().map(|path| bundle.dir().join(path)),
            block_threads: image.block_threads,
            dynamic_smem_bytes: image.dynamic_smem_bytes,
        });
        kernels[index] = Some(loaded.map_err(|error| error.at(|| image.entry.clone()))?);
    }
    Ok(kernels)
}

/// An executable's launches with their arguments in place.
pub(super) fn bind(
    plan: &CudaPlan<'_>,
    executable: &Executable,
    layout: &StepLayout,
    kernels: &[Option<KernelHandle>],
    weights: &WeightPlan,
    addresses: &Addresses,
) -> Result<Vec<BoundLaunch>, DeviceError> {
    let program = &plan.target.programs[executable.program as usize];
    let step = layout.pointers(addresses);
    let bound = |launch: &kiln_bundle::Launch| {
        let kernel = &program.kernels[launch.kernel as usize];
        let place = format!(
            "{}, kernel {} ({})",
            executable.name,
            launch.kernel,
            kernel.name()
        );
        let missing = |what: &str| plan.error(format!("{place}: {what} is missing"));
        let parameter = |argument: &Argument| {
            parameter(plan, executable, argument, &step, weights, addresses)
                .ok_or_else(|| missing(&format!("{argument:?}")))
        };
        let parameters: Result<Vec<_>, _> = launch.arguments.iter().map(parameter).collect();
        Ok(BoundLaunch {
            kernel: kernels[launch.image as usize].ok_or_else(|| missing("its image"))?,
            grid: launch.grid,
            parameters: parameters?,
            place,
        })
    };
    executable.launches.iter().map(bound).collect()
}

/// The launch that copies blocks.
pub(super) fn bind_copier(
    plan: &CudaPlan<'_>,
    kernels: &[Option<KernelHandle>],
    addresses: &Addresses,
) -> Result<Copier, DeviceError> {
    let launch = plan.target.copy_blocks.as_ref();
    let bound = launch.and_then(|launch| {
        Some(Copier {
            kernel: kernels[launch.image as usize]?,
            grid_x: launch.grid_x,
            kv_cache: addresses.kv_cache,
        })
    });
    bound.ok_or_else(|| plan.error("it has no launch that copies blocks"))
}

/// The bytes of a parameter; none for a tensor that the weight file lacks.
fn parameter(
    plan: &CudaPlan<'_>,
    executable: &Executable,
    argument: &Argument,
    step: &StepPointers,
    weights: &WeightPlan,
    addresses: &Addresses,
) -> Option<Vec<u8>> {
    let address = match argument {
        Argument::Step => return Some(pointer_bytes(step)),
        Argument::Buffer(id) => addresses
            .arena
            .offset(executable.offsets_bytes[id.0 as usize]),
        Argument::Weight(name) => addresses.weights.offset(*weights.offsets.get(name)?),
        Argument::KvLayer(layer) => {
            let element_bytes = plan.target.dtype.size_bytes() as u64;
            let layer_bytes = kv_layer_bytes(u64::from(plan.model.hidden_size), element_bytes);
            addresses.kv_cache.offset(u64::from(*layer) * layer_bytes)
        }
        Argument::Workspace { offset_bytes } => addresses.workspace.offset(*offset_bytes),
        Argument::Counters => addresses.counters,
    };
    Some(address.0.to_le_bytes().to_vec())
}
