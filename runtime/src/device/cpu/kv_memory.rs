//! The memory of the paged KV cache.

use super::map_zeros;
use crate::cpu::{KvCache, KvCacheMut, KvLayout, Storage, StorageError, StorageMut};
use crate::kv::BlockCopy;
use kiln_bundle::{DType, ModelInfo};
use memmap2::MmapMut;
use std::io;

/// Keys and values of all layers, block by block.
pub(super) struct KvMemory {
    map: MmapMut,
    dtype: DType,
    layout: KvLayout,
    block_bytes: usize,
}

impl KvMemory {
    /// Bytes that a block takes in all layers.
    pub(super) fn block_bytes(model: &ModelInfo, dtype: DType) -> u64 {
        let elements = layout(model).block_len() as u64;
        elements.saturating_mul(dtype.size_bytes() as u64)
    }

    pub(super) fn new(model: &ModelInfo, dtype: DType, blocks: usize) -> io::Result<KvMemory> {
        let block_bytes = KvMemory::block_bytes(model, dtype);
        let map = map_zeros(block_bytes.saturating_mul(blocks as u64))?;
        // A layer's part of a block is read in one stream, and blocks are taken whole: a page holds little that
        // nobody uses.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(KvMemory {
            map,
            dtype,
            layout: layout(model),
            block_bytes: block_bytes as usize,
        })
    }

    /// Copies a block, all layers of it. The blocks exist.
    pub(super) fn copy(&mut self, copy: BlockCopy) {
        let [from, to] = [copy.from, copy.to].map(|block| block as usize * self.block_bytes);
        self.map.copy_within(from..from + self.block_bytes, to);
    }

    /// A layer, to read.
    pub(super) fn layer(&self, layer: usize) -> Result<KvCache<'_>, StorageError> {
        let data = Storage::new(&self.map[..self.used_bytes()], self.dtype)?;
        Ok(KvCache::new(data, self.layout, layer))
    }

    /// A layer, to write.
    pub(super) fn layer_mut(&mut self, layer: usize) -> Result<KvCacheMut<'_>, StorageError> {
        let used_bytes = self.used_bytes();
        let data = StorageMut::new(&mut self.map[..used_bytes], self.dtype)?;
        Ok(KvCacheMut::new(data, self.layout, layer))
    }

    /// Of the map those that are whole blocks.
    fn used_bytes(&self) -> usize {
        self.map.len() / self.block_bytes * self.block_bytes
    }
}

fn layout(model: &ModelInfo) -> KvLayout {
    let [layers, heads, head_dim] = [model.layers, model.heads, model.head_dim].map(|n| n as usize);
    KvLayout::new(layers, heads, head_dim)
}
