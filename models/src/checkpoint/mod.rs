//! Checkpoints: named tensors in a directory, read by position and never as a whole.
//!
//! | file | format |
//! |---|---|
//! | `safetensors.rs` | `model.safetensors` |
//! | `torch.rs`, `pickle.rs` | `pytorch_model.bin`: a zip of storages and a pickle that names them |
//! | `sharded.rs` | an index json and its shards, of either format |
//! | `gptq.rs` | the integers of GPTQ in any of these, and what they stand for |
//! | `export.rs` | any checkpoint written as a Hugging Face directory |
//!
//! A checkpoint is untrusted: every size and offset is checked against its file before a byte of it
//! is read, and nothing in it is executed.

mod error;
mod export;
mod gptq;
pub mod pickle;
mod safetensors;
mod sharded;
mod torch;

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};
use kiln_ir::DType;

pub use error::{CheckpointError, Found};
pub use export::export_hf;
pub use gptq::{Codes, GptqCheckpoint, Integers, dequantised};
pub(crate) use sharded::parse_index;

/// Element type of a stored tensor, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper 16 bits of binary32.
    Bf16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// One byte an element, 0 or 1.
    Bool,
}

impl SourceDType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            SourceDType::F64 | SourceDType::I64 => 8,
            SourceDType::F32 | SourceDType::I32 => 4,
            SourceDType::F16 | SourceDType::Bf16 | SourceDType::I16 => 2,
            SourceDType::I8 | SourceDType::U8 | SourceDType::Bool => 1,
        }
    }

    /// The name that messages use and safetensors writes.
    pub const fn name(self) -> &'static str {
        match self {
            SourceDType::F64 => "F64",
            SourceDType::F32 => "F32",
            SourceDType::F16 => "F16",
            SourceDType::Bf16 => "BF16",
            SourceDType::I64 => "I64",
            SourceDType::I32 => "I32",
            SourceDType::I16 => "I16",
            SourceDType::I8 => "I8",
            SourceDType::U8 => "U8",
            SourceDType::Bool => "BOOL",
        }
    }

    /// The element type of kiln's own tensors that holds the same values, if there is one.
    pub const fn as_dtype(self) -> Option<DType> {
        match self {
            SourceDType::F32 => Some(DType::F32),
            SourceDType::F16 => Some(DType::F16),
            SourceDType::Bf16 => Some(DType::Bf16),
            SourceDType::I32 => Some(DType::I32),
            _ => None,
        }
    }
}

impl From<DType> for SourceDType {
    fn from(dtype: DType) -> SourceDType {
        match dtype {
            DType::F32 => SourceDType::F32,
            DType::F16 => SourceDType::F16,
            DType::Bf16 => SourceDType::Bf16,
            DType::I32 => SourceDType::I32,
            DType::U8 => SourceDType::U8,
        }
    }
}

impl fmt::Display for SourceDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a checkpoint says of one tensor. Its size in bytes fits `usize`: that was checked when the
/// checkpoint was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: SourceDType,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Elements of the tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the tensor.
    pub fn size_bytes(&self) -> usize {
        self.elements() * self.dtype.size_bytes()
    }

    /// Size of the outermost dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Bytes of one row: of everything behind the outermost dimension.
    pub fn row_bytes(&self) -> usize {
        let elements: usize = self.shape.iter().skip(1).product();
        elements * self.dtype.size_bytes()
    }

    /// Checks the arithmetic that the methods above rely on.
    fn size_fits(&self) -> bool {
        // A zero dimension must not hide an overflow of the others.
        self.shape
            .iter()
            .try_fold(self.dtype.size_bytes(), |size, &dim| {
                size.checked_mul(dim.max(1))
            })
            .is_some()
    }
}

/// The values of a tensor, or of some of its rows: `info.shape` is the shape of what is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name, element type and shape.
    pub info: TensorInfo,
    /// The elements, little-endian, row-major, contiguous.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// The values as f32: exact for F32, F16 and BF16, rounded for F64; other types are refused.
    pub fn to_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        decode_f32(self.info.dtype, &self.bytes).ok_or_else(|| CheckpointError::NotFloat {
            tensor: self.info.name.clone(),
            found: self.info.dtype,
        })
    }
}

/// Named tensors that are read on demand.
pub trait Checkpoint: Send + Sync {
    /// Every tensor, by name.
    fn tensors(&self) -> &BTreeMap<String, TensorInfo>;

    /// Reads rows of a tensor into `out`, whose length is the number of rows times
    /// [`TensorInfo::row_bytes`].
    fn read_rows_into(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError>;

    /// Where the tensors come from, for messages.
    fn origin(&self) -> &Path;

    /// The integers of some of the tensors, where that is what is stored.
    fn quantised(&self) -> Option<&GptqCheckpoint> {
        None
    }

    /// What the checkpoint says of a tensor.
    fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.tensors()
            .get(name)
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                origin: self.origin().to_owned(),
                tensor: name.to_owned(),
                count: self.tensors().len(),
                first: self.tensors().keys().next().cloned().unwrap_or_default(),
            })
    }

    /// Reads some rows of a tensor: slices of its outermost dimension.
    fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor, CheckpointError> {
        let info = self.info(name)?;
        check_rows(self.origin(), info, &rows)?;
        let mut bytes = vec![0; rows.len() * info.row_bytes()];
        self.read_rows_into(name, rows.clone(), &mut bytes)?;
        let mut info = info.clone();
        if let Some(outer) = info.shape.first_mut() {
            *outer = rows.len();
        }
        Ok(Tensor { info, bytes })
    }

    /// Reads a whole tensor.
    fn read(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let rows = self.info(name)?.rows();
        self.read_rows(name, 0..rows)
    }
}

/// Weight files of a checkpoint directory, in the order in which they are preferred.
pub(crate) const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Opens the weights of a checkpoint directory: safetensors before pickles, one file before shards.
pub fn open(dir: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError> {
    let Some(name) = WEIGHT_FILES
        .into_iter()
        .find(|name| dir.join(name).exists())
    else {
        return Err(CheckpointError::NoWeights {
            dir: dir.to_owned(),
            found: list(dir)?,
        });
    };
    let path = dir.join(name);
    if name.ends_with(".index.json") {
        Ok(Box::new(sharded::Sharded::open(&path)?))
    } else {
        open_file(&path)
    }
}

/// Opens one weight file, by its extension: `.safetensors`, or `.bin` for torch's zip format.
pub fn open_file(path: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError> {
    match path.extension().and_then(|ext| ext.to_str()) {
        Some("safetensors") => Ok(Box::new(safetensors::SafetensorsFile::open(path)?)),
        Some("bin" | "pt" | "pth") => Ok(Box::new(torch::TorchFile::open(path)?)),
        _ => Err(CheckpointError::UnknownFormat {
            path: path.to_owned(),
        }),
    }
}

/// A weight file: the open file with the path that messages name.
struct WeightFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl WeightFile {
    fn open(path: &Path) -> Result<WeightFile, CheckpointError> {
        let io_error = |source| CheckpointError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io_error)?;
        let metadata = file.metadata().map_err(io_error)?;
        if !metadata.is_file() {
            return Err(io_error(io::Error::other("not a regular file")));
        }
        Ok(WeightFile {
            path: path.to_owned(),
            file,
            len: metadata.len(),
        })
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.file
            .read_exact_at(out, offset)
            .map_err(|source| CheckpointError::Io {
                path: self.path.clone(),
                source,
            })
    }

    /// The tensor `name` of this file is not what it should be.
    fn bad_tensor(
        &self,
        name: &str,
        found: impl Into<String>,
        needed: impl Into<String>,
    ) -> CheckpointError {
        CheckpointError::Tensor {
            path: self.path.clone(),
            tensor: shorten(name),
            found: found.into(),
            needed: needed.into(),
        }
    }

    /// The file as a whole is not what it should be.
    fn bad_file(&self, found: impl Into<String>, needed: impl Into<String>) -> CheckpointError {
        CheckpointError::File {
            path: self.path.clone(),
            found: found.into(),
            needed: needed.into(),
        }
    }
}

/// Rows must lie within the tensor, in order.
pub(crate) fn check_rows(
    origin: &Path,
    info: &TensorInfo,
    rows: &Range<usize>,
) -> Result<(), CheckpointError> {
    if rows.start <= rows.end && rows.end <= info.rows() {
        return Ok(());
    }
    Err(CheckpointError::Rows {
        origin: origin.to_owned(),
        tensor: info.name.clone(),
        start: rows.start,
        end: rows.end,
        rows: info.rows(),
    })
}

/// As [`check_rows`]; the buffer must be of the size of the rows as well.
pub(crate) fn check_read(
    origin: &Path,
    info: &TensorInfo,
    rows: &Range<usize>,
    out: &[u8],
) -> Result<(), CheckpointError> {
    check_rows(origin, info, rows)?;
    let needed = rows.len() * info.row_bytes();
    if out.len() == needed {
        return Ok(());
    }
    Err(CheckpointError::Buffer {
        tensor: info.name.clone(),
        found: out.len(),
        needed,
    })
}

fn decode_f32(dtype: SourceDType, bytes: &[u8]) -> Option<Vec<f32>> {
    /// Elements converted at a time, through a buffer that stays in the first-level cache.
    const CHUNK: usize = 1024;

    fn halves(bytes: &[u8], convert: impl Fn(&[u16], &mut [f32])) -> Vec<f32> {
        let mut bits = [0u16; CHUNK];
        let mut values = vec![0.0; bytes.len() / 2];
        for (from, to) in bytes.chunks(2 * CHUNK).zip(values.chunks_mut(CHUNK)) {
            for (bits, pair) in bits.iter_mut().zip(from.as_chunks::<2>().0) {
                *bits = u16::from_le_bytes(*pair);
            }
            convert(&bits[..to.len()], to);
        }
        values
    }

    match dtype {
        SourceDType::F32 => Some(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
        ),
        SourceDType::F64 => Some(
            bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b) as f32)
                .collect(),
        ),
        SourceDType::F16 => Some(halves(bytes, |bits, to| {
            bits.reinterpret_cast::<f16>().convert_to_f32_slice(to);
        })),
        SourceDType::Bf16 => Some(halves(bytes, |bits, to| {
            bits.reinterpret_cast::<bf16>().convert_to_f32_slice(to);
        })),
        _ => None,
    }
}

/// Reads a small text file, refusing one above the limit before reading it.
fn read_text(path: &Path, limit: u64) -> Result<String, CheckpointError> {
    let io_error = |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let len = std::fs::metadata(path).map_err(io_error)?.len();
    if len > limit {
        return Err(CheckpointError::File {
            path: path.to_owned(),
            found: format!("{len} bytes"),
            needed: format!("at most {limit}"),
        });
    }
    std::fs::read_to_string(path).map_err(io_error)
}

/// The names in a directory, sorted, for the message that nothing usable is among them.
fn list(dir: &Path) -> Result<Found, CheckpointError> {
    let io_error = |source| CheckpointError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error)? {
        names.push(
            entry
                .map_err(io_error)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    Ok(Found(names))
}

/// A name from a file as a message shows it.
fn shorten(name: &str) -> String {
    const LIMIT: usize = 120;
    match name.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}
