//! Typed views of weights and caches whose element type is known only at run time.

use half::{bf16, f16};
use kiln_bundle::{DType, packing};

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
    pub(super) data: Storage<'a>,
    n: usize,
    k: usize,
}

impl<'a> PackedMatrix<'a> {
    /// The matrix of `n` rows and `k` columns packed in `data`.
    ///
    /// # Errors
    /// [`StorageError::Length`] when `data` is not of the packed size.
    pub fn new(data: Storage<'a>, n: usize, k: usize) -> Result<PackedMatrix<'a>, StorageError> {
        let needed = packing::packed_shape(n, k)
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b));
        if needed != Some(data.len()) {
            return Err(StorageError::Length {
                n,
                k,
                found: data.len(),
            });
        }
        Ok(PackedMatrix { data, n, k })
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
    #[error("a packed ({n}, {k}) matrix cannot have {found} elements")]
    Length {
        /// Rows expected.
        n: usize,
        /// Columns expected.
        k: usize,
        /// Elements found.
        found: usize,
    },
}
