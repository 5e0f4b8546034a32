//! How weight matrices are arranged.
//!
//! # Panels: the CPU
//!
//! A linear weight `W` of shape (N, K) (N outputs, K inputs, as `nn.Linear` stores it) is cut into
//! panels of [`PANEL`] outputs. A panel is stored with K outermost, so that its bytes are read as
//! one sequential stream and a vector register holds the same input column of neighbouring outputs:
//!
//! ```text
//! packed[n / PANEL][k / t][n % PANEL][k % t] = W[n][k]        shape (ceil(N / PANEL), ceil(K / t), PANEL, t)
//! ```
//!
//! t inputs of an output lie [`together`]: two in bf16, which thus make a word, as products of pairs want them (and
//! a shift or a mask makes an f32 of either); else one. The last panel is filled with zero rows, and the last inputs
//! that lie together with zeros. Every output can then be one chain of multiply-adds in the
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
//! 16-bit numbers, which is how they are multiplied, with no shuffle. Scales and minima are bf16 for its
//! range. That they are coarse costs next to nothing, because weights are rounded against what is stored.
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
//!
//! # Tiles of integers: CUDA
//!
//! A lane's vector of 16 bytes then holds its share of several neighbouring tiles, a *span*: of two in
//! int8, of four in int4. A strip, which is [`TILE_N`] outputs by all inputs, lies together:
//!
//! ```text
//! strip = span 0 | span 1 | ... | groups | units          filled up to STRIP_ALIGN_BYTES
//! span = lane 0 | lane 1 | ... | lane 31                  16 bytes each
//! int8 lane 4 * n + c: word[2 * tile + i / 4], byte i % 4 with the middle two exchanged: q + 128
//! int4 lane 4 * n + c: word[tile], bits from 4 * (i / 2) + 16 * (i % 2): q
//!                                                         i-th of the lane's inputs of a tile
//! group = scale and minimum of output 0 | of output 1 | ...       bf16; minima in int4 only; none in
//!                                                         int8 with a scale for each output
//! units = one f32 for each output
//! ```
//!
//! A mask thus leaves two codes where the two halves of a word of the operand are, the lower bits of
//! f16 or bf16; a multiply-add makes numbers of them. For these to fit an f16, scales and minima are
//! relative to the output's unit: the power of two that makes the largest number of a row's groups, the
//! scale or a sixteenth of the minimum, at least 1 and less than 2. An output is the sum of its products
//! in units. In int8 with a scale for each output that scale is the unit.

use crate::{DType, IntFormat};
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
    /// Shape of the packed form of an (N, K) matrix of floating-point elements.
    pub fn shape(self, element: DType, n: usize, k: usize) -> Vec<usize> {
        match self {
            Layout::Panels => packed_shape(element, n, k).to_vec(),
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

    /// Packs rows of W, (n, K) row-major, into whole groups, for elements of a type; missing ones are zero.
    pub fn pack(self, element: DType, rows: &[f32], k: usize) -> Vec<f32> {
        let n = rows.len() / k.max(1);
        let mut packed = vec![0.0; self.shape(element, n, k).iter().product()];
        for (row, values) in rows.chunks(k.max(1)).enumerate() {
            match self {
                Layout::Panels => {
                    for (column, &value) in values.iter().enumerate() {
                        packed[packed_index(element, row, column, k)] = value;
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
/// Lanes of a warp, which share a tile, and the bytes that each loads at once.
const TILE_LANES: usize = 32;
const VECTOR_BYTES: usize = 16;
/// Strips of integer tiles are multiples of this: a cache line of a GPU.
pub const STRIP_ALIGN_BYTES: usize = 128;

/// Outputs (rows of W) in a panel.
pub const PANEL: usize = 32;

/// Panels that N outputs take.
pub const fn panels(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// Inputs of an output that lie together in panels of such elements.
pub const fn together(element: DType) -> usize {
    match element {
        DType::Bf16 => 2,
        _ => 1,
    }
}

/// Shape of an (N, K) matrix of such elements in panels.
pub const fn packed_shape(element: DType, n: usize, k: usize) -> [usize; 4] {
    let together = together(element);
    [panels(n), k.div_ceil(together), PANEL, together]
}

/// Index of `W[n][k]` in panels of such elements, of a matrix with `k_len` columns.
pub const fn packed_index(element: DType, n: usize, k: usize, k_len: usize) -> usize {
    let together = together(element);
    let columns = n / PANEL * k_len.div_ceil(together) + k / together;
    (columns * PANEL + n % PANEL) * together + k % together
}

/// The inputs of a group of integers are filled up to a multiple of this.
pub const CODE_STEP: usize = 8;

/// Bytes of a panel's scales, or minima, of one group.
pub const SCALES_BYTES: usize = PANEL * 2;

impl IntFormat {
    /// Shape, in bytes, of an (N, K) matrix in panels.
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

    /// Bits of a code in tiles.
    pub const fn bits(self) -> usize {
        match self {
            IntFormat::Int8 { .. } => 8,
            IntFormat::Int4 { .. } => 4,
        }
    }

    /// Tiles of inputs in a lane's vector.
    pub const fn span_tiles(self) -> usize {
        VECTOR_BYTES * TILE_LANES * 8 / (self.bits() * TILE_N * TILE_K)
    }

    /// Inputs of a group of tiles, a multiple of [`TILE_K`] that may be more than a matrix has; none
    /// where a scale is of a whole output.
    pub const fn tile_group(self) -> Option<usize> {
        match self {
            IntFormat::Int8 { group: None } => None,
            IntFormat::Int8 { group: Some(group) } | IntFormat::Int4 { group } => {
                Some(group.inputs())
            }
        }
    }

    /// Shape, in bytes, of an (N, K) matrix in strips of tiles.
    pub fn strips_shape(self, n: usize, k: usize) -> [usize; 2] {
        [n.div_ceil(TILE_N), self.strip_bytes(k)]
    }

    /// Bytes of a strip of `k` inputs.
    pub fn strip_bytes(self, k: usize) -> usize {
        (self.units_start(k) + TILE_N * 4).next_multiple_of(STRIP_ALIGN_BYTES)
    }

    /// Inputs of a strip with those that fill its last span.
    fn strip_inputs(self, k: usize) -> usize {
        k.next_multiple_of(self.span_tiles() * TILE_K)
    }

    /// Where the groups of a strip begin, in bytes.
    fn groups_start(self, k: usize) -> usize {
        let spans = self.strip_inputs(k) / (self.span_tiles() * TILE_K);
        spans * TILE_LANES * VECTOR_BYTES
    }

    /// Bytes of an output's numbers of a group.
    const fn numbers_bytes(self) -> usize {
        match self.has_minimum() {
            true => 4,
            false => 2,
        }
    }

    /// Where the units of a strip begin, in bytes.
    fn units_start(self, k: usize) -> usize {
        let groups = self
            .tile_group()
            .map_or(0, |group| self.strip_inputs(k).div_ceil(group));
        self.groups_start(k) + groups * TILE_N * self.numbers_bytes()
    }

    /// Packs rows of W, as [`pack`](Self::pack) has them, into whole strips.
    pub fn pack_strips(self, codes: &[i8], scales: &[u16], minima: &[u16], k: usize) -> Vec<u8> {
        let (n, groups) = (codes.len() / k.max(1), self.groups(k));
        let strip_bytes = self.strip_bytes(k);
        let mut packed = vec![0; n.div_ceil(TILE_N) * strip_bytes];
        for (row, codes) in codes.chunks(k.max(1)).enumerate() {
            let (strip, output) = (row / TILE_N * strip_bytes, row % TILE_N);
            let strip = &mut packed[strip..strip + strip_bytes];
            for (input, &code) in codes.iter().enumerate() {
                let (at, shift) = self.tile_place(output, input);
                strip[at] |= match self {
                    IntFormat::Int8 { .. } => code.cast_unsigned() ^ 0x80,
                    IntFormat::Int4 { .. } => (code.cast_unsigned() & 15) << shift,
                };
            }
            let numbers = |list: &[u16]| -> Vec<f32> {
                let list = list.iter().skip(row * groups).take(groups);
                list.map(|&bits| bf16(bits)).collect()
            };
            let (scales, minima) = (numbers(scales), numbers(minima));
            let unit = match self.tile_group() {
                None => scales.first().copied().unwrap_or(0.0),
                Some(_) => unit(&scales, &minima),
            };
            let at = self.units_start(k) + 4 * output;
            strip[at..at + 4].copy_from_slice(&unit.to_le_bytes());
            if self.tile_group().is_none() {
                continue;
            }
            let numbers_bytes = self.numbers_bytes();
            for group in 0..groups {
                let at = self.groups_start(k) + (group * TILE_N + output) * numbers_bytes;
                for (list, numbers) in [&scales, &minima].into_iter().enumerate() {
                    if let Some(&number) = numbers.get(group) {
                        let at = at + 2 * list;
                        // Exact: a quotient by a power of two.
                        let bits = (number / unit).to_bits() >> 16;
                        strip[at..at + 2].copy_from_slice(&(bits as u16).to_le_bytes());
                    }
                }
            }
        }
        packed
    }

    /// Where the code of an output and an input lies in a strip: its byte, and its first bit.
    fn tile_place(self, output: usize, input: usize) -> (usize, usize) {
        let (tile, input) = (input / TILE_K, input % TILE_K);
        let (span, tile) = (tile / self.span_tiles(), tile % self.span_tiles());
        let (lane, i) = (4 * output + input / 8, input % 8);
        let vector = (span * TILE_LANES + lane) * VECTOR_BYTES;
        match self {
            IntFormat::Int8 { .. } => {
                let byte = [0, 2, 1, 3][i % 4];
                (vector + 8 * tile + i / 4 * 4 + byte, 0)
            }
            IntFormat::Int4 { .. } => {
                let bit = 4 * (i / 2) + 16 * (i % 2);
                (vector + 4 * tile + bit / 8, bit % 8)
            }
        }
    }
}

/// The number with these bits of bf16.
fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The power of two that scales and minima of an output are relative to.
fn unit(scales: &[f32], minima: &[f32]) -> f32 {
    let minima = minima.iter().map(|minimum| minimum.abs() / 16.0);
    let largest = scales
        .iter()
        .copied()
        .chain(minima)
        .fold(f32::MIN_POSITIVE, f32::max);
    // The exponent without the fraction.
    f32::from_bits(largest.to_bits() & 0xff80_0000)
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

    #[test]
    fn strips_of_integers_are_read_as_lanes_read_them() {
        for text in [
            "int8",
            "int8:g32",
            "int8:g96",
            "int4:g32",
            "int4:g64",
            "int4:g1024",
        ] {
            let format = text.parse::<WeightFormat>().unwrap().int().unwrap();
            let (n, k) = (19, 205);
            let (lowest, highest) = format.codes();
            let span = i64::from(highest) - i64::from(lowest) + 1;
            let code = |row: usize, input: usize| {
                (i64::from(lowest) + (row * 37 + input * 11) as i64 % span) as i8
            };
            let codes: Vec<i8> = (0..n * k).map(|at| code(at / k, at % k)).collect();
            let groups = format.groups(k);
            // Numbers over many powers of two.
            let bits = |at: usize| (0x3000 + at * 0x35) as u16;
            let scales: Vec<u16> = (0..n * groups).map(bits).collect();
            let minima: Vec<u16> = match format.has_minimum() {
                true => scales.iter().map(|scale| 0x8000 | (scale + 64)).collect(),
                false => vec![],
            };
            let packed = format.pack_strips(&codes, &scales, &minima, k);
            let [strips, strip_bytes] = format.strips_shape(n, k);
            assert_eq!((strips, packed.len()), (3, strips * strip_bytes));
            assert!(strip_bytes.is_multiple_of(STRIP_ALIGN_BYTES));
            let read = |at: usize| u16::from_le_bytes([packed[at], packed[at + 1]]);
            let (tiles, size) = (
                format.span_tiles(),
                if format.has_minimum() { 4 } else { 2 },
            );
            let spans = k.div_ceil(TILE_K * tiles);
            for row in 0..strips * TILE_N {
                let strip = row / TILE_N * strip_bytes;
                let group_bytes = TILE_N * size;
                let first_group = strip + spans * 512;
                let stored_groups = format
                    .tile_group()
                    .map_or(0, |group| (spans * tiles * TILE_K).div_ceil(group));
                let unit = first_group + stored_groups * group_bytes + row % TILE_N * 4;
                let unit = f32::from_le_bytes(packed[unit..unit + 4].try_into().unwrap());
                for input in 0..spans * tiles * TILE_K {
                    let (tile, lane) = (input / TILE_K, 4 * (row % TILE_N) + input % TILE_K / 8);
                    let vector = strip + (tile / tiles * 32 + lane) * 16;
                    let word = |word: usize| {
                        let at = vector + 4 * word;
                        u32::from_le_bytes(packed[at..at + 4].try_into().unwrap())
                    };
                    // A pair of codes stands in the halves of a word once it is masked.
                    let (pair, half) = (input % 8 / 2, input % 2);
                    let found = match format {
                        IntFormat::Int8 { .. } => {
                            let word = word(tile % tiles * 2 + pair / 2) >> (8 * (pair % 2));
                            i64::from(word >> (16 * half) & 0xff) - 128
                        }
                        IntFormat::Int4 { .. } => {
                            i64::from(word(tile % tiles) >> (4 * pair + 16 * half) & 15)
                        }
                    };
                    if row >= n || input >= k {
                        assert!(found == 0 || found == -128);
                        continue;
                    }
                    assert_eq!(
                        found,
                        i64::from(code(row, input)),
                        "{text}: [{row}][{input}]"
                    );
                    let group = row * groups + input / format.group(k).max(1);
                    let (mut scale, mut minimum) = (1.0, 0.0);
                    if let Some(inputs) = format.tile_group() {
                        let at = first_group + input / inputs * group_bytes + row % TILE_N * size;
                        scale = bf16(read(at));
                        assert!(scale < 2.0);
                        if format.has_minimum() {
                            minimum = bf16(read(at + 2));
                            assert!(minimum.abs() < 32.0);
                        }
                    }
                    assert_eq!(scale * unit, bf16(scales[group]), "{text}");
                    let needed = minima.get(group).map_or(0.0, |&bits| bf16(bits));
                    assert_eq!(minimum * unit, needed, "{text}");
                }
            }
        }
    }
}
