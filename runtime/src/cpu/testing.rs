//! What the kernels' tests share: deterministic numbers, packed weights, and a [`Cpu`] of each kind.

use super::{Cpu, Isa, Storage, StorageMut, ThreadPool};
use half::{bf16, f16};
use kiln_bundle::packing;

/// A 64-bit xorshift generator.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next_u32(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// Values in [-1, 1).
    pub(super) fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| self.next_u32() as f32 / 2f32.powi(31) - 1.0)
            .collect()
    }

    /// A permutation of `0..len`.
    pub(super) fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.next_u32() as usize % (i + 1));
        }
        order
    }
}

/// The instruction sets of this machine.
pub(super) fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_supported())
}

/// A CPU for each instruction set, with one to three threads.
pub(super) fn cpus() -> impl Iterator<Item = Cpu> {
    isas().flat_map(|isa| (1..=3).map(move |threads| cpu(isa, threads)))
}

pub(super) fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::new(ThreadPool::new(threads).unwrap(), isa).unwrap()
}

/// Owned elements of any type.
#[derive(Clone)]
pub(super) enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Elements {
    /// `values` as each type in turn.
    pub(super) fn each(values: &[f32]) -> [Elements; 3] {
        [
            Elements::F32(values.to_vec()),
            Elements::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            Elements::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        ]
    }

    pub(super) fn as_storage(&self) -> Storage<'_> {
        match self {
            Elements::F32(data) => Storage::F32(data),
            Elements::F16(data) => Storage::F16(data),
            Elements::Bf16(data) => Storage::Bf16(data),
        }
    }

    pub(super) fn as_storage_mut(&mut self) -> StorageMut<'_> {
        match self {
            Elements::F32(data) => StorageMut::F32(data),
            Elements::F16(data) => StorageMut::F16(data),
            Elements::Bf16(data) => StorageMut::Bf16(data),
        }
    }

    /// What the elements stand for, after rounding.
    pub(super) fn get(&self, i: usize) -> f32 {
        match self {
            Elements::F32(data) => data[i],
            Elements::F16(data) => data[i].to_f32(),
            Elements::Bf16(data) => data[i].to_f32(),
        }
    }
}

/// The packed form of `w` (n, k).
pub(super) fn pack(w: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut packed = vec![0.0; packing::packed_shape(n, k).iter().product()];
    for row in 0..n {
        for col in 0..k {
            packed[packing::packed_index(row, col, k)] = w[row * k + col];
        }
    }
    packed
}

/// The bits of a row, to be compared.
pub(super) fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}
