//! What share of the read bandwidth kernels get that stream weights, or keys and values, from memory:
//! `cargo bench -p kiln-benches --bench streams -- [NAME] [ROUNDS]`, for streams whose names have NAME in them.
//!
//! Streams take turns. Each goes through 96 MB, between two passes of the bandwidth test over as much; where these
//! differ by more than a tenth, the turn does not count. Memory that others use, too, may have two speeds: turns below
//! and above the middle of what was found are told apart.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark stops where a program would report"
)]

use kiln_bundle::packing::Layout;
use kiln_bundle::{Activations, BLOCK_TOKENS, DType, WeightFormat};
use kiln_runtime::cpu::{
    Attention, Cpu, Isa, KvCache, KvCacheMut, KvLayout, Linear, PackedMatrix, Rows, RowsMut,
    Sequence, Storage, StorageMut, ThreadPool, attention, linear, read_once, write_kv,
};
use memmap2::MmapMut;
use std::time::Instant;

const STREAM_BYTES: usize = 96 << 20;
const ROUNDS: usize = 40;

/// (N, K) of the matrices.
const MATRIX: [usize; 2] = [6144, 2048];
const HEADS: usize = 32;
const HEAD_DIM: usize = 64;

enum Stream {
    Matrices(WeightFormat, Option<Activations>),
    /// Decode attention of so many sequences over so many positions each, in bf16.
    Attention([usize; 2], Option<Activations>),
}

struct Turn {
    ratio: f64,
    read: f64,
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let name = arguments.next().unwrap_or_default();
    let rounds = arguments
        .next()
        .map_or(ROUNDS, |rounds| rounds.parse().expect("a number of rounds"));

    let format = |name: &str| name.parse().expect("a format");
    let (int8, bf16) = (Some(Activations::Int8), Some(Activations::Bf16));
    let mut streams = vec![
        ("bf16", Stream::Matrices(format("bf16"), None)),
        ("bf16/bf16", Stream::Matrices(format("bf16"), bf16)),
        ("int8", Stream::Matrices(format("int8"), None)),
        ("int8/int8", Stream::Matrices(format("int8"), int8)),
        ("int4", Stream::Matrices(format("int4"), None)),
        ("int4/int8", Stream::Matrices(format("int4"), int8)),
        ("attention 1 x 32", Stream::Attention([1, 32], None)),
        ("attention 1 x 512", Stream::Attention([1, 512], None)),
        ("attention 1 x 2048", Stream::Attention([1, 2048], None)),
        ("attention 4 x 512", Stream::Attention([4, 512], None)),
        (
            "attention/bf16 1 x 2048",
            Stream::Attention([1, 2048], bf16),
        ),
        ("attention/bf16 4 x 512", Stream::Attention([4, 512], bf16)),
    ];
    streams.retain(|stream| stream.0.contains(&name));

    let pool = ThreadPool::with_physical_cores().expect("threads");
    let isa = Isa::detect().expect("an instruction set");
    let mut cpu = Cpu::new(pool, isa).expect("a CPU");
    let weights = memory();
    let weights: &[u8] = &weights;
    let read_pages = memory();
    let read_pages: &[f32] = bytemuck::cast_slice(&read_pages);
    let caches: &mut [u8] = &mut memory();

    let mut turns: Vec<Vec<Turn>> = streams.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        for i in (0..streams.len()).map(|i| (i + round) % streams.len()) {
            let read = |cpu: &Cpu| read_once(cpu.pool(), isa, read_pages);
            let before = read(&cpu);
            let start = Instant::now();
            let bytes = match &streams[i].1 {
                Stream::Matrices(format, activations) => {
                    matrices(&mut cpu, weights, *format, *activations)
                }
                Stream::Attention(shape, activations) => {
                    attend(&mut cpu, caches, *shape, *activations)
                }
            };
            let rate = bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
            let after = read(&cpu);
            let read = (before + after) / 2.0;
            if (before - after).abs() < 0.1 * read {
                turns[i].push(Turn {
                    ratio: rate / read,
                    read,
                });
            }
        }
    }

    let reads = || turns.iter().flatten().map(|turn| turn.read);
    let (least, most) = (
        reads().fold(f64::INFINITY, f64::min),
        reads().fold(0.0, f64::max),
    );
    let middle = match most / least {
        ..1.3 => f64::INFINITY,
        _ => f64::sqrt(least * most),
    };
    println!("stream                 read GB/s  turns  median      p10      p90");
    for ((name, _), turns) in streams.iter().zip(&turns) {
        for fast in [false, true] {
            let of = || turns.iter().filter(|turn| (turn.read >= middle) == fast);
            let mut ratios: Vec<f64> = of().map(|turn| turn.ratio).collect();
            if ratios.is_empty() {
                continue;
            }
            ratios.sort_unstable_by(f64::total_cmp);
            let at = |part: f64| ratios[(part * (ratios.len() - 1) as f64).round() as usize];
            let read = of().map(|turn| turn.read).sum::<f64>() / ratios.len() as f64;
            println!(
                "{name:22} {read:9.1} {:6} {:7.3} {:8.3} {:8.3}",
                ratios.len(),
                at(0.5),
                at(0.1),
                at(0.9)
            );
        }
    }
}

/// Memory full of bf16, scales of matrices among them; in huge pages, where the system has them, as weights and the KV
/// cache are.
fn memory() -> MmapMut {
    let mut memory = MmapMut::map_anon(STREAM_BYTES).expect("memory");
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    bytemuck::cast_slice_mut::<u8, half::bf16>(&mut memory).fill(half::bf16::from_f32(0.01));
    memory
}

/// Multiplies a row with one matrix after the other, and returns their bytes.
fn matrices(
    cpu: &mut Cpu,
    memory: &[u8],
    format: WeightFormat,
    activations: Option<Activations>,
) -> usize {
    let [n, k] = MATRIX;
    let bytes = format.bytes(Layout::Panels, n, k) as usize;
    let (x, mut out) = (vec![0.5; k], vec![0.0; n]);
    for matrix in memory.chunks_exact(bytes) {
        let weights = bytemuck::cast_slice(matrix);
        let weights = PackedMatrix::from_bytes(weights, format, n, k).expect("a matrix");
        let mut op = Linear::new(weights);
        op.activations = activations;
        linear(cpu, &op, Rows::new(&x, 1, k), RowsMut::new(&mut out, 1, n));
    }
    memory.len() / bytes * bytes
}

/// Writes the last positions in one layer after the other, attends to all of them, and returns the layers' bytes.
fn attend(
    cpu: &mut Cpu,
    memory: &mut [u8],
    [batch, positions]: [usize; 2],
    activations: Option<Activations>,
) -> usize {
    let cols = HEADS * HEAD_DIM;
    let blocks = (positions / BLOCK_TOKENS) as u32;
    let table: Vec<u32> = (0..batch as u32 * blocks).collect();
    let sequence = |row| Sequence {
        first_row: row,
        rows: 1,
        past: positions - 1,
        block_table: &table[row * blocks as usize..],
    };
    let sequences: Vec<Sequence<'_>> = (0..batch).map(sequence).collect();
    let last_slots: Vec<u32> = (1..=batch).map(|i| (i * positions) as u32 - 1).collect();
    let (x, mut out) = (vec![0.5; batch * cols], vec![0.0; batch * cols]);
    let rows = Rows::new(&x, batch, cols);

    let layer_bytes = 2 * batch * positions * cols * DType::Bf16.size_bytes();
    // What is left takes up what each block has besides.
    let layers = memory.len() / layer_bytes - 1;
    let layout = KvLayout::new(layers, HEADS, HEAD_DIM);
    let memory = &mut memory[..table.len() * layout.block_len() * DType::Bf16.size_bytes()];
    for layer in 0..layers {
        let data = StorageMut::new(memory, DType::Bf16).expect("bf16");
        write_kv(
            cpu,
            rows,
            rows,
            &last_slots,
            &mut KvCacheMut::new(data, layout, layer),
        );
        let data = Storage::new(memory, DType::Bf16).expect("bf16");
        let op = Attention {
            queries: rows,
            sequences: &sequences,
            cache: KvCache::new(data, layout, layer),
            scale: 0.125,
            activations,
        };
        attention(cpu, &op, RowsMut::new(&mut out, batch, cols));
    }
    layers * layer_bytes
}
