//! Writing a bundle: everything goes to a temporary directory beside the destination, which is
//! renamed when it is whole. Whatever fails before, nothing half-written stays.

use crate::{ALIGN_BYTES, DType, FileRecord, MANIFEST_FILE, Manifest, ManifestError};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Why a bundle cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The path or the disk.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The destination holds something that is no bundle.
    #[error("{} exists and is not a kiln bundle; choose another output or remove it", .0.display())]
    Occupied(PathBuf),
    /// The compiler's mistake.
    #[error("the manifest is not sound: {0}")]
    Manifest(#[from] ManifestError),
    /// The compiler's mistake.
    #[error("tensor {name:?} was written with {found} bytes, declared were {needed}")]
    TensorSize {
        /// The tensor.
        name: String,
        /// Bytes written.
        found: u64,
        /// Bytes declared.
        needed: u64,
    },
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> WriteError + 'a {
    move |source| WriteError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDecl {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorDecl {
    /// Bytes of its elements.
    pub fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&dim| dim as u64).product();
        elements * self.dtype.size_bytes() as u64
    }
}

/// A bundle being written. Dropping it unfinished removes what there is.
#[derive(Debug)]
pub struct BundleWriter {
    destination: PathBuf,
    temporary: TempDir,
    files: BTreeMap<String, FileRecord>,
}

impl BundleWriter {
    /// Starts a bundle that [`BundleWriter::finish`] will put at `destination`, replacing a bundle
    /// that is there.
    ///
    /// # Errors
    /// A destination that is no bundle, or cannot be written beside.
    pub fn create(destination: &Path) -> Result<BundleWriter, WriteError> {
        if destination.exists() && !destination.join(MANIFEST_FILE).is_file() {
            let empty = fs::read_dir(destination).is_ok_and(|mut entries| entries.next().is_none());
            if !empty {
                return Err(WriteError::Occupied(destination.to_owned()));
            }
        }
        let parent = match destination.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        let temporary = tempfile::Builder::new()
            .prefix(".kiln-")
            .tempdir_in(parent)
            .map_err(io_error("create a directory in", parent))?;
        Ok(BundleWriter {
            destination: destination.to_owned(),
            temporary,
            files: BTreeMap::new(),
        })
    }

    /// Writes a whole file of the bundle; `name` may lie in directories of it.
    ///
    /// # Errors
    /// The path or the disk.
    pub fn add_file(&mut self, name: &str, contents: &[u8]) -> Result<(), WriteError> {
        let path = self.temporary.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        }
        let mut file = HashedFile::create(path)?;
        file.write(contents)?;
        self.files.insert(name.to_owned(), file.finish()?);
        Ok(())
    }

    /// Writes a safetensors file, tensor after tensor: `fill` gets each declaration and writes its
    /// little-endian elements, as much at a time as it likes.
    ///
    /// # Errors
    /// The path or the disk, a tensor of another size than declared, or what `fill` returns.
    pub fn add_tensors<E: From<WriteError>>(
        &mut self,
        name: &str,
        tensors: &[TensorDecl],
        mut fill: impl FnMut(&TensorDecl, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut file = HashedFile::create(self.temporary.path().join(name))?;
        file.write(&safetensors_header(tensors))?;
        for tensor in tensors {
            let start = file.bytes;
            fill(tensor, &mut TensorSink(&mut file))?;
            let (found, needed) = (file.bytes - start, tensor.bytes());
            if found != needed {
                return Err(WriteError::TensorSize {
                    name: tensor.name.clone(),
                    found,
                    needed,
                }
                .into());
            }
        }
        self.files.insert(name.to_owned(), file.finish()?);
        Ok(())
    }

    /// Adds the manifest, with the records of all files, and puts the bundle in its place.
    ///
    /// # Errors
    /// A manifest that is not sound, the path or the disk.
    pub fn finish(mut self, mut manifest: Manifest) -> Result<Manifest, WriteError> {
        manifest.files = std::mem::take(&mut self.files);
        manifest.verify()?;
        let path = self.temporary.path().join(MANIFEST_FILE);
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| io_error("write", &path)(io::Error::other(error)))?;
        let mut file = HashedFile::create(path)?;
        file.write(&text)?;
        file.finish()?;
        open_to_all(self.temporary.path())?;
        // A directory cannot be replaced in one step, so the old bundle moves aside first; it goes
        // with the temporary directory that holds it.
        let aside = tempfile::Builder::new()
            .prefix(".kiln-old-")
            .tempdir_in(self.temporary.path().parent().unwrap_or(Path::new(".")))
            .map_err(io_error("create a directory beside", &self.destination))?;
        if self.destination.exists() {
            fs::rename(&self.destination, aside.path().join("bundle"))
                .map_err(io_error("replace", &self.destination))?;
        }
        if let Err(error) = fs::rename(self.temporary.path(), &self.destination) {
            // Bring the old bundle back: failing must not lose it.
            fs::rename(aside.path().join("bundle"), &self.destination).ok();
            return Err(io_error("create", &self.destination)(error));
        }
        Ok(manifest)
    }
}

/// Temporary directories are private; a finished bundle is as readable as any new directory.
fn open_to_all(dir: &Path) -> Result<(), WriteError> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
            .map_err(io_error("set permissions of", dir))?;
    }
    Ok(())
}

/// Where a tensor's bytes go.
#[derive(Debug)]
pub struct TensorSink<'a>(&'a mut HashedFile);

impl TensorSink<'_> {
    /// Appends bytes of the tensor.
    ///
    /// # Errors
    /// The disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.0.write(bytes)
    }
}

/// Files are written in pieces of this size, at multiples of it: a file system that can then keeps each in a huge page,
/// in which a bundle that has just been compiled is mapped.
const PIECE_BYTES: usize = 2 << 20;

#[derive(Debug)]
struct HashedFile {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    fn create(path: PathBuf) -> Result<HashedFile, WriteError> {
        let file = File::create(&path).map_err(io_error("create", &path))?;
        Ok(HashedFile {
            path,
            file: BufWriter::with_capacity(PIECE_BYTES, file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let mut left = bytes;
        while !left.is_empty() {
            let room = match PIECE_BYTES - self.file.buffer().len() {
                // The next write puts the piece into the file.
                0 => PIECE_BYTES,
                room => room,
            };
            let (piece, behind) = left.split_at(room.min(left.len()));
            self.file
                .write_all(piece)
                .map_err(io_error("write", &self.path))?;
            left = behind;
        }
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Flushes to the disk, so that a full disk shows here and not after the rename.
    fn finish(self) -> Result<FileRecord, WriteError> {
        let HashedFile {
            path,
            file,
            hasher,
            bytes,
        } = self;
        let file = file
            .into_inner()
            .map_err(|error| io_error("write", &path)(error.into_error()))?;
        file.sync_all().map_err(io_error("write", &path))?;
        Ok(FileRecord {
            bytes,
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }
}

/// Length and JSON header, filled with spaces so that the data starts at [`ALIGN_BYTES`].
fn safetensors_header(tensors: &[TensorDecl]) -> Vec<u8> {
    let mut offset = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|tensor| {
            let end = offset + tensor.bytes();
            let dtype = tensor.dtype.name().to_uppercase();
            let entry =
                json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
            offset = end;
            format!("{}:{entry}", json!(tensor.name))
        })
        .collect();
    let mut header = format!("{{{}}}", entries.join(",")).into_bytes();
    let used = size_of::<u64>() + header.len();
    header.resize(
        header.len() + used.next_multiple_of(ALIGN_BYTES) - used,
        b' ',
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes
}
