//! The inner loop of every matrix product: a tile of outputs kept in registers.

use super::simd::{Kernel, LANES, Simd, Weights};
use half::bf16;
use std::ops::Range;

/// Repeats the body for each constant below the limit: ROWS, at most 12, VECTORS, at most 4, or the
/// INPUTS of a step, at most 8. A loop would do the same if the compiler could be relied on to unroll it
/// before it decides what lives in registers.
macro_rules! unrolled {
    ($i:ident in ROWS $body:block) => {
        unrolled!($i in (ROWS) $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($i:ident in VECTORS $body:block) => {
        unrolled!($i in (VECTORS) $body 0 1 2 3)
    };
    ($i:ident in W::INPUTS $body:block) => {
        unrolled!($i in (W::INPUTS) $body 0 1 2 3 4 5 6 7)
    };
    ($i:ident in ($limit:expr) $body:block $($value:literal)*) => {
        $(if const { $value < $limit } {
            const $i: usize = $value;
            $body
        })*
    };
}

/// Where a tile finds its operands: `c[r][j] += sum over i of a[i][r] * b[i][j]`.
#[derive(Clone, Copy)]
pub(super) struct Tile<W> {
    /// Length of the sum. Where weights come in steps of several inputs, `a` is zero for those of the
    /// last step that are missing.
    pub(super) k: usize,
    /// `a[i][r]` at `a + i * a_step + r * a_stride`.
    pub(super) a: *const f32,
    pub(super) a_step: usize,
    pub(super) a_stride: usize,
    /// Each step of `b`, a run of vectors, at `b + step * b_step`.
    pub(super) b: *const W,
    pub(super) b_step: usize,
    /// `c[r]`, a run of vectors, at `c + r * c_stride`.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Continue from the sums in `c` instead of from zero.
    pub(super) resume: bool,
    /// Memory that will be wanted next: `ahead + step * ahead_step` bytes is asked for in each step.
    pub(super) ahead: *const u8,
    pub(super) ahead_step: usize,
}

/// The sums of a tile of ROWS rows and VECTORS vectors.
type Sums<S, const ROWS: usize, const VECTORS: usize> = [[<S as Simd>::V; VECTORS]; ROWS];

impl<W: Weights> Tile<W> {
    /// Computes a tile of ROWS rows and VECTORS vectors: each element one chain of fused
    /// multiply-adds in the order of i.
    ///
    /// # Safety
    /// The operands exist, and `c` overlaps neither.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let mut sums = [[simd.zero(); VECTORS]; ROWS];
        if self.resume {
            unrolled!(R in ROWS {
                unrolled!(V in VECTORS {
                    // SAFETY: within `c`.
                    sums[R][V] = unsafe { simd.load_f32(self.c.add(R * self.c_stride + V * LANES)) };
                });
            });
        }
        // SAFETY: the caller's.
        let sums = unsafe { self.accumulate::<S, ROWS, VECTORS>(simd, sums) };
        unrolled!(R in ROWS {
            unrolled!(V in VECTORS {
                // SAFETY: within `c`.
                unsafe { simd.store_f32(self.c.add(R * self.c_stride + V * LANES), sums[R][V]) };
            });
        });
    }

    /// `sums` continued.
    ///
    /// # Safety
    /// `a` and `b` exist.
    #[inline(always)]
    unsafe fn accumulate<S: Simd, const ROWS: usize, const VECTORS: usize>(
        self,
        simd: S,
        mut sums: Sums<S, ROWS, VECTORS>,
    ) -> Sums<S, ROWS, VECTORS> {
        // Lines that a step of `b` takes in memory.
        let lines = (VECTORS * LANES * size_of::<W>()).div_ceil(64);
        // A pointer a row: were they computed from one another in the loop, the compiler would load
        // too many values of `a` ahead, and have no registers left for the sums.
        let mut rows = [self.a; ROWS];
        unrolled!(R in ROWS {
            rows[R] = self.a.wrapping_add(R * self.a_stride);
        });
        let (mut b, mut ahead) = (self.b, self.ahead);
        for i in (0..self.k).step_by(W::INPUTS) {
            for line in 0..lines {
                simd.prefetch(ahead.wrapping_add(64 * line));
            }
            // SAFETY: this step of `b`.
            let mut step = [unsafe { W::load_step(simd, b) }; VECTORS];
            unrolled!(V in VECTORS {
                // SAFETY: as above.
                step[V] = unsafe { W::load_step(simd, b.add(V * LANES)) };
            });
            unrolled!(I in W::INPUTS {
                let mut column = [simd.zero(); VECTORS];
                unrolled!(V in VECTORS {
                    column[V] = W::input::<S, I>(simd, step[V]);
                });
                unrolled!(R in ROWS {
                    // SAFETY: the step of `a`.
                    let x = simd.splat(unsafe { *rows[R].add((i + I) * self.a_step) });
                    unrolled!(V in VECTORS {
                        sums[R][V] = simd.fma(x, column[V], sums[R][V]);
                    });
                });
            });
            b = b.wrapping_add(self.b_step);
            ahead = ahead.wrapping_add(self.ahead_step);
        }
        sums
    }
}

/// A run of whole groups of integers ([`kiln_bundle::packing`]) against the rows of a tile:
/// `c[r] += scale * sum over i of a[i][r] * code[i] + minimum * sum over i of a[i][r]` for each.
#[derive(Clone, Copy)]
pub(super) struct GroupTile<W> {
    /// Of all groups; `a` as in [`Tile`], `b` the codes of the first group, `k` the inputs of all.
    pub(super) tile: Tile<W>,
    /// Inputs of a group; the last may have fewer.
    pub(super) group: usize,
    /// From a group to the next.
    pub(super) group_bytes: usize,
    /// Of the first group.
    pub(super) scales: *const bf16,
    /// Of the first group, where there are any, with the sum of each group of `a`, (groups, rows).
    pub(super) minima: Option<(*const bf16, *const f32)>,
    /// Bytes from the codes being multiplied to those being asked for; where absent, the tile's
    /// `ahead` is asked for.
    pub(super) prefetch_bytes: Option<usize>,
}

impl<W: Weights> GroupTile<W> {
    /// Computes ROWS rows and VECTORS vectors, group after group: in each a chain as in
    /// [`Tile::run`], from zero.
    ///
    /// # Safety
    /// The operands exist, and `c` overlaps none of them.
    #[inline(always)]
    unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let mut tile = self.tile;
        let (mut scales, mut minima) = (self.scales, self.minima);
        let mut left = tile.k;
        while left > 0 {
            tile.k = left.min(self.group);
            left -= tile.k;
            if let Some(bytes) = self.prefetch_bytes {
                tile.ahead = tile.b.cast::<u8>().wrapping_add(bytes);
            }
            // SAFETY: the caller's.
            let sums = unsafe {
                tile.accumulate::<S, ROWS, VECTORS>(simd, [[simd.zero(); VECTORS]; ROWS])
            };
            unrolled!(V in VECTORS {
                // SAFETY: the group's own numbers, and `c`.
                unsafe {
                    let scale = simd.load_bf16(scales.add(V * LANES));
                    unrolled!(R in ROWS {
                        let c = tile.c.add(R * tile.c_stride + V * LANES);
                        let mut total = match tile.resume {
                            true => simd.load_f32(c),
                            false => simd.zero(),
                        };
                        if let Some((minima, sums)) = minima {
                            let minimum = simd.load_bf16(minima.add(V * LANES));
                            total = simd.fma(simd.splat(*sums.add(R)), minimum, total);
                        }
                        simd.store_f32(c, simd.fma(scale, sums[R][V], total));
                    });
                }
            });
            tile.resume = true;
            tile.a = tile.a.wrapping_add(tile.k * tile.a_step);
            let steps = tile.k.div_ceil(W::INPUTS);
            tile.ahead = tile.ahead.wrapping_add(steps * tile.ahead_step);
            tile.b = tile.b.wrapping_byte_add(self.group_bytes);
            scales = scales.wrapping_byte_add(self.group_bytes);
            minima = minima.map(|(minima, sums)| {
                (
                    minima.wrapping_byte_add(self.group_bytes),
                    sums.wrapping_add(ROWS),
                )
            });
        }
    }
}

/// A tile of a number of rows known at run time, which are interleaved: `a_step` and `a_stride` are
/// taken to be that number and 1.
pub(super) trait AnyRows: Copy {
    /// # Safety
    /// The operands exist for ROWS rows and VECTORS vectors, and `c` overlaps none of them.
    unsafe fn run_interleaved<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S);

    /// Computes at most `S::TILE_ROWS` rows, or `S::DIRECT_ROWS` where the tile is wider than others.
    ///
    /// # Safety
    /// As `run_interleaved`.
    #[inline(always)]
    unsafe fn run_rows<S: Simd, const VECTORS: usize>(self, simd: S, rows: usize) {
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match rows {
                    $($rows => simd.outlined(Outlined::<Self, $rows, VECTORS>(self)),)*
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

impl<W: Weights> AnyRows for Tile<W> {
    #[inline(always)]
    unsafe fn run_interleaved<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let tile = Tile {
            a_step: ROWS,
            a_stride: 1,
            ..self
        };
        // SAFETY: the caller's.
        unsafe { tile.run::<S, ROWS, VECTORS>(simd) };
    }
}

impl<W: Weights> AnyRows for GroupTile<W> {
    #[inline(always)]
    unsafe fn run_interleaved<S: Simd, const ROWS: usize, const VECTORS: usize>(mut self, simd: S) {
        (self.tile.a_step, self.tile.a_stride) = (ROWS, 1);
        // SAFETY: the caller's.
        unsafe { self.run::<S, ROWS, VECTORS>(simd) };
    }
}

/// A tile whose loop is compiled by itself: among others the compiler would not keep the sums of each
/// in registers. Made only where [`AnyRows::run_interleaved`] may be called.
struct Outlined<T, const ROWS: usize, const VECTORS: usize>(T);

impl<T: AnyRows, const ROWS: usize, const VECTORS: usize> Kernel for Outlined<T, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: that of `run_rows`, which alone makes these.
        unsafe { self.0.run_interleaved::<S, ROWS, VECTORS>(simd) };
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
