//! The CPU kernels on the shapes of opt-125m: `cargo bench -p kiln-benches --bench kernels`.
//!
//! Throughput is bytes of weights for decode, multiplications and additions for prefill, so that
//! the figures stand beside the machine's read bandwidth and its FMA peak.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark stops where a program would report"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kiln_bundle::{WeightFormat, packing::Layout};
use kiln_runtime::cpu::{Cpu, Isa, Linear, PackedMatrix, Rows, RowsMut, ThreadPool, linear};
use std::hint::black_box;

/// (name, N, K): the linears of a layer and the LM head.
const SHAPES: [(&str, usize, usize); 4] = [
    ("qkv", 2304, 768),
    ("ffn_up", 3072, 768),
    ("ffn_down", 768, 3072),
    ("head", 50272, 768),
];

fn cpu() -> Cpu {
    let pool = ThreadPool::with_physical_cores().expect("threads");
    Cpu::new(pool, Isa::detect().expect("an instruction set")).expect("a supported one")
}

fn linears(criterion: &mut Criterion) {
    let mut cpu = cpu();
    for (phase, tokens) in [("decode", 1), ("decode8", 8), ("prefill512", 512)] {
        let mut group = criterion.benchmark_group(phase);
        group.sample_size(20);
        for format in ["f32", "bf16", "int8", "int4:g64"] {
            let format: WeightFormat = format.parse().expect("a format");
            for (name, n, k) in SHAPES {
                if tokens > 64 && name == "head" {
                    // The head is computed for a few rows only.
                    continue;
                }
                let bytes = format.bytes(Layout::Panels, n, k) as usize;
                // Small values of any type: the exponent stays in range.
                let words = vec![0x3c10_3c10_u32; bytes / 4];
                let x = vec![0.5_f32; tokens * k];
                let mut out = vec![0.0_f32; tokens * n];
                group.throughput(match tokens {
                    512 => Throughput::Elements((2 * tokens * n * k) as u64),
                    _ => Throughput::Bytes(bytes as u64),
                });
                group.bench_function(BenchmarkId::new(name, format), |bencher| {
                    let bytes = bytemuck::cast_slice(&words);
                    let weight = PackedMatrix::from_bytes(bytes, format, n, k);
                    let weight = weight.expect("the packed size");
                    let spec = Linear::new(weight);
                    bencher.iter(|| {
                        let rows = Rows::new(black_box(&x), tokens, k);
                        linear(&mut cpu, &spec, rows, RowsMut::new(&mut out, tokens, n));
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, linears);
criterion_main!(benches);
