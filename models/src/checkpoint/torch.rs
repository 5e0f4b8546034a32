//! `pytorch_model.bin`: a zip archive of uncompressed storages (`<root>/data/<key>`) and a pickle
//! (`<root>/data.pkl`) that says which tensors are views of them.

use std::{
    collections::{BTreeMap, HashMap},
    io::BufReader,
    ops::Range,
    path::Path,
};

use zip::{CompressionMethod, ZipArchive};

use super::{
    Checkpoint, CheckpointError, TensorInfo, WeightFile, check_read,
    pickle::{self, PICKLE_LIMIT_BYTES, TensorView},
    shorten,
};

/// More entries than storages of the largest models.
const MAX_ENTRIES: usize = 1 << 20;

/// An open torch checkpoint.
pub(super) struct TorchFile {
    file: WeightFile,
    tensors: BTreeMap<String, TensorInfo>,
    views: HashMap<String, View>,
}

/// A tensor's elements in the file. Every element that shape and strides reach was checked to lie
/// within the storage.
struct View {
    /// Offset of element (0, 0, ...) in the file, in bytes.
    start: u64,
    /// Elements from one index to the next, by dimension.
    stride: Vec<usize>,
    /// Whether the elements follow each other in row-major order.
    contiguous: bool,
}

/// An entry of the archive, by position in the file.
struct Entry {
    start: u64,
    len: u64,
    stored: bool,
}

impl TorchFile {
    pub(super) fn open(path: &Path) -> Result<TorchFile, CheckpointError> {
        let file = WeightFile::open(path)?;
        refuse_legacy(&file)?;
        let entries = entries(&file)?;

        let mut roots = entries.keys().filter_map(|name| {
            name.strip_suffix("/data.pkl")
                .filter(|root| !root.contains('/'))
        });
        let (Some(root), None) = (roots.next(), roots.next()) else {
            let found = format!("an archive of {} entries", entries.len());
            return Err(file.bad_file(found, "torch.save's archive, with one <root>/data.pkl"));
        };
        let order = read_entry(&file, &entries, &format!("{root}/byteorder"), 16)?;
        if order.is_some_and(|order| order != b"little") {
            return Err(file.bad_file("big-endian storages", "little-endian ones"));
        }
        let pickle = read_entry(
            &file,
            &entries,
            &format!("{root}/data.pkl"),
            PICKLE_LIMIT_BYTES,
        )?
        .unwrap_or_default();
        let state_dict =
            pickle::parse_state_dict(&pickle).map_err(|source| CheckpointError::Pickle {
                path: path.to_owned(),
                source,
            })?;

        let mut tensors = BTreeMap::new();
        let mut views = HashMap::new();
        for (name, tensor) in state_dict {
            let entry_name = format!("{root}/data/{}", tensor.storage_key);
            let (info, view) = place(&file, &name, &tensor, entries.get(&entry_name))?;
            tensors.insert(name.clone(), info);
            views.insert(name, view);
        }
        Ok(TorchFile {
            file,
            tensors,
            views,
        })
    }

    /// Reads rows of a strided view: the span of the storage that they reach over, then the
    /// elements out of it.
    fn gather(
        &self,
        info: &TensorInfo,
        view: &View,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let size = info.dtype.size_bytes();
        let mut shape = info.shape.clone();
        let outer = view.stride.first().copied().unwrap_or(0);
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        let first = rows.start * outer;
        let span = 1 + last_element(&shape, &view.stride);
        let mut window = vec![0; span * size];
        self.file
            .read_at(view.start + (first * size) as u64, &mut window)?;

        let mut index = vec![0; shape.len()];
        for element in out.chunks_exact_mut(size) {
            let from: usize = index.iter().zip(&view.stride).map(|(i, s)| i * s).sum();
            element.copy_from_slice(&window[from * size..][..size]);
            for (i, &dim) in index.iter_mut().zip(&shape).rev() {
                *i += 1;
                if *i < dim {
                    break;
                }
                *i = 0;
            }
        }
        Ok(())
    }
}

/// torch before 1.6 wrote bare pickles, the first of them a magic number; before that, tar files.
fn refuse_legacy(file: &WeightFile) -> Result<(), CheckpointError> {
    let mut start = [0; 4];
    if file.len >= 4 {
        file.read_at(0, &mut start)?;
    }
    if start[0] == 0x80 && start[2..] == [0x8a, 0x0a] {
        return Err(CheckpointError::LegacyTorch {
            path: file.path.clone(),
        });
    }
    Ok(())
}

/// Every entry of the archive, by name.
fn entries(file: &WeightFile) -> Result<HashMap<String, Entry>, CheckpointError> {
    let zip_error = |source| CheckpointError::Zip {
        path: file.path.clone(),
        source,
    };
    let io_error = |source| CheckpointError::Io {
        path: file.path.clone(),
        source,
    };
    let reader = BufReader::new(file.file.try_clone().map_err(io_error)?);
    let mut archive = ZipArchive::new(reader).map_err(zip_error)?;
    if archive.len() > MAX_ENTRIES {
        let found = format!("an archive of {} entries", archive.len());
        return Err(file.bad_file(found, format!("at most {MAX_ENTRIES}")));
    }
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(zip_error)?;
        let name = entry.name().map_err(zip_error)?.into_owned();
        let Some(start) = entry.data_start() else {
            continue;
        };
        let stored = entry.compression() == CompressionMethod::Stored
            && !entry.encrypted()
            && entry.size() == entry.compressed_size();
        let len = entry.size();
        if stored && start.checked_add(len).is_none_or(|end| end > file.len) {
            return Err(file.bad_file(
                format!("entry {:?} of {len} bytes at byte {start}", shorten(&name)),
                format!("entries within the file's {} bytes", file.len),
            ));
        }
        entries.insert(name, Entry { start, len, stored });
    }
    Ok(entries)
}

/// The bytes of a small entry, if the archive has it.
fn read_entry(
    file: &WeightFile,
    entries: &HashMap<String, Entry>,
    name: &str,
    limit: u64,
) -> Result<Option<Vec<u8>>, CheckpointError> {
    let Some(entry) = entries.get(name) else {
        return Ok(None);
    };
    if !entry.stored || entry.len > limit {
        let kind = if entry.stored { "stored" } else { "compressed" };
        return Err(file.bad_file(
            format!("entry {:?}, {kind}, of {} bytes", shorten(name), entry.len),
            format!("an uncompressed entry of at most {limit} bytes"),
        ));
    }
    let mut bytes = vec![0; entry.len as usize];
    file.read_at(entry.start, &mut bytes)?;
    Ok(Some(bytes))
}

/// Checks a tensor of the pickle against its storage in the archive.
fn place(
    file: &WeightFile,
    name: &str,
    tensor: &TensorView,
    entry: Option<&Entry>,
) -> Result<(TensorInfo, View), CheckpointError> {
    let Some(entry) = entry else {
        let found = format!(
            "no entry data/{} in the archive",
            shorten(&tensor.storage_key)
        );
        return Err(file.bad_tensor(name, found, "the storage that the pickle names"));
    };
    if !entry.stored {
        return Err(file.bad_tensor(name, "a compressed storage", "one as torch.save stores it"));
    }
    let size = tensor.dtype.size_bytes() as u64;
    if tensor
        .storage_elements
        .checked_mul(size)
        .is_none_or(|bytes| bytes > entry.len)
    {
        return Err(file.bad_tensor(
            name,
            format!("a storage of {} bytes", entry.len),
            format!("{} elements of {}", tensor.storage_elements, tensor.dtype),
        ));
    }

    let (shape, stride) = match (sizes(&tensor.shape), sizes(&tensor.stride)) {
        (Some(shape), Some(stride)) => (shape, stride),
        _ => return Err(file.bad_tensor(name, "sizes above 2^48", "sizes within the storage")),
    };
    let reach = || {
        let elements = shape
            .iter()
            .try_fold(1u64, |n, &dim| n.checked_mul(dim as u64))?;
        let last = shape
            .iter()
            .zip(&stride)
            .try_fold(0u64, |last, (&dim, &stride)| {
                let steps = (dim as u64).saturating_sub(1);
                last.checked_add(steps.checked_mul(stride as u64)?)
            })?;
        Some((elements, tensor.offset.checked_add(last)?.checked_add(1)?))
    };
    // More elements than the storage has would be a broadcast, which grows without bound when read.
    let fits = reach().is_some_and(|(elements, end)| {
        elements == 0 || (end <= tensor.storage_elements && elements <= tensor.storage_elements)
    });
    let info = TensorInfo {
        name: name.to_owned(),
        dtype: tensor.dtype,
        shape,
    };
    if !fits || !info.size_fits() {
        return Err(file.bad_tensor(
            name,
            format!(
                "shape {:?}, strides {:?}, offset {}",
                tensor.shape, tensor.stride, tensor.offset
            ),
            format!(
                "a view within a storage of {} elements",
                tensor.storage_elements
            ),
        ));
    }
    let start = entry.start + tensor.offset.min(tensor.storage_elements) * size;
    let contiguous = is_contiguous(&info.shape, &stride);
    Ok((
        info,
        View {
            start,
            stride,
            contiguous,
        },
    ))
}

/// Sizes as `usize`, below a bound that no tensor reaches.
fn sizes(sizes: &[u64]) -> Option<Vec<usize>> {
    sizes
        .iter()
        .map(|&n| usize::try_from(n).ok().filter(|&n| n < 1 << 48))
        .collect()
}

fn is_contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1;
    for (&dim, &stride) in shape.iter().zip(stride).rev() {
        if dim > 1 && stride != expected {
            return false;
        }
        expected *= dim.max(1);
    }
    true
}

/// Element index of the last element of a view, from its first.
fn last_element(shape: &[usize], stride: &[usize]) -> usize {
    shape
        .iter()
        .zip(stride)
        .map(|(&dim, &stride)| dim.saturating_sub(1) * stride)
        .sum()
}

impl Checkpoint for TorchFile {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn origin(&self) -> &Path {
        &self.file.path
    }

    fn read_rows_into(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let info = self.info(name)?;
        check_read(&self.file.path, info, &rows, out)?;
        let Some(view) = self.views.get(name).filter(|_| !out.is_empty()) else {
            return Ok(());
        };
        if view.contiguous {
            self.file
                .read_at(view.start + (rows.start * info.row_bytes()) as u64, out)
        } else {
            self.gather(info, view, rows, out)
        }
    }
}
