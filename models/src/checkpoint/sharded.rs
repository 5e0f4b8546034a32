//! An index json and its shards: `model.safetensors.index.json`, `pytorch_model.bin.index.json`.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Checkpoint, CheckpointError, TensorInfo, open_file, read_text, shorten};

const INDEX_LIMIT_BYTES: u64 = 64 << 20;

/// Several weight files behind one index.
pub(super) struct Sharded {
    index: PathBuf,
    shards: Vec<Box<dyn Checkpoint>>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Position in `shards` of each tensor.
    owner: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The shard of each tensor that an index names. Shard names are plain file names: that is checked
/// here, before anybody opens or downloads one.
pub(crate) fn parse_index(
    text: &str,
    path: &Path,
) -> Result<BTreeMap<String, String>, CheckpointError> {
    let index: Index = serde_json::from_str(text).map_err(|e| CheckpointError::File {
        path: path.to_owned(),
        found: format!("text that does not parse ({e})"),
        needed: "an index: a JSON object with a weight_map of tensor names to file names"
            .to_owned(),
    })?;
    for shard in index.weight_map.values() {
        let plain = !shard.contains(['/', '\\', '\0'])
            && (shard.ends_with(".safetensors") || shard.ends_with(".bin"));
        if !plain {
            return Err(CheckpointError::ShardName {
                index: path.to_owned(),
                shard: shorten(shard),
            });
        }
    }
    Ok(index.weight_map)
}

impl Sharded {
    pub(super) fn open(index: &Path) -> Result<Sharded, CheckpointError> {
        let weight_map = parse_index(&read_text(index, INDEX_LIMIT_BYTES)?, index)?;
        let dir = index.parent().unwrap_or(Path::new("."));

        let mut shards: Vec<Box<dyn Checkpoint>> = Vec::new();
        let mut opened: HashMap<String, usize> = HashMap::new();
        let mut tensors = BTreeMap::new();
        let mut owner = HashMap::new();
        for (name, shard) in weight_map {
            let position = match opened.get(&shard) {
                Some(&position) => position,
                None => {
                    let path = dir.join(&shard);
                    if !path.exists() {
                        return Err(CheckpointError::MissingShard {
                            index: index.to_owned(),
                            shard: shorten(&shard),
                        });
                    }
                    shards.push(open_file(&path)?);
                    opened.insert(shard.clone(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            let Some(info) = shards[position].tensors().get(&name) else {
                return Err(CheckpointError::MissingFromShard {
                    index: index.to_owned(),
                    shard: shorten(&shard),
                    tensor: shorten(&name),
                });
            };
            tensors.insert(name.clone(), info.clone());
            owner.insert(name, position);
        }
        Ok(Sharded {
            index: index.to_owned(),
            shards,
            tensors,
            owner,
        })
    }
}

impl Checkpoint for Sharded {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn origin(&self) -> &Path {
        &self.index
    }

    fn read_rows_into(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        self.info(name)?;
        let position = self.owner.get(name).copied().unwrap_or(0);
        self.shards[position].read_rows_into(name, rows, out)
    }
}
