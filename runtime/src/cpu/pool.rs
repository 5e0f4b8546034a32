//! Fork-join threads for kernels.
//!
//! A decoded token takes some sixty fork-joins of tens of microseconds each, so idle workers spin
//! for a while before they sleep, and a fork costs two cache-line transfers a worker: the job's
//! number going out, the count of running workers coming back.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{hint, io, thread};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(60);

/// A fixed number of threads, the caller of [`run`](ThreadPool::run) among them.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    busy: AtomicBool,
}

impl ThreadPool {
    /// A pool of `threads` threads: the caller and `threads - 1` workers.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<ThreadPool> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicU32::new(0)),
            running: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job {
                data: std::ptr::null(),
                call: nothing,
            }),
            left: (0..threads).map(|_| Padded(Tasks::default())).collect(),
            parked: (1..threads)
                .map(|_| Padded(AtomicBool::new(false)))
                .collect(),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            crowded: threads > thread::available_parallelism().map_or(1, |n| n.get()),
        });
        let mut pool = ThreadPool {
            shared,
            workers: Vec::new(),
            busy: AtomicBool::new(false),
        };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("kiln-cpu-{index}"))
                .spawn(move || shared.work(index))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// A thread for each physical core that this process may use.
    ///
    /// # Errors
    /// As [`ThreadPool::new`].
    pub fn with_physical_cores() -> io::Result<ThreadPool> {
        ThreadPool::new(physical_cores().len())
    }

    /// Keeps every thread, the caller included, on a physical core of its own from now on, and so what
    /// threads the caller starts later. What else runs on these cores is not kept away: it pays where
    /// nothing does.
    ///
    /// # Errors
    /// When there are more threads than cores, or the system refuses.
    pub fn pin(&self) -> io::Result<()> {
        let cores = physical_cores();
        if self.threads() > cores.len() {
            let problem = format!("cores that this thread may use: {}", cores.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let places: Vec<Vec<usize>> = cores.into_iter().map(|core| vec![core]).collect();
        self.bind(&places)
    }

    /// Keeps every thread, the caller included, on CPUs of its own list from now on, and so what threads
    /// the caller starts later. There is a list for each thread.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn bind(&self, places: &[Vec<usize>]) -> io::Result<()> {
        let refused = Mutex::new(None);
        self.run(|thread| {
            if let Err(error) = affinity::bind(&places[thread]) {
                *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        let refused = refused.into_inner();
        refused
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(thread)` once on every thread, thread 0 being the caller, and returns when all calls
    /// have returned. A panic in any of them goes on in the caller. Within a job, or while another
    /// thread has the pool, all the calls are made by the caller, one after the other.
    pub fn run(&self, f: impl Fn(usize) + Sync) {
        if self.workers.is_empty() || self.busy.swap(true, Ordering::Acquire) {
            (0..self.threads()).for_each(f);
            return;
        }
        self.run_alone(f);
    }

    /// [`ThreadPool::run`] of a caller that has made the pool busy.
    fn run_alone(&self, f: impl Fn(usize) + Sync) {
        let own = self.fork_join(&f);
        self.busy.store(false, Ordering::Release);
        let workers = self
            .shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = own.err().or(workers) {
            resume_unwind(panic);
        }
    }

    /// Calls `f(thread, task)` for each task in `0..tasks`, as [`ThreadPool::parallel_ranges`] hands them out.
    pub fn parallel_for(&self, tasks: usize, f: impl Fn(usize, usize) + Sync) {
        let f = &f;
        self.parallel_ranges(tasks, |thread| {
            move |tasks: Range<usize>| tasks.for_each(|task| f(thread, task))
        });
    }

    /// Hands out ranges that make up `0..tasks` to what `f(thread)` gives, which a thread calls before its first
    /// range. Every thread has a part of the tasks, of neighbours, which it takes in ascending order before it helps
    /// others with theirs: what neighbouring tasks share, and what earlier jobs of as many tasks wrote, is in its own
    /// cache most of the time. A range is a quarter of what a part has left, so that threads meet rarely and end
    /// together. Who helps takes the last tasks of a part, so that what its thread streams from memory goes on.
    pub fn parallel_ranges<W: FnMut(Range<usize>)>(
        &self,
        tasks: usize,
        f: impl Fn(usize) -> W + Sync,
    ) {
        let alone = tasks <= 1 || self.workers.is_empty() || u32::try_from(tasks).is_err();
        if alone || self.busy.swap(true, Ordering::Acquire) {
            f(0)(0..tasks);
            return;
        }
        let threads = self.threads();
        let left = &self.shared.left;
        for (part, left) in left.iter().enumerate() {
            left.0.set(partition(tasks, threads, part));
        }
        self.run_alone(|thread| {
            let mut work = None;
            let mut work = |tasks| work.get_or_insert_with(|| f(thread))(tasks);
            while let Some(tasks) = left[thread].0.take_first() {
                work(tasks);
            }
            for part in (thread + 1..threads).chain(0..thread) {
                while let Some(tasks) = left[part].0.take_last() {
                    work(tasks);
                }
            }
        });
    }

    fn fork_join<F: Fn(usize) + Sync>(&self, f: &F) -> thread::Result<()> {
        unsafe fn call<F: Fn(usize)>(data: *const (), thread: usize) {
            // SAFETY: `data` is the closure that `fork_join` keeps borrowed until all have returned.
            unsafe { (*data.cast::<F>())(thread) }
        }
        let shared = &*self.shared;
        shared
            .running
            .0
            .store(self.workers.len(), Ordering::Relaxed);
        // SAFETY: `busy` keeps other callers out, and the workers of the last job have all finished,
        // so that nobody reads the cell; the new epoch below publishes what is written.
        unsafe {
            *shared.job.get() = Job {
                data: std::ptr::from_ref(f).cast(),
                call: call::<F>,
            }
        };
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers) {
            if parked.0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        // The workers borrow `f`: wait for them even if the caller's own part panics.
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        let mut spins = 0u32;
        while shared.running.0.load(Ordering::Acquire) != 0 {
            spins += 1;
            if shared.crowded || spins > 20_000 {
                thread::yield_now();
            } else {
                hint::spin_loop();
            }
        }
        own
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker hands its panics to the caller of `run`, so this one returns.
            let _ = worker.join();
        }
    }
}

/// A range of tasks from both of whose ends threads take. Start and end, of 32 bits, are one word, so
/// that no task is taken twice.
#[derive(Default)]
struct Tasks(AtomicU64);

impl Tasks {
    fn set(&self, tasks: Range<usize>) {
        self.0.store(Tasks::pack(tasks), Ordering::Relaxed);
    }

    /// The first quarter.
    fn take_first(&self) -> Option<Range<usize>> {
        self.take(|tasks, quarter| {
            let cut = tasks.start + quarter;
            (tasks.start..cut, cut..tasks.end)
        })
    }

    /// The last quarter.
    fn take_last(&self) -> Option<Range<usize>> {
        self.take(|tasks, quarter| {
            let cut = tasks.end - quarter;
            (cut..tasks.end, tasks.start..cut)
        })
    }

    /// `choose` cuts a range that has tasks, given a quarter of their number, into those to take and those to leave.
    fn take(
        &self,
        choose: impl Fn(Range<usize>, usize) -> (Range<usize>, Range<usize>),
    ) -> Option<Range<usize>> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = ((seen >> 32) as usize, (seen as u32) as usize);
            if start >= end {
                return None;
            }
            let (taken, left) = choose(start..end, (end - start).div_ceil(4));
            let left = Tasks::pack(left);
            let exchanged =
                self.0
                    .compare_exchange_weak(seen, left, Ordering::Relaxed, Ordering::Relaxed);
            match exchanged {
                Ok(_) => return Some(taken),
                Err(now) => seen = now,
            }
        }
    }

    fn pack(tasks: Range<usize>) -> u64 {
        (tasks.start as u64) << 32 | tasks.end as u64
    }
}

/// The part of `0..len` that falls to `part` of `parts`: contiguous, sizes at most one apart.
pub fn partition(len: usize, parts: usize, part: usize) -> Range<usize> {
    len * part / parts..len * (part + 1) / parts
}

/// One logical CPU of every physical core that this process may use, at least one.
pub fn physical_cores() -> Vec<usize> {
    let mut siblings_seen = Vec::new();
    let mut cores = affinity::allowed();
    cores.retain(|cpu| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string());
        let new = !siblings_seen.contains(&siblings);
        siblings_seen.push(siblings);
        new
    });
    // A container may be given less time than it is given CPUs.
    let quota = thread::available_parallelism().map_or(1, |n| n.get());
    cores.truncate(quota);
    if cores.is_empty() { vec![0] } else { cores }
}

/// Keeps a value away from the cache lines of its neighbours.
#[repr(align(128))]
struct Padded<T>(T);

#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
}

unsafe fn nothing(_: *const (), _: usize) {}

struct Shared {
    /// Number of the job at hand.
    epoch: Padded<AtomicU32>,
    /// Workers that have not finished it.
    running: Padded<AtomicUsize>,
    job: UnsafeCell<Job>,
    /// Of each part of a job's tasks, those that nobody has taken.
    left: Vec<Padded<Tasks>>,
    /// Which workers sleep, or are about to.
    parked: Vec<Padded<AtomicBool>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// More threads than cores: spinning would keep the others from running.
    crowded: bool,
}

// SAFETY: `job` is written only while no worker runs and read only after the epoch that publishes it;
// what it points at is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(index, seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: published by the epoch just seen, and not written again before this worker
            // has counted itself out below.
            let job = unsafe { *self.job.get() };
            // SAFETY: the caller keeps what `data` points at alive until every worker has finished.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data, index) }));
            if let Err(panic) = result {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.running.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a job after number `seen`.
    fn next_epoch(&self, index: usize, seen: u32) -> u32 {
        let deadline = Instant::now() + SPIN;
        loop {
            for _ in 0..64 {
                let epoch = self.epoch.0.load(Ordering::Acquire);
                if epoch != seen {
                    return epoch;
                }
                if self.crowded {
                    thread::yield_now();
                } else {
                    hint::spin_loop();
                }
            }
            if Instant::now() > deadline {
                break;
            }
        }
        // The flag goes up before the epoch is looked at again, and the caller of `run` looks at the
        // flag after it has raised the epoch: one of the two sees the other. (A store would do, but qemu's Arm lets
        // a load pass one.)
        let parked = &self.parked[index - 1].0;
        parked.swap(true, Ordering::SeqCst);
        let epoch = loop {
            let epoch = self.epoch.0.load(Ordering::SeqCst);
            if epoch != seen {
                break epoch;
            }
            thread::park();
        };
        parked.store(false, Ordering::SeqCst);
        epoch
    }
}

#[cfg(target_os = "linux")]
mod affinity {

    /// The CPUs that this thread may run on.
    pub(super) fn allowed() -> Vec<usize> {
        let mut set = empty();
        // SAFETY: the kernel writes at most the size given into `set`.
        let status =
            unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
        if status != 0 {
            return Vec::new();
        }
        let limit = 8 * size_of::<libc::cpu_set_t>();
        // SAFETY: `cpu` is below the number of bits in the set.
        (0..limit)
            .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
            .collect()
    }

    /// Keeps this thread on these CPUs.
    pub(super) fn bind(cpus: &[usize]) -> std::io::Result<()> {
        let mut set = empty();
        for &cpu in cpus {
            if cpu >= 8 * size_of::<libc::cpu_set_t>() {
                return Err(std::io::ErrorKind::InvalidInput.into());
            }
            // SAFETY: `cpu` is below the number of bits in the set.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
        // SAFETY: the kernel reads at most the size given from `set`.
        match unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn empty() -> libc::cpu_set_t {
        // SAFETY: a bit set, for which all zeros means no CPU.
        unsafe { std::mem::zeroed() }
    }
}

#[cfg(not(target_os = "linux"))]
mod affinity {

    pub(super) fn allowed() -> Vec<usize> {
        (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
    }

    pub(super) fn bind(_: &[usize]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::new(threads).unwrap();
            for _ in 0..200 {
                let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|thread| {
                    calls[thread].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_threads_have_a_core_each() {
        // In a thread of its own, which the other tests do not run on.
        let test = thread::spawn(|| {
            let cores = physical_cores();
            let pool = ThreadPool::new(cores.len()).unwrap();
            pool.pin().unwrap();
            let found = Mutex::new(vec![Vec::new(); cores.len()]);
            pool.run(|thread| found.lock().unwrap()[thread] = affinity::allowed());
            let expected: Vec<_> = cores.iter().map(|&core| vec![core]).collect();
            assert_eq!(found.into_inner().unwrap(), expected);

            // This thread has one core now.
            let crowded = ThreadPool::new(2).unwrap().pin().unwrap_err();
            assert_eq!(crowded.to_string(), "cores that this thread may use: 1");
        });
        test.join().unwrap();
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = ThreadPool::new(2).unwrap();
        let calls = AtomicUsize::new(0);
        for pause_us in [0, 30, 60, 61, 90, 500, 5000] {
            thread::sleep(Duration::from_micros(pause_us));
            pool.run(|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(calls.into_inner(), 14);
    }

    #[test]
    fn tasks_run_once_each() {
        let pool = ThreadPool::new(3).unwrap();
        for tasks in [0, 1, 2, 100] {
            let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            let begun = AtomicUsize::new(0);
            pool.parallel_ranges(tasks, |_| {
                begun.fetch_add(1, Ordering::Relaxed);
                |tasks: Range<usize>| {
                    for task in tasks {
                        calls[task].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            assert!(begun.into_inner() <= pool.threads());
        }
    }

    #[test]
    fn panics_reach_the_caller_and_leave_the_pool_usable() {
        let pool = ThreadPool::new(3).unwrap();
        for culprit in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|thread| assert!(thread != culprit, "thread {thread} fails"));
            }));
            let panic = result.unwrap_err();
            assert_eq!(
                *panic.downcast::<String>().unwrap(),
                format!("thread {culprit} fails")
            );
        }
        let calls = AtomicUsize::new(0);
        pool.run(|_| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 3);
    }

    #[test]
    fn nested_jobs_run_in_place() {
        let pool = ThreadPool::new(2).unwrap();
        let calls = AtomicUsize::new(0);
        pool.run(|_| {
            pool.run(|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(calls.into_inner(), 4);
    }

    #[test]
    fn partitions_cover_and_balance() {
        for len in 0..40 {
            for parts in 1..9 {
                let ranges: Vec<_> = (0..parts).map(|part| partition(len, parts, part)).collect();
                assert_eq!(ranges[0].start, 0);
                assert_eq!(ranges[parts - 1].end, len);
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(
                    ranges
                        .iter()
                        .all(|r| r.len() == len / parts || r.len() == len / parts + 1)
                );
            }
        }
    }
}
