//! The embedding of tokens and positions.

use super::norm;
use super::simd::{Element, Kernel, LANES, Simd};
use super::storage::{PackedMatrix, Panels, Storage};
use super::{Cpu, RowsMut};
use kiln_bundle::DType;
use kiln_bundle::packing::{PANEL, together};

/// A table of position embeddings: (P, C), row-major.
#[derive(Clone, Copy, Debug)]
pub struct PositionTable<'a> {
    data: Storage<'a>,
    cols: usize,
}

impl<'a> PositionTable<'a> {
    /// The table of rows of `cols` values.
    pub fn new(data: Storage<'a>, cols: usize) -> PositionTable<'a> {
        assert!(
            cols > 0 && data.len().is_multiple_of(cols),
            "rows of {cols} values"
        );
        PositionTable { data, cols }
    }

    /// P.
    pub fn rows(&self) -> usize {
        self.data.len() / self.cols
    }
}

/// What makes up the embedding of a row.
#[derive(Clone, Copy, Debug)]
pub struct Embedding<'a> {
    /// The token table (V, C), which may be that of the LM head, and the token of each row. Where
    /// absent, the output holds the rows already and the positions are added to them.
    pub tokens: Option<(PackedMatrix<'a>, &'a [u32])>,
    /// The position table (P, C), and the table's row for each row.
    pub positions: Option<(PositionTable<'a>, &'a [u32])>,
}

/// Computes `op` into `out`, (T, C).
pub fn embed(cpu: &Cpu, op: &Embedding<'_>, mut out: RowsMut<'_>) {
    let (t, c) = (out.rows(), out.cols());
    if let Some((table, ids)) = op.tokens {
        assert_eq!(
            (ids.len(), table.k()),
            (t, c),
            "tokens, and columns of their table"
        );
        assert!(
            ids.iter().all(|&id| (id as usize) < table.n()),
            "tokens of the vocabulary"
        );
    }
    if let Some((table, ids)) = op.positions {
        assert_eq!(
            (ids.len(), table.cols),
            (t, c),
            "positions, and columns of their table"
        );
        assert!(
            ids.iter().all(|&id| (id as usize) < table.rows()),
            "positions of the table"
        );
    }
    let isa = cpu.isa;
    let rows = out.shared();
    let embed_row = |_: usize, t: usize| {
        // SAFETY: row t belongs to this task.
        let out = unsafe { rows.row(t) };
        if let Some((table, ids)) = op.tokens {
            let id = ids[t] as usize;
            match table.data {
                Panels::Float(Storage::F32(table)) => {
                    isa.run(Token::<_, { together(DType::F32) }> {
                        table,
                        id,
                        out: &mut *out,
                    });
                }
                Panels::Float(Storage::F16(table)) => {
                    isa.run(Token::<_, { together(DType::F16) }> {
                        table,
                        id,
                        out: &mut *out,
                    });
                }
                Panels::Float(Storage::Bf16(table)) => {
                    isa.run(Token::<_, { together(DType::Bf16) }> {
                        table,
                        id,
                        out: &mut *out,
                    });
                }
                Panels::Int(table) => table.row(id, out),
            }
        }
        if let Some((table, ids)) = op.positions {
            let range = ids[t] as usize * c..(ids[t] as usize + 1) * c;
            match table.data {
                Storage::F32(table) => isa.run(Position {
                    row: &table[range],
                    out,
                }),
                Storage::F16(table) => isa.run(Position {
                    row: &table[range],
                    out,
                }),
                Storage::Bf16(table) => isa.run(Position {
                    row: &table[range],
                    out,
                }),
            }
        }
    };
    // A few rows take less time than waking the workers.
    if t <= 4 {
        (0..t).for_each(|t| embed_row(0, t));
    } else {
        cpu.pool.parallel_for(t, embed_row);
    }
}

/// `out = table[id]`, the table packed in panels, TOGETHER inputs together: a strided walk, which the hardware
/// prefetches.
struct Token<'a, E, const TOGETHER: usize> {
    table: &'a [E],
    id: usize,
    out: &'a mut [f32],
}

impl<E: Element, const TOGETHER: usize> Kernel for Token<'_, E, TOGETHER> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.out.len();
        let panel = self.id / PANEL * cols.next_multiple_of(TOGETHER);
        let row = &self.table[panel * PANEL + self.id % PANEL * TOGETHER..];
        for (i, out) in self.out.chunks_mut(LANES).enumerate() {
            let mut lanes = [E::zeroed(); LANES];
            for (j, lane) in lanes.iter_mut().take(out.len()).enumerate() {
                let k = i * LANES + j;
                *lane = row[k / TOGETHER * (TOGETHER * PANEL) + k % TOGETHER];
            }
            // SAFETY: the array has sixteen elements, the output as many as are stored.
            unsafe {
                norm::store(
                    simd,
                    out.as_mut_ptr(),
                    E::load(simd, lanes.as_ptr()),
                    out.len(),
                );
            }
        }
    }
}

/// `out += row`
struct Position<'a, E> {
    row: &'a [E],
    out: &'a mut [f32],
}

impl<E: Element> Kernel for Position<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, out) in self.row.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
            // SAFETY: both have `out.len()` elements, the row and the output being equally long.
            unsafe {
                let position = if row.len() == LANES {
                    E::load(simd, row.as_ptr())
                } else {
                    E::load_first(simd, row.as_ptr(), row.len())
                };
                let x = norm::load(simd, out.as_ptr(), out.len());
                norm::store(simd, out.as_mut_ptr(), simd.add(x, position), out.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Elements, Packed, Random, cpus};

    #[test]
    fn rows_are_looked_up_and_added() {
        let (v, p) = (75, 9);
        for (t, c) in [(0, 4), (1, 1), (3, 16), (7, 37), (30, 64)] {
            let mut random = Random::new(3);
            let tokens = Packed::each(&random.values(v * c), v, c);
            let positions = Elements::each(&random.values(p * c));
            let ids: Vec<u32> = (0..t).map(|_| random.next_u32() % v as u32).collect();
            let places: Vec<u32> = (0..t).map(|_| random.next_u32() % p as u32).collect();
            for (tokens, positions) in tokens.iter().zip(positions.iter().cycle()) {
                let table = tokens.matrix();
                let token = |t: usize, i: usize| tokens.get(ids[t] as usize, i);
                let place = |t: usize, i: usize| positions.get(places[t] as usize * c + i);
                for cpu in cpus() {
                    let mut out = vec![f32::NAN; t * c];
                    let mut run = |op: Embedding<'_>| {
                        embed(&cpu, &op, RowsMut::new(&mut out, t, c));
                        out.clone()
                    };
                    let table = Some((table, &ids[..]));
                    let places = Some((PositionTable::new(positions.as_storage(), c), &places[..]));
                    let alone = run(Embedding {
                        tokens: table,
                        positions: None,
                    });
                    let added = run(Embedding {
                        tokens: None,
                        positions: places,
                    });
                    let both = run(Embedding {
                        tokens: table,
                        positions: places,
                    });
                    assert_eq!(added, both);
                    for t in 0..t {
                        for i in 0..c {
                            assert_eq!(alone[t * c + i], token(t, i));
                            assert_eq!(both[t * c + i], token(t, i) + place(t, i));
                        }
                    }
                }
            }
        }
    }
}
