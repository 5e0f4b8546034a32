//! What can be wrong with a checkpoint.

use std::{fmt, io, path::PathBuf};

use super::{SourceDType, pickle::PickleError};

/// Names that were found where others were looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found(pub Vec<String>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        f.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system failed, or the file ended early.
    #[error("cannot read or write {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory holds no weights: the caller's path, or an incomplete download.
    #[error(
        "no weights in {dir}: found {found}; needed model.safetensors, pytorch_model.bin, or the \
         index json of their shards; give the checkpoint's own directory or download it again"
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What it holds.
        found: Found,
    },
    /// The extension is that of no known format: the caller's or the index's mistake.
    #[error("{path} is in no format that kiln reads; needed: a .safetensors or .bin file")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A file is not well-formed: truncated, corrupted or hostile.
    #[error("{path}: found {found}; needed {needed}; download the file again")]
    File {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be there.
        needed: String,
    },
    /// What a file says of a tensor is wrong or not supported.
    #[error("{path}: tensor {tensor:?}: found {found}; needed {needed}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is there.
        found: String,
        /// What should be there.
        needed: String,
    },
    /// The index names a shard that is not there: an incomplete download.
    #[error("{index} names the shard {shard:?}, which is missing; download it next to the index")]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// The index names a shard outside its own directory: a hostile file.
    #[error(
        "{index} names the shard {shard:?}; needed: a plain file name next to the index, ending in \
         .safetensors or .bin"
    )]
    ShardName {
        /// The index file.
        index: PathBuf,
        /// What it names.
        shard: String,
    },
    /// A tensor is not in the shard that the index gives for it.
    #[error(
        "{index} places tensor {tensor:?} in shard {shard:?}, which does not hold it; index and \
         shards are from different checkpoints: download them again"
    )]
    MissingFromShard {
        /// The index file.
        index: PathBuf,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// The file was written by torch.save before the zip format (torch 1.6).
    #[error(
        "{path} is in torch's legacy format, which kiln does not read; load and save it once with \
         torch 1.6 or later, or convert it to safetensors"
    )]
    LegacyTorch {
        /// The file.
        path: PathBuf,
    },
    /// The file is no zip archive: truncated, or another format.
    #[error(
        "{path} is not a torch checkpoint: {source}; needed: the zip format of torch.save; \
         download the file again"
    )]
    Zip {
        /// The file.
        path: PathBuf,
        /// What the zip reader said.
        source: zip::result::ZipError,
    },
    /// The pickle asks for more than tensors, or is damaged.
    #[error("{path}: {source}")]
    Pickle {
        /// The file.
        path: PathBuf,
        /// What the unpickler refused.
        source: PickleError,
    },
    /// The checkpoint has no tensor of that name: another architecture or an incomplete file.
    #[error("{origin} has no tensor {tensor:?} among its {count} tensors (the first is {first:?})")]
    NoSuchTensor {
        /// The checkpoint.
        origin: PathBuf,
        /// The name that was asked for.
        tensor: String,
        /// How many there are.
        count: usize,
        /// One that is there, to compare with.
        first: String,
    },
    /// Rows outside a tensor: the caller's mistake.
    #[error("{origin}: rows {start}..{end} of tensor {tensor:?}, which has {rows}")]
    Rows {
        /// The checkpoint.
        origin: PathBuf,
        /// The tensor.
        tensor: String,
        /// First row.
        start: usize,
        /// Behind the last row.
        end: usize,
        /// Rows of the tensor.
        rows: usize,
    },
    /// A buffer of the wrong size: the caller's mistake.
    #[error("a buffer of {found} bytes for rows of tensor {tensor:?}; needed {needed} bytes")]
    Buffer {
        /// The tensor.
        tensor: String,
        /// Bytes of the buffer.
        found: usize,
        /// Bytes of the rows.
        needed: usize,
    },
    /// A tensor that should hold weights is not of a floating-point type.
    #[error("tensor {tensor:?} has elements of type {found}; needed F32, F16, BF16 or F64")]
    NotFloat {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: SourceDType,
    },
}
