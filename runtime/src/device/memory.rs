//! How much memory a device needs, and how much there is.
//!
//! A plan is made, and refused, before anything is allocated.

use super::{DeviceError, MemoryNeed};
use crate::kv::blocks_for;
use kiln_bundle::Limits;

/// What a plan is made from.
#[derive(Clone, Debug)]
pub(super) struct Room<'a> {
    /// For errors: where the memory is.
    pub(super) place: &'a str,
    /// Weights.
    pub(super) weight_bytes: u64,
    /// Activations, and whatever else does not depend on the KV cache.
    pub(super) arena_bytes: u64,
    /// A block of the KV cache, all layers.
    pub(super) block_bytes: u64,
    /// What is free, where it is known.
    pub(super) available_bytes: Option<u64>,
    /// The part of the memory left beside weights and activations that the KV cache takes at most,
    /// unless a size is asked for.
    pub(super) kv_share: f64,
    /// Size of the KV cache that was asked for.
    pub(super) asked_bytes: Option<u64>,
}

/// Blocks of the KV cache, and what all the memory comes to.
///
/// # Errors
/// [`DeviceError::Memory`] and [`DeviceError::KvCacheTooSmall`].
pub(super) fn plan_memory(
    limits: &Limits,
    room: &Room<'_>,
) -> Result<(u32, MemoryNeed), DeviceError> {
    let max_seq_len = limits.max_seq_len;
    let sequence_blocks = blocks_for(max_seq_len as usize) as u64;
    let full_blocks = sequence_blocks.saturating_mul(u64::from(limits.max_batch));
    let sequence_bytes = sequence_blocks.saturating_mul(room.block_bytes);
    let least = MemoryNeed {
        weight_bytes: room.weight_bytes,
        arena_bytes: room.arena_bytes,
        kv_bytes: sequence_bytes,
    };
    let enough = |need: MemoryNeed| match room.available_bytes {
        Some(available_bytes) if need.total_bytes() > available_bytes => Err(DeviceError::Memory {
            place: room.place.to_owned(),
            need,
            available_bytes,
            max_seq_len,
        }),
        _ => Ok(need),
    };
    enough(least)?;
    let blocks = match room.asked_bytes {
        Some(asked) if asked < sequence_bytes => {
            return Err(DeviceError::KvCacheTooSmall {
                asked_bytes: asked,
                needed_bytes: sequence_bytes,
                max_seq_len,
            });
        }
        Some(asked) => asked / room.block_bytes,
        None => {
            let left = room.available_bytes.map_or(u64::MAX, |available| {
                available
                    .saturating_sub(room.weight_bytes)
                    .saturating_sub(room.arena_bytes)
            });
            let share = (left as f64 * room.kv_share) as u64;
            full_blocks
                .min(share / room.block_bytes)
                .max(sequence_blocks)
        }
    };
    // A block's positions are numbered by u32 slots.
    let blocks = blocks.min(u64::from(u32::MAX) / kiln_bundle::BLOCK_TOKENS as u64);
    let need = enough(MemoryNeed {
        kv_bytes: blocks.saturating_mul(room.block_bytes),
        ..least
    })?;
    Ok((blocks as u32, need))
}

/// Bytes that the system can give without swapping, where it tells (Linux: `MemAvailable`).
pub fn available_bytes() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LIMITS: Limits = Limits {
        max_batch: 4,
        max_seq_len: 64,
    };

    fn room(available_bytes: Option<u64>, asked_bytes: Option<u64>) -> Room<'static> {
        Room {
            place: "this machine",
            weight_bytes: 10 * MIB,
            arena_bytes: MIB,
            block_bytes: 1024,
            available_bytes,
            kv_share: 0.5,
            asked_bytes,
        }
    }

    fn plan(available: Option<u64>, asked: Option<u64>) -> Result<(u32, MemoryNeed), DeviceError> {
        plan_memory(&LIMITS, &room(available, asked))
    }

    #[test]
    fn the_cache_holds_a_full_batch_where_memory_allows() {
        let (blocks, need) = plan(None, None).unwrap();
        assert_eq!(blocks, 4 * blocks_for(64) as u32);
        assert_eq!(need.kv_bytes, u64::from(blocks) * 1024);
        let (roomy, _) = plan(Some(1 << 40), None).unwrap();
        assert_eq!(roomy, blocks);
        let sequence_bytes = need.kv_bytes / 4;
        let tight = 11 * MIB + 5 * sequence_bytes;
        assert_eq!(plan(Some(tight), None).unwrap().0, 10);
        let tighter = 11 * MIB + sequence_bytes;
        assert_eq!(plan(Some(tighter), None).unwrap().0, 4);
    }

    #[test]
    fn a_size_that_is_asked_for_is_taken() {
        assert_eq!(plan(None, Some(7 * 1024 + 5)).unwrap().0, 7);
        let error = plan(Some(11 * MIB + 4096), Some(MIB)).unwrap_err();
        assert!(matches!(error, DeviceError::Memory { .. }), "{error}");
    }

    #[test]
    fn too_little_memory_is_told_in_figures() {
        let error = plan(Some(10 * MIB), None).unwrap_err().to_string();
        assert!(
            error.contains("not enough memory on this machine"),
            "{error}"
        );
        assert!(
            error.contains("10.0 MiB weights") && error.contains("10.0 MiB available"),
            "{error}"
        );
        let error = plan(None, Some(1)).unwrap_err().to_string();
        assert!(error.contains("one sequence of 64 positions"), "{error}");
    }

    #[test]
    fn reads_the_available_line() {
        let text = "MemTotal:       24689696 kB\nMemFree: 1 kB\nMemAvailable:   24000000 kB\n";
        assert_eq!(parse_meminfo(text), Some(24_000_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_meminfo("MemAvailable: much\n"), None);
    }
}
