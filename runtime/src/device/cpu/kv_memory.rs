//! The memory of the paged KV cache.

use super::map_zeros;
use crate::cpu::{KvCache, KvCacheMut, Storage, StorageError, StorageMut};
use crate::kv::BlockCopy;
use kiln_bundle::{BLOCK_TOKENS, DType, ModelInfo};
use memmap2::MmapMut;
use std::io;

/// Keys and values of all layers: (L, 2, blocks, C * 16), as the kernels arrange a block.
pub(super) struct KvMemory {
    map: MmapMut,
    dtype: DType,
    heads: usize,
    head_dim: usize,
    /// Bytes of one layer's keys, or of its values.
    part_bytes: usize,
}

impl KvMemory {
    /// Bytes that a block takes in all layers.
    pub(super) fn block_bytes(model: &ModelInfo, dtype: DType) -> u64 {
        let row_bytes =
            u64::from(model.heads) * u64::from(model.head_dim) * dtype.size_bytes() as u64;
        2 * u64::from(model.layers) * row_bytes * BLOCK_TOKENS as u64
    }

    pub(super) fn new(model: &ModelInfo, dtype: DType, blocks: usize) -> io::Result<KvMemory> {
        let bytes = KvMemory::block_bytes(model, dtype).saturating_mul(blocks as u64);
        let map = map_zeros(bytes)?;
        let part_bytes = map.len() / (2 * model.layers.max(1) as usize);
        let (heads, head_dim) = (model.heads as usize, model.head_dim as usize);
        Ok(KvMemory {
            map,
            dtype,
            heads,
            head_dim,
            part_bytes,
        })
    }

    /// Copies a block, all layers of it. The blocks exist.
    pub(super) fn copy(&mut self, copy: BlockCopy) {
        let row_bytes = self.heads * self.head_dim * self.dtype.size_bytes();
        let block_bytes = row_bytes * BLOCK_TOKENS;
        let (from, to) = (copy.from as usize, copy.to as usize);
        for part in self.map.chunks_exact_mut(self.part_bytes) {
            let start = from * block_bytes;
            part.copy_within(start..start + block_bytes, to * block_bytes);
        }
    }

    /// A layer, to read.
    pub(super) fn layer(&self, layer: usize) -> Result<KvCache<'_>, StorageError> {
        let both = &self.map[2 * layer * self.part_bytes..][..2 * self.part_bytes];
        let (keys, values) = both.split_at(self.part_bytes);
        let keys = Storage::new(keys, self.dtype)?;
        let values = Storage::new(values, self.dtype)?;
        Ok(KvCache::new(keys, values, self.heads, self.head_dim))
    }

    /// A layer, to write.
    pub(super) fn layer_mut(&mut self, layer: usize) -> Result<KvCacheMut<'_>, StorageError> {
        let both = &mut self.map[2 * layer * self.part_bytes..][..2 * self.part_bytes];
        let (keys, values) = both.split_at_mut(self.part_bytes);
        let keys = StorageMut::new(keys, self.dtype)?;
        let values = StorageMut::new(values, self.dtype)?;
        Ok(KvCacheMut::new(keys, values, self.heads, self.head_dim))
    }
}
