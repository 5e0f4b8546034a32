//! Fences around what kernels may touch, for the emulation.
//!
//! Activations are parts of one allocation, and so are temporaries, weights and the lists of a step: a
//! kernel that leaves its own part lands in another, and no sanitizer minds. [`fence`] changes a bundle
//! so that every part has a place of its own and a gap behind it, and [`FencedDriver`] forbids the
//! gaps. Besides, it forbids a kernel to touch what other kernels of the same step write before it has
//! waited for the previous one.

use crate::emulation::EmulatedDriver;
use kiln_bundle::{
    Argument, BLOCK_TOKENS, BlockCopies, Bundle, DType, Executable, Image, Launch, MANIFEST_FILE,
    Manifest, StepCounts, StepDraw, StepPointers, StepSequence, StepTile, Target, kv_layer_bytes,
};
use kiln_runtime::device::cuda::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
use std::{
    collections::BTreeMap,
    fs,
    mem::offset_of,
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

const WEIGHTS: &str = "weights";
/// At least so much lies behind every part.
const GAP_BYTES: u64 = 64;
/// Parts of the arena start at multiples of this.
const BUFFER_ALIGN_BYTES: u64 = 64;
/// Tensors and temporaries start at multiples of this.
const ALIGN_BYTES: u64 = 256;

/// An allocation, known by its size, and its parts: nobody may touch what lies between them.
#[derive(Clone, Debug)]
struct Fence {
    what: &'static str,
    bytes: u64,
    parts: Vec<Range<u64>>,
}

/// The fences of a target.
#[derive(Clone, Debug)]
pub struct Fences {
    fences: Vec<Fence>,
    /// Size of the one allocation whose zeros matter.
    counter_bytes: u64,
    /// Of the KV cache: a layer of a block, and a block.
    layer_bytes: u64,
    block_bytes: u64,
}

/// Gives every activation buffer and every temporary of the target's executables a place of its own:
/// rewrites the bundle's manifest.
///
/// # Panics
/// When the bundle is none, or has no such target.
pub fn fence(dir: &Path, target: &str) -> Fences {
    let bundle = Bundle::open(dir).expect("a bundle");
    let mut manifest = bundle.manifest().clone();
    let index = manifest.targets.iter().position(|t| t.name == target);
    let index = index.expect("a target of the bundle");
    let weights = fence_weights(&bundle, &manifest.targets[index]);
    let arena = fence_buffers(&mut manifest.targets[index]);
    let workspace = fence_temporaries(&mut manifest, index);
    let text = serde_json::to_vec(&manifest).expect("plain data");
    fs::write(dir.join(MANIFEST_FILE), text).expect("a writable bundle");
    let counters = manifest.targets[index].executables.iter();
    let counters = counters.map(|executable| executable.counters).max();
    let model = &manifest.model;
    let element_bytes = manifest.targets[index].dtype.size_bytes() as u64;
    let layer_bytes = kv_layer_bytes(u64::from(model.hidden_size), element_bytes);
    Fences {
        fences: vec![weights, arena, workspace],
        counter_bytes: u64::from(counters.unwrap_or(0)) * 4,
        layer_bytes,
        block_bytes: u64::from(model.layers) * layer_bytes,
    }
}

/// Between tensors, as the device lays them out: in the order of the file.
fn fence_weights(bundle: &Bundle, target: &Target) -> Fence {
    let weights = bundle.weights(target).expect("weights");
    let names = weights.names().into_iter();
    let mut tensors: Vec<&[u8]> = names
        .filter_map(|n| Some(weights.tensor(n)?.data))
        .collect();
    tensors.sort_by_key(|data| data.as_ptr());
    let mut parts = Parts::new(WEIGHTS, ALIGN_BYTES, 0);
    for data in tensors {
        parts.add(data.len() as u64);
    }
    parts.fence()
}

fn fence_buffers(target: &mut Target) -> Fence {
    let mut parts = Parts::new("activations", BUFFER_ALIGN_BYTES, GAP_BYTES);
    for executable in &mut target.executables {
        let buffers = &target.programs[executable.program as usize].buffers;
        for (offset, buffer) in executable.offsets_bytes.iter_mut().zip(buffers) {
            let elements = u64::from(executable.bounds.rows(buffer.rows)) * u64::from(buffer.width);
            *offset = parts.add(elements * buffer.dtype.size_bytes() as u64);
        }
    }
    let fence = parts.fence();
    for executable in &mut target.executables {
        executable.arena_bytes = fence.bytes;
    }
    fence
}

fn fence_temporaries(manifest: &mut Manifest, target: usize) -> Fence {
    let head_dim = u64::from(manifest.model.head_dim);
    let target = &mut manifest.targets[target];
    let mut parts = Parts::new("temporaries", ALIGN_BYTES, GAP_BYTES);
    for executable in &mut target.executables {
        // Where a kernel reads what another one left, it comes right behind it, but for the best
        // tokens of the LM head's blocks, whose place nothing else takes.
        let mut moved = BTreeMap::new();
        let mut launches = std::mem::take(&mut executable.launches);
        for launch in &mut launches {
            let image = &target.images[launch.image as usize];
            let written = temporary(image, launch, executable, head_dim);
            for (index, argument) in launch.arguments.iter_mut().enumerate() {
                let Argument::Workspace { offset_bytes } = argument else {
                    continue;
                };
                if let Some((_, bytes)) = written.filter(|(written, _)| *written == index) {
                    moved.insert(*offset_bytes, parts.add(bytes));
                }
                *offset_bytes = moved[offset_bytes];
            }
        }
        executable.launches = launches;
    }
    let fence = parts.fence();
    for executable in &mut target.executables {
        executable.workspace_bytes = fence.bytes;
    }
    fence
}

/// Which of a launch's arguments is a temporary that it fills, and the bytes that it fills.
fn temporary(
    image: &Image,
    launch: &Launch,
    executable: &Executable,
    head_dim: u64,
) -> Option<(usize, u64)> {
    let last = launch.arguments.len() - 1;
    let blocks: u64 = launch.grid.into_iter().map(u64::from).product();
    let warps = u64::from(image.block_threads / 32);
    let mut words = image.entry.split('_');
    match words.next()? {
        // rows_norm_768_f16_tokens
        "rows" => {
            let mut words = words.skip_while(|word| word.parse::<u64>().is_err());
            let width: u64 = words.next()?.parse().ok()?;
            let dtype = match words.next()? {
                "f32" => DType::F32,
                _ => DType::F16,
            };
            Some((last, blocks * width * dtype.size_bytes() as u64))
        }
        // The best token of each block, a row.
        "linear" if words.any(|word| word == "logits") => Some((
            last,
            u64::from(executable.bounds.max_logit_rows) * blocks * 8,
        )),
        // A row of scores for each draw.
        "sample" => {
            let vocab_size: u64 = words.next()?.parse().ok()?;
            Some((last, blocks * vocab_size * 4))
        }
        // A part for each of a block's chunks, which are its warps.
        "attention" if words.next()? == "decode" => Some((4, blocks * warps * (head_dim + 2) * 4)),
        _ => None,
    }
}

/// Lays out an allocation.
struct Parts {
    what: &'static str,
    align_bytes: u64,
    gap_bytes: u64,
    end: u64,
    parts: Vec<Range<u64>>,
}

impl Parts {
    fn new(what: &'static str, align_bytes: u64, gap_bytes: u64) -> Parts {
        Parts {
            what,
            align_bytes,
            gap_bytes,
            end: 0,
            parts: vec![],
        }
    }

    /// Where a part of this size lies.
    fn add(&mut self, bytes: u64) -> u64 {
        let start = self.end;
        self.end = (start + bytes + self.gap_bytes).next_multiple_of(self.align_bytes);
        self.parts.push(start..start + bytes);
        start
    }

    fn fence(self) -> Fence {
        Fence {
            what: self.what,
            bytes: self.end,
            parts: self.parts,
        }
    }
}

/// An emulated GPU under which every part of an allocation is fenced. Memory comes full of garbage,
/// NaNs as numbers, where kernels may not count on zeros.
pub struct FencedDriver {
    driver: EmulatedDriver,
    fences: Fences,
    /// Allocations; those that are fenced, with their fences.
    memory: Vec<(Range<u64>, Option<Fence>)>,
    /// Recorded launches.
    graphs: Vec<Vec<BoundLaunch>>,
    /// Of the launches that were replayed last.
    times: Vec<Duration>,
    /// The last upload that can be a step's lists.
    upload: (DeviceAddress, Vec<u8>),
}

impl FencedDriver {
    /// A device for a bundle that has been fenced.
    pub fn new(driver: EmulatedDriver, fences: &Fences) -> FencedDriver {
        FencedDriver {
            driver,
            fences: fences.clone(),
            memory: vec![],
            graphs: vec![],
            times: vec![],
            upload: (DeviceAddress(0), vec![]),
        }
    }

    /// The allocation that an address lies in.
    fn find(&self, at: u64) -> Option<&(Range<u64>, Option<Fence>)> {
        self.memory.iter().find(|(range, _)| range.contains(&at))
    }

    /// Forbids what is not this launch's to touch.
    fn fence(&mut self, launch: &BoundLaunch) {
        let kinds: Vec<&str> = self.fences.fences.iter().map(|fence| fence.what).collect();
        assert!(kinds.is_empty(), "nothing was allocated for {kinds:?}");
        let pointers = launch.parameters.first().and_then(|bytes| pointers(bytes));
        let pointers = pointers.expect("a kernel's first parameter is its step");
        let lists = (self.upload.0.0 == pointers.counts).then_some(&self.upload.1);
        let counts = lists.and_then(|bytes| counts(bytes));
        let counts = counts.expect("a step begins with its lists");
        self.fence_lists(&pointers, &counts);
        let arguments = launch.parameters[1..].iter();
        let addresses =
            arguments.filter_map(|bytes| Some(u64::from_le_bytes(*bytes.first_chunk()?)));
        let written = addresses.flat_map(|at| self.written(at, &pointers, &counts));
        self.driver.hide(&written.collect::<Vec<_>>());
    }

    /// Copies blocks while all others are forbidden.
    fn copy_blocks(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        let (words, _) = launch.parameters[0].as_chunks::<4>();
        let cache = launch.parameters[1].first_chunk();
        let cache = u64::from_le_bytes(*cache.expect("an address"));
        let (all, _) = self.find(cache).expect("an allocation").clone();
        let block_bytes = self.fences.block_bytes;
        let words = words.iter().take(2 * launch.grid[1] as usize);
        let blocks: Vec<(DeviceAddress, u64)> = words
            .map(|&word| u64::from(u32::from_le_bytes(word)) * block_bytes)
            .map(|offset| (DeviceAddress(cache + offset), block_bytes))
            .collect();
        self.driver.poison(DeviceAddress(cache), all.end - cache);
        for &(at, bytes) in &blocks {
            self.driver.unpoison(at, bytes);
        }
        self.driver.hide(&blocks);
        self.driver.launch(launch)?;
        self.driver.unpoison(DeviceAddress(cache), all.end - cache);
        Ok(())
    }

    /// Forbids what a step's lists do not use of their room.
    fn fence_lists(&mut self, pointers: &StepPointers, counts: &StepCounts) {
        let used = [
            (pointers.counts, size_of::<StepCounts>(), 1),
            (pointers.token_ids, 4, counts.tokens),
            (pointers.positions, 4, counts.tokens),
            (pointers.kv_slots, 4, counts.tokens),
            (pointers.logit_rows, 4, counts.logit_rows),
            (
                pointers.sequences,
                size_of::<StepSequence>(),
                counts.sequences,
            ),
            (pointers.tiles, size_of::<StepTile>(), counts.tiles),
            (pointers.draws, size_of::<StepDraw>(), counts.draws),
        ];
        let starts = used[1..].iter().map(|(start, ..)| *start);
        for ((start, size, count), next) in used.into_iter().zip(starts.chain([pointers.lists])) {
            let end = start + size as u64 * u64::from(count);
            self.driver.poison(DeviceAddress(end), next - end);
        }
        // Block tables and suppressed ids end where the copy did.
        let end = self.upload.0.0 + self.upload.1.len() as u64;
        let all = self.find(pointers.counts).map_or(end, |(all, _)| all.end);
        self.driver.poison(DeviceAddress(end), all - end);
    }

    /// What kernels of the step write of the memory at a launch's argument.
    fn written(
        &self,
        at: u64,
        pointers: &StepPointers,
        counts: &StepCounts,
    ) -> Vec<(DeviceAddress, u64)> {
        let Some((all, fence)) = self.find(at) else {
            return vec![];
        };
        match fence {
            Some(fence) if fence.what == WEIGHTS => vec![],
            Some(fence) => {
                let part = fence.parts.iter().find(|part| all.start + part.start == at);
                let part = part.expect("an argument is the start of a part");
                vec![(DeviceAddress(at), part.end - part.start)]
            }
            None if all.end - all.start == self.fences.counter_bytes => {
                vec![(DeviceAddress(at), self.fences.counter_bytes)]
            }
            // A layer of the KV cache, of which a step writes some blocks.
            None => {
                let slots = (pointers.kv_slots - pointers.counts) as usize;
                let slots = self.upload.1[slots..].as_chunks::<4>().0.iter();
                let slots = slots.take(counts.tokens as usize);
                let mut blocks: Vec<u64> = slots
                    .map(|&slot| u64::from(u32::from_le_bytes(slot)) / BLOCK_TOKENS as u64)
                    .collect();
                blocks.dedup();
                let place = |block| DeviceAddress(at + block * self.fences.block_bytes);
                let blocks = blocks.into_iter();
                blocks
                    .map(|block| (place(block), self.fences.layer_bytes))
                    .collect()
            }
        }
    }
}

fn pointers(bytes: &[u8]) -> Option<StepPointers> {
    if bytes.len() != size_of::<StepPointers>() {
        return None;
    }
    let at = |offset: usize| Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?));
    Some(StepPointers {
        counts: at(offset_of!(StepPointers, counts))?,
        token_ids: at(offset_of!(StepPointers, token_ids))?,
        positions: at(offset_of!(StepPointers, positions))?,
        kv_slots: at(offset_of!(StepPointers, kv_slots))?,
        logit_rows: at(offset_of!(StepPointers, logit_rows))?,
        sequences: at(offset_of!(StepPointers, sequences))?,
        tiles: at(offset_of!(StepPointers, tiles))?,
        draws: at(offset_of!(StepPointers, draws))?,
        lists: at(offset_of!(StepPointers, lists))?,
        last_sampled: at(offset_of!(StepPointers, last_sampled))?,
        chosen: at(offset_of!(StepPointers, chosen))?,
        continuations: at(offset_of!(StepPointers, continuations))?,
        histories: at(offset_of!(StepPointers, histories))?,
        token_counts: at(offset_of!(StepPointers, token_counts))?,
    })
}

fn counts(bytes: &[u8]) -> Option<StepCounts> {
    let (words, _) = bytes.as_chunks::<4>();
    let mut words = words.iter().map(|&word| u32::from_le_bytes(word));
    Some(StepCounts {
        tokens: words.next()?,
        sequences: words.next()?,
        logit_rows: words.next()?,
        tiles: words.next()?,
        draws: words.next()?,
    })
}

impl Driver for FencedDriver {
    fn facts(&self) -> &GpuFacts {
        self.driver.facts()
    }

    fn allocate(&mut self, bytes: u64) -> Result<DeviceAddress, DriverError> {
        let address = self.driver.allocate(bytes)?;
        if bytes != self.fences.counter_bytes {
            self.driver.upload(address, &vec![0xff; bytes as usize])?;
        }
        let fences = &mut self.fences.fences;
        let found = fences.iter().position(|fence| fence.bytes == bytes);
        let fence = found.map(|found| fences.remove(found));
        if let Some(fence) = &fence {
            let starts = fence.parts.iter().map(|part| part.start);
            let ends = starts.skip(1).chain([bytes]);
            for (part, end) in fence.parts.iter().zip(ends) {
                self.driver.poison(address.offset(part.end), end - part.end);
            }
        }
        self.memory.push((address.0..address.0 + bytes, fence));
        Ok(address)
    }

    fn load(&mut self, image: &KernelImage) -> Result<KernelHandle, DriverError> {
        self.driver.load(image)
    }

    fn upload(&mut self, to: DeviceAddress, bytes: &[u8]) -> Result<(), DriverError> {
        // What the lists of the last step left of their room may be needed now.
        if let Some((all, None)) = self.find(to.0) {
            self.driver
                .unpoison(DeviceAddress(all.start), all.end - all.start);
        }
        self.driver.upload(to, bytes)?;
        // A single token, chosen by the host, is no list.
        if counts(bytes).is_some() {
            self.upload = (to, bytes.to_vec());
        }
        Ok(())
    }

    fn launch(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        if launch.parameters[0].len() == size_of::<BlockCopies>() {
            return self.copy_blocks(launch);
        }
        self.fence(launch);
        self.driver.launch(launch)
    }

    fn record(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.graphs.push(launches.to_vec());
        Ok(GraphHandle(self.graphs.len() - 1))
    }

    fn record_timed(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.record(launches)
    }

    fn replay(&mut self, graph: GraphHandle) -> Result<(), DriverError> {
        let launches = self.graphs[graph.0].clone();
        self.times.clear();
        for launch in &launches {
            let start = Instant::now();
            self.launch(launch)?;
            self.times.push(start.elapsed());
        }
        Ok(())
    }

    fn launch_times(&mut self, _: GraphHandle) -> Result<Vec<Duration>, DriverError> {
        Ok(self.times.clone())
    }

    fn download(&mut self, from: DeviceAddress, bytes: usize) -> Result<Ticket, DriverError> {
        self.driver.download(from, bytes)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Vec<u8>, DriverError> {
        self.driver.wait(ticket)
    }
}
