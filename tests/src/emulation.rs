//! CUDA without a GPU: a [`Driver`] that compiles a bundle's CUDA sources for the host and runs
//! their threads as fibers (`tests/emulation`).
//!
//! Work is done when it is enqueued. Beyond running kernels, it finds mistakes: barriers and warp
//! collectives that not all threads reach, blocks that never wait for the previous kernel, copies
//! to shared memory that nobody waits for, writes beside an allocation, and, with
//! [`EmulationOptions::sanitize`], whatever the address and undefined-behaviour sanitizers find, and
//! what is touched before the previous kernel has ended.
//! The order of threads and blocks follows a seed, so that a missing barrier shows.

use crate::repository;
use kiln_runtime::device::cuda::{
    BoundLaunch, DeviceAddress, Driver, DriverError, GpuFacts, GraphHandle, KernelHandle,
    KernelImage, Ticket,
};
use libloading::{Library, Symbol};
use std::{
    alloc::{self, Layout},
    collections::{BTreeMap, VecDeque},
    env,
    ffi::{CStr, CString, c_char, c_int, c_void},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Output},
    ptr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// How kernels are compiled and run.
#[derive(Clone, Debug)]
pub struct EmulationOptions {
    /// Chooses the order of blocks and threads; 0 is the natural order.
    pub seed: u64,
    /// With AddressSanitizer and UndefinedBehaviorSanitizer: only within [`rerun_sanitized`], and
    /// about three times slower.
    pub sanitize: bool,
    /// What the device says of itself. Allocations beyond `free_bytes` fail.
    pub facts: GpuFacts,
}

impl Default for EmulationOptions {
    fn default() -> Self {
        EmulationOptions {
            seed: 0,
            sanitize: env::var_os(SANITIZED).is_some(),
            facts: GpuFacts {
                name: "emulated".to_owned(),
                compute_capability: (9, 0),
                multiprocessors: 4,
                max_smem_bytes: 227 << 10,
                total_bytes: 1 << 30,
                free_bytes: 1 << 30,
            },
        }
    }
}

/// An emulated GPU.
pub struct EmulatedDriver {
    options: EmulationOptions,
    memory: BTreeMap<u64, Allocation>,
    hidden: Vec<RawRange>,
    allocated_bytes: u64,
    kernels: Vec<Kernel>,
    graphs: Vec<Graph>,
    downloads: VecDeque<(u64, Vec<u8>)>,
    next_ticket: u64,
    pool: Pool,
}

/// A recorded chain, and how long its launches took when they ran last.
struct Graph {
    launches: Vec<BoundLaunch>,
    times: Vec<Duration>,
}

struct Kernel {
    library: Arc<KernelLibrary>,
    image: KernelImage,
}

impl EmulatedDriver {
    /// A device with nothing on it.
    ///
    /// # Panics
    /// When it is to sanitize in a process without the sanitizer.
    pub fn new(options: EmulationOptions) -> EmulatedDriver {
        assert!(
            !options.sanitize || sanitizer_hook(POISON).is_some(),
            "a sanitized emulation runs within rerun_sanitized"
        );
        EmulatedDriver {
            options,
            memory: BTreeMap::new(),
            hidden: vec![],
            allocated_bytes: 0,
            kernels: vec![],
            graphs: vec![],
            downloads: VecDeque::new(),
            next_ticket: 0,
            pool: Pool(ptr::null_mut(), None),
        }
    }

    /// Changes the order of blocks and threads for the launches that follow.
    pub fn set_seed(&mut self, seed: u64) {
        self.options.seed = seed;
    }

    /// Forbids kernels to touch these bytes, such as a gap between two buffers of an arena. Without
    /// sanitizers it does nothing. Ends at a multiple of 8 or with the allocation.
    pub fn poison(&mut self, address: DeviceAddress, bytes: u64) {
        self.mark(POISON, address, bytes);
    }

    /// Allows what [`EmulatedDriver::poison`] forbade.
    pub fn unpoison(&mut self, address: DeviceAddress, bytes: u64) {
        self.mark(UNPOISON, address, bytes);
    }

    /// Forbids the launches that follow to touch these bytes before their threads have waited for the
    /// previous kernel: what other kernels of a step write. Without sanitizers it does nothing.
    ///
    /// # Panics
    /// When a range lies in no allocation.
    pub fn hide(&mut self, ranges: &[(DeviceAddress, u64)]) {
        let known = |&(at, bytes): &(DeviceAddress, u64)| self.find(at, bytes).is_some();
        assert!(ranges.iter().all(known), "hidden memory is allocated");
        let range = |&(at, bytes): &(DeviceAddress, u64)| RawRange {
            start: at.0,
            bytes: bytes as usize,
        };
        self.hidden = ranges.iter().map(range).collect();
    }

    fn mark(&self, hook: &[u8], address: DeviceAddress, bytes: u64) {
        if let Some(hook) = sanitizer_hook(hook).filter(|_| self.find(address, bytes).is_some()) {
            // SAFETY: the range lies in one allocation of ours. The sanitizer keeps a map of what
            // may be touched and does not touch the memory itself.
            unsafe { hook(address.0 as *const c_void, bytes as usize) };
        }
    }

    /// The allocation that a range lies in.
    fn find(&self, address: DeviceAddress, bytes: u64) -> Option<&Allocation> {
        let (start, found) = self.memory.range(..=address.0).next_back()?;
        let end = address.0.checked_add(bytes)?;
        (end <= start + found.bytes as u64).then_some(found)
    }

    fn check_range(
        &self,
        call: &'static str,
        address: DeviceAddress,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let known = self.find(address, bytes as u64).is_some();
        let problem = format!("{bytes} bytes at {:#x} are in no allocation", address.0);
        known.then_some(()).ok_or_else(|| error(call, "", problem))
    }

    fn run(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        let failed = |problem| error("launch", &launch.place, problem);
        let kernel = self.kernels.get(launch.kernel.0);
        let kernel = kernel.ok_or_else(|| failed("no such kernel".to_owned()))?;
        kernel
            .library
            .launch(
                &kernel.image,
                launch,
                &self.hidden,
                &self.options,
                &mut self.pool,
            )
            .map_err(|problem| failed(format!("`{}`: {problem}", kernel.image.entry)))?;
        let damaged = self.memory.values().find_map(Allocation::damage);
        damaged.map_or(Ok(()), |damage| {
            Err(failed(format!("`{}` {damage}", kernel.image.entry)))
        })
    }
}

fn error(call: &'static str, place: &str, problem: String) -> DriverError {
    DriverError {
        call,
        place: place.to_owned(),
        problem,
    }
}

impl Driver for EmulatedDriver {
    fn facts(&self) -> &GpuFacts {
        &self.options.facts
    }

    fn allocate(&mut self, bytes: u64) -> Result<DeviceAddress, DriverError> {
        let free = self.options.facts.free_bytes - self.allocated_bytes;
        if bytes > free {
            let problem = format!("out of memory: {bytes} bytes of {free}");
            return Err(error("allocate", "", problem));
        }
        let allocation = Allocation::new(bytes as usize, self.options.sanitize);
        let address = allocation.data() as u64;
        self.allocated_bytes += bytes;
        self.memory.insert(address, allocation);
        Ok(DeviceAddress(address))
    }

    fn load(&mut self, image: &KernelImage) -> Result<KernelHandle, DriverError> {
        let failed = |problem| {
            let place = format!("{}, `{}`", image.source.display(), image.entry);
            error("load", &place, problem)
        };
        let most = self.options.facts.max_smem_bytes;
        if image.dynamic_smem_bytes > most {
            let found = image.dynamic_smem_bytes;
            let problem = format!("{found} bytes of shared memory: a block has {most}");
            return Err(failed(problem));
        }
        let library = load(&image.source, &image.entry, self.options.sanitize).map_err(failed)?;
        self.kernels.push(Kernel {
            library,
            image: image.clone(),
        });
        Ok(KernelHandle(self.kernels.len() - 1))
    }

    fn upload(&mut self, to: DeviceAddress, bytes: &[u8]) -> Result<(), DriverError> {
        self.check_range("upload", to, bytes.len())?;
        // SAFETY: the range lies in an allocation, which nothing borrows: kernels run only within
        // `launch` and `replay`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn launch(&mut self, launch: &BoundLaunch) -> Result<(), DriverError> {
        self.run(launch)
    }

    fn record(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.graphs.push(Graph {
            launches: launches.to_vec(),
            times: Vec::new(),
        });
        Ok(GraphHandle(self.graphs.len() - 1))
    }

    /// The host's clock stands for events: launches are done when they are enqueued.
    fn record_timed(&mut self, launches: &[BoundLaunch]) -> Result<GraphHandle, DriverError> {
        self.record(launches)
    }

    fn launch_times(&mut self, graph: GraphHandle) -> Result<Vec<Duration>, DriverError> {
        let graph = self.graphs.get(graph.0);
        let graph = graph.ok_or_else(|| error("launch_times", "", "no such graph".to_owned()))?;
        Ok(graph.times.clone())
    }

    fn replay(&mut self, graph: GraphHandle) -> Result<(), DriverError> {
        let no_graph = || error("replay", "", "no such graph".to_owned());
        let launches = self.graphs.get(graph.0).map(|graph| graph.launches.clone());
        let mut times = Vec::new();
        for launch in launches.ok_or_else(no_graph)? {
            let start = Instant::now();
            self.run(&launch)?;
            times.push(start.elapsed());
        }
        self.graphs[graph.0].times = times;
        Ok(())
    }

    fn download(&mut self, from: DeviceAddress, bytes: usize) -> Result<Ticket, DriverError> {
        self.check_range("download", from, bytes)?;
        let mut copy = vec![0; bytes];
        // SAFETY: as in `upload`; every byte of an allocation has been written.
        unsafe { ptr::copy_nonoverlapping(from.0 as *const u8, copy.as_mut_ptr(), bytes) };
        self.next_ticket += 1;
        self.downloads.push_back((self.next_ticket, copy));
        Ok(Ticket(self.next_ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Vec<u8>, DriverError> {
        match self.downloads.pop_front() {
            Some((oldest, bytes)) if oldest == ticket.0 => Ok(bytes),
            _ => {
                let problem = format!("{ticket:?} is not the oldest download");
                Err(error("wait", "", problem))
            }
        }
    }
}

/// Device memory with a zone of known bytes on both sides. Where the sanitizer runs it has zones of
/// its own, which also catch reads; then there are none here, and the size is exact.
struct Allocation {
    start: *mut u8,
    layout: Layout,
    zone: usize,
    bytes: usize,
}

// SAFETY: the memory is owned, and touched only through `&mut EmulatedDriver`.
unsafe impl Send for Allocation {}

/// Of CUDA's allocations.
const ALIGNMENT: usize = 256;
const ZONE_BYTES: usize = 256;
/// As a number: a NaN, which spreads where a kernel reads beside its memory.
const ZONE: u8 = 0xff;

impl Allocation {
    fn new(bytes: usize, exact: bool) -> Allocation {
        let zone = if exact { 0 } else { ZONE_BYTES };
        let layout = Layout::from_size_align((bytes + 2 * zone).max(1), ALIGNMENT)
            .expect("a size that fits into memory");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        if start.is_null() {
            alloc::handle_alloc_error(layout);
        }
        let allocation = Allocation {
            start,
            layout,
            zone,
            bytes,
        };
        for zone in allocation.zones() {
            // SAFETY: zones lie within the allocation.
            unsafe { ptr::write_bytes(zone, ZONE, allocation.zone) };
        }
        allocation
    }

    fn data(&self) -> *mut u8 {
        self.start.wrapping_add(self.zone)
    }

    /// Before and after the data.
    fn zones(&self) -> [*mut u8; 2] {
        [self.start, self.data().wrapping_add(self.bytes)]
    }

    /// What was written beside the data, in words.
    fn damage(&self) -> Option<String> {
        self.zones().into_iter().find_map(|zone| {
            // SAFETY: zones lie within the allocation, were filled when it was made, and no kernel
            // runs.
            let bytes = unsafe { std::slice::from_raw_parts(zone, self.zone) };
            if *bytes == [ZONE; ZONE_BYTES][..self.zone] {
                return None;
            }
            let at = bytes.iter().position(|&byte| byte != ZONE)?;
            let offset = zone as i64 + at as i64 - self.data() as i64;
            let size = self.bytes;
            Some(format!(
                "wrote at offset {offset} of an allocation of {size} bytes"
            ))
        })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once. What was poisoned is freed as well:
        // the sanitizer marks the whole of it anew.
        unsafe { alloc::dealloc(self.start, self.layout) };
    }
}

/// A kernel's shared object. It has the state of one launch, hence the lock.
struct KernelLibrary {
    library: Mutex<Library>,
}

/// Stacks of a block's threads, kept from launch to launch, and whose function frees them.
struct Pool(*mut c_void, Option<Arc<KernelLibrary>>);

// SAFETY: the stacks are used only within a launch, through `&mut EmulatedDriver`.
unsafe impl Send for Pool {}

impl Drop for Pool {
    fn drop(&mut self) {
        let Some(kernel) = &self.1 else { return };
        let library = lock(&kernel.library);
        type Free = unsafe extern "C" fn(*mut c_void);
        // SAFETY: every kernel's object exports this function, which takes what a launch made.
        if let Ok(free) = unsafe { library.get::<Free>(b"kiln_free_pool") } {
            // SAFETY: as above; no launch is under way.
            unsafe { free(self.0) };
        }
    }
}

/// `Launch` of `tests/emulation/fibers.hpp`.
#[repr(C)]
struct RawLaunch {
    place: *const c_char,
    grid: [u32; 3],
    block_threads: u32,
    dynamic_smem_bytes: u32,
    max_smem_bytes: u32,
    seed: u64,
    parameters: *const RawParameter,
    parameter_count: usize,
    hidden: *const RawRange,
    hidden_count: usize,
    pool: *mut *mut c_void,
    error: *mut c_char,
    error_bytes: usize,
}

#[repr(C)]
struct RawParameter {
    bytes: *const u8,
    size: usize,
}

/// An address is a number here: the memory is the driver's, not the launch's.
#[repr(C)]
struct RawRange {
    start: u64,
    bytes: usize,
}

impl KernelLibrary {
    fn launch(
        self: &Arc<Self>,
        image: &KernelImage,
        launch: &BoundLaunch,
        hidden: &[RawRange],
        options: &EmulationOptions,
        pool: &mut Pool,
    ) -> Result<(), String> {
        let place = CString::new(launch.place.replace('\0', " ")).unwrap_or_default();
        let parameters: Vec<RawParameter> = launch
            .parameters
            .iter()
            .map(|bytes| RawParameter {
                bytes: bytes.as_ptr(),
                size: bytes.len(),
            })
            .collect();
        let mut error: [c_char; 2048] = [0; 2048];
        pool.1.get_or_insert_with(|| self.clone());
        let raw = RawLaunch {
            place: place.as_ptr(),
            grid: launch.grid,
            block_threads: image.block_threads,
            dynamic_smem_bytes: image.dynamic_smem_bytes,
            max_smem_bytes: options.facts.max_smem_bytes,
            seed: options.seed,
            parameters: parameters.as_ptr(),
            parameter_count: parameters.len(),
            hidden: hidden.as_ptr(),
            hidden_count: hidden.len(),
            pool: &raw mut pool.0,
            error: error.as_mut_ptr(),
            error_bytes: error.len(),
        };
        let library = lock(&self.library);
        type Emulate = unsafe extern "C" fn(*const RawLaunch) -> c_int;
        // SAFETY: launch.cpp defines it with this signature.
        let emulate: Symbol<'_, Emulate> =
            unsafe { library.get(b"kiln_emulate") }.map_err(|error| error.to_string())?;
        // SAFETY: all pointers outlive the call, and the lock keeps other launches out. What the
        // kernel does with its arguments is what is being tested.
        if unsafe { emulate(&raw) } == 0 {
            return Ok(());
        }
        // SAFETY: the emulation ends its message with a zero, within the buffer.
        let message = unsafe { CStr::from_ptr(error.as_ptr()) };
        Err(message.to_string_lossy().into_owned())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles kernels ahead of [`Driver::load`], as many at a time as there are processors.
///
/// # Errors
/// The compiler's message.
pub fn compile_all(images: &[KernelImage], sanitize: bool) -> Result<(), String> {
    let queue = Mutex::new(images.iter());
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let work = || {
        // The queue is locked for taking an image alone.
        while let Some(image) = { lock(&queue).next() } {
            load(&image.source, &image.entry, sanitize)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("compiling does not panic"))
    })
}

/// An object that is made once and stays loaded as long as the process.
type Loaded = Arc<OnceLock<Result<Arc<KernelLibrary>, String>>>;

/// The kernel's shared object: loaded before, compiled before, or compiled now.
fn load(source: &Path, entry: &str, sanitize: bool) -> Result<Arc<KernelLibrary>, String> {
    static LIBRARIES: Mutex<BTreeMap<PathBuf, Loaded>> = Mutex::new(BTreeMap::new());
    let source = fs::canonicalize(source).map_err(|error| error.to_string())?;
    let path = object(&source, entry, sanitize)?;
    let loaded = lock(&LIBRARIES).entry(path.clone()).or_default().clone();
    loaded
        .get_or_init(|| {
            // One process compiles it, others wait.
            let turn = turn(&path).map_err(|error| error.to_string())?;
            if !path.exists() {
                compile_kernel(&source, entry, sanitize, &path)?;
            }
            drop(turn);
            // SAFETY: compiled by us; its initialisers do nothing of their own.
            let library = unsafe { Library::new(&path) }.map_err(|error| error.to_string())?;
            let library = Mutex::new(library);
            Ok(Arc::new(KernelLibrary { library }))
        })
        .clone()
}

const RUNTIME_SOURCES: [&str; 2] = ["fibers.cpp", "mma.cpp"];

fn emulation(name: &str) -> PathBuf {
    repository("tests/emulation").join(name)
}

fn flags(sanitize: bool) -> Vec<&'static str> {
    let mut flags = vec![
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        // A contracted sum would depend on the machine.
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
    ];
    // fmaf is slow where it is not an instruction; its result is the same.
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        flags.extend(["-mavx2", "-mfma"]);
    }
    if sanitize {
        flags.extend([
            "-O1",
            "-g",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
        ]);
    } else {
        flags.push("-O2");
    }
    flags
}

/// A lock on the making of an object, held as long as the file is open.
fn turn(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let file = File::create(path.with_extension("lock"))?;
    file.lock()?;
    Ok(file)
}

/// Where the object belongs, by the contents of all that it is made of. Where the source lies is not
/// among that: the same kernel of many bundles is compiled once.
fn object(source: &Path, entry: &str, sanitize: bool) -> Result<PathBuf, String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(shared_sources()?.as_bytes());
    let mut files = vec![source.to_owned()];
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        let text = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        hasher.update(&text);
        for included in included(&String::from_utf8_lossy(&text), &file, source) {
            if !files.contains(&included) {
                files.push(included);
            }
        }
        next += 1;
    }
    // The names too: they are in the messages.
    let names = files.iter().filter_map(|file| file.file_name());
    let names = names.map(|name| name.to_string_lossy());
    let words: Vec<_> = names.chain([entry.into()]).collect();
    hasher.update(words.join("\n").as_bytes());
    hasher.update(flags(sanitize).join(" ").as_bytes());
    let name = format!("{entry}-{}.so", &hasher.finalize().to_hex()[..24]);
    Ok(repository("target/emulation").join(name))
}

/// The headers that a file includes on the way from `source`, as g++ finds them: the emulation's come
/// first, then those beside the source, such as a bundle's.
fn included(text: &str, file: &Path, source: &Path) -> Vec<PathBuf> {
    let beside = |file: &Path| file.parent().unwrap_or(Path::new(".")).to_owned();
    let folders = [
        beside(file),
        repository("tests/emulation"),
        beside(source),
        repository("templates"),
    ];
    let names = text.lines().filter_map(|line| {
        let name = line.trim().strip_prefix("#include \"")?;
        name.split('"').next()
    });
    let find = |name| {
        folders
            .iter()
            .map(|folder| folder.join(name))
            .find(|path| path.exists())
    };
    names.filter_map(find).collect()
}

/// A hash of the emulation and the compiler's version.
fn shared_sources() -> Result<String, String> {
    static HASH: OnceLock<Result<String, String>> = OnceLock::new();
    let hash = || {
        let mut hasher = blake3::Hasher::new();
        for folder in ["tests/emulation", "tests/emulation/kiln"] {
            let entries = fs::read_dir(repository(folder)).map_err(|error| error.to_string())?;
            let mut files: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()).filter(|path| path.is_file()))
                .collect();
            files.sort();
            for file in files {
                hasher.update(file.to_string_lossy().as_bytes());
                hasher.update(&fs::read(&file).map_err(|error| error.to_string())?);
            }
        }
        let version = compiler().arg("--version").output();
        let version = version.map_err(|error| format!("g++ does not run: {error}"))?;
        hasher.update(&version.stdout);
        Ok(hasher.finalize().to_string())
    };
    HASH.get_or_init(hash).clone()
}

fn compiler() -> Command {
    let mut command = Command::new("g++");
    // The compiler itself is not to be sanitized.
    command.env_remove("LD_PRELOAD");
    command
}

fn compile_kernel(source: &Path, entry: &str, sanitize: bool, path: &Path) -> Result<(), String> {
    let runtime = runtime_object()?;
    // From the source's folder, so that messages name the source without it.
    let beside = source.parent().unwrap_or(Path::new("."));
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let mut command = compiler();
    command
        .current_dir(beside)
        .args(flags(sanitize))
        .arg("-shared")
        .arg(format!("-ffile-prefix-map={}=.", beside.display()))
        .arg("-I")
        .arg(repository("tests/emulation"))
        .arg("-I.")
        .arg("-I")
        .arg(repository("templates"))
        .arg(format!("-DKILN_SOURCE=\"{name}\""))
        .arg(format!("-DKILN_ENTRY={entry}"))
        .arg(emulation("launch.cpp"))
        .arg(runtime)
        .arg("-Wl,--no-undefined")
        .arg("-T")
        .arg(emulation("shared.ld"));
    finish(command, path)
}

/// What all kernels share, compiled once and without sanitizers.
fn runtime_object() -> Result<PathBuf, String> {
    static OBJECT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let make = || {
        let flags = flags(false);
        let mut hasher = blake3::Hasher::new();
        hasher.update(shared_sources()?.as_bytes());
        hasher.update(flags.join(" ").as_bytes());
        let name = format!("runtime-{}.o", &hasher.finalize().to_hex()[..24]);
        let path = repository("target/emulation").join(name);
        if !path.exists() {
            let mut command = compiler();
            command
                .args(flags)
                // Without a thought for floating-point traps loops become vectors.
                .args(["-O3", "-fno-trapping-math", "-r", "-nostdlib"])
                .args(["-Wall", "-Wextra", "-Werror"])
                .args(RUNTIME_SOURCES.map(emulation));
            finish(command, &path)?;
        }
        Ok(path)
    };
    OBJECT.get_or_init(make).clone()
}

/// Compiles beside `path` and moves the result there, so that other processes see all of it or
/// nothing.
fn finish(mut command: Command, path: &Path) -> Result<(), String> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut run = || -> io::Result<(Output, tempfile::TempDir)> {
        fs::create_dir_all(folder)?;
        let own = tempfile::tempdir_in(folder)?;
        let output = command.arg("-o").arg(own.path().join("object")).output()?;
        Ok((output, own))
    };
    let (output, own) = run().map_err(|error| format!("g++ does not run: {error}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?}:\n{message}"));
    }
    fs::rename(own.path().join("object"), path).map_err(|error| error.to_string())
}

/// Set in a process that [`rerun_sanitized`] started.
const SANITIZED: &str = "KILN_TESTS_SANITIZED";
const POISON: &[u8] = b"__asan_poison_memory_region";
const UNPOISON: &[u8] = b"__asan_unpoison_memory_region";

/// A function of AddressSanitizer, where it is loaded.
fn sanitizer_hook(name: &[u8]) -> Option<unsafe extern "C" fn(*const c_void, usize)> {
    let process = libloading::os::unix::Library::this();
    // SAFETY: both hooks have this signature. The process stays loaded.
    unsafe { process.get(name) }.ok().map(|symbol| *symbol)
}

/// Runs a test again with the sanitizers loaded, which must be there before anything else is: in a
/// process of its own. Gives `None` within that process, and outside its output, of which the
/// caller makes what it expects.
///
/// `test` is the name as the harness prints it, such as `emulation::reads_are_checked`.
///
/// # Panics
/// When the process cannot be started, or has no such test.
pub fn rerun_sanitized(test: &str) -> Option<Output> {
    if env::var_os(SANITIZED).is_some() {
        return None;
    }
    let found = compiler().arg("-print-file-name=libasan.so").output();
    let library = found.expect("g++ runs").stdout;
    let output = Command::new(env::current_exe().expect("a test is a program"))
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(SANITIZED, "1")
        .env("LD_PRELOAD", String::from_utf8_lossy(&library).trim())
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .expect("a test starts again");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("running 1 test"),
        "no test {test}, or no sanitizer: {output:?}"
    );
    Some(output)
}
