//! The inner loop of every matrix product: a tile of outputs kept in registers.

use super::simd::{Element, Kernel, LANES, Simd};
use std::ops::Range;

/// Repeats the body for each constant below the limit: ROWS, at most 12, or VECTORS, at most 4. A loop
/// would do the same if the compiler could be relied on to unroll it before it decides what lives in
/// registers.
macro_rules! unrolled {
    ($i:ident in ROWS $body:block) => {
        unrolled!($i in ROWS $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($i:ident in VECTORS $body:block) => {
        unrolled!($i in VECTORS $body 0 1 2 3)
    };
    ($i:ident in $limit:ident $body:block $($value:literal)*) => {
        $(if const { $value < $limit } {
            const $i: usize = $value;
            $body
        })*
    };
}

/// Where a tile finds its operands: `c[r][j] += sum over i of a[i][r] * b[i][j]`.
#[derive(Clone, Copy)]
pub(super) struct Tile<E> {
    /// Length of the sum.
    pub(super) k: usize,
    /// `a[i][r]` at `a + i * a_step + r * a_stride`.
    pub(super) a: *const f32,
    pub(super) a_step: usize,
    pub(super) a_stride: usize,
    /// `b[i]`, a run of vectors, at `b + i * b_step`.
    pub(super) b: *const E,
    pub(super) b_step: usize,
    /// `c[r]`, a run of vectors, at `c + r * c_stride`.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Continue from the sums in `c` instead of from zero.
    pub(super) resume: bool,
    /// Memory that will be wanted next: `ahead + i * ahead_step` bytes is asked for in step i.
    pub(super) ahead: *const u8,
    pub(super) ahead_step: usize,
}

impl<E: Element> Tile<E> {
    /// Computes a tile of ROWS rows and VECTORS vectors: each element one chain of fused
    /// multiply-adds in the order of i.
    ///
    /// # Safety
    /// The operands exist, and `c` overlaps neither.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        // Lines that a step of `b` takes in memory.
        let lines = (VECTORS * LANES * size_of::<E>()).div_ceil(64);
        let mut sums = [[simd.zero(); VECTORS]; ROWS];
        if self.resume {
            unrolled!(R in ROWS {
                unrolled!(V in VECTORS {
                    // SAFETY: within `c`.
                    sums[R][V] = unsafe { simd.load_f32(self.c.add(R * self.c_stride + V * LANES)) };
                });
            });
        }
        // A pointer a row: were they computed from one another in the loop, the compiler would load
        // too many values of `a` ahead, and have no registers left for the sums.
        let mut rows = [self.a; ROWS];
        unrolled!(R in ROWS {
            rows[R] = self.a.wrapping_add(R * self.a_stride);
        });
        let (mut b, mut ahead) = (self.b, self.ahead);
        for i in 0..self.k {
            for line in 0..lines {
                simd.prefetch(ahead.wrapping_add(64 * line));
            }
            let mut column = [simd.zero(); VECTORS];
            unrolled!(V in VECTORS {
                // SAFETY: step i of `b`.
                column[V] = unsafe { E::load(simd, b.add(V * LANES)) };
            });
            unrolled!(R in ROWS {
                // SAFETY: step i of `a`.
                let x = simd.splat(unsafe { *rows[R].add(i * self.a_step) });
                unrolled!(V in VECTORS {
                    sums[R][V] = simd.fma(x, column[V], sums[R][V]);
                });
            });
            b = b.wrapping_add(self.b_step);
            ahead = ahead.wrapping_add(self.ahead_step);
        }
        unrolled!(R in ROWS {
            unrolled!(V in VECTORS {
                // SAFETY: within `c`.
                unsafe { simd.store_f32(self.c.add(R * self.c_stride + V * LANES), sums[R][V]) };
            });
        });
    }

    /// [`run`](Tile::run) for a number of rows known at run time, at most `S::TILE_ROWS`, or
    /// `S::DIRECT_ROWS` where the tile is wider than others. The rows are interleaved: `a_step` and
    /// `a_stride` are taken to be `rows` and 1.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    pub(super) unsafe fn run_rows<S: Simd, const VECTORS: usize>(self, simd: S, rows: usize) {
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match rows {
                    $($rows => simd.outlined(Outlined::<E, $rows, VECTORS>(self)),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        if const { VECTORS > S::TILE_VECTORS } {
            by_rows!(1, 2)
        } else if const { S::TILE_ROWS <= 6 } {
            by_rows!(1, 2, 3, 4, 5, 6)
        } else {
            by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
        }
    }
}

/// A tile whose loop is compiled by itself: among others the compiler would not keep the sums of each
/// in registers. Made only where [`Tile::run`] may be called.
struct Outlined<E, const ROWS: usize, const VECTORS: usize>(Tile<E>);

impl<E: Element, const ROWS: usize, const VECTORS: usize> Kernel for Outlined<E, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: that of `run_rows`, which alone makes these.
        unsafe {
            Tile {
                a_step: ROWS,
                a_stride: 1,
                ..self.0
            }
            .run::<S, ROWS, VECTORS>(simd)
        };
    }
}

/// The cut of rows into tiles of nearly equal height.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    pub(super) rows: usize,
    pub(super) count: usize,
}

impl Tiles {
    pub(super) fn new(rows: usize, tallest: usize) -> Tiles {
        Tiles {
            rows,
            count: rows.div_ceil(tallest),
        }
    }

    /// Rows of the tallest tile.
    pub(super) fn tallest(&self) -> usize {
        self.rows.div_ceil(self.count)
    }

    /// Rows of tile `i`.
    #[inline(always)]
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        super::pool::partition(self.rows, self.count, i)
    }
}
