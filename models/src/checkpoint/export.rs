//! Writes any checkpoint as a Hugging Face directory: `config.json` and `model.safetensors`.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Map, json};

use super::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;

/// Bytes that are held at a time.
const CHUNK_BYTES: usize = 8 << 20;

/// Writes `config.json` and `model.safetensors` into `dir`, which is created if need be. Memory is
/// bounded whatever the size of the model; each file appears under its name only when complete.
pub fn export_hf(
    dir: &Path,
    config: &ModelConfig,
    checkpoint: &dyn Checkpoint,
) -> Result<(), CheckpointError> {
    fs::create_dir_all(dir).map_err(|source| CheckpointError::Io {
        path: dir.to_owned(),
        source,
    })?;
    write_whole(&dir.join("model.safetensors"), |out, path| {
        write_safetensors(out, path, checkpoint)
    })?;
    write_whole(&dir.join("config.json"), |out, path| {
        out.write_all(config.to_hf_json().as_bytes())
            .map_err(|source| CheckpointError::Io {
                path: path.to_owned(),
                source,
            })
    })
}

/// Writes to a neighbouring name and renames.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>, &Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let part = path.with_extension("part");
    let io_error = |source| CheckpointError::Io {
        path: part.clone(),
        source,
    };
    let file = File::create(&part).map_err(io_error)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let written = write(&mut out, &part).and_then(|()| out.flush().map_err(io_error));
    let renamed = written.and_then(|()| {
        fs::rename(&part, path).map_err(|source| CheckpointError::Io {
            path: path.to_owned(),
            source,
        })
    });
    if renamed.is_err() {
        // The first error is the one to report; what is left of the file goes if it can.
        let _ = fs::remove_file(&part);
    }
    renamed
}

fn write_safetensors(
    out: &mut impl Write,
    path: &Path,
    checkpoint: &dyn Checkpoint,
) -> Result<(), CheckpointError> {
    let io_error = |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let header = header(checkpoint);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .map_err(io_error)?;
    out.write_all(&header).map_err(io_error)?;

    let mut buffer = Vec::new();
    for (name, info) in checkpoint.tensors() {
        let rows_at_once = (CHUNK_BYTES / info.row_bytes().max(1)).max(1);
        let mut row = 0;
        while row < info.rows() {
            let end = info.rows().min(row + rows_at_once);
            buffer.resize((end - row) * info.row_bytes(), 0);
            checkpoint.read_rows_into(name, row..end, &mut buffer)?;
            out.write_all(&buffer).map_err(io_error)?;
            row = end;
        }
    }
    Ok(())
}

/// The header, padded with spaces so that the tensors start at a multiple of eight.
fn header(checkpoint: &dyn Checkpoint) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut offset = 0;
    for (name, info) in checkpoint.tensors() {
        let end = offset + info.size_bytes();
        entries.insert(
            name.clone(),
            json!({
                "dtype": info.dtype.name(),
                "shape": info.shape,
                "data_offsets": [offset, end],
            }),
        );
        offset = end;
    }
    let mut header = serde_json::Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}
