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
mod draws;
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
use super::{Device, DeviceError, DeviceFacts, Step, StepId, StepOutput, SubmitPart, Tokens};
use crate::record::StepPart;
use crate::sampling::{Continuation, Draw, Sampler};
use bind::{Addresses, WeightPlan};
use copies::Copier;
use draws::{Slot, history_len, is_made_by_kernel};
use kiln_bundle::{
    Bundle, Executable, MAX_CONTINUATIONS, ModelInfo, NO_TOKEN, StepContinuation, Target,
    WeightFile, kv_layer_bytes, packing::Layout,
};
use std::collections::VecDeque;
use std::time::Instant;
use step_lists::{SlotGround, StepLayout};

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
    slots: Vec<Slot>,
    /// Words between the histories of two slots.
    history_stride: u32,
    /// For the draws that kernels do not make.
    sampler: Sampler,
    submit_parts: Vec<SubmitPart>,
    next_step: u64,
    in_flight: VecDeque<InFlight>,
}

/// An executable, ready to run.
struct Chain {
    layout: StepLayout,
    launches: Vec<BoundLaunch>,
    /// Recorded when it runs first.
    graph: Option<GraphHandle>,
    /// The same with events, recorded when its kernels are first timed.
    timed_graph: Option<GraphHandle>,
}

struct InFlight {
    id: StepId,
    executable: usize,
    /// By draw of a kernel: how many continuations it gives, or 0 for a token.
    draws: Vec<u32>,
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
        let draws = plan.largest(|e| u64::from(e.bounds.max_sequences));
        // Continuations, of two words, lie behind them.
        let chosen_bytes = (draws * word).next_multiple_of(size_of::<StepContinuation>() as u64);
        let continuation_bytes =
            draws * u64::from(MAX_CONTINUATIONS) * size_of::<StepContinuation>() as u64;
        // A draw appends to what its sequence has.
        let history_stride = plan.largest(|e| u64::from(e.bounds.max_kv_len)) + 1;
        let history_words = u64::from(slots).saturating_mul(history_stride);
        if u32::try_from(history_words).is_err() {
            return Err(plan.error("its slots keep more tokens than kernels can count"));
        }
        let count_words = u64::from(slots).saturating_mul(manifest.model.vocab_size.into());
        let gpu = driver.facts();
        let name = format!("cuda:{} ({}, {})", options.ordinal, gpu.name, target.name);
        let available = gpu.free_bytes;
        let fixed = [
            arena_bytes,
            workspace_bytes,
            counter_bytes,
            step_bytes,
            slot_bytes,
            chosen_bytes + continuation_bytes,
            history_words * word,
            count_words.saturating_mul(word),
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
        let mut addresses = Addresses {
            weights: allocate("weights", weight_plan.bytes)?,
            arena: allocate("activations", arena_bytes)?,
            workspace: allocate("the workspace", workspace_bytes)?,
            counters: allocate("counters", counter_bytes)?,
            kv_cache: allocate("the KV cache", memory.kv_bytes)?,
            step: allocate("a step's lists", step_bytes)?,
            last_sampled: allocate("sampled tokens", slot_bytes)?,
            chosen: allocate("chosen tokens", chosen_bytes + continuation_bytes)?,
            histories: allocate("histories", history_words * word)?,
            token_counts: allocate("counts of tokens", count_words.saturating_mul(word))?,
            ..Addresses::default()
        };
        addresses.continuations = addresses.chosen.offset(chosen_bytes);
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
                timed_graph: None,
            })
        };
        let chains: Result<Vec<Chain>, DeviceError> =
            target.executables.iter().map(chain).collect();
        let copier = bind::bind_copier(&plan, &kernels, &addresses)?;
        Ok(CudaDevice {
            facts: DeviceFacts {
                name,
                target: target.name.clone(),
                gpu: Some(options.ordinal),
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
            slots: vec![Slot::default(); slots as usize],
            history_stride: history_stride as u32,
            sampler: Sampler::default(),
            submit_parts: Vec::new(),
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

    /// Takes note of a part of `submit` that is over, where it is to be seen.
    fn ran(&mut self, part: StepPart, began: Option<Instant>) {
        self.submit_parts.extend(began.map(|began| SubmitPart {
            part,
            ran: began..Instant::now(),
        }));
    }

    /// Waits for all steps in flight, and keeps what they give until it is collected.
    fn settle(&mut self) {
        for mut step in std::mem::take(&mut self.in_flight) {
            let result = self.finish(step.result, step.executable, &step.draws);
            step.result = Pending::Done(result);
            self.in_flight.push_back(step);
        }
    }

    fn finish(
        &mut self,
        result: Pending,
        executable: usize,
        draws: &[u32],
    ) -> Result<StepOutput, DeviceError> {
        let ticket = match result {
            Pending::Done(output) => return output,
            Pending::Download(ticket) => ticket,
        };
        match self.driver.wait(ticket) {
            Ok(chosen) => Ok(self.chosen(&chosen, draws)),
            Err(error) => Err(self.at(executable, "waiting for its tokens", error)),
        }
    }
}

/// What the draws of a step read and leave.
impl<D: Driver> CudaDevice<D> {
    /// Whether the tokens that draws read are there: all where ids are fed, else in the slot.
    fn check_histories(&self, step: &Step) -> Result<(), DeviceError> {
        for sequence in step.sequences() {
            let needed = sequence
                .draw
                .map_or(0, |draw| history_len(&sequence, &draw));
            let found = match (&sequence.draw, sequence.tokens) {
                (Some(draw), Tokens::Ids(_)) => draw.history.len(),
                _ => self.slots[sequence.slot as usize].history_len,
            };
            if needed > 0 && found != needed {
                return Err(DeviceError::Step(format!(
                    "slot {} draws by {needed} tokens, of which {found} are there",
                    sequence.slot
                )));
            }
        }
        Ok(())
    }

    /// By draw, how many continuations the kernel gives, or 0 for a token.
    fn continuations_of_draws(&self, step: &Step) -> Vec<u32> {
        let vocab_size = self.model.vocab_size;
        let draws = step.sequences().filter_map(|sequence| sequence.draw);
        let count = |draw: Draw<'_>| match draw.beam {
            Some(beam) if is_made_by_kernel(&draw, vocab_size) => beam.count.min(vocab_size),
            Some(_) | None => 0,
        };
        draws.map(count).collect()
    }

    /// Bytes of what the kernels' draws leave. A step that chooses nothing is waited for as well.
    fn chosen_bytes(&self, draws: &[u32]) -> usize {
        let continuations: usize = draws.iter().map(|&count| count as usize).sum();
        match continuations {
            0 => draws.len().max(1) * size_of::<u32>(),
            _ => self.tokens_bytes() + continuations * size_of::<StepContinuation>(),
        }
    }

    /// Bytes before the continuations.
    fn tokens_bytes(&self) -> usize {
        (self.addresses.continuations.0 - self.addresses.chosen.0) as usize
    }

    /// Tokens and continuations from what the kernels' draws left.
    fn chosen(&self, bytes: &[u8], draws: &[u32]) -> StepOutput {
        let (tokens, _) = bytes.as_chunks::<4>();
        let continuations = bytes.get(self.tokens_bytes()..).unwrap_or_default();
        let mut continuations = continuations.as_chunks::<8>().0.iter().map(continuation);
        let mut output = StepOutput::default();
        for (&token, &count) in tokens.iter().zip(draws) {
            if count == 0 {
                let token = Some(u32::from_le_bytes(token));
                output.tokens.push(token.filter(|&token| token != NO_TOKEN));
                continue;
            }
            let best: Vec<Continuation> = continuations.by_ref().take(count as usize).collect();
            let is_number = best.first().is_some_and(|first| first.id != NO_TOKEN);
            output.continuations.push(match is_number {
                true => best,
                false => Vec::new(),
            });
        }
        output
    }

    /// Takes note of what a step leaves in the slots.
    fn note_draws(&mut self, step: &Step) {
        for sequence in step.sequences() {
            let Some(draw) = sequence.draw else { continue };
            // A beam is fed by value: its slot goes on with nothing.
            let history_len = match (draw.beam, history_len(&sequence, &draw)) {
                (Some(_), _) | (_, 0) => 0,
                (None, len) => len + 1,
            };
            self.slots[sequence.slot as usize] = Slot {
                sampled: true,
                history_len,
                counted: is_made_by_kernel(&draw, self.model.vocab_size),
            };
        }
    }
}

fn continuation(bytes: &[u8; 8]) -> Continuation {
    let pair = u64::from_le_bytes(*bytes);
    let score = f32::from_bits((pair >> 32) as u32);
    Continuation {
        id: pair as u32,
        score,
        rank: score,
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

    fn keeps_histories(&self) -> bool {
        true
    }

    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError> {
        let ground = Ground {
            executables: &self.target.executables,
            facts: &self.facts,
            vocab_size: self.model.vocab_size,
        };
        check_step(step, &ground, |slot| self.slots[slot as usize].sampled)?;
        self.check_histories(step)?;
        self.submit_parts.clear();
        let index = step.executable;
        let layout = &self.chains[index].layout;
        let slots = SlotGround {
            vocab_size: self.model.vocab_size,
            slots: &self.slots,
            history_stride: self.history_stride,
        };
        let counts = layout.fill(step, &slots, &mut self.lists);
        let draws = self.continuations_of_draws(step);
        let by_host = step
            .sequences()
            .filter_map(|sequence| sequence.draw)
            .any(|draw| !is_made_by_kernel(&draw, self.model.vocab_size));
        let now = || step.observe.times.then(Instant::now);
        let launching = now();
        self.copy_blocks(index, &step.copies)?;
        let lists: &[u8] = bytemuck::cast_slice(&self.lists);
        let uploaded = self.driver.upload(self.addresses.step, lists);
        uploaded.map_err(|error| self.at(index, "its lists", error))?;
        let waits = step.observe.is_any() || step.observe.kernel_times || by_host;
        let result = if !waits {
            self.run(index)?;
            let bytes = self.chosen_bytes(&draws);
            let ticket = self.driver.download(self.addresses.chosen, bytes);
            let ticket = ticket.map_err(|error| self.at(index, "its tokens", error))?;
            self.ran(StepPart::Launch, launching);
            Pending::Download(ticket)
        } else {
            // What follows waits for the device in between.
            self.ran(StepPart::Launch, launching);
            // Downloads are waited for in their order, and those of this step now.
            self.settle();
            let mut output = self.run_observed(index, &counts, step.observe, &draws)?;
            let drawing = now();
            self.draw_on_host(index, step, &mut output)?;
            self.ran(StepPart::Sampling, drawing.filter(|_| by_host));
            Pending::Done(Ok(output))
        };
        self.note_draws(step);
        let id = StepId(self.next_step);
        self.next_step += 1;
        self.in_flight.push_back(InFlight {
            id,
            executable: index,
            draws,
            result,
        });
        Ok(id)
    }

    fn submit_parts(&self) -> &[SubmitPart] {
        &self.submit_parts
    }

    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError> {
        match self.in_flight.pop_front() {
            Some(step) if step.id == id => self.finish(step.result, step.executable, &step.draws),
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
