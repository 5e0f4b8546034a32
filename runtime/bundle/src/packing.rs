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
//! # Panels of integers: the CPU
//!
//! In the formats of [`IntFormat`] a panel is cut into groups of inputs, and what a group needs lies
//! before its codes, so that a panel still is one stream:
//!
//! ```text
//! panel = group 0 | group 1 | ...               all of `group` inputs but the last
//! group = scales (PANEL) | minima (PANEL) | codes          bf16; minima in int4 only
//! int8 codes: word[k / 4][n % PANEL], little-endian u32    q in the bits from 8 * (k % 4)
//! int4 codes: word[k / 8][n % PANEL], little-endian u32    q in the bits from 4 * (k % 8)
//! ```
//!
//! The inputs of a group are filled up to a multiple of [`CODE_STEP`] with zeros, which keeps every
//! panel aligned to a cache line. A word holds inputs of one output: a shift and a mask give two of them as
//! 16-bit numbers, which is how they are multiplied, with no shuffle. Scales and minima are bf16 for its range. That they are coarse costs
//! next to nothing, because weights are rounded against what is stored.
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

use crate::IntFormat;
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

/// The inputs of a group of integers are filled up to a multiple of this.
pub const CODE_STEP: usize = 8;

/// Bytes of a panel's scales, or minima, of one group.
pub const SCALES_BYTES: usize = PANEL * 2;

impl IntFormat {
    /// Shape, in bytes, of the packed form of an (N, K) matrix.
    pub fn packed_shape(self, n: usize, k: usize) -> [usize; 2] {
        [panels(n), self.panel_bytes(k)]
    }

    /// Bytes of a panel of `k` inputs.
    pub fn panel_bytes(self, k: usize) -> usize {
        let group = self.group(k).max(1);
        let rest = match k % group {
            0 => 0,
            rest => self.group_bytes(rest),
        };
        k / group * self.group_bytes(group) + rest
    }

    /// Bytes of a panel's group of `inputs`.
    pub fn group_bytes(self, inputs: usize) -> usize {
        let inputs = inputs.next_multiple_of(CODE_STEP);
        self.header_bytes()
            + match self {
                IntFormat::Int8 { .. } => PANEL * inputs,
                IntFormat::Int4 { .. } => PANEL * inputs / 2,
            }
    }

    /// Bytes of a group before its codes.
    pub const fn header_bytes(self) -> usize {
        match self.has_minimum() {
            true => 2 * SCALES_BYTES,
            false => SCALES_BYTES,
        }
    }

    /// Packs rows of W into whole panels: `codes` (n, k), `scales` and `minima` (n, groups) as bits
    /// of bf16, all row-major; `minima` is empty in formats without. Missing rows are zero.
    pub fn pack(self, codes: &[i8], scales: &[u16], minima: &[u16], k: usize) -> Vec<u8> {
        let (n, groups, group) = (codes.len() / k.max(1), self.groups(k), self.group(k));
        let panel_bytes = self.panel_bytes(k);
        let mut packed = vec![0; panels(n) * panel_bytes];
        for (row, codes) in codes.chunks(k.max(1)).enumerate() {
            let (panel, lane) = (row / PANEL, row % PANEL);
            for (index, codes) in codes.chunks(group).enumerate() {
                let start = panel * panel_bytes + index * self.group_bytes(group);
                let numbers = [scales, minima].into_iter().filter(|list| !list.is_empty());
                for (list, numbers) in numbers.enumerate() {
                    let at = start + list * SCALES_BYTES + 2 * lane;
                    packed[at..at + 2]
                        .copy_from_slice(&numbers[row * groups + index].to_le_bytes());
                }
                let start = start + self.header_bytes();
                for (input, &code) in codes.iter().enumerate() {
                    match self {
                        IntFormat::Int8 { .. } => {
                            let word = start + 4 * (input / 4 * PANEL + lane);
                            packed[word + input % 4] = code.cast_unsigned();
                        }
                        IntFormat::Int4 { .. } => {
                            let word = start + 4 * (input / CODE_STEP * PANEL + lane);
                            let byte = word + input % CODE_STEP / 2;
                            packed[byte] |= (code.cast_unsigned() & 15) << (4 * (input % 2));
                        }
                    }
                }
            }
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightFormat;

    #[test]
    fn panels_of_integers_are_streams_of_groups() {
        for text in ["int8", "int8:g32", "int4:g32"] {
            let WeightFormat::Int(format) = text.parse().unwrap() else {
                unreachable!()
            };
            let (n, k) = (40, 77);
            let code = |row: usize, input: usize| ((row * 7 + input * 3) % 16) as i8;
            let codes: Vec<i8> = (0..n * k).map(|at| code(at / k, at % k)).collect();
            let groups = format.groups(k);
            let scales: Vec<u16> = (0..n * groups).map(|at| at as u16 + 1).collect();
            let minima: Vec<u16> = match format.has_minimum() {
                true => scales.iter().map(|scale| scale + 1000).collect(),
                false => vec![],
            };
            let packed = format.pack(&codes, &scales, &minima, k);
            let [count, panel_bytes] = format.packed_shape(n, k);
            assert_eq!((count, packed.len()), (2, count * panel_bytes));
            assert!(panel_bytes.is_multiple_of(64));
            // Walked as a kernel walks it.
            let mut at = 0;
            for panel in 0..count {
                for group in 0..groups {
                    let inputs = (k - group * format.group(k)).min(format.group(k));
                    let mut numbers = |numbers: &[u16]| {
                        for lane in 0..PANEL {
                            let row = panel * PANEL + lane;
                            let found = u16::from_le_bytes([packed[at], packed[at + 1]]);
                            let needed = numbers.get(row * groups + group).copied().unwrap_or(0);
                            assert_eq!(found, needed, "{text}");
                            at += 2;
                        }
                    };
                    numbers(&scales);
                    if format.has_minimum() {
                        numbers(&minima);
                    }
                    for step in (0..inputs).step_by(CODE_STEP) {
                        let bytes = match format {
                            IntFormat::Int8 { .. } => CODE_STEP * PANEL,
                            IntFormat::Int4 { .. } => CODE_STEP * PANEL / 2,
                        };
                        for input in step..step + CODE_STEP {
                            for lane in 0..PANEL {
                                let found = match format {
                                    IntFormat::Int8 { .. } => {
                                        let word = at + 4 * ((input - step) / 4 * PANEL + lane);
                                        packed[word + (input - step) % 4].cast_signed()
                                    }
                                    IntFormat::Int4 { .. } => {
                                        let word = &packed[at + 4 * lane..][..4];
                                        let word = u32::from_le_bytes(word.try_into().unwrap());
                                        (word >> (4 * (input - step)) & 15) as i8
                                    }
                                };
                                let row = panel * PANEL + lane;
                                let needed = match row < n && input < inputs {
                                    true => code(row, group * format.group(k) + input),
                                    false => 0,
                                };
                                assert_eq!(found, needed, "{text}: W[{row}], input {input}");
                            }
                        }
                        at += bytes;
                    }
                }
            }
            assert_eq!(at, packed.len(), "{text}");
        }
    }
}
