//! A GPU behind libcuda, which is loaded when it is first asked for.
//!
//! Work goes to one stream. On GPUs of compute capability 9.0 and up, the launches of a recorded
//! chain overlap: each starts before the one ahead has ended and waits for it inside the kernel
//! (`wait_for_previous` in the kernels' headers). The first launch of a chain does not, since it
//! follows a copy; nor do launches that are enqueued one by one.

mod api;
mod cubin;
mod owned;

pub use api::NvidiaGpu;

use super::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
use api::check;
use cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction, CUfunction_attribute, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUresult, CUstreamCaptureMode,
};
use owned::{Context, DeviceMemory, Event, ExecutableGraph, Graph, Module, Pinned, Stream};
use std::collections::VecDeque;
use std::ffi::{CString, c_void};
use std::ptr;
use std::time::Duration;

/// Pieces of staging memory: one is filled while others are copied.
const STAGING_PIECES: usize = 4;
/// Bytes of a piece.
const STAGING_BYTES: usize = 4 << 20;
/// The least pinned memory of a download.
const DOWNLOAD_BYTES: usize = 4096;
/// Dynamic shared memory that a kernel gets without asking.
const PLAIN_SMEM_BYTES: u32 = 48 << 10;
/// Compute capability from which launches may overlap.
const OVERLAP_CAPABILITY: (u32, u32) = (9, 0);

/// See the module.
///
/// Fields are dropped in their order: the context last.
pub struct NvidiaDriver {
    facts: GpuFacts,
    kernels: Vec<Kernel>,
    staging: Vec<Pinned>,
    next_piece: usize,
    downloads: VecDeque<Download>,
    /// Pinned memory of downloads that are done.
    spare: Vec<Pinned>,
    next_ticket: u64,
    graphs: Vec<ExecutableGraph>,
    modules: Vec<Module>,
    memory: Vec<DeviceMemory>,
    stream: Stream,
    context: Context,
}

// SAFETY: the handles belong to a context that is made current on whichever thread a call comes
// from, and every use of them goes through `&mut self` or `self` by value.
unsafe impl Send for NvidiaDriver {}

struct Kernel {
    function: CUfunction,
    block_threads: u32,
    smem_bytes: u32,
    /// What it expects of each parameter.
    parameter_bytes: Vec<usize>,
}

struct Download {
    ticket: u64,
    memory: Pinned,
    bytes: usize,
}

impl NvidiaDriver {
    /// Takes hold of a GPU.
    ///
    /// # Errors
    /// There is no driver or no such GPU, or it is too old for kiln.
    pub fn open(ordinal: u32) -> Result<NvidiaDriver, DriverError> {
        api::init()?;
        let (device, gpu) = api::find(ordinal)?;
        gpu.check_age()?;
        let context = Context::retain(device)?;
        context.make_current()?;
        let stream = Stream::new()?;
        let staging: Result<Vec<Pinned>, DriverError> = (0..STAGING_PIECES)
            .map(|_| Pinned::new(STAGING_BYTES))
            .collect();
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; both are written.
        let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check(result, "cuMemGetInfo", "")?;
        let attribute = |id| api::attribute(device, id);
        let facts = GpuFacts {
            name: gpu.name,
            compute_capability: gpu.compute_capability,
            multiprocessors: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )?,
            max_smem_bytes: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            total_bytes: total as u64,
            free_bytes: free as u64,
        };
        Ok(NvidiaDriver {
            facts,
            kernels: Vec::new(),
            staging: staging?,
            next_piece: 0,
            downloads: VecDeque::new(),
            spare: Vec::new(),
            next_ticket: 0,
            graphs: Vec::new(),
            modules: Vec::new(),
            memory: Vec::new(),
            stream,
            context,
        })
    }

    /// Records `count` pieces of work of another library, with an event before the first and one behind
    /// each, as [`Driver::record_timed`] does with launches. `enqueue` gets a piece's index and the
    /// stream that is being captured, a `CUstream`.
    ///
    /// # Errors
    /// A failure of the device, and those of `enqueue`.
    pub fn record_work(
        &mut self,
        place: &str,
        count: usize,
        mut enqueue: impl FnMut(usize, *mut c_void) -> Result<(), DriverError>,
    ) -> Result<GraphHandle, DriverError> {
        self.capture_timed(place, count, |driver, index| {
            enqueue(index, driver.stream.0.cast())
        })
    }

    /// Enqueues a launch; with `overlap`, one that may start before the launch ahead has ended.
    fn enqueue(&self, launch: &BoundLaunch, overlap: bool) -> Result<(), DriverError> {
        let place = &launch.place;
        let kernel = self.kernels.get(launch.kernel.0);
        let kernel = kernel.ok_or_else(|| misuse("cuLaunchKernelEx", place, "no such kernel"))?;
        let given = launch.parameters.iter().map(Vec::len);
        if !given.eq(kernel.parameter_bytes.iter().copied()) {
            let given: Vec<usize> = launch.parameters.iter().map(Vec::len).collect();
            let problem = format!(
                "its parameters have {given:?} bytes, the kernel's {:?}",
                kernel.parameter_bytes
            );
            return Err(misuse("cuLaunchKernelEx", place, &problem));
        }
        let mut parameters: Vec<*mut c_void> = launch
            .parameters
            .iter()
            .map(|bytes| bytes.as_ptr().cast_mut().cast())
            .collect();
        let mut attributes = [CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        }];
        let [x, y, z] = launch.grid;
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: kernel.block_threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.smem_bytes,
            hStream: self.stream.0,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(overlap),
        };
        // SAFETY: stream and function exist in the current context; there are as many parameters,
        // of as many bytes, as the function reads, and it reads them before the call returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(result, "cuLaunchKernelEx", place)
    }

    /// Records what `enqueue` puts into the stream; `events` are those that it records.
    fn capture(
        &mut self,
        place: &str,
        events: Vec<Event>,
        enqueue: impl FnOnce(&NvidiaDriver, &[Event]) -> Result<(), DriverError>,
    ) -> Result<GraphHandle, DriverError> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream exists, and is not being captured: every capture ends below.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.stream.0, mode) };
        check(result, "cuStreamBeginCapture", place)?;
        let enqueued = enqueue(self, &events);
        let mut graph = ptr::null_mut();
        // SAFETY: the stream is being captured; `graph` is written. After a launch that failed the
        // capture has to be ended all the same.
        let result = unsafe { sys::cuStreamEndCapture(self.stream.0, &raw mut graph) };
        let graph = Graph::new(graph);
        enqueued?;
        check(result, "cuStreamEndCapture", place)?;
        let graph = graph.ok_or_else(|| misuse("cuStreamEndCapture", place, "it gave no graph"))?;
        self.graphs.push(graph.instantiate(place, events)?);
        Ok(GraphHandle(self.graphs.len() - 1))
    }

    /// Records `count` calls of `enqueue`, with an event before the first and one behind each.
    fn capture_timed(
        &mut self,
        place: &str,
        count: usize,
        mut enqueue: impl FnMut(&NvidiaDriver, usize) -> Result<(), DriverError>,
    ) -> Result<GraphHandle, DriverError> {
        self.context.make_current()?;
        let events: Result<Vec<Event>, DriverError> =
            (0..=count).map(|_| Event::new(true)).collect();
        let events = events.map_err(|error| error.at(|| place.to_owned()))?;
        self.capture(place, events, |driver, events| {
            for (index, event) in events.iter().enumerate() {
                if index > 0 {
                    enqueue(driver, index - 1)?;
                }
                let recorded = event.record_in_graph(&driver.stream);
                recorded.map_err(|error| error.at(|| place.to_owned()))?;
            }
            Ok(())
        })
    }

    /// Pinned memory of at least so many bytes.
    fn pinned(&mut self, bytes: usize) -> Result<Pinned, DriverError> {
        match self.spare.iter().position(|memory| memory.len() >= bytes) {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Pinned::new(bytes.next_power_of_two().max(DOWNLOAD_BYTES)),
        }
    }

    fn load_module(&mut self, image: &KernelImage) -> Result<CUfunction, DriverError> {
        let entry = &image.entry;
        let Some(path) = &image.cubin else {
            return Err(misuse(
                "loading a kernel",
                entry,
                "the bundle has no machine code: it was compiled with --emit-only",
            ));
        };
        let file = path.display().to_string();
        let bytes = std::fs::read(path)
            .map_err(|error| misuse("loading a kernel", &file, &error.to_string()))?;
        cubin::check(&bytes).map_err(|problem| misuse("loading a kernel", &file, &problem))?;
        let name = CString::new(entry.as_str())
            .map_err(|error| misuse("loading a kernel", entry, &error.to_string()))?;
        let mut module = ptr::null_mut();
        // SAFETY: the context is current; the bytes are an ELF file whose sections lie inside them,
        // and are not needed after the call; `module` is written.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, bytes.as_ptr().cast()) };
        check(result, "cuModuleLoadData", &file)?;
        self.modules.push(Module(module));
        let mut function = ptr::null_mut();
        // SAFETY: the module was just loaded; `name` ends in a zero; `function` is written.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check(result, "cuModuleGetFunction", &format!("{entry} in {file}"))?;
        Ok(function)
    }

    /// Milliseconds of copying `bytes` bytes from one place of the device to another.
    fn time_copy(&self, [from, to]: [&DeviceMemory; 2], bytes: usize) -> Result<f32, DriverError> {
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        start.record(&self.stream)?;
        // SAFETY: both places have so many bytes, and outlive the wait below.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.stream.0) };
        check(result, "cuMemcpyDtoDAsync", "")?;
        end.record(&self.stream)?;
        end.wait()?;
        end.since(&start)
    }
}

/// For errors: where a chain starts.
fn place_of(launches: &[BoundLaunch]) -> &str {
    launches.first().map_or("", |launch| launch.place.as_str())
}

/// An error of kiln's own making, in the place of a call that was not made.
fn misuse(call: &'static str, place: &str, problem: &str) -> DriverError {
    DriverError {
        call,
        place: place.to_owned(),
        problem: problem.to_owned(),
    }
}

impl Driver for NvidiaDriver {
    fn facts(&self) -> &GpuFacts {
        &self.facts
    }

    fn allocate(&mut self, bytes: u64) -> Result<DeviceAddress, DriverError> {
        self.context.make_current()?;
        // The driver refuses to allocate nothing.
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        let memory = DeviceMemory::new(bytes)?;
        let address = memory.0;
        self.memory.push(memory);
        // SAFETY: the memory was just allocated and has so many bytes.
        let result = unsafe { sys::cuMemsetD8Async(address, 0, bytes, self.stream.0) };
        check(result, "cuMemsetD8Async", "")?;
        Ok(DeviceAddress(address))
    }

    fn load(&mut self, image: &KernelImage) -> Result<KernelHandle, DriverError> {
        self.context.make_current()?;
        let entry = &image.entry;
        let (needed, most) = (image.dynamic_smem_bytes, self.facts.max_smem_bytes);
        if needed > most {
            let problem = format!("it needs {needed} bytes of shared memory, the GPU has {most}");
            return Err(misuse("loading a kernel", entry, &problem));
        }
        let function = self.load_module(image)?;
        if needed > PLAIN_SMEM_BYTES {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists; its module is kept.
            let result = unsafe { sys::cuFuncSetAttribute(function, attribute, needed as i32) };
            check(result, "cuFuncSetAttribute", entry)?;
        }
        self.kernels.push(Kernel {
            function,
            block_threads: image.block_threads,
            smem_bytes: needed,
            parameter_bytes: parameter_bytes(function, entry)?,
        });
        Ok(KernelHandle(self.kernels.len() - 1))
    }

    fn upload(&mut self, to: DeviceAddress, bytes: &[u8]) -> Result<(), DriverError> {
        self.context.make_current()?;
        for (index, piece) in bytes.chunks(STAGING_BYTES).enumerate() {
            let to = to.offset((index * STAGING_BYTES) as u64);
            let staging = &mut self.staging[self.next_piece];
            self.next_piece = (self.next_piece + 1) % STAGING_PIECES;
            staging.settled()?[..piece.len()].copy_from_slice(piece);
            let from = staging.as_mut_ptr().cast_const().cast();
            // SAFETY: the staging memory has the bytes and is not touched before its event; `to` is
            // the caller's, within what it allocated.
            let result =
                unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from, piece.len(), self.stream.0) };
            check(result, "cuMemcpyHtoDAsync", "")?;
            staging.event.record(&self.stream)?;
        }
        Ok(())
    }

    fn launch(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        self.context.make_current()?;
        self.enqueue(launch, false)
    }

    fn record(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.context.make_current()?;
        let overlap = self.facts.compute_capability >= OVERLAP_CAPABILITY;
        self.capture(place_of(launches), Vec::new(), |driver, _| {
            let mut launches = launches.iter().enumerate();
            launches.try_for_each(|(index, launch)| driver.enqueue(launch, overlap && index > 0))
        })
    }

    fn record_timed(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.capture_timed(place_of(launches), launches.len(), |driver, index| {
            driver.enqueue(&launches[index], false)
        })
    }

    fn launch_times(&mut self, graph: GraphHandle) -> Result<Vec<Duration>, DriverError> {
        self.context.make_current()?;
        let graph = self.graphs.get(graph.0);
        let graph = graph.ok_or_else(|| misuse("cuEventElapsedTime", "", "no such graph"))?;
        // Until the GPU comes to them, events of a graph are as the replay before has left them:
        // it is the stream that has to be waited for.
        self.stream.synchronize(&graph.place)?;
        let between = graph.events.windows(2).map(|pair| {
            let milliseconds = pair[1].since(&pair[0]);
            let milliseconds = milliseconds.map_err(|error| error.at(|| graph.place.clone()))?;
            Ok(Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).unwrap_or_default())
        });
        between.collect()
    }

    fn replay(&mut self, graph: GraphHandle) -> Result<(), DriverError> {
        self.context.make_current()?;
        let graph = self.graphs.get(graph.0);
        let graph = graph.ok_or_else(|| misuse("cuGraphLaunch", "", "no such graph"))?;
        // SAFETY: graph and stream exist.
        let result = unsafe { sys::cuGraphLaunch(graph.raw, self.stream.0) };
        check(result, "cuGraphLaunch", &graph.place)
    }

    fn download(&mut self, from: DeviceAddress, bytes: usize) -> Result<Ticket, DriverError> {
        self.context.make_current()?;
        let mut memory = self.pinned(bytes)?;
        let to = memory.as_mut_ptr().cast();
        // SAFETY: the pinned memory has room and is kept, untouched, until its event; `from` is the
        // caller's, within what it allocated.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from.0, bytes, self.stream.0) };
        let recorded =
            check(result, "cuMemcpyDtoHAsync", "").and_then(|()| memory.event.record(&self.stream));
        if let Err(error) = recorded {
            // A copy may be under way without an event to wait for: let the stream come to rest.
            let _ = self.stream.synchronize("");
            return Err(error);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.downloads.push_back(Download {
            ticket,
            memory,
            bytes,
        });
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Vec<u8>, DriverError> {
        self.context.make_current()?;
        match self.downloads.pop_front() {
            Some(mut download) if download.ticket == ticket.0 => {
                let bytes = download.memory.settled()?[..download.bytes].to_vec();
                self.spare.push(download.memory);
                Ok(bytes)
            }
            other => {
                if let Some(download) = other {
                    self.downloads.push_front(download);
                }
                Err(misuse(
                    "cuEventSynchronize",
                    "",
                    &format!("{ticket:?} is not the oldest download"),
                ))
            }
        }
    }

    /// Times copies of 512 MiB between two places of the device.
    fn copy_bandwidth(&mut self) -> Result<Option<f64>, DriverError> {
        const BYTES: usize = 512 << 20;
        const PASSES: usize = 9;
        self.context.make_current()?;
        let (from, to) = (DeviceMemory::new(BYTES)?, DeviceMemory::new(BYTES)?);
        // SAFETY: the memory was just allocated and has so many bytes.
        let result = unsafe { sys::cuMemsetD8Async(from.0, 1, BYTES, self.stream.0) };
        check(result, "cuMemsetD8Async", "")?;
        // The first pass warms up.
        let passes: Result<Vec<f32>, DriverError> = (0..=PASSES)
            .map(|_| self.time_copy([&from, &to], BYTES))
            .collect();
        let mut milliseconds = passes?.split_off(1);
        milliseconds.sort_unstable_by(f32::total_cmp);
        let seconds = f64::from(milliseconds[PASSES / 2]) / 1e3;
        Ok(Some(2.0 * BYTES as f64 / seconds / 1e9))
    }
}

/// Bytes of each parameter of a kernel.
fn parameter_bytes(function: CUfunction, entry: &str) -> Result<Vec<usize>, DriverError> {
    let mut all = Vec::new();
    loop {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function exists; both are written.
        let result = unsafe {
            sys::cuFuncGetParamInfo(function, all.len(), &raw mut offset, &raw mut bytes)
        };
        // So the driver says that there are no more.
        if result == CUresult::CUDA_ERROR_INVALID_VALUE {
            return Ok(all);
        }
        check(result, "cuFuncGetParamInfo", entry)?;
        all.push(bytes);
    }
}

impl Drop for NvidiaDriver {
    /// Nothing may be under way when memory is given back.
    fn drop(&mut self) {
        let _ = self.context.make_current();
        let _ = self.stream.synchronize("");
    }
}
