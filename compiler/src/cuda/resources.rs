//! What a compiled kernel takes of a multiprocessor, and how many of its blocks fit one.

use serde::{Deserialize, Serialize};

/// Resources of a kernel, as `ptxas -v` reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// 32-bit registers of a thread.
    pub registers: u32,
    /// Shared memory of a block that the kernel declares; the dynamic part is not known here.
    pub static_smem_bytes: u32,
    /// Local memory of a thread for arrays and spills, in the deepest chain of calls.
    pub stack_bytes: u32,
    /// Stores of registers to local memory, by all functions of the kernel.
    pub spill_store_bytes: u32,
    /// And loads.
    pub spill_load_bytes: u32,
    /// Constant memory, parameters included. Not reported from sm_90 on, and 0 there.
    pub constant_bytes: u32,
    /// Named barriers of a block.
    pub barriers: u32,
}

impl Resources {
    /// Finds the resources of `entry` in the log of a compilation; `None` where it has no such
    /// kernel.
    ///
    /// An entry's lines follow its `Compiling entry function`. After its own `Used` line there may
    /// be properties of functions that it calls: their spills count, their frames are in its
    /// cumulative stack size.
    pub fn parse(log: &str, entry: &str) -> Option<Resources> {
        let mut found: Option<Resources> = None;
        let mut inside = false;
        let mut used = false;
        for line in log.lines() {
            if line.contains("Compiling entry function") {
                inside = line.split('\'').nth(1) == Some(entry);
                used = false;
                if inside {
                    found = Some(Resources::default());
                }
            }
            let Some(resources) = found.as_mut().filter(|_| inside) else {
                continue;
            };
            // "... 8 bytes stack frame, 16 bytes spill stores, 16 bytes spill loads"
            if line.contains("bytes stack frame") {
                resources.stack_bytes = resources
                    .stack_bytes
                    .max(before(line, "bytes stack frame").unwrap_or(0));
                resources.spill_store_bytes += before(line, "bytes spill stores").unwrap_or(0);
                resources.spill_load_bytes += before(line, "bytes spill loads").unwrap_or(0);
            }
            // "... Used 22 registers, used 1 barriers, 128 bytes smem, 480 bytes cmem[0]"
            if !used && line.contains("Used ") && line.contains(" registers") {
                used = true;
                resources.registers = before(line, "registers")?;
                resources.barriers = before(line, "barriers").unwrap_or(0);
                resources.static_smem_bytes = before(line, "bytes smem").unwrap_or(0);
                let stack_bytes = before(line, "bytes cumulative stack size").unwrap_or(0);
                resources.stack_bytes = resources.stack_bytes.max(stack_bytes);
                let constants = line
                    .split(',')
                    .filter_map(|part| before(part, "bytes cmem["));
                resources.constant_bytes = constants.sum();
            }
        }
        found.filter(|resources| resources.registers > 0)
    }

    /// Blocks of this kernel that run on a multiprocessor at once; 0 where none fits, or `arch`
    /// (`sm_90a`) is not known.
    ///
    /// Registers go to warps in units of 256, to each of four quarters by itself; shared memory to
    /// blocks in units of 128 bytes, and 1 KiB of it is the system's for each block. Limits are
    /// those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
    /// the rules those of `cuda_occupancy.h` in the CUDA toolkit.
    pub fn blocks_per_multiprocessor(
        &self,
        block_threads: u32,
        dynamic_smem_bytes: u32,
        arch: &str,
    ) -> u32 {
        let Some(limits) = Multiprocessor::of(arch) else {
            return 0;
        };
        if !(1..=MAX_BLOCK_THREADS).contains(&block_threads)
            || self.registers > MAX_THREAD_REGISTERS
        {
            return 0;
        }
        let warps = block_threads.div_ceil(WARP_THREADS);
        let by_threads = limits.threads / WARP_THREADS / warps;
        let warp_registers = (self.registers.max(1) * WARP_THREADS).next_multiple_of(256);
        let by_registers = REGISTERS / QUARTERS / warp_registers * QUARTERS / warps;
        let smem_bytes = u64::from(self.static_smem_bytes)
            + u64::from(dynamic_smem_bytes)
            + u64::from(RESERVED_SMEM_BYTES);
        let by_smem = u64::from(limits.smem_bytes) / smem_bytes.next_multiple_of(128);
        limits
            .blocks
            .min(by_threads)
            .min(by_registers)
            .min(by_smem as u32)
    }
}

/// The number before the first `unit` of a line: 16 for `bytes smem` in `4 registers, 16 bytes smem`.
fn before(line: &str, unit: &str) -> Option<u32> {
    let (head, _) = line.split_once(unit)?;
    head.split_whitespace().next_back()?.parse().ok()
}

const WARP_THREADS: u32 = 32;
const MAX_BLOCK_THREADS: u32 = 1024;
const MAX_THREAD_REGISTERS: u32 = 255;
/// Registers of a multiprocessor, and the parts that its warps are dealt to.
const REGISTERS: u32 = 64 * 1024;
const QUARTERS: u32 = 4;
const RESERVED_SMEM_BYTES: u32 = 1024;

/// What differs between multiprocessors.
struct Multiprocessor {
    threads: u32,
    blocks: u32,
    smem_bytes: u32,
}

impl Multiprocessor {
    fn of(arch: &str) -> Option<Multiprocessor> {
        let number = arch.strip_prefix("sm_")?.trim_end_matches(['a', 'f']);
        let (threads, blocks, smem_kib) = match number {
            "80" => (2048, 32, 164),
            "86" => (1536, 16, 100),
            "89" => (1536, 24, 100),
            "90" | "100" => (2048, 32, 228),
            "120" => (1536, 24, 100),
            _ => return None,
        };
        Some(Multiprocessor {
            threads,
            blocks,
            smem_bytes: smem_kib * 1024,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC 13.0, two entries of one source.
    const SM_80: &str = "\
ptxas info    : 16 bytes gmem, 32 bytes cmem[4]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 1 barriers, 128 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     20640 bytes stack frame, 26992 bytes spill stores, 45128 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 20640 bytes cumulative stack size, 368 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Function properties for _Z6helperPfi
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
";

    #[test]
    fn an_entry_is_found_among_several() {
        let second = Resources {
            registers: 22,
            static_smem_bytes: 128,
            constant_bytes: 480,
            barriers: 1,
            ..Resources::default()
        };
        assert_eq!(Resources::parse(SM_80, "second"), Some(second));
        let first = Resources {
            registers: 32,
            stack_bytes: 20640,
            spill_store_bytes: 27000,
            spill_load_bytes: 45132,
            constant_bytes: 376,
            ..Resources::default()
        };
        assert_eq!(Resources::parse(SM_80, "first"), Some(first));
        assert_eq!(Resources::parse(SM_80, "firs"), None);
        assert_eq!(Resources::parse("", "first"), None);
    }

    /// NVRTC 13.0 for sm_90 on leaves constants out; CUDA 11 and 12 leave barriers out and begin
    /// the second line of properties with spaces.
    #[test]
    fn other_versions_leave_things_out() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     112 bytes stack frame, 224 bytes spill stores, 184 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 112 bytes cumulative stack size
";
        let resources = Resources::parse(log, "k").unwrap();
        assert_eq!((resources.registers, resources.stack_bytes), (255, 112));
        assert_eq!(resources.spill_load_bytes, 184);
        let log = "\
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 4096 bytes smem, 400 bytes cmem[0]
";
        let resources = Resources::parse(log, "k").unwrap();
        assert_eq!((resources.registers, resources.stack_bytes), (40, 8));
        assert_eq!((resources.static_smem_bytes, resources.barriers), (4096, 0));
    }

    #[test]
    fn the_scarcest_resource_limits_the_blocks() {
        let with = |registers, static_smem_bytes| Resources {
            registers,
            static_smem_bytes,
            ..Resources::default()
        };
        // Threads, and blocks.
        assert_eq!(with(32, 0).blocks_per_multiprocessor(256, 0, "sm_90a"), 8);
        assert_eq!(with(32, 0).blocks_per_multiprocessor(256, 0, "sm_86"), 6);
        for (arch, blocks) in [("sm_80", 32), ("sm_86", 16), ("sm_89", 24), ("sm_100a", 32)] {
            assert_eq!(
                with(16, 0).blocks_per_multiprocessor(32, 0, arch),
                blocks,
                "{arch}"
            );
        }
        // Registers: 33 take a warp as many as 40; 168 leave twelve warps, three a quarter.
        assert_eq!(with(33, 0).blocks_per_multiprocessor(256, 0, "sm_80"), 6);
        assert_eq!(with(40, 0).blocks_per_multiprocessor(256, 0, "sm_80"), 6);
        assert_eq!(with(168, 0).blocks_per_multiprocessor(384, 0, "sm_90a"), 1);
        assert_eq!(with(255, 0).blocks_per_multiprocessor(288, 0, "sm_90a"), 0);
        // Shared memory, of which each block gives 1 KiB away.
        assert_eq!(
            with(32, 1024).blocks_per_multiprocessor(128, 225 << 10, "sm_90a"),
            1
        );
        assert_eq!(
            with(32, 1024).blocks_per_multiprocessor(128, 226 << 10, "sm_100a"),
            1
        );
        assert_eq!(
            with(32, 1024).blocks_per_multiprocessor(128, 227 << 10, "sm_90a"),
            0
        );
        assert_eq!(
            with(32, 0).blocks_per_multiprocessor(128, 49 << 10, "sm_120a"),
            2
        );
        assert_eq!(
            with(32, 0).blocks_per_multiprocessor(128, 49 << 10, "sm_80"),
            3
        );
        assert_eq!(
            with(32, 0).blocks_per_multiprocessor(128, u32::MAX, "sm_80"),
            0
        );
        assert_eq!(with(32, 0).blocks_per_multiprocessor(2048, 0, "sm_80"), 0);
        assert_eq!(with(32, 0).blocks_per_multiprocessor(128, 0, "sm_75"), 0);
    }
}
