//! CUDA devices: launch the records of a bundle's target on a GPU, through a [`Driver`].
//!
//! Everything is allocated when a bundle is loaded: weights, one arena and one workspace that the
//! executables share, the KV cache, and the lists of a step. A step enqueues its copies of KV blocks,
//! copies its lists, enqueues its executable's chain of launches, and copies the chosen tokens back. Nothing in between waits for
//! the host, so the next step can be enqueued before the tokens of the last one are read, except where
//! the host is to see rows or to choose tokens itself.

mod arch;
mod bind;
mod copies;
mod driver;
mod host_draws;
mod nvidia;
mod observe;
mod step_lists;
#[cfg(test)]
mod tests;

pub use arch::{best_target, is_cuda_target, target_to_compile};
pub use driver::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
pub use nvidia::{NvidiaDriver, NvidiaGpu};

use super::check::{Ground, check_step};
use super::memory::{Room, plan_memory};
use super::{Device, DeviceError, DeviceFacts, Observe, Step, StepId, StepOutput};
use crate::sampling::Sampler;
use bind::{Addresses, WeightPlan};
use copies::Copier;
use kiln_bundle::{
    Bundle, Executable, ModelInfo, NO_TOKEN, Target, WeightFile, kv_layer_bytes, packing::Layout,
};
use std::collections::VecDeque;
use step_lists::StepLayout;

/// The part of the memory left beside weights and activations that the KV cache takes at most,
/// unless a size is asked for.
const KV_CACHE_SHARE: f64 = 0.9;

/// How a CUDA device is set up.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Which GPU, in the driver's numbering.
    pub ordinal: u32,
    /// Size of the KV cache; none: enough for a full batch of full sequences, within limits.
    pub kv_cache_bytes: Option<u64>,
    /// Whether an executable's launches are recorded once and replayed; otherwise each step
    /// launches them one by one.
    pub graphs: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        CudaOptions {
            ordinal: 0,
            kv_cache_bytes: None,
            graphs: true,
        }
    }
}

/// See the module.
pub struct CudaDevice<D> {
    driver: D,
    facts: DeviceFacts,
    model: ModelInfo,
    target: Target,
    /// The norms of hidden states are applied on the host.
    weights: WeightFile,
    addresses: Addresses,
    /// By executable.
    chains: Vec<Chain>,
    copier: Copier,
    graphs: bool,
    /// The lists of the step at hand.
    lists: Vec<u32>,
    /// By slot: whether it holds a token.
    sampled: Vec<bool>,
    /// For the draws that kernels do not make.
    sampler: Sampler,
    next_step: u64,
    in_flight: VecDeque<InFlight>,
}

/// An executable, ready to run.
struct Chain {
    layout: StepLayout,
    launches: Vec<BoundLaunch>,
    /// Recorded when it runs first.
    graph: Option<GraphHandle>,
}

struct InFlight {
    id: StepId,
    executable: usize,
    draws: u32,
    result: Pending,
}

enum Pending {
    /// The chosen tokens are on their way.
    Download(Ticket),
    Done(Result<StepOutput, DeviceError>),
}

/// What loading works from.
struct CudaPlan<'a> {
    model: &'a ModelInfo,
    target: &'a Target,
}

impl CudaPlan<'_> {
    fn error(&self, problem: impl Into<String>) -> DeviceError {
        DeviceError::Plan {
            target: self.target.name.clone(),
            problem: problem.into(),
        }
    }

    /// Whether the target keeps to what this device can do, beyond what every sound manifest does.
    fn check(&self) -> Result<(), DeviceError> {
        let target = self.target;
        if target.layout != Layout::Tiles {
            return Err(self.error(format!("its weights are laid out as {:?}", target.layout)));
        }
        match target.executables.iter().find(|e| e.launches.is_empty()) {
            Some(executable) => {
                Err(self.error(format!("executable {} launches nothing", executable.name)))
            }
            None => Ok(()),
        }
    }

    /// A block of the KV cache, (L, 2, H, D/16, 256) elements.
    fn block_bytes(&self) -> u64 {
        let element_bytes = self.target.dtype.size_bytes() as u64;
        let layer_bytes = kv_layer_bytes(u64::from(self.model.hidden_size), element_bytes);
        u64::from(self.model.layers) * layer_bytes
    }

    /// The largest of what the executables, which share their memory, need.
    fn largest(&self, need: impl Fn(&Executable) -> u64) -> u64 {
        self.target.executables.iter().map(need).max().unwrap_or(0)
    }
}

impl<D: Driver> CudaDevice<D> {
    /// Loads a target of a bundle. `progress` gets the bytes of weights that are copied, and those
    /// of all.
    ///
    /// # Errors
    /// Any of [`DeviceError`] but [`DeviceError::Step`]; [`DeviceError::Memory`] before anything
    /// is allocated.
    pub fn load(
        bundle: &Bundle,
        target: &Target,
        mut driver: D,
        options: &CudaOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<CudaDevice<D>, DeviceError> {
        let manifest = bundle.manifest();
        let plan = CudaPlan {
            model: &manifest.model,
            target,
        };
        plan.check()?;
        let weights = bundle.weights(target)?;
        let weight_plan = WeightPlan::new(&weights);

        let slots = manifest.limits.max_batch;
        let word = size_of::<u32>() as u64;
        let arena_bytes = plan.largest(|e| e.arena_bytes);
        let workspace_bytes = plan.largest(|e| e.workspace_bytes);
        let counter_bytes = plan.largest(|e| u64::from(e.counters)) * word;
        let step_bytes = plan.largest(|e| StepLayout::new(&e.bounds).bytes());
        let slot_bytes = u64::from(slots) * word;
        let chosen_bytes = plan.largest(|e| u64::from(e.bounds.max_sequences)) * word;
        let gpu = driver.facts();
        let name = format!("cuda:{} ({}, {})", options.ordinal, gpu.name, target.name);
        let available = gpu.free_bytes;
        let fixed = [
            arena_bytes,
            workspace_bytes,
            counter_bytes,
            step_bytes,
            slot_bytes,
            chosen_bytes,
        ];
        let room = Room {
            place: &name,
            weight_bytes: weight_plan.bytes,
            arena_bytes: fixed.into_iter().fold(0, u64::saturating_add),
            block_bytes: plan.block_bytes(),
            available_bytes: Some(available),
            kv_share: KV_CACHE_SHARE,
            asked_bytes: options.kv_cache_bytes,
        };
        let (kv_blocks, memory) = plan_memory(&manifest.limits, &room)?;

        // Kernels first: what is wrong with them is known before gigabytes are copied.
        let kernels = bind::load_kernels(bundle, &plan, &mut driver)?;
        let mut allocate = |what: &str, bytes: u64| {
            let address = driver.allocate(bytes);
            address.map_err(|error| error.at(|| format!("{bytes} bytes for {what}")))
        };
        let addresses = Addresses {
            weights: allocate("weights", weight_plan.bytes)?,
            arena: allocate("activations", arena_bytes)?,
            workspace: allocate("the workspace", workspace_bytes)?,
            counters: allocate("counters", counter_bytes)?,
            kv_cache: allocate("the KV cache", memory.kv_bytes)?,
            step: allocate("a step's lists", step_bytes)?,
            last_sampled: allocate("sampled tokens", slot_bytes)?,
            chosen: allocate("chosen tokens", chosen_bytes)?,
        };
        weight_plan.upload(&weights, addresses.weights, &mut driver, progress)?;

        let chain = |executable: &Executable| {
            let layout = StepLayout::new(&executable.bounds);
            let launches = bind::bind(
                &plan,
                executable,
                &layout,
                &kernels,
                &weight_plan,
                &addresses,
            )?;
            Ok(Chain {
                layout,
                launches,
                graph: None,
            })
        };
        let chains: Result<Vec<Chain>, DeviceError> =
            target.executables.iter().map(chain).collect();
        let copier = bind::bind_copier(&plan, &kernels, &addresses)?;
        Ok(CudaDevice {
            facts: DeviceFacts {
                name,
                target: target.name.clone(),
                slots,
                kv_blocks,
                memory,
                available_bytes: Some(available),
            },
            driver,
            model: manifest.model.clone(),
            target: target.clone(),
            weights,
            addresses,
            chains: chains?,
            copier,
            graphs: options.graphs,
            lists: Vec::new(),
            sampled: vec![false; slots as usize],
            sampler: Sampler::default(),
            next_step: 0,
            in_flight: VecDeque::new(),
        })
    }

    /// A failure of the driver, with the executable that it happened in.
    fn at(&self, executable: usize, what: &str, error: DriverError) -> DeviceError {
        let name = &self.target.executables[executable].name;
        DeviceError::Driver(error.at(|| format!("{name}, {what}")))
    }

    /// Enqueues an executable's launches.
    fn run(&mut self, index: usize) -> Result<(), DeviceError> {
        let run = self.enqueue(index);
        run.map_err(|error| self.at(index, "its launches", error))
    }

    fn enqueue(&mut self, index: usize) -> Result<(), DriverError> {
        let chain = &mut self.chains[index];
        if !self.graphs {
            return chain
                .launches
                .iter()
                .try_for_each(|launch| self.driver.launch(launch));
        }
        let graph = match chain.graph {
            Some(graph) => graph,
            None => *chain.graph.insert(self.driver.record(&chain.launches)?),
        };
        self.driver.replay(graph)
    }

    /// Waits for all steps in flight, and keeps what they give until it is collected.
    fn settle(&mut self) {
        for mut step in std::mem::take(&mut self.in_flight) {
            let result = self.finish(step.result, step.executable, step.draws);
            step.result = Pending::Done(result);
            self.in_flight.push_back(step);
        }
    }

    fn finish(
        &mut self,
        result: Pending,
        executable: usize,
        draws: u32,
    ) -> Result<StepOutput, DeviceError> {
        let ticket = match result {
            Pending::Done(output) => return output,
            Pending::Download(ticket) => ticket,
        };
        match self.driver.wait(ticket) {
            Ok(chosen) => Ok(StepOutput {
                tokens: tokens(&chosen, draws),
                ..StepOutput::default()
            }),
            Err(error) => Err(self.at(executable, "waiting for its tokens", error)),
        }
    }
}

impl<D: Driver> Device for CudaDevice<D> {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn executables(&self) -> &[Executable] {
        &self.target.executables
    }

    fn pipeline_depth(&self) -> usize {
        1
    }

    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
        let ground = Ground {
            executables: &self.target.executables,
            facts: &self.facts,
            vocab_size: self.model.vocab_size,
        };
        check_step(step, &ground, |slot| self.sampled[slot as usize])?;
        let index = step.executable;
        self.copy_blocks(index, &step.copies)?;
        let layout = &self.chains[index].layout;
        let counts = layout.fill(step, self.model.vocab_size, &mut self.lists);
        let lists: &[u8] = bytemuck::cast_slice(&self.lists);
        let uploaded = self.driver.upload(self.addresses.step, lists);
        uploaded.map_err(|error| self.at(index, "its lists", error))?;

        let result = if step.observe == Observe::default() && !host_draws::any(step) {
            self.run(index)?;
            // A step that chooses nothing is waited for as well.
            let bytes = counts.draws.max(1) as usize * size_of::<u32>();
            let ticket = self.driver.download(self.addresses.chosen, bytes);
            Pending::Download(ticket.map_err(|error| self.at(index, "its tokens", error))?)
        } else {
            // Downloads are waited for in their order, and those of this step now.
            self.settle();
            let mut output = self.run_observed(index, &counts, step.observe)?;
            self.draw_on_host(index, step, &mut output)?;
            Pending::Done(Ok(output))
        };
        for sequence in step.sequences().filter(|sequence| sequence.draw.is_some()) {
            self.sampled[sequence.slot as usize] = true;
        }
        let id = StepId(self.next_step);
        self.next_step += 1;
        self.in_flight.push_back(InFlight {
            id,
            executable: index,
            draws: counts.draws,
            result,
        });
        Ok(id)
    }

    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError> {
        match self.in_flight.pop_front() {
            Some(step) if step.id == id => self.finish(step.result, step.executable, step.draws),
            other => {
                if let Some(step) = other {
                    self.in_flight.push_front(step);
                }
                Err(DeviceError::Step(format!(
                    "{id:?} is not the oldest step in flight"
                )))
            }
        }
    }

    /// Of copying: bytes read and bytes written.
    fn read_bandwidth(&mut self) -> Option<f64> {
        self.settle();
        self.driver.copy_bandwidth().ok().flatten()
    }
}

/// The first `draws` of the chosen tokens.
fn tokens(chosen: &[u8], draws: u32) -> Vec<Option<u32>> {
    let tokens = chosen.as_chunks::<4>().0.iter();
    tokens
        .take(draws as usize)
        .map(|&token| Some(u32::from_le_bytes(token)).filter(|&token| token != NO_TOKEN))
        .collect()
}
