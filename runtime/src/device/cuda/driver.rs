//! What the CUDA device needs of a driver: memory, kernels, and one queue of work.
//!
//! There are two: [`super::NvidiaDriver`] calls libcuda; the tests' emulation compiles the bundle's
//! CUDA sources for the host. Everything above this trait is the same for both.

use std::path::PathBuf;
use std::time::Duration;

/// Address in the memory of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceAddress(pub u64);

impl DeviceAddress {
    /// So many bytes further on.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> DeviceAddress {
        DeviceAddress(self.0 + bytes)
    }
}

/// What a GPU is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    /// Product name.
    pub name: String,
    /// Major and minor compute capability.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most dynamic shared memory of a block.
    pub max_smem_bytes: u32,
    /// All of its memory.
    pub total_bytes: u64,
    /// What was free when the driver was opened.
    pub free_bytes: u64,
}

/// A compiled kernel to load.
#[derive(Clone, Debug)]
pub struct KernelImage {
    /// Name of the entry point.
    pub entry: String,
    /// CUDA source: the emulation compiles it.
    pub source: PathBuf,
    /// Machine code: the GPU runs it. Absent where only sources were emitted.
    pub cubin: Option<PathBuf>,
    /// Threads of a block.
    pub block_threads: u32,
    /// Dynamic shared memory of a block.
    pub dynamic_smem_bytes: u32,
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelHandle(pub usize);

/// A recorded chain of launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphHandle(pub usize);

/// A launch whose arguments are addresses and values.
#[derive(Clone, Debug)]
pub struct BoundLaunch {
    /// The kernel.
    pub kernel: KernelHandle,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Parameters in order, each in its own bytes (8 for an address, the whole struct for
    /// [`kiln_bundle::StepPointers`]).
    pub parameters: Vec<Vec<u8>>,
    /// For errors: executable and kernel, such as `decode-b1-kv256, kernel 3 (linear)`.
    pub place: String,
}

/// A failed call.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed{}: {problem}", at(place))]
pub struct DriverError {
    /// The call of the driver, such as `cuMemAlloc`.
    pub call: &'static str,
    /// Which kernel or file it was for; may be empty.
    pub place: String,
    /// What the driver said.
    pub problem: String,
}

impl DriverError {
    /// The same error at `place`, where the driver could name none.
    #[must_use]
    pub fn at(mut self, place: impl FnOnce() -> String) -> DriverError {
        if self.place.is_empty() {
            self.place = place();
        }
        self
    }
}

fn at(place: &str) -> String {
    if place.is_empty() {
        String::new()
    } else {
        format!(" ({place})")
    }
}

/// A GPU, or what stands in for one. Work is done in the order in which it is enqueued.
pub trait Driver: Send {
    /// What it is.
    fn facts(&self) -> &GpuFacts;

    /// Memory of zeros, kept as long as the driver.
    ///
    /// # Errors
    /// There is not enough.
    fn allocate(&mut self, bytes: u64) -> Result<DeviceAddress, DriverError>;

    /// Loads a kernel.
    ///
    /// # Errors
    /// Machine code for another device, an entry point that is missing, or too much shared memory.
    fn load(&mut self, image: &KernelImage) -> Result<KernelHandle, DriverError>;

    /// Enqueues a copy of `bytes` to the device through pinned staging memory, and returns as soon
    /// as `bytes` may be changed. Waits where all staging memory is in use.
    ///
    /// # Errors
    /// A failure of the device, now or of work enqueued before.
    fn upload(&mut self, to: DeviceAddress, bytes: &[u8]) -> Result<(), DriverError>;

    /// Enqueues one launch.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn launch(&mut self, launch: &BoundLaunch) -> Result<(), DriverError>;

    /// Records a chain of launches, to be replayed many times.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn record(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError>;

    /// Records a chain with an event before its first launch and one behind each. Here launches come
    /// one after another even where [`Driver::record`] lets them overlap: a launch can be told not to
    /// wait for the end of a kernel, but not of an event.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn record_timed(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError>;

    /// Of each launch of a chain recorded with events, the time from the event before it to the one
    /// behind it, when it was replayed last. Waits for all that was enqueued.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn launch_times(&mut self, graph: GraphHandle) -> Result<Vec<Duration>, DriverError>;

    /// Enqueues a recorded chain.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn replay(&mut self, graph: GraphHandle) -> Result<(), DriverError>;

    /// Enqueues a copy from the device and returns a ticket for it.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn download(&mut self, from: DeviceAddress, bytes: usize) -> Result<Ticket, DriverError>;

    /// Waits for a download, and for all that was enqueued before it. Tickets are redeemed in the
    /// order of their downloads.
    ///
    /// # Errors
    /// A failure of the device.
    fn wait(&mut self, ticket: Ticket) -> Result<Vec<u8>, DriverError>;

    /// Measures how fast the device's memory is copied, in GB/s (10^9 bytes a second), bytes read
    /// and bytes written together. None where there is nothing to measure it by.
    ///
    /// # Errors
    /// As [`Driver::upload`], and too little memory for the copy.
    fn copy_bandwidth(&mut self) -> Result<Option<f64>, DriverError> {
        Ok(None)
    }
}

/// A download in flight.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);
