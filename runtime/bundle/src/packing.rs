//! The panel layout of weight matrices for the CPU target.
//!
//! A linear weight `W` of shape (N, K) (N outputs, K inputs, as `nn.Linear` stores it) is cut into
//! panels of [`PANEL`] outputs. A panel is stored with K outermost, so that its bytes are read as
//! one sequential stream and a vector register holds the same input column of neighbouring outputs:
//!
//! ```text
//! packed[n / PANEL][k][n % PANEL] = W[n][k]        shape (ceil(N / PANEL), K, PANEL)
//! ```
//!
//! The last panel is filled with zero rows. Every output is then one chain of multiply-adds in the
//! order of k, whatever the number of rows it is computed for: that is what makes results
//! independent of the batch.

/// Outputs (rows of W) in a panel.
pub const PANEL: usize = 32;

/// Panels that N outputs take.
pub const fn panels(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// Shape of the packed form of an (N, K) matrix.
pub const fn packed_shape(n: usize, k: usize) -> [usize; 3] {
    [panels(n), k, PANEL]
}

/// Index, in elements, of `W[n][k]` in the packed form of a matrix with `k_len` columns.
pub const fn packed_index(n: usize, k: usize, k_len: usize) -> usize {
    ((n / PANEL) * k_len + k) * PANEL + n % PANEL
}
