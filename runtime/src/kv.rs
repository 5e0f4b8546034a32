//! Blocks of the paged KV cache: who holds them, and what they hold.
//!
//! The cache is cut into blocks of [`BLOCK_TOKENS`] positions, each of all layers. A sequence holds
//! the blocks of its positions in order, its *block table*. A block may be held by several
//! sequences, which then only read it: who is to write into it gets a copy of its own first
//! ([`BlockPool::prepare`]), unless nobody else holds it any more.
//!
//! A block is free when its last holder lets go, but what it holds stays until it is given out again,
//! the longest free first. What positions hold follows from the tokens up to them alone, so a
//! sequence that begins with tokens whose blocks are still there starts from those
//! ([`BlockPool::find_prefix`]). The blocks form a tree for this: below a block are those that followed
//! it in some sequence, each with its tokens. Tokens are compared, not hashes of them.

use kiln_bundle::BLOCK_TOKENS;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

/// Blocks that `tokens` positions take.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// What a block held since it was given out; no two are equal.
type ContentId = u64;

/// Above the first blocks of all sequences.
const ROOT: ContentId = 0;

/// Copies all of a block to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Block to read.
    pub from: u32,
    /// Block to write.
    pub to: u32,
}

/// The blocks of a cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Blocks without a holder, those first that are given out next: by [`Block::released`].
    free: BTreeSet<(u64, u32)>,
    /// The tree: blocks by the content before them.
    followers: HashMap<ContentId, Vec<u32>>,
    next_content: ContentId,
    next_release: u64,
}

#[derive(Debug, Default)]
struct Block {
    holders: u32,
    /// When the last holder let go; 0 where nothing in it is of use.
    released: u64,
    content: ContentId,
    /// The content of the block before it; of use where there are tokens.
    before: ContentId,
    /// Those of its positions whose keys and values are in the cache, as far as they are recorded.
    tokens: Vec<u32>,
}

/// The longest beginning of a sequence that is in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Whole blocks.
    blocks: Vec<u32>,
    /// A block that goes on with so many of the sequence's tokens.
    rest: Option<(u32, usize)>,
}

impl Prefix {
    /// Positions.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS + self.rest.map_or(0, |(_, tokens)| tokens)
    }
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: u32) -> BlockPool {
        BlockPool {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            free: (0..blocks).map(|block| (0, block)).collect(),
            followers: HashMap::new(),
            next_content: ROOT + 1,
            next_release: 1,
        }
    }

    /// Blocks in all.
    pub fn capacity(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks without a holder.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks with a holder.
    pub fn used_blocks(&self) -> usize {
        self.capacity() - self.free_blocks()
    }

    /// Makes the positions of `range`, which begins where the sequence's cached positions end, ready to
    /// be written: lengthens `table`, and replaces a block that others hold too by a copy, which is
    /// added to `copies`. Returns whether there were blocks enough; where not, nothing changes.
    #[must_use]
    pub fn prepare(
        &mut self,
        table: &mut Vec<u32>,
        range: Range<usize>,
        copies: &mut Vec<BlockCopy>,
    ) -> bool {
        let first = range.start / BLOCK_TOKENS;
        let shared = table
            .get(first)
            .copied()
            .filter(|&block| self.blocks[block as usize].holders > 1);
        let more = blocks_for(range.end).saturating_sub(table.len());
        if more + usize::from(shared.is_some()) > self.free.len() {
            return false;
        }
        if let Some(from) = shared
            && let Some(to) = self.copy(from, range.start % BLOCK_TOKENS)
        {
            self.let_go(from);
            table[first] = to;
            copies.push(BlockCopy { from, to });
        }
        for _ in 0..more {
            table.extend(self.give_out());
        }
        true
    }

    /// Further holders for the blocks of `table`: what a fork of a sequence starts from.
    pub fn share(&mut self, table: &[u32]) -> Vec<u32> {
        for &block in table {
            self.hold(block);
        }
        table.to_vec()
    }

    /// Lets go of all blocks of `table`.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        // From the end, since a block is of no use without those before it.
        for block in table.drain(..).rev() {
            self.let_go(block);
        }
    }

    /// Notes that the cache holds the positions of `tokens`, the first ones of a sequence with this
    /// `table`, of which so many have been noted before.
    pub fn record(&mut self, table: &[u32], tokens: &[u32], noted: usize) {
        let mut before = match noted / BLOCK_TOKENS {
            0 => ROOT,
            first => self.blocks[table[first - 1] as usize].content,
        };
        let chunks = tokens.chunks(BLOCK_TOKENS).zip(table);
        for (chunk, &index) in chunks.skip(noted / BLOCK_TOKENS) {
            let block = &mut self.blocks[index as usize];
            if block.tokens.is_empty() {
                block.before = before;
                self.followers.entry(before).or_default().push(index);
            }
            let known = block.tokens.len();
            block.tokens.extend(chunk.iter().skip(known));
            before = block.content;
        }
    }

    /// The longest beginning of `tokens` that is in the cache.
    pub fn find_prefix(&self, tokens: &[u32]) -> Prefix {
        let mut prefix = Prefix::default();
        let mut before = ROOT;
        for chunk in tokens.chunks(BLOCK_TOKENS) {
            let common = |&index: &u32| {
                let known = &self.blocks[index as usize].tokens;
                let same = known.iter().zip(chunk).take_while(|(a, b)| a == b);
                (index, same.count())
            };
            let followers = self.followers.get(&before).into_iter().flatten();
            // Of equals the first: two searches while it is held find the same.
            let best = followers
                .map(common)
                .rev()
                .max_by_key(|&(_, common)| common);
            match best.filter(|&(_, common)| common > 0) {
                Some((index, BLOCK_TOKENS)) => {
                    prefix.blocks.push(index);
                    before = self.blocks[index as usize].content;
                }
                rest => {
                    prefix.rest = rest;
                    break;
                }
            }
        }
        prefix
    }

    /// Free blocks that a sequence of `tokens` positions takes which starts from `prefix`.
    pub fn blocks_to_take(&self, prefix: &Prefix, tokens: usize) -> usize {
        let is_free = |&&block: &&u32| self.blocks[block as usize].holders == 0;
        let revived = prefix.blocks.iter().filter(is_free).count();
        blocks_for(tokens).saturating_sub(prefix.blocks.len()) + revived
    }

    /// A table for the positions of `prefix`: whole blocks are shared, the rest is copied.
    pub fn take_prefix(&mut self, prefix: &Prefix, copies: &mut Vec<BlockCopy>) -> Vec<u32> {
        let mut table = self.share(&prefix.blocks);
        if let Some((from, tokens)) = prefix.rest
            && let Some(to) = self.copy(from, tokens)
        {
            table.push(to);
            copies.push(BlockCopy { from, to });
        }
        table
    }

    /// A block for a copy of another one, of whose tokens the first ones count; none when all are held.
    fn copy(&mut self, from: u32, tokens: usize) -> Option<u32> {
        let Block {
            before,
            tokens: known,
            ..
        } = &self.blocks[from as usize];
        let (before, known) = (*before, known[..tokens.min(known.len())].to_vec());
        let to = self.give_out()?;
        if !known.is_empty() {
            self.blocks[to as usize].before = before;
            self.blocks[to as usize].tokens = known;
            self.followers.entry(before).or_default().push(to);
        }
        Some(to)
    }

    /// A block for one holder; what it held is forgotten.
    fn give_out(&mut self) -> Option<u32> {
        let (_, index) = self.free.pop_first()?;
        let block = &mut self.blocks[index as usize];
        // One that was never given out has the content of none.
        if block.content != ROOT {
            self.followers.remove(&block.content);
        }
        if !block.tokens.is_empty() {
            block.tokens.clear();
            if let Some(siblings) = self.followers.get_mut(&block.before) {
                siblings.retain(|&sibling| sibling != index);
            }
        }
        block.content = self.next_content;
        block.holders = 1;
        self.next_content += 1;
        Some(index)
    }

    fn hold(&mut self, index: u32) {
        let block = &mut self.blocks[index as usize];
        if block.holders == 0 {
            self.free.remove(&(block.released, index));
        }
        block.holders += 1;
    }

    fn let_go(&mut self, index: u32) {
        let block = &mut self.blocks[index as usize];
        debug_assert!(block.holders > 0, "block {index} has no holder");
        block.holders = block.holders.saturating_sub(1);
        if block.holders == 0 {
            block.released = match block.tokens.is_empty() {
                true => 0,
                false => self.next_release,
            };
            self.next_release += 1;
            self.free.insert((block.released, index));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(range: Range<u32>) -> Vec<u32> {
        range.collect()
    }

    /// A table for `tokens` that are in the cache.
    fn cached(pool: &mut BlockPool, tokens: &[u32]) -> Vec<u32> {
        let mut table = Vec::new();
        let mut copies = Vec::new();
        assert!(pool.prepare(&mut table, 0..tokens.len(), &mut copies));
        assert!(copies.is_empty());
        pool.record(&table, tokens, 0);
        table
    }

    #[test]
    fn grows_by_whole_blocks() {
        let mut pool = BlockPool::new(4);
        let (mut table, mut copies) = (Vec::new(), Vec::new());
        assert!(pool.prepare(&mut table, 0..1, &mut copies));
        assert!(pool.prepare(&mut table, 1..BLOCK_TOKENS, &mut copies));
        assert_eq!(table, [0]);
        assert!(pool.prepare(&mut table, BLOCK_TOKENS..BLOCK_TOKENS + 1, &mut copies));
        assert_eq!(table, [0, 1]);
        assert_eq!((pool.free_blocks(), pool.used_blocks()), (2, 2));
        assert!(copies.is_empty());
    }

    #[test]
    fn refuses_whole_and_takes_back() {
        let mut pool = BlockPool::new(3);
        let (mut a, mut b, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        assert!(pool.prepare(&mut a, 0..2 * BLOCK_TOKENS, &mut copies));
        assert!(!pool.prepare(&mut b, 0..2 * BLOCK_TOKENS, &mut copies));
        assert!(b.is_empty());
        pool.release(&mut a);
        assert!(a.is_empty());
        assert_eq!(pool.free_blocks(), 3);
        assert!(pool.prepare(&mut b, 0..3 * BLOCK_TOKENS, &mut copies));
        b.sort_unstable();
        assert_eq!(b, [0, 1, 2]);
    }

    #[test]
    fn who_writes_into_a_shared_block_gets_a_copy() {
        let mut pool = BlockPool::new(4);
        let mut first = cached(&mut pool, &tokens(0..20));
        let mut second = pool.share(&first);
        let mut copies = Vec::new();
        assert!(pool.prepare(&mut second, 20..21, &mut copies));
        assert_eq!(copies, [BlockCopy { from: 1, to: 2 }]);
        assert_eq!(
            (first.as_slice(), second.as_slice()),
            (&[0, 1][..], &[0, 2][..])
        );
        // The other one is alone with its block now.
        assert!(pool.prepare(&mut first, 20..21, &mut copies));
        assert_eq!((copies.len(), pool.free_blocks()), (1, 1));
        // A block that begins is nobody else's.
        let mut third = pool.share(&first[..1]);
        assert!(pool.prepare(&mut third, 16..17, &mut copies));
        assert_eq!((copies.len(), third.as_slice()), (1, &[0, 3][..]));
        // Nothing is left to copy to.
        let mut fourth = pool.share(&first);
        assert!(!pool.prepare(&mut fourth, 20..21, &mut copies));
        assert_eq!(fourth, first);
        for table in [&mut first, &mut second, &mut third, &mut fourth] {
            pool.release(table);
        }
        assert_eq!(pool.free_blocks(), 4);
    }

    #[test]
    fn a_beginning_is_found_again() {
        let mut pool = BlockPool::new(6);
        let all = tokens(0..40);
        let mut table = cached(&mut pool, &all[..35]);
        pool.record(&table, &all[..37], 35);
        assert_eq!(pool.find_prefix(&all).tokens(), 37);
        assert_eq!(pool.find_prefix(&all[..36]).tokens(), 36);
        assert_eq!(pool.find_prefix(&all[1..]).tokens(), 0);
        let mut other = all.clone();
        other[20] = 99;
        assert_eq!(pool.find_prefix(&other).tokens(), 20);
        // While it is held and when it is free.
        for held in [true, false] {
            if !held {
                pool.release(&mut table);
            }
            let prefix = pool.find_prefix(&other);
            let free = pool.free_blocks();
            let to_take = pool.blocks_to_take(&prefix, 40);
            assert_eq!(to_take, if held { 2 } else { 3 });
            let mut copies = Vec::new();
            let mut found = pool.take_prefix(&prefix, &mut copies);
            assert_eq!(found[0], 0);
            assert_eq!((copies.len(), copies[0].from, found.len()), (1, 1, 2));
            assert!(pool.prepare(&mut found, 20..40, &mut copies));
            assert_eq!((copies.len(), free - pool.free_blocks()), (1, to_take));
            pool.release(&mut found);
        }
    }

    #[test]
    fn what_is_given_out_again_is_forgotten() {
        let mut pool = BlockPool::new(3);
        let old = tokens(0..32);
        let mut table = cached(&mut pool, &old);
        pool.release(&mut table);
        assert_eq!(pool.find_prefix(&old).tokens(), 32);
        // The unused block first, then the end of the sequence that was let go.
        let mut one = cached(&mut pool, &tokens(100..103));
        assert_eq!(
            (one.as_slice(), pool.find_prefix(&old).tokens()),
            (&[2][..], 32)
        );
        let mut two = cached(&mut pool, &tokens(200..203));
        assert_eq!(
            (two.as_slice(), pool.find_prefix(&old).tokens()),
            (&[1][..], 16)
        );
        let mut three = cached(&mut pool, &tokens(300..303));
        assert_eq!(pool.find_prefix(&old).tokens(), 0);
        assert_eq!(pool.find_prefix(&tokens(200..205)).tokens(), 3);
        for table in [&mut one, &mut two, &mut three] {
            pool.release(table);
        }
        assert_eq!(pool.find_prefix(&tokens(300..305)).tokens(), 3);
    }

    #[test]
    fn what_followed_a_forgotten_block_is_not_found_below_its_successor() {
        let mut pool = BlockPool::new(2);
        let old = tokens(0..32);
        let mut table = cached(&mut pool, &old);
        // The first block is let go, the second is held on.
        let mut tail = pool.share(&table[1..]);
        pool.release(&mut table);
        let mut fresh = cached(&mut pool, &tokens(50..66));
        assert_eq!(fresh, [0]);
        let mut both = tokens(50..66);
        both.extend(16..32);
        assert_eq!(pool.find_prefix(&both).tokens(), 16);
        pool.release(&mut tail);
        pool.release(&mut fresh);
    }

    #[test]
    fn a_copy_is_found_too() {
        let mut pool = BlockPool::new(4);
        let all = tokens(0..20);
        let first = cached(&mut pool, &all);
        let mut second = pool.share(&first);
        let mut copies = Vec::new();
        assert!(pool.prepare(&mut second, 18..19, &mut copies));
        let mut forked = all[..18].to_vec();
        forked.extend([7, 8]);
        pool.record(&second, &forked, 18);
        assert_eq!(pool.find_prefix(&forked).tokens(), 20);
        assert_eq!(pool.find_prefix(&all).tokens(), 20);
    }
}
