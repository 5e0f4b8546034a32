//! The paged KV cache: how keys and values lie in it, and how they are written.
//!
//! A block holds [`BLOCK_TOKENS`] positions, of all layers and heads, in one piece: what a sequence takes of the memory
//! grows by whole blocks, and so by few pages, however large these are. In each layer a head's keys lie as (D, 16), so
//! that a vector holds one component of sixteen neighbouring keys and scores need no sums across lanes; its values lie
//! as (16, D). D is rounded up to whole vectors. Of bf16, two neighbours of what sums go along make a word, as in
//! panels: keys lie as (D / 2, 16, 2), values as (8, D, 2).

use super::scratch::Shards;
use super::simd::{Element, Kernel, LANES, Simd};
use super::storage::{Storage, StorageMut};
use super::{Cpu, Rows, norm};
use kiln_bundle::packing::together;
use kiln_bundle::{BLOCK_TOKENS, DType};
use std::ops::Range;

/// Where keys and values lie in a cache.
#[derive(Clone, Copy, Debug)]
pub struct KvLayout {
    layers: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Elements of a head's keys in a block and layer, or of its values.
    head_len: usize,
    block_len: usize,
}

impl KvLayout {
    /// Of a model with so many layers, and heads of dimension `head_dim`, none of which is 0.
    pub fn new(layers: usize, heads: usize, head_dim: usize) -> KvLayout {
        assert!(layers > 0 && heads > 0 && head_dim > 0, "layers and heads");
        let head_len = width(head_dim).saturating_mul(BLOCK_TOKENS);
        let parts = layers.saturating_mul(heads).saturating_mul(2);
        KvLayout {
            layers,
            heads,
            head_dim,
            head_len,
            block_len: parts.saturating_add(1).saturating_mul(head_len),
        }
    }

    /// Elements of a block: (L, 2, H, D * 16), keys before values, and a head's part that nobody uses, lest one head
    /// of all blocks fall to the same sets of the processor's caches. The greatest number where it is none.
    pub const fn block_len(&self) -> usize {
        self.block_len
    }

    /// Where a head's keys are.
    #[inline(always)]
    pub(super) fn keys(&self, block: usize, layer: usize, head: usize) -> Range<usize> {
        let start = block * self.block_len + (2 * layer * self.heads + head) * self.head_len;
        start..start + self.head_len
    }

    /// Where a head's values are.
    #[inline(always)]
    pub(super) fn values(&self, block: usize, layer: usize, head: usize) -> Range<usize> {
        self.keys(block, layer, self.heads + head)
    }

    fn check(&self, layer: usize, elements: usize) {
        assert!(layer < self.layers, "a layer of the cache");
        assert_eq!(elements % self.block_len(), 0, "a whole number of blocks");
    }
}

/// Components that a key or a value takes: whole vectors.
pub(super) const fn width(head_dim: usize) -> usize {
    head_dim.div_ceil(LANES).saturating_mul(LANES)
}

/// One layer's keys and values, to read.
#[derive(Clone, Copy, Debug)]
pub struct KvCache<'a> {
    pub(super) data: Storage<'a>,
    pub(super) layout: KvLayout,
    pub(super) layer: usize,
}

impl<'a> KvCache<'a> {
    /// A layer of the cache that `data` holds, which are whole blocks.
    pub fn new(data: Storage<'a>, layout: KvLayout, layer: usize) -> KvCache<'a> {
        layout.check(layer, data.len());
        KvCache {
            data,
            layout,
            layer,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.data.len() / self.layout.block_len()
    }
}

/// One layer's keys and values, to write.
#[derive(Debug)]
pub struct KvCacheMut<'a> {
    data: StorageMut<'a>,
    layout: KvLayout,
    layer: usize,
}

impl<'a> KvCacheMut<'a> {
    /// As [`KvCache::new`].
    pub fn new(data: StorageMut<'a>, layout: KvLayout, layer: usize) -> KvCacheMut<'a> {
        layout.check(layer, data.len());
        KvCacheMut {
            data,
            layout,
            layer,
        }
    }
}

/// Writes new keys and values, both (T, H*D), into the cache, rounded to nearest even. Row t goes to
/// slot `slot_mapping[t]`, which is `block * BLOCK_TOKENS + offset`; of rows for the same slot the
/// last one stays.
pub fn write_kv(
    cpu: &Cpu,
    keys: Rows<'_>,
    values: Rows<'_>,
    slot_mapping: &[u32],
    cache: &mut KvCacheMut<'_>,
) {
    let (layout, layer) = (cache.layout, cache.layer);
    for rows in [&keys, &values] {
        let cols = layout.heads * layout.head_dim;
        assert_eq!(rows.rows(), slot_mapping.len(), "a slot for each row");
        assert_eq!(rows.cols(), cols, "columns of keys and values");
    }
    let slots = cache.data.len() / layout.block_len() * BLOCK_TOKENS;
    assert!(
        slot_mapping.iter().all(|&slot| (slot as usize) < slots),
        "slots that exist"
    );
    let rows = [keys, values];
    match &mut cache.data {
        StorageMut::F32(data) => {
            scatter::<_, { together(DType::F32) }>(cpu, rows, slot_mapping, data, layout, layer)
        }
        StorageMut::F16(data) => {
            scatter::<_, { together(DType::F16) }>(cpu, rows, slot_mapping, data, layout, layer)
        }
        StorageMut::Bf16(data) => {
            scatter::<_, { together(DType::Bf16) }>(cpu, rows, slot_mapping, data, layout, layer)
        }
    }
}

/// Values of keys below which the caller writes the cache alone.
const WRITE_ALONE: usize = 1024;
/// Rows from the one being written to the cache to the one being asked for.
const ROWS_AHEAD: usize = 8;

fn scatter<E: Element, const TOGETHER: usize>(
    cpu: &Cpu,
    [keys, values]: [Rows<'_>; 2],
    slot_mapping: &[u32],
    cache: &mut [E],
    layout: KvLayout,
    layer: usize,
) {
    let KvLayout {
        heads, head_dim, ..
    } = layout;
    let cache = Shards::new(cache);
    let write_head = |_: usize, head: usize| {
        let columns = head * head_dim..(head + 1) * head_dim;
        for (t, &slot) in slot_mapping.iter().enumerate() {
            let (block, offset) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            let [key_block, value_block] = [
                layout.keys(block, layer, head),
                layout.values(block, layer, head),
            ]
            // SAFETY: this head's parts of the block belong to this task.
            .map(|part| unsafe { cache.range(part.start, part.len()) });
            // A head's part of a row is too short for the processor to look ahead by itself.
            let ahead = t + ROWS_AHEAD;
            let ahead = (ahead < slot_mapping.len())
                .then(|| [&keys, &values].map(|rows| &rows.row(ahead)[columns.clone()]));
            cpu.isa.run(WriteSlot::<_, TOGETHER> {
                key: &keys.row(t)[columns.clone()],
                value: &values.row(t)[columns.clone()],
                ahead,
                key_block,
                value_block,
                offset,
            });
        }
    };
    if slot_mapping.len() * heads * head_dim <= WRITE_ALONE {
        (0..heads).for_each(|head| write_head(0, head));
    } else {
        cpu.pool.parallel_for(heads, write_head);
    }
}

/// One position of one head.
struct WriteSlot<'a, E, const TOGETHER: usize> {
    /// (D).
    key: &'a [f32],
    /// (D).
    value: &'a [f32],
    /// A key and a value that are to be read soon.
    ahead: Option<[&'a [f32]; 2]>,
    /// (D / TOGETHER, 16, TOGETHER).
    key_block: &'a mut [E],
    /// (16 / TOGETHER, D, TOGETHER).
    value_block: &'a mut [E],
    offset: usize,
}

impl<E: Element, const TOGETHER: usize> Kernel for WriteSlot<'_, E, TOGETHER> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (head_dim, offset) = (self.key.len(), self.offset % BLOCK_TOKENS);
        let row = TOGETHER * width(head_dim);
        let value_row = &mut self.value_block[offset / TOGETHER * row..][..row];
        for d in (0..head_dim).step_by(LANES) {
            for row in self.ahead.into_iter().flatten() {
                simd.prefetch(row[d..].as_ptr().cast());
            }
            let mut rounded = [E::zeroed(); LANES];
            // SAFETY: so many values are left, and the array holds a vector.
            unsafe {
                let key = norm::load(simd, self.key.as_ptr().add(d), head_dim - d);
                E::store(simd, rounded.as_mut_ptr(), key);
            }
            let vectors =
                self.key_block[d * BLOCK_TOKENS..].chunks_exact_mut(TOGETHER * BLOCK_TOKENS);
            for (vector, key) in vectors.zip(rounded.chunks_exact(TOGETHER)) {
                vector[TOGETHER * offset..][..TOGETHER].copy_from_slice(key);
            }

            // SAFETY: as above, and the row holds whole vectors where its words are of one element.
            unsafe {
                let value = norm::load(simd, self.value.as_ptr().add(d), head_dim - d);
                match TOGETHER {
                    1 => E::store(simd, value_row.as_mut_ptr().add(d), value),
                    _ => {
                        E::store(simd, rounded.as_mut_ptr(), value);
                        let words = &mut value_row[TOGETHER * d..][..TOGETHER * LANES];
                        for (word, value) in words.chunks_exact_mut(TOGETHER).zip(rounded) {
                            word[offset % TOGETHER] = value;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::testing::{Elements, Random, cpu};

    #[test]
    fn the_cache_is_laid_out_as_said() {
        let (layout, layer, blocks) = (KvLayout::new(3, 2, 18), 1, 4);
        let (heads, head_dim) = (layout.heads, layout.head_dim);
        let slots: Vec<u32> = (0..16).chain([49, 48, 50]).collect();
        let (rows, cols) = (slots.len(), heads * head_dim);
        let mut random = Random::new(1);
        let [k, v] = [(); 2].map(|()| random.values(rows * cols));
        for kind in 0..3 {
            let mut cache =
                Elements::each(&vec![f32::NAN; blocks * layout.block_len()])[kind].clone();
            let mut layer_of_cache = KvCacheMut::new(cache.as_storage_mut(), layout, layer);
            let [keys, values] = [&k, &v].map(|rows_of| Rows::new(rows_of, rows, cols));
            write_kv(
                &cpu(Isa::Portable, 1),
                keys,
                values,
                &slots,
                &mut layer_of_cache,
            );

            let rounded = |x: f32| Elements::each(&[x])[kind].get(0);
            let together = if kind == 2 { 2 } else { 1 };
            // Of (inputs / together, outputs, together).
            let at = |input: usize, output: usize, outputs: usize| {
                (input / together * outputs + output) * together + input % together
            };
            for (row, &slot) in slots.iter().enumerate() {
                let (block, offset) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
                for head in 0..heads {
                    let keys = layout.keys(block, layer, head).start;
                    let values = layout.values(block, layer, head).start;
                    for d in 0..head_dim {
                        let column = row * cols + head * head_dim + d;
                        let key = cache.get(keys + at(d, offset, BLOCK_TOKENS));
                        assert_eq!(key, rounded(k[column]));
                        let value = cache.get(values + at(offset, d, width(head_dim)));
                        assert_eq!(value, rounded(v[column]));
                    }
                }
            }
            let written = (0..cache.as_storage().len()).filter(|&i| !cache.get(i).is_nan());
            let of_head = 2 * width(head_dim);
            assert_eq!(
                written.count(),
                rows * heads * of_head,
                "nothing else is written"
            );
        }
    }

    #[test]
    fn parts_of_a_cache_are_apart() {
        let layout = KvLayout::new(3, 4, 5);
        let mut parts = Vec::new();
        for block in 0..2 {
            for layer in 0..3 {
                for head in 0..4 {
                    parts.push(layout.keys(block, layer, head));
                    parts.push(layout.values(block, layer, head));
                }
            }
        }
        parts.sort_by_key(|part| part.start);
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(parts.iter().all(|part| part.len() == 16 * BLOCK_TOKENS));
        assert!(parts[parts.len() - 1].end <= 2 * layout.block_len());
    }
}
