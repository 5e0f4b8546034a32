//! Views of `f32` matrices whose rows lie a stride apart.

use std::marker::PhantomData;

/// Rows to read: (rows, cols), row `i` at `data[i * stride..][..cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Contiguous rows: `data` holds exactly `rows * cols` values.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Rows<'a> {
        assert_eq!(data.len(), rows * cols, "({rows}, {cols}) rows");
        Rows {
            data,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Rows `stride` values apart, such as one of the three parts of (T, 3*C).
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Rows<'a> {
        check(data.len(), rows, cols, stride);
        Rows {
            data,
            rows,
            cols,
            stride,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`: (cols).
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        &self.data[i * self.stride..][..self.cols]
    }
}

/// Rows to write: (rows, cols), row `i` at `data[i * stride..][..cols]`.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> RowsMut<'a> {
    /// Contiguous rows: `data` holds exactly `rows * cols` values.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> RowsMut<'a> {
        assert_eq!(data.len(), rows * cols, "({rows}, {cols}) rows");
        RowsMut {
            data,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Rows `stride` values apart; what lies between them is left alone.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> RowsMut<'a> {
        check(data.len(), rows, cols, stride);
        RowsMut {
            data,
            rows,
            cols,
            stride,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same rows, to read.
    pub(super) fn as_rows(&self) -> Rows<'_> {
        Rows {
            data: self.data,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }

    /// The same rows, to be written by several threads.
    pub(super) fn shared(&mut self) -> SharedRows<'_> {
        SharedRows {
            data: self.data.as_mut_ptr(),
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            _borrow: PhantomData,
        }
    }
}

/// Rows that several threads write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct SharedRows<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only followed through `at` and `row`, whose callers keep threads apart.
unsafe impl Sync for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Send for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// Where the element at (`row`, `col`) lies; valid for `cols - col` values.
    ///
    /// # Safety
    /// No two threads may use the same element at once, unless all of them read.
    #[inline(always)]
    pub(super) unsafe fn at(&self, row: usize, col: usize) -> *mut f32 {
        debug_assert!(row < self.rows && col < self.cols);
        // SAFETY: rows and columns within the view lie within its slice.
        unsafe { self.data.add(row * self.stride + col) }
    }

    /// Row `i`: (cols).
    ///
    /// # Safety
    /// Nothing else may use the row while the reference lives.
    pub(super) unsafe fn row(&self, i: usize) -> &'a mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row lies within the view; the caller has it for itself.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }
}

fn check(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(
        stride >= cols,
        "rows of {cols} values overlap at a stride of {stride}"
    );
    let needed = if rows == 0 {
        0
    } else {
        (rows - 1) * stride + cols
    };
    assert!(
        len >= needed,
        "({rows}, {cols}) rows at a stride of {stride} in {len} values"
    );
}
