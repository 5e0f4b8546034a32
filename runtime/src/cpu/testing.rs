//! What the kernels' tests share: deterministic numbers, packed weights, and a [`Cpu`] of each kind.

use super::simd::FUSED;
use super::{Cpu, Isa, PackedMatrix, Storage, StorageMut, ThreadPool};
use half::{bf16, f16};
use kiln_bundle::{DType, IntFormat, WeightFormat, packing::Layout};

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

/// Those of them that round a multiply-add once, as all but the portable one surely do.
pub(super) fn fused_isas() -> impl Iterator<Item = Isa> {
    isas().filter(|isa| FUSED || *isa != Isa::Portable)
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
        [DType::F32, DType::F16, DType::Bf16].map(|dtype| Elements::of(dtype, values))
    }

    /// `values` as a type of floating-point numbers.
    pub(super) fn of(dtype: DType, values: &[f32]) -> Elements {
        match dtype {
            DType::F16 => Elements::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::Bf16 => Elements::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Elements::F32(values.to_vec()),
        }
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

/// A packed matrix, and what its elements stand for.
pub(super) struct Packed {
    data: Data,
    values: Vec<f32>,
    n: usize,
    k: usize,
}

enum Data {
    Float(Elements),
    Int(AlignedBytes, IntFormat),
}

impl Packed {
    /// `w` (n, k) in each way of storing it.
    pub(super) fn each(w: &[f32], n: usize, k: usize) -> Vec<Packed> {
        let floats = Elements::each(w).map(|elements| {
            let values: Vec<f32> = (0..n * k).map(|i| elements.get(i)).collect();
            let dtype = elements.as_storage().dtype();
            let packed = Layout::Panels.pack(dtype, &values, k);
            let data = Data::Float(Elements::of(dtype, &packed));
            Packed { data, values, n, k }
        });
        let formats = [
            "int8",
            "int8:g32",
            "int8:g160",
            "int8:g192",
            "int4:g32",
            "int4:g64",
            "int4:g192",
            "int4:g288",
        ];
        let ints = formats.map(|format| {
            let format: WeightFormat = format.parse().unwrap();
            Packed::of_integers(w, n, k, format.int().unwrap())
        });
        floats.into_iter().chain(ints).collect()
    }

    /// Each group between its extremes, plainly.
    fn of_integers(w: &[f32], n: usize, k: usize, format: IntFormat) -> Packed {
        let (mut codes, mut scales, mut minima, mut values) = (vec![], vec![], vec![], vec![]);
        for group in w.chunks(k).flat_map(|row| row.chunks(format.group(k))) {
            let low = group.iter().copied().fold(f32::MAX, f32::min);
            let high = group.iter().copied().fold(f32::MIN, f32::max);
            let (scale, minimum) = match format.has_minimum() {
                true => ((high - low).max(1e-6) / 15.0, low),
                false => (high.max(-low) / 127.0, 0.0),
            };
            let (scale, minimum) = (bf16::from_f32(scale), bf16::from_f32(minimum));
            let (lowest, highest) = format.codes();
            for x in group {
                let code = ((x - minimum.to_f32()) / scale.to_f32()).round();
                let code = code.clamp(lowest.into(), highest.into());
                codes.push(code as i8);
                values.push(scale.to_f32() * code + minimum.to_f32());
            }
            scales.push(scale.to_bits());
            minima.extend(format.has_minimum().then_some(minimum.to_bits()));
        }
        let bytes = AlignedBytes::new(&format.pack(&codes, &scales, &minima, k));
        let data = Data::Int(bytes, format);
        Packed { data, values, n, k }
    }

    pub(super) fn matrix(&self) -> PackedMatrix<'_> {
        match &self.data {
            Data::Float(elements) => PackedMatrix::new(elements.as_storage(), self.n, self.k),
            Data::Int(bytes, format) => {
                PackedMatrix::of_integers(bytes.as_slice(), *format, self.n, self.k)
            }
        }
        .unwrap()
    }

    /// What `W[n][k]` stands for.
    pub(super) fn get(&self, n: usize, k: usize) -> f32 {
        self.values[n * self.k + k]
    }
}

/// Bytes aligned as those of a mapped file.
pub(super) struct AlignedBytes(Vec<u64>, usize);

impl AlignedBytes {
    pub(super) fn new(bytes: &[u8]) -> AlignedBytes {
        let mut words = vec![0; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        AlignedBytes(words, bytes.len())
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }
}

/// The bits of a row, to be compared.
pub(super) fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}
