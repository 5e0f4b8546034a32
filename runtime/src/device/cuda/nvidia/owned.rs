//! What the driver gives and takes back. Each is returned when it is dropped; the context, which the
//! others need, must be dropped last. Errors on the way out have nobody left to tell.

use super::super::DriverError;
use super::api::check;
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUevent_flags, CUevent_record_flags, CUgraph,
    CUgraphExec, CUmodule, CUstream, CUstream_flags,
};
use std::ptr;

/// The primary context of a device.
pub(super) struct Context {
    device: CUdevice,
    raw: CUcontext,
}

impl Context {
    pub(super) fn retain(device: CUdevice) -> Result<Context, DriverError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the device exists; `raw` is written.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check(result, "cuDevicePrimaryCtxRetain", "")?;
        Ok(Context { device, raw })
    }

    /// Contexts are current to a thread, and each call of the driver may come from another one.
    pub(super) fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained.
        let result = unsafe { sys::cuCtxSetCurrent(self.raw) };
        check(result, "cuCtxSetCurrent", "")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A queue of work that waits for no other.
pub(super) struct Stream(pub(super) CUstream);

impl Stream {
    pub(super) fn new() -> Result<Stream, DriverError> {
        let mut raw = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; `raw` is written.
        let result = unsafe { sys::cuStreamCreate(&raw mut raw, flags) };
        check(result, "cuStreamCreate", "")?;
        Ok(Stream(raw))
    }

    /// Waits for all work enqueued.
    pub(super) fn synchronize(&self, place: &str) -> Result<(), DriverError> {
        // SAFETY: the stream exists.
        let result = unsafe { sys::cuStreamSynchronize(self.0) };
        check(result, "cuStreamSynchronize", place)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// A point in a stream.
pub(super) struct Event(pub(super) CUevent);

impl Event {
    pub(super) fn new(timing: bool) -> Result<Event, DriverError> {
        let mut raw = ptr::null_mut();
        let flags = match timing {
            true => CUevent_flags::CU_EVENT_DEFAULT,
            false => CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        // SAFETY: a context is current; `raw` is written.
        let result = unsafe { sys::cuEventCreate(&raw mut raw, flags as u32) };
        check(result, "cuEventCreate", "")?;
        Ok(Event(raw))
    }

    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: both exist, in the current context.
        let result = unsafe { sys::cuEventRecord(self.0, stream.0) };
        check(result, "cuEventRecord", "")
    }

    /// Records it in a stream that is being captured, as a node of the graph: each replay records it
    /// anew.
    pub(super) fn record_in_graph(&self, stream: &Stream) -> Result<(), DriverError> {
        let flags = CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: both exist, in the current context.
        let result = unsafe { sys::cuEventRecordWithFlags(self.0, stream.0, flags) };
        check(result, "cuEventRecordWithFlags", "")
    }

    /// Waits until the work before it is done; at once where it was never recorded.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event exists.
        let result = unsafe { sys::cuEventSynchronize(self.0) };
        check(result, "cuEventSynchronize", "")
    }

    /// Milliseconds from `start` to here; both were recorded with timing and waited for.
    pub(super) fn since(&self, start: &Event) -> Result<f32, DriverError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events exist; `milliseconds` is written.
        let result = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, start.0, self.0) };
        check(result, "cuEventElapsedTime", "")?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Memory of the host that the GPU reads and writes itself, with the event that says when it has.
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
    pub(super) event: Event,
}

impl Pinned {
    pub(super) fn new(bytes: usize) -> Result<Pinned, DriverError> {
        let event = Event::new(false)?;
        let mut start = ptr::null_mut();
        // SAFETY: a context is current; `start` is written. Without flags the memory is cached, so
        // the host reads it as fast as any other.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, 0) };
        check(result, "cuMemHostAlloc", &format!("{bytes} bytes"))?;
        let start = start.cast::<u8>();
        // SAFETY: these bytes were just allocated.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned {
            start,
            bytes,
            event,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start
    }

    /// Its bytes, once no copy to or from it is under way.
    pub(super) fn settled(&mut self) -> Result<&mut [u8], DriverError> {
        self.event.wait()?;
        // SAFETY: the memory is initialised, and the copies that the event follows are done.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; the driver waits for copies before it drops this.
        let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
    }
}

/// Memory of the device.
pub(super) struct DeviceMemory(pub(super) CUdeviceptr);

impl DeviceMemory {
    pub(super) fn new(bytes: usize) -> Result<DeviceMemory, DriverError> {
        let mut address = 0;
        // SAFETY: a context is current; `address` is written.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        check(result, "cuMemAlloc", "")?;
        Ok(DeviceMemory(address))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once.
        let _ = unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Loaded machine code.
pub(super) struct Module(pub(super) CUmodule);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once.
        let _ = unsafe { sys::cuModuleUnload(self.0) };
    }
}

/// A recorded chain.
pub(super) struct Graph(CUgraph);

impl Graph {
    /// None where nothing was recorded.
    pub(super) fn new(raw: CUgraph) -> Option<Graph> {
        (!raw.is_null()).then_some(Graph(raw))
    }

    /// `events` are those that were recorded in it.
    pub(super) fn instantiate(
        &self,
        place: &str,
        events: Vec<Event>,
    ) -> Result<ExecutableGraph, DriverError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the graph exists; `raw` is written.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, self.0, 0) };
        check(result, "cuGraphInstantiate", place)?;
        Ok(ExecutableGraph {
            raw,
            place: place.to_owned(),
            events,
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: recorded once, destroyed once; what was instantiated from it stays.
        let _ = unsafe { sys::cuGraphDestroy(self.0) };
    }
}

/// A recorded chain, ready to be launched.
pub(super) struct ExecutableGraph {
    pub(super) raw: CUgraphExec,
    /// For errors: where its chain starts.
    pub(super) place: String,
    /// Recorded by each replay, in this order. They go after the graph, which names them.
    pub(super) events: Vec<Event>,
}

impl Drop for ExecutableGraph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}
