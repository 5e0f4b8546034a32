//! Copies of blocks of the KV cache, before a step's own launches.
//!
//! A step's copies are made one after the other, but those of a launch at once. So a list is cut where
//! a copy reads or writes what an earlier one of its launch wrote, or writes what that one read.

use super::{BoundLaunch, CudaDevice, DeviceAddress, Driver, KernelHandle};
use crate::device::DeviceError;
use crate::kv::BlockCopy;
use kiln_bundle::{BlockCopies, COPIES_PER_LAUNCH};

/// The target's launch, bound.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copier {
    pub(super) kernel: KernelHandle,
    pub(super) grid_x: u32,
    pub(super) kv_cache: DeviceAddress,
}

impl Copier {
    fn launch(&self, copies: &[BlockCopy]) -> BoundLaunch {
        let mut pairs: BlockCopies = [[0; 2]; COPIES_PER_LAUNCH];
        for (pair, copy) in pairs.iter_mut().zip(copies) {
            *pair = [copy.from, copy.to];
        }
        let words = pairs.as_flattened().iter();
        let pairs = words.flat_map(|word| word.to_le_bytes()).collect();
        BoundLaunch {
            kernel: self.kernel,
            grid: [self.grid_x, copies.len() as u32, 1],
            parameters: vec![pairs, self.kv_cache.0.to_le_bytes().to_vec()],
            place: "copies of blocks".to_owned(),
        }
    }
}

impl<D: Driver> CudaDevice<D> {
    /// Enqueues the copies of a step.
    pub(super) fn copy_blocks(
        &mut self,
        index: usize,
        copies: &[BlockCopy],
    ) -> Result<(), DeviceError> {
        for together in launches(copies) {
            let launched = self.driver.launch(&self.copier.launch(&together));
            launched.map_err(|error| self.at(index, "its copies", error))?;
        }
        Ok(())
    }
}

/// The copies of each launch.
fn launches(copies: &[BlockCopy]) -> Vec<Vec<BlockCopy>> {
    let mut all: Vec<Vec<BlockCopy>> = Vec::new();
    for &copy in copies.iter().filter(|copy| copy.from != copy.to) {
        let is_apart = |earlier: &BlockCopy| {
            copy.from != earlier.to && copy.to != earlier.from && copy.to != earlier.to
        };
        match all.last_mut() {
            Some(last) if last.len() < COPIES_PER_LAUNCH && last.iter().all(is_apart) => {
                last.push(copy);
            }
            _ => all.push(vec![copy]),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copy((from, to): (u32, u32)) -> BlockCopy {
        BlockCopy { from, to }
    }

    #[track_caller]
    fn check(copies: &[(u32, u32)], expect: &[&[(u32, u32)]]) {
        let copies: Vec<BlockCopy> = copies.iter().copied().map(copy).collect();
        let expect: Vec<Vec<BlockCopy>> = expect
            .iter()
            .map(|launch| launch.iter().copied().map(copy).collect())
            .collect();
        assert_eq!(launches(&copies), expect);
    }

    #[test]
    fn what_depends_on_a_copy_comes_in_a_later_launch() {
        check(&[], &[]);
        check(&[(3, 3)], &[]);
        // One block to several.
        check(&[(1, 2), (1, 3), (4, 5)], &[&[(1, 2), (1, 3), (4, 5)]]);
        // Read what was written; write what was read; write twice.
        check(&[(1, 2), (2, 3)], &[&[(1, 2)], &[(2, 3)]]);
        check(&[(1, 2), (3, 1)], &[&[(1, 2)], &[(3, 1)]]);
        check(&[(1, 2), (3, 2)], &[&[(1, 2)], &[(3, 2)]]);
        // A swap through a third block, with another copy between.
        check(
            &[(1, 9), (2, 1), (5, 5), (6, 7), (9, 2)],
            &[&[(1, 9)], &[(2, 1), (6, 7)], &[(9, 2)]],
        );
    }

    #[test]
    fn launches_hold_so_many_copies() {
        let copies: Vec<(u32, u32)> = (0..130).map(|i| (i, 200 + i)).collect();
        check(&copies, &[&copies[..64], &copies[64..128], &copies[128..]]);
    }

    proptest! {
        #[test]
        fn launches_do_what_the_list_does(pairs in prop::collection::vec((0..9u32, 0..9u32), 0..40)) {
            let copies: Vec<BlockCopy> = pairs.into_iter().map(copy).collect();
            let mut expected: Vec<u32> = (0..9).collect();
            for copy in &copies {
                expected[copy.to as usize] = expected[copy.from as usize];
            }
            let mut found: Vec<u32> = (0..9).collect();
            for together in launches(&copies) {
                // All are read before any is written, and the last is written first.
                let before = found.clone();
                for copy in together.iter().rev() {
                    found[copy.to as usize] = before[copy.from as usize];
                }
                let mut targets: Vec<u32> = together.iter().map(|copy| copy.to).collect();
                targets.sort_unstable();
                targets.dedup();
                prop_assert_eq!(targets.len(), together.len());
            }
            prop_assert_eq!(found, expected);
        }
    }
}
