//! `plan_memory`: no two buffers that live at once share a byte, and memory is reused.

use kiln_bundle::{ALIGN_BYTES, Bounds, DType, KernelSpec, Phase, Program};
use kiln_compiler::{passes::fuse, plan_memory, specialise};
use kiln_models::{build, builtin};

fn program(model: &str) -> Program {
    specialise(
        &fuse(build(&builtin(model).unwrap())),
        Phase::Decode,
        DType::F32,
    )
    .unwrap()
}

const BOUNDS: Bounds = Bounds {
    max_tokens: 8,
    max_sequences: 8,
    max_kv_len: 256,
    max_logit_rows: 8,
    hidden_states: true,
};

#[test]
fn buffers_that_live_together_do_not_meet() {
    for model in ["opt-125m", "opt-350m", "gpt2"] {
        let program = program(model);
        let plan = plan_memory(&program, &BOUNDS);
        let size = |buffer: usize| {
            let buffer = &program.buffers[buffer];
            u64::from(BOUNDS.rows(buffer.rows)) * u64::from(buffer.width) * 4
        };
        // Contents by byte range, replayed kernel by kernel: every read must find what was written.
        let mut live: Vec<usize> = vec![];
        for kernel in &program.kernels {
            for read in kernel.reads() {
                assert!(
                    live.contains(&(read.0 as usize)),
                    "{model}: {read} was overwritten"
                );
            }
            if let Some(out) = kernel.writes() {
                let out = out.0 as usize;
                let (start, end) = (plan.offsets_bytes[out], plan.offsets_bytes[out] + size(out));
                assert!(start.is_multiple_of(ALIGN_BYTES as u64) && end <= plan.arena_bytes);
                live.retain(|&other| {
                    let at = plan.offsets_bytes[other];
                    at + size(other) <= start || end <= at
                });
                live.push(out);
            }
        }
        assert!(
            live.contains(&(program.logits.0 as usize)),
            "{model}: the logits were overwritten"
        );
    }
}

#[test]
fn the_arena_does_not_grow_with_the_layers() {
    let [small, large] = ["gpt2", "gpt2-xl"].map(|model| {
        let program = program(model);
        (plan_memory(&program, &BOUNDS).arena_bytes, program)
    });
    // What one layer needs at its widest: residual in, residual out of the block, FFN.
    for (arena_bytes, program) in [small, large] {
        let widest: u64 = program
            .kernels
            .iter()
            .filter(|kernel| matches!(kernel, KernelSpec::Linear(_)))
            .map(|kernel| {
                let buffers = kernel.reads().into_iter().chain(kernel.writes());
                buffers
                    .map(|buffer| u64::from(program.buffers[buffer.0 as usize].width) * 8 * 4 + 64)
                    .sum()
            })
            .max()
            .unwrap();
        assert!(
            arena_bytes <= widest,
            "{arena_bytes} bytes, one kernel needs {widest}"
        );
    }
}
