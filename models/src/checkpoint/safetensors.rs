//! `model.safetensors`: eight bytes of header length, a JSON header, the tensors.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
};

use safetensors::tensor::{Dtype, TensorInfo as HeaderEntry};

use super::{Checkpoint, CheckpointError, SourceDType, TensorInfo, WeightFile, check_read};

/// No checkpoint has a longer header; it bounds what parsing may allocate.
const HEADER_LIMIT_BYTES: u64 = 16 << 20;

/// An open safetensors file.
pub(super) struct SafetensorsFile {
    file: WeightFile,
    tensors: BTreeMap<String, TensorInfo>,
    /// Offset of each tensor in the file.
    offsets: HashMap<String, u64>,
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path) -> Result<SafetensorsFile, CheckpointError> {
        let file = WeightFile::open(path)?;
        let header = read_header(&file)?;
        let data_start = 8 + header.len() as u64;
        let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
            .map_err(|e| file.bad_file(format!("a header that is no JSON object ({e})"), "one"))?;

        let mut tensors = BTreeMap::new();
        let mut offsets = HashMap::new();
        let mut spans = Vec::new();
        for (name, value) in entries {
            if name == "__metadata__" {
                continue;
            }
            let entry: HeaderEntry = serde_json::from_value(value).map_err(|e| {
                file.bad_tensor(
                    &name,
                    format!("a header entry that does not parse ({e})"),
                    NEEDED,
                )
            })?;
            let info = tensor_info(&file, &name, &entry)?;
            let span = data_span(&file, &info, &entry, data_start)?;
            offsets.insert(name.clone(), span.start);
            spans.push((span.start, span.end, name.clone()));
            tensors.insert(name, info);
        }
        check_disjoint(&file, spans)?;
        Ok(SafetensorsFile {
            file,
            tensors,
            offsets,
        })
    }
}

/// What a header entry must hold.
const NEEDED: &str = "a known dtype, a shape and two data_offsets";

fn read_header(file: &WeightFile) -> Result<Vec<u8>, CheckpointError> {
    let needed = "a safetensors file: 8 bytes of header length, the header, the tensors";
    if file.len < 8 {
        return Err(file.bad_file(format!("{} bytes", file.len), needed));
    }
    let mut length = [0; 8];
    file.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_LIMIT_BYTES || length > file.len - 8 {
        let found = format!(
            "a header length of {length} in a file of {} bytes",
            file.len
        );
        return Err(file.bad_file(found, format!("{needed} (the header below 16 MiB)")));
    }
    let mut header = vec![0; length as usize];
    file.read_at(8, &mut header)?;
    Ok(header)
}

fn tensor_info(
    file: &WeightFile,
    name: &str,
    entry: &HeaderEntry,
) -> Result<TensorInfo, CheckpointError> {
    let dtype = match entry.dtype {
        Dtype::F64 => SourceDType::F64,
        Dtype::F32 => SourceDType::F32,
        Dtype::F16 => SourceDType::F16,
        Dtype::BF16 => SourceDType::Bf16,
        Dtype::I64 => SourceDType::I64,
        Dtype::I32 => SourceDType::I32,
        Dtype::I16 => SourceDType::I16,
        Dtype::I8 => SourceDType::I8,
        Dtype::U8 => SourceDType::U8,
        Dtype::BOOL => SourceDType::Bool,
        other => {
            return Err(file.bad_tensor(
                name,
                format!("element type {other:?}"),
                "F64, F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL",
            ));
        }
    };
    let info = TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: entry.shape.clone(),
    };
    if !info.size_fits() {
        let found = format!("shape {:?}", entry.shape);
        return Err(file.bad_tensor(name, found, "a size that fits 64 bits"));
    }
    Ok(info)
}

/// Where the tensor lies in the file. `data_offsets` count from the end of the header.
fn data_span(
    file: &WeightFile,
    info: &TensorInfo,
    entry: &HeaderEntry,
    data_start: u64,
) -> Result<Range<u64>, CheckpointError> {
    let (start, end) = entry.data_offsets;
    let data_len = file.len - data_start;
    if start > end || end as u64 > data_len {
        let found = format!("data_offsets {start}..{end}");
        return Err(file.bad_tensor(
            &info.name,
            found,
            format!("a range within {data_len} bytes"),
        ));
    }
    if end - start != info.size_bytes() {
        return Err(file.bad_tensor(
            &info.name,
            format!("{} bytes", end - start),
            format!(
                "{} for {} of shape {:?}",
                info.size_bytes(),
                info.dtype,
                info.shape
            ),
        ));
    }
    Ok(data_start + start as u64..data_start + end as u64)
}

/// Two tensors that share bytes are a lie: the format has no views.
fn check_disjoint(
    file: &WeightFile,
    mut spans: Vec<(u64, u64, String)>,
) -> Result<(), CheckpointError> {
    spans.sort();
    for pair in spans.windows(2) {
        let ((_, end, first), (start, _, second)) = (&pair[0], &pair[1]);
        if start < end {
            return Err(file.bad_tensor(
                second,
                format!("bytes shared with tensor {first:?}"),
                "bytes of its own",
            ));
        }
    }
    Ok(())
}

impl Checkpoint for SafetensorsFile {
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
        let offset = self.offsets.get(name).copied().unwrap_or(0);
        self.file
            .read_at(offset + (rows.start * info.row_bytes()) as u64, out)
    }
}
