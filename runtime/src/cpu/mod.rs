//! The CPU kernels: every operation of a decoder, fused as the plans ask for.
//!
//! Shapes: B sequences, T new tokens over all sequences, P past tokens, C hidden, H heads, D head
//! dimension, V vocabulary; a linear layer maps K inputs to N outputs. Activations are `f32` rows,
//! ragged: (T, C) without padding. Weights and the KV cache are `f32`, `f16` or `bf16`.
//!
//! **The bits of a row depend on that row alone.** Every reduction has one fixed order (over k, over
//! d, over positions), whatever the other rows of the step, the tile a row falls into, the chunks a
//! prompt is fed in, or the number of threads. The AVX2, AVX-512 and NEON forms agree with each other
//! (with rows of bf16, but for subnormal numbers), and AMX with them, but where bf16 is multiplied;
//! the portable form rounds products before it adds them where the target has no fused
//! multiply-add, and so may differ from them.
//!
//! Kernels are written once, over the sixteen-lane vectors of [`simd`], and compiled for each
//! [`Isa`]. Preconditions on shapes are asserted at the entry of each kernel, before any work.

mod amx;
mod attention;
mod bandwidth;
mod embed;
mod fixed;
mod kv_cache;
mod linear;
mod matrix;
mod nodes;
mod norm;
mod peak;
mod pool;
mod rows;
pub mod scores;
mod scratch;
mod simd;
mod storage;
#[cfg(test)]
mod testing;
mod tile;

pub use attention::{Attention, Sequence, attention};
pub use bandwidth::{BANDWIDTH_BYTES, Bandwidth, read_bandwidth, read_once};
pub use embed::{Embedding, PositionTable, embed};
pub use kv_cache::{KvCache, KvCacheMut, KvLayout, write_kv};
pub use linear::{Activation, Linear, Residual, linear};
pub use nodes::Nodes;
pub use norm::{Norm, layer_norm};
pub use peak::{Peak, peak};
pub use pool::{ThreadPool, partition, physical_cores};
pub use rows::{Rows, RowsMut};
pub use simd::{Isa, IsaError};
pub use storage::{PackedMatrix, Storage, StorageError, StorageMut};

use scratch::Scratch;

/// What a kernel needs of the machine: threads, an instruction set and scratch memory that is kept
/// between calls.
pub struct Cpu {
    pool: ThreadPool,
    isa: Isa,
    scratch: Scratch,
}

impl Cpu {
    /// Kernels on `pool`, compiled for `isa`.
    ///
    /// # Errors
    /// [`IsaError::Unsupported`] when this machine lacks `isa`.
    pub fn new(pool: ThreadPool, isa: Isa) -> Result<Cpu, IsaError> {
        let isa = isa.supported()?;
        let scratch = Scratch::new(pool.threads());
        Ok(Cpu { pool, isa, scratch })
    }

    /// The threads that kernels run on.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// The instruction set that kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}
