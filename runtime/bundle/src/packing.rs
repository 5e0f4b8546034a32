//! How weight matrices are arranged.
//!
//! # Panels: the CPU
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
//!
//! # Tiles: CUDA
//!
//! `W` is cut into tiles of [`TILE_N`] outputs by [`TILE_K`] inputs, which are filled with zeros at
//! the edges:
//!
//! ```text
//! packed[n / TILE_N][k / TILE_K][n % TILE_N][k % TILE_K] = W[n][k]
//! ```
//!
//! In 16-bit types a tile is 512 bytes: the 16-byte vectors of the 32 lanes of a warp. Lane `4 * n + c`
//! holds inputs `8 * c` to `8 * c + 7` of output `n`, its share of the B operands of two
//! `mma.m16n8k16`. (The instruction sums over k in any order, as long as A is permuted likewise.)

use serde::{Deserialize, Serialize};

/// An arrangement of weight matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// For vectors of a CPU.
    Panels,
    /// For the tensor cores of a GPU.
    Tiles,
}

impl Layout {
    /// Shape of the packed form of an (N, K) matrix.
    pub fn shape(self, n: usize, k: usize) -> Vec<usize> {
        match self {
            Layout::Panels => packed_shape(n, k).to_vec(),
            Layout::Tiles => {
                vec![n.div_ceil(TILE_N), k.div_ceil(TILE_K), TILE_N, TILE_K]
            }
        }
    }

    /// Outputs that are packed together: blocks of whole groups can be packed apart.
    pub const fn group(self) -> usize {
        match self {
            Layout::Panels => PANEL,
            Layout::Tiles => TILE_N,
        }
    }

    /// Packs rows of W, (n, K) row-major, into whole groups; missing elements are zero.
    pub fn pack(self, rows: &[f32], k: usize) -> Vec<f32> {
        let n = rows.len() / k.max(1);
        let mut packed = vec![0.0; self.shape(n, k).iter().product()];
        for (row, values) in rows.chunks(k.max(1)).enumerate() {
            match self {
                Layout::Panels => {
                    for (column, &value) in values.iter().enumerate() {
                        packed[packed_index(row, column, k)] = value;
                    }
                }
                Layout::Tiles => {
                    let columns = k.div_ceil(TILE_K);
                    for (tile, values) in values.chunks(TILE_K).enumerate() {
                        let start =
                            ((row / TILE_N * columns + tile) * TILE_N + row % TILE_N) * TILE_K;
                        packed[start..start + values.len()].copy_from_slice(values);
                    }
                }
            }
        }
        packed
    }
}

/// Outputs of a tile.
pub const TILE_N: usize = 8;
/// Inputs of a tile.
pub const TILE_K: usize = 32;

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
