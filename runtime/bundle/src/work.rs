//! What a kernel moves and computes: the one count behind predictions, tables and rates.
//!
//! Bytes are those that must come from or go to memory at least once in a step: weights, rows of
//! activations and tables, keys and values. A step's lists (token ids, block tables) are not among them,
//! nor what a target puts into its workspace. Operations are the multiplications and additions of
//! products; what is done to a row besides (norms, activations, softmax) is not counted.

use crate::{
    Bounds, BufferId, DType, KernelSpec, Linear, Norm, Phase, Program, RowKind, Target,
    WeightFormat,
    packing::{Layout, PANEL, TILE_N},
};
use std::iter::Sum;

/// The sizes of a step that its work depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSize {
    /// T.
    pub tokens: u64,
    /// R.
    pub logit_rows: u64,
    /// Pairs of a query and a position that it sees.
    pub pairs: u64,
    /// Positions whose keys and values are read: past and new ones of each sequence.
    pub kv_positions: u64,
}

impl StepSize {
    /// Counts one more sequence of `past` cached positions and `new` tokens, of which `logit_rows` get
    /// logits.
    pub fn add(&mut self, past: u64, new: u64, logit_rows: u64) {
        self.tokens += new;
        self.logit_rows += logit_rows;
        self.pairs += new * past + new * (new + 1) / 2;
        self.kv_positions += past + new;
    }

    /// A step at its bounds: in prefill, one prompt of all its tokens and the logits of the last; in
    /// decode, every sequence at its longest.
    pub fn at_bounds(phase: Phase, bounds: &Bounds) -> StepSize {
        let mut size = StepSize::default();
        match phase {
            Phase::Prefill => size.add(0, bounds.max_tokens.into(), 1),
            Phase::Decode => {
                let past = u64::from(bounds.max_kv_len.saturating_sub(1));
                (0..bounds.max_sequences).for_each(|_| size.add(past, 1, 1));
            }
        }
        size
    }
}

/// What a kernel, or a step, moves and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Matrices and vectors that are read whatever the size of the step; not the rows of embeddings.
    pub weight_bytes: u64,
    /// All bytes, those of weights among them.
    pub bytes: f64,
    /// Multiplications and additions.
    pub flops: f64,
}

impl Work {
    /// The least time at these rates, in microseconds: the longer of bytes and operations.
    pub fn floor_us(&self, gb_per_s: f64, gflop_per_s: f64) -> f64 {
        (self.bytes / gb_per_s).max(self.flops / gflop_per_s) / 1e3
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Work>>(parts: I) -> Work {
        parts.fold(Work::default(), |sum, part| Work {
            weight_bytes: sum.weight_bytes + part.weight_bytes,
            bytes: sum.bytes + part.bytes,
            flops: sum.flops + part.flops,
        })
    }
}

/// The work of all kernels of a program of `target`.
pub fn step_work(target: &Target, program: &Program, size: &StepSize) -> Work {
    let kernels = program.kernels.iter();
    kernels
        .map(|kernel| kernel_work(target, program, kernel, size))
        .sum()
}

/// The work of a kernel of `program`, a sound program of `target`.
pub fn kernel_work(
    target: &Target,
    program: &Program,
    kernel: &KernelSpec,
    size: &StepSize,
) -> Work {
    let buffer = |id: BufferId| &program.buffers[id.0 as usize];
    let rows_of = |id: BufferId| match buffer(id).rows {
        RowKind::Tokens => size.tokens as f64,
        RowKind::Logits => size.logit_rows as f64,
    };
    let element = |id: BufferId| buffer(id).dtype.size_bytes() as f64;
    let all = |id: BufferId| rows_of(id) * f64::from(buffer(id).width) * element(id);
    let kv_element = target.dtype.size_bytes() as f64;
    let (weight_bytes, moved, flops) = match kernel {
        KernelSpec::Embed {
            tokens,
            positions,
            out,
            ..
        } => {
            let width = buffer(*out).width as usize;
            let token = tokens.as_ref().map_or(0.0, |name| {
                row_bytes(target.format(name), target.layout, width)
            });
            let position = positions
                .as_ref()
                .map_or(0, |_| width * target.tables.size_bytes());
            (
                0,
                rows_of(*out) * (token + position as f64) + all(*out),
                0.0,
            )
        }
        KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => {
            let rows = rows_of(linear.out);
            let (n, k) = (
                f64::from(linear.out_features),
                f64::from(linear.in_features),
            );
            let added = linear.residual.as_ref();
            let written = match kernel {
                // A third of the columns is q; keys and values go to the cache.
                KernelSpec::Qkv { .. } => rows * n / 3.0 * (element(linear.out) + 2.0 * kv_element),
                _ => all(linear.out),
            };
            let moved = rows * k * element(linear.input)
                + added.map_or(0.0, |added| rows * n * element(added.buffer))
                + written;
            (linear_bytes(target, linear), moved, 2.0 * rows * n * k)
        }
        KernelSpec::Attention {
            q,
            heads,
            head_dim,
            out,
            ..
        } => {
            let width = f64::from(*heads) * f64::from(*head_dim);
            let kv = 2.0 * size.kv_positions as f64 * width * kv_element;
            let moved = rows_of(*q) * width * element(*q) + kv + all(*out);
            (0, moved, 4.0 * size.pairs as f64 * width)
        }
        KernelSpec::Sample { logits } => (0, all(*logits), 0.0),
    };
    Work {
        weight_bytes,
        bytes: weight_bytes as f64 + moved,
        flops,
    }
}

/// Of a linear's matrix as it is stored, its bias and its norms.
fn linear_bytes(target: &Target, linear: &Linear) -> u64 {
    let (n, k) = (linear.out_features as usize, linear.in_features as usize);
    let vector = |name: &Option<String>, len: usize| match name {
        Some(_) => (len * DType::F32.size_bytes()) as u64,
        None => 0,
    };
    let norm = |norm: Option<&Norm>, len| {
        norm.map_or(0, |norm| {
            vector(&norm.weight, len) + vector(&norm.bias, len)
        })
    };
    let residual = linear.residual.as_ref();
    target.format(&linear.weight).bytes(target.layout, n, k)
        + vector(&linear.bias, n)
        + norm(linear.norm.as_ref(), k)
        + norm(residual.and_then(|residual| residual.norm.as_ref()), n)
}

/// Of a row of a packed table: its share of the rows that lie together.
fn row_bytes(format: WeightFormat, layout: Layout, width: usize) -> f64 {
    let together = match layout {
        Layout::Panels => PANEL,
        Layout::Tiles => TILE_N,
    };
    format.bytes(layout, together, width) as f64 / together as f64
}
