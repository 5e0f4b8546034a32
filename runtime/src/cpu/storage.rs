//! Typed views of weights and caches whose element type is known only at run time.

use half::{bf16, f16};
use kiln_bundle::packing::{CODE_STEP, PANEL, SCALES_BYTES};
use kiln_bundle::{DType, IntFormat, WeightFormat, packing};

/// Elements to read.
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// IEEE 754 binary32.
    F32(&'a [f32]),
    /// IEEE 754 binary16.
    F16(&'a [f16]),
    /// The upper half of binary32.
    Bf16(&'a [bf16]),
}

impl<'a> Storage<'a> {
    /// Reads `bytes` as elements of `dtype`.
    ///
    /// # Errors
    /// When `bytes` is not a whole number of aligned elements, or `dtype` is no number that kernels
    /// compute with.
    pub fn new(bytes: &'a [u8], dtype: DType) -> Result<Storage<'a>, StorageError> {
        let malformed = |_| StorageError::Malformed {
            dtype,
            bytes: bytes.len(),
        };
        match dtype {
            DType::F32 => bytemuck::try_cast_slice(bytes)
                .map(Storage::F32)
                .map_err(malformed),
            DType::F16 => bytemuck::try_cast_slice(bytes)
                .map(Storage::F16)
                .map_err(malformed),
            DType::Bf16 => bytemuck::try_cast_slice(bytes)
                .map(Storage::Bf16)
                .map_err(malformed),
            other => Err(StorageError::Unsupported(other)),
        }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::F32(_) => DType::F32,
            Storage::F16(_) => DType::F16,
            Storage::Bf16(_) => DType::Bf16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Storage::F32(data) => data.len(),
            Storage::F16(data) => data.len(),
            Storage::Bf16(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Elements to write.
#[derive(Debug)]
pub enum StorageMut<'a> {
    /// IEEE 754 binary32.
    F32(&'a mut [f32]),
    /// IEEE 754 binary16.
    F16(&'a mut [f16]),
    /// The upper half of binary32.
    Bf16(&'a mut [bf16]),
}

impl<'a> StorageMut<'a> {
    /// Takes `bytes` as elements of `dtype`.
    ///
    /// # Errors
    /// As [`Storage::new`].
    pub fn new(bytes: &'a mut [u8], dtype: DType) -> Result<StorageMut<'a>, StorageError> {
        let len = bytes.len();
        let malformed = |_| StorageError::Malformed { dtype, bytes: len };
        match dtype {
            DType::F32 => bytemuck::try_cast_slice_mut(bytes)
                .map(StorageMut::F32)
                .map_err(malformed),
            DType::F16 => bytemuck::try_cast_slice_mut(bytes)
                .map(StorageMut::F16)
                .map_err(malformed),
            DType::Bf16 => bytemuck::try_cast_slice_mut(bytes)
                .map(StorageMut::Bf16)
                .map_err(malformed),
            other => Err(StorageError::Unsupported(other)),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            StorageMut::F32(data) => data.len(),
            StorageMut::F16(data) => data.len(),
            StorageMut::Bf16(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A matrix (N, K) in the panel layout of [`kiln_bundle::packing`].
///
/// Fastest when its first byte is aligned to 64.
#[derive(Clone, Copy, Debug)]
pub struct PackedMatrix<'a> {
    pub(super) data: Panels<'a>,
    n: usize,
    k: usize,
}

/// What panels are made of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Panels<'a> {
    Float(Storage<'a>),
    Int(IntPanels<'a>),
}

impl<'a> PackedMatrix<'a> {
    /// The matrix of `n` rows and `k` columns packed in `data`.
    ///
    /// # Errors
    /// [`StorageError::Length`] when `data` is not of the packed size.
    pub fn new(data: Storage<'a>, n: usize, k: usize) -> Result<PackedMatrix<'a>, StorageError> {
        check_length(&packing::packed_shape(data.dtype(), n, k), data.len(), n, k)?;
        let data = Panels::Float(data);
        Ok(PackedMatrix { data, n, k })
    }

    /// The matrix of `n` rows and `k` columns packed in `bytes` as integers.
    ///
    /// # Errors
    /// [`StorageError::Length`] when `bytes` is not of the packed size,
    /// [`StorageError::Malformed`] when it is not aligned to the words that kernels read.
    pub fn of_integers(
        bytes: &'a [u8],
        format: IntFormat,
        n: usize,
        k: usize,
    ) -> Result<PackedMatrix<'a>, StorageError> {
        check_length(&format.packed_shape(n, k), bytes.len(), n, k)?;
        if !bytes.as_ptr().addr().is_multiple_of(size_of::<u32>()) {
            return Err(StorageError::Malformed {
                dtype: DType::U8,
                bytes: bytes.len(),
            });
        }
        let data = Panels::Int(IntPanels { bytes, format, k });
        Ok(PackedMatrix { data, n, k })
    }

    /// The matrix of a tensor stored in `format`.
    ///
    /// # Errors
    /// As [`PackedMatrix::new`], [`PackedMatrix::of_integers`] and [`Storage::new`].
    pub fn from_bytes(
        bytes: &'a [u8],
        format: WeightFormat,
        n: usize,
        k: usize,
    ) -> Result<PackedMatrix<'a>, StorageError> {
        match format.int() {
            Some(format) => PackedMatrix::of_integers(bytes, format, n, k),
            None => PackedMatrix::new(Storage::new(bytes, format.element())?, n, k),
        }
    }

    /// Rows: the outputs of a linear layer.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the inputs of a linear layer.
    pub fn k(&self) -> usize {
        self.k
    }
}

fn check_length(shape: &[usize], found: usize, n: usize, k: usize) -> Result<(), StorageError> {
    let needed = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
    match needed == Some(found) {
        true => Ok(()),
        false => Err(StorageError::Length { n, k, found }),
    }
}

/// Panels of integers, of the packed size.
#[derive(Clone, Copy, Debug)]
pub(super) struct IntPanels<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) format: IntFormat,
    k: usize,
}

impl<'a> IntPanels<'a> {
    /// Row `n`, (K).
    pub(super) fn row(&self, n: usize, out: &mut [f32]) {
        let (format, lane) = (self.format, n % PANEL);
        let panel = &self.bytes[n / PANEL * format.panel_bytes(self.k)..];
        let group = format.group(self.k);
        let groups = panel.chunks(format.group_bytes(group));
        for (bytes, out) in groups.zip(out.chunks_mut(group)) {
            let number = |list: usize| {
                let at = list * SCALES_BYTES + 2 * lane;
                bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
            };
            let scale = number(0);
            let codes = &bytes[format.header_bytes()..];
            match format {
                IntFormat::Int8 { .. } => {
                    for (i, out) in out.iter_mut().enumerate() {
                        let word = 4 * (i / 4 * PANEL + lane);
                        *out = scale * f32::from(codes[word + i % 4].cast_signed());
                    }
                }
                IntFormat::Int4 { .. } => {
                    let minimum = number(1);
                    for (i, out) in out.iter_mut().enumerate() {
                        let word = 4 * (i / CODE_STEP * PANEL + lane);
                        let code = codes[word + i % CODE_STEP / 2] >> (4 * (i % 2)) & 15;
                        *out = scale * f32::from(code) + minimum;
                    }
                }
            }
        }
    }
}

/// Memory that does not hold what it is said to hold: a fault of the bundle or of its reader.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The bytes cannot be cut into aligned elements.
    #[error("{bytes} bytes are not a whole number of aligned {dtype} elements")]
    Malformed {
        /// The element type asked for.
        dtype: DType,
        /// The bytes given.
        bytes: usize,
    },
    /// The element type is none that kernels compute with.
    #[error("kernels compute with f32, f16 and bf16, not {0}")]
    Unsupported(DType),
    /// A packed matrix of the wrong size.
    #[error("a packed ({n}, {k}) matrix of this format cannot have {found} elements")]
    Length {
        /// Rows expected.
        n: usize,
        /// Columns expected.
        k: usize,
        /// Elements found.
        found: usize,
    },
}
