//! Reading a bundle as untrusted input: sizes and offsets are checked against the files before
//! anything is indexed by them, and nothing is read outside its file.

use crate::{
    ALIGN_BYTES, DType, FORMAT_VERSION, FileRecord, MANIFEST_FILE, Manifest, ManifestError,
    TOKENIZER_FILE, Target, WeightRole,
};
use memmap2::{Mmap, MmapMut};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

/// Largest manifest that is read: opt-175b's has a few megabytes.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// Why a bundle cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
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
    /// The caller named something else.
    #[error("{} is not a kiln bundle: it has no {MANIFEST_FILE}; `kilnc compile` makes one", .0.display())]
    NotABundle(PathBuf),
    /// The bundle is of another version of kiln.
    #[error(
        "{} has bundle format {found} (written by kiln {writer}); this kiln reads format {FORMAT_VERSION}: {}",
        path.display(),
        if *found > FORMAT_VERSION { "use a newer kiln" } else { "compile the model again" }
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its format version.
        found: u32,
        /// Its `kiln_version`.
        writer: String,
    },
    /// The bundle is damaged or was not written by kiln.
    #[error("{} is damaged: {problem}; compile the model again or copy the bundle anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was needed.
        problem: String,
    },
    /// The manifest contradicts itself.
    #[error("{} is damaged: {error}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The contradiction.
        error: ManifestError,
    },
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> BundleError + 'a {
    move |source| BundleError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// An open bundle whose manifest is sound and whose files have the sizes it lists.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    manifest: Manifest,
}

impl Bundle {
    /// Opens a bundle: magic, version, structure, then the sizes of its files. Hashes are left to
    /// [`Bundle::verify_hashes`], since they need every byte.
    ///
    /// # Errors
    /// Any of [`BundleError`].
    pub fn open(dir: &Path) -> Result<Bundle, BundleError> {
        let path = dir.join(MANIFEST_FILE);
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound if dir.exists() => BundleError::NotABundle(dir.to_owned()),
            io::ErrorKind::NotADirectory => BundleError::NotABundle(dir.to_owned()),
            _ => BundleError::Io {
                action: "open bundle",
                path: dir.to_owned(),
                source,
            },
        })?;
        let damaged = |problem: String| BundleError::Damaged {
            path: path.clone(),
            problem,
        };
        let mut text = String::new();
        let read = file.take(MAX_MANIFEST_BYTES + 1).read_to_string(&mut text);
        match read {
            Ok(bytes) if bytes as u64 > MAX_MANIFEST_BYTES => {
                return Err(damaged(format!(
                    "it is longer than {MAX_MANIFEST_BYTES} bytes"
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged("it is not UTF-8".to_owned()));
            }
            other => other.map_err(io_error("read", &path))?,
        };
        // The version decides how the rest is to be understood, so it is read alone first.
        let head: Head = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if head.format_version != FORMAT_VERSION {
            return Err(BundleError::Version {
                path,
                found: head.format_version,
                writer: head.kiln_version,
            });
        }
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        manifest.verify().map_err(|error| BundleError::Manifest {
            path: path.clone(),
            error,
        })?;
        let bundle = Bundle {
            dir: dir.to_owned(),
            manifest,
        };
        for (name, record) in &bundle.manifest.files {
            bundle.check_size(name, record)?;
        }
        Ok(bundle)
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The bundle's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizer's file, if the bundle has one.
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        let listed = self.manifest.files.contains_key(TOKENIZER_FILE);
        listed.then(|| self.dir.join(TOKENIZER_FILE))
    }

    /// Compares every file with its hash. `progress` gets the bytes done and the bytes in all.
    ///
    /// # Errors
    /// The first file that differs or cannot be read.
    pub fn verify_hashes(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), BundleError> {
        let total = self
            .manifest
            .files
            .values()
            .map(|record| record.bytes)
            .sum();
        let mut done = 0;
        let mut chunk = vec![0; 1 << 20];
        for (name, record) in &self.manifest.files {
            let path = self.dir.join(name);
            let mut file = File::open(&path).map_err(io_error("open", &path))?;
            let mut hasher = blake3::Hasher::new();
            loop {
                let bytes = file.read(&mut chunk).map_err(io_error("read", &path))?;
                if bytes == 0 {
                    break;
                }
                hasher.update(&chunk[..bytes]);
                done += bytes as u64;
                progress(done, total);
            }
            if hasher.finalize().to_hex().as_str() != record.blake3 {
                return Err(BundleError::Damaged {
                    path,
                    problem: "its blake3 hash differs from the manifest's".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Maps a target's weights and checks that every tensor that its programs use is there.
    ///
    /// # Errors
    /// A file that cannot be mapped, lies about its contents, or lacks a tensor.
    pub fn weights(&self, target: &Target) -> Result<WeightFile, BundleError> {
        let weights = WeightFile::open(&self.dir.join(&target.weights_file))?;
        for program in &target.programs {
            let uses =
                program
                    .weight_uses(&self.manifest)
                    .map_err(|error| BundleError::Manifest {
                        path: self.dir.join(MANIFEST_FILE),
                        error,
                    })?;
            for (name, role) in uses {
                weights.check(&name, &role, target)?;
            }
        }
        Ok(weights)
    }

    fn check_size(&self, name: &str, record: &FileRecord) -> Result<(), BundleError> {
        let path = self.dir.join(name);
        let inside = Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !inside || name.is_empty() {
            return Err(BundleError::Damaged {
                path: self.dir.join(MANIFEST_FILE),
                problem: format!("it lists the file {name:?}, which is not inside the bundle"),
            });
        }
        let found = path.metadata().map_err(io_error("open", &path))?.len();
        if found != record.bytes {
            return Err(BundleError::Damaged {
                path,
                problem: format!("it has {found} bytes, the manifest says {}", record.bytes),
            });
        }
        Ok(())
    }
}

/// The part of a manifest that every version has.
#[derive(Deserialize)]
struct Head {
    format_version: u32,
    #[serde(default)]
    kiln_version: String,
}

/// A mapped safetensors file.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: Mmap,
    tensors: HashMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// One tensor of a [`WeightFile`].
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major; aligned to the element type, matrices to
    /// [`ALIGN_BYTES`].
    pub data: &'a [u8],
}

impl WeightFile {
    fn open(path: &Path) -> Result<WeightFile, BundleError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        // SAFETY: a map of a file is undefined behaviour when another process truncates or changes
        // it meanwhile. Bundles are written to a temporary directory and renamed, never changed in
        // place; every mapping program trusts its user that far.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error("map", path))?;
        // Where file systems have huge pages, reading weights misses the TLB less. Elsewhere nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let damaged = |problem: String| BundleError::Damaged {
            path: path.to_owned(),
            problem,
        };
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| damaged(error.to_string()))?;
        let data_start = header_bytes + size_of::<u64>();
        let mut tensors = HashMap::new();
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => DType::F32,
                safetensors::Dtype::F16 => DType::F16,
                safetensors::Dtype::BF16 => DType::Bf16,
                safetensors::Dtype::U8 => DType::U8,
                other => {
                    return Err(damaged(format!(
                        "tensor {name:?} has element type {other:?}"
                    )));
                }
            };
            let (start, end) = info.data_offsets;
            let range = data_start.saturating_add(start)..data_start.saturating_add(end);
            if range.start > range.end || range.end > map.len() {
                return Err(damaged(format!("tensor {name:?} lies outside the file")));
            }
            if !range.start.is_multiple_of(dtype.size_bytes()) {
                return Err(damaged(format!(
                    "tensor {name:?} is not aligned to its elements"
                )));
            }
            tensors.insert(
                name.clone(),
                Tensor {
                    dtype,
                    shape: info.shape.clone(),
                    range,
                },
            );
        }
        Ok(WeightFile {
            path: path.to_owned(),
            map,
            tensors,
        })
    }

    /// Reads the whole file and keeps it in memory for as long as it is mapped.
    ///
    /// # Errors
    /// When the system allows no more locked memory (`ulimit -l`), or has none to lock.
    pub fn lock(&self) -> io::Result<()> {
        #[cfg(unix)]
        return self.map.lock();
        #[cfg(not(unix))]
        return Err(io::ErrorKind::Unsupported.into());
    }

    /// The file in memory of its own, which `copy` fills: from the file's bytes, to as many.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn copied(self, copy: impl FnOnce(&[u8], &mut [u8])) -> io::Result<WeightFile> {
        let mut memory = MmapMut::map_anon(self.map.len())?;
        // A huge page would be of one thread, and so of one memory node, where several fill it.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::NoHugePage);
        copy(&self.map, &mut memory);
        let map = memory.make_read_only()?;
        Ok(WeightFile { map, ..self })
    }

    /// All of its bytes.
    pub fn data(&self) -> &[u8] {
        &self.map
    }

    /// Where a tensor's bytes lie in the file.
    pub fn range(&self, name: &str) -> Option<std::ops::Range<usize>> {
        self.tensors.get(name).map(|tensor| tensor.range.clone())
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|tensor| TensorView {
            dtype: tensor.dtype,
            shape: &tensor.shape,
            data: &self.map[tensor.range.clone()],
        })
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether the tensor is there, of the shape, element type and alignment that its role needs.
    fn check(&self, name: &str, role: &WeightRole, target: &Target) -> Result<(), BundleError> {
        let damaged = |problem: String| BundleError::Damaged {
            path: self.path.clone(),
            problem,
        };
        let Some(tensor) = self.tensors.get(name) else {
            return Err(damaged(format!("tensor {name:?} is missing")));
        };
        let align_bytes = match role {
            WeightRole::Packed { .. } => ALIGN_BYTES,
            WeightRole::Table { .. } | WeightRole::Vector { .. } => 1,
        };
        let dtype = role.element(target, name);
        let needed = role.shape(target, name);
        let fits = match role {
            WeightRole::Table { min_rows, width } => {
                matches!(tensor.shape[..], [rows, found] if rows >= *min_rows && found == *width)
            }
            _ => tensor.shape == needed,
        };
        if !fits || tensor.dtype != dtype {
            return Err(damaged(format!(
                "tensor {name:?} is {} {:?}, needed is {dtype} {needed:?}",
                tensor.dtype, tensor.shape
            )));
        }
        if !tensor.range.start.is_multiple_of(align_bytes) {
            return Err(damaged(format!(
                "tensor {name:?} is not aligned to {align_bytes} bytes"
            )));
        }
        Ok(())
    }
}
