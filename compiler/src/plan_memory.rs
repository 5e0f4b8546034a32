//! Places a program's buffers in one arena, for given bounds.
//!
//! A buffer lives from the kernel that writes it to the last that reads it; buffers whose lives do
//! not meet may share bytes. Larger buffers are placed first, each at the lowest offset that is
//! free during its life: first fit by falling size, which for a decoder's few shapes comes out at
//! the largest sum that is ever alive at once.

use kiln_bundle::{ALIGN_BYTES, Bounds, Program};
use std::ops::RangeInclusive;

/// Offsets of a program's buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Size of the arena.
    pub arena_bytes: u64,
    /// By buffer.
    pub offsets_bytes: Vec<u64>,
}

/// Plans the memory of a program within its bounds.
pub fn plan_memory(program: &Program, bounds: &Bounds) -> MemoryPlan {
    let lives = lives(program);
    let sizes: Vec<u64> = program
        .buffers
        .iter()
        .map(|buffer| {
            let elements = u64::from(bounds.rows(buffer.rows)) * u64::from(buffer.width);
            (elements * buffer.dtype.size_bytes() as u64).next_multiple_of(ALIGN_BYTES as u64)
        })
        .collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&buffer| (std::cmp::Reverse(sizes[buffer]), buffer));
    let mut offsets_bytes = vec![0; sizes.len()];
    let mut placed: Vec<usize> = vec![];
    for buffer in order {
        let mut taken: Vec<(u64, u64)> = placed
            .iter()
            .filter(|&&other| meet(&lives[buffer], &lives[other]))
            .map(|&other| (offsets_bytes[other], offsets_bytes[other] + sizes[other]))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + sizes[buffer] <= start {
                break;
            }
            offset = offset.max(end);
        }
        offsets_bytes[buffer] = offset;
        placed.push(buffer);
    }
    let arena_bytes = offsets_bytes
        .iter()
        .zip(&sizes)
        .map(|(offset, size)| offset + size)
        .max()
        .unwrap_or(0);
    MemoryPlan {
        arena_bytes,
        offsets_bytes,
    }
}

/// By buffer, the kernels from the one that writes it to the last that needs it.
fn lives(program: &Program) -> Vec<RangeInclusive<usize>> {
    let mut lives = vec![0..=0; program.buffers.len()];
    for (index, kernel) in program.kernels.iter().enumerate() {
        if let Some(out) = kernel.writes() {
            lives[out.0 as usize] = index..=index;
        }
        for read in kernel.reads() {
            let life = &mut lives[read.0 as usize];
            *life = *life.start()..=index;
        }
    }
    // The host may ask for the logits after the step.
    let logits = &mut lives[program.logits.0 as usize];
    *logits = *logits.start()..=program.kernels.len();
    lives
}

fn meet(a: &RangeInclusive<usize>, b: &RangeInclusive<usize>) -> bool {
    a.start() <= b.end() && b.start() <= a.end()
}
