//! Scratch memory that is kept between kernel calls, so that a step in steady state allocates
//! nothing.

use super::attention::Work;
use super::norm::Stats;
use std::marker::PhantomData;

/// A cache line of values.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A growing buffer of `f32`, aligned to 64 bytes.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// At least `len` values, with whatever an earlier use has left in them.
    pub(super) fn reserve(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        // SAFETY: `Line` is sixteen values without padding.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}

/// Scratch of a [`super::Cpu`].
pub(super) struct Scratch {
    /// Input rows of a linear layer as its tiles read them, with their runs, and room for a row of each, where
    /// threads share them.
    pub(super) rows: Buffer,
    /// Mean and deviation of each residual row.
    pub(super) stats: Vec<Stats>,
    /// The sequences that attention works on, in the order it takes them.
    pub(super) work: Vec<Work>,
    /// What rows of theirs have of chunks of positions, until all are there.
    pub(super) shares: Buffer,
    /// One buffer a thread: sums, and such rows where it prepares them for itself.
    pub(super) threads: Vec<Buffer>,
}

impl Scratch {
    pub(super) fn new(threads: usize) -> Scratch {
        Scratch {
            rows: Buffer::default(),
            stats: Vec::new(),
            work: Vec::new(),
            shares: Buffer::default(),
            threads: (0..threads).map(|_| Buffer::default()).collect(),
        }
    }
}

/// Items of which each thread uses its own.
pub(super) struct Shards<'a, T> {
    items: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer is only followed through `get`, whose callers keep threads apart.
unsafe impl<T: Send> Sync for Shards<'_, T> {}

impl<'a, T> Shards<'a, T> {
    pub(super) fn new(items: &'a mut [T]) -> Shards<'a, T> {
        Shards {
            items: items.as_mut_ptr(),
            len: items.len(),
            _borrow: PhantomData,
        }
    }

    /// Item `i`.
    ///
    /// # Safety
    /// Nothing else may use item `i` while the reference lives.
    #[allow(clippy::mut_from_ref, reason = "the caller has item i for itself")]
    pub(super) unsafe fn get(&self, i: usize) -> &mut T {
        assert!(i < self.len);
        // SAFETY: within the slice; the caller has the item for itself.
        unsafe { &mut *self.items.add(i) }
    }

    /// Items `first..first + len`.
    ///
    /// # Safety
    /// Nothing else may use these items while the reference lives.
    #[allow(clippy::mut_from_ref, reason = "the caller has the items for itself")]
    pub(super) unsafe fn range(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: within the slice; the caller has the items for itself.
        unsafe { std::slice::from_raw_parts_mut(self.items.add(first), len) }
    }
}
