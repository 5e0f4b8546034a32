//! Blocks of the paged KV cache: who holds them.
//!
//! The cache is cut into blocks of [`BLOCK_TOKENS`] positions, each of all layers. A sequence holds
//! the blocks of its positions in order, its *block table*. A block may be held by several
//! sequences, which then only read it; it is free again when the last holder lets go.

use kiln_bundle::BLOCK_TOKENS;

/// Blocks that `tokens` positions take.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// The blocks of a cache, counted by their holders.
#[derive(Debug)]
pub struct BlockPool {
    /// Holders of each block.
    holders: Vec<u32>,
    /// Blocks without a holder; the last one is given out next.
    free: Vec<u32>,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: u32) -> BlockPool {
        BlockPool {
            holders: vec![0; blocks as usize],
            free: (0..blocks).rev().collect(),
        }
    }

    /// Blocks in all.
    pub fn capacity(&self) -> usize {
        self.holders.len()
    }

    /// Blocks without a holder.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Lengthens `table` until it covers `tokens` positions. Returns whether there were blocks
    /// enough; where not, nothing changes.
    #[must_use]
    pub fn grow(&mut self, table: &mut Vec<u32>, tokens: usize) -> bool {
        let more = blocks_for(tokens).saturating_sub(table.len());
        if more > self.free.len() {
            return false;
        }
        for block in self.free.drain(self.free.len() - more..).rev() {
            self.holders[block as usize] = 1;
            table.push(block);
        }
        true
    }

    /// A second holder for the blocks of `table`: what a fork of a sequence starts from.
    pub fn share(&mut self, table: &[u32]) -> Vec<u32> {
        for &block in table {
            self.holders[block as usize] += 1;
        }
        table.to_vec()
    }

    /// Lets go of all blocks of `table`.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let holders = &mut self.holders[block as usize];
            debug_assert!(*holders > 0, "block {block} has no holder");
            *holders = holders.saturating_sub(1);
            if *holders == 0 {
                self.free.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_by_whole_blocks() {
        let mut pool = BlockPool::new(4);
        let mut table = Vec::new();
        assert!(pool.grow(&mut table, 1));
        assert!(pool.grow(&mut table, BLOCK_TOKENS));
        assert_eq!(table, [0]);
        assert!(pool.grow(&mut table, BLOCK_TOKENS + 1));
        assert_eq!(table, [0, 1]);
        assert_eq!(pool.free_blocks(), 2);
    }

    #[test]
    fn refuses_whole_and_takes_back() {
        let mut pool = BlockPool::new(3);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(pool.grow(&mut a, 2 * BLOCK_TOKENS));
        assert!(!pool.grow(&mut b, 2 * BLOCK_TOKENS));
        assert!(b.is_empty());
        pool.release(&mut a);
        assert!(a.is_empty());
        assert_eq!(pool.free_blocks(), 3);
        assert!(pool.grow(&mut b, 3 * BLOCK_TOKENS));
        b.sort_unstable();
        assert_eq!(b, [0, 1, 2]);
    }

    #[test]
    fn a_shared_block_outlives_its_first_holder() {
        let mut pool = BlockPool::new(2);
        let mut first = Vec::new();
        assert!(pool.grow(&mut first, 2 * BLOCK_TOKENS));
        let mut second = pool.share(&first[..1]);
        pool.release(&mut first);
        assert_eq!(pool.free_blocks(), 1);
        pool.release(&mut second);
        assert_eq!(pool.free_blocks(), 2);
    }
}
