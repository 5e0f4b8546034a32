//! `specialise`: a fused graph in, the plan's text out.

use kiln_bundle::{Bounds, DType, Executable, Phase};
use kiln_compiler::{KernelPlan, plan_memory, specialise};
use kiln_ir::Graph;

const FUSED: &str = "graph g {
  weight @t [10, 4] = load \"t\"
  weight @p [8, 4] = load \"p\"
  weight @qkv [12, 4] = load \"qkv\"
  weight @w [4, 4] = load \"w\"
  weight @b [4] = load \"b\"
  %0 = token_ids : ids
  %1 = positions : ids
  %2 = embed %0, %1 tokens=@t positions=@p offset=2 : [T, 4]
  %3 = qkv %2 weight=@qkv norm=(@b, @b, 0.00001) layer=0 : [T, 12]
  %4 = attention %3 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %5 = linear %4, %2 weight=@w bias=@b act=gelu_new residual_norm=(@b, _, 0.5) : [T, 4]
  %6 = linear %5 weight=@t rows=logits : [R, 10]
  hidden %2
  hidden %5 norm=(@b, @b, 0.00001)
  logits %6
}
";

#[test]
fn every_node_becomes_a_kernel_and_every_value_a_buffer() {
    let graph: Graph = FUSED.parse().unwrap();
    let program = specialise(&graph, Phase::Prefill, DType::F32).unwrap();
    let bounds = Bounds {
        max_tokens: 32,
        max_sequences: 4,
        max_kv_len: 8,
        max_logit_rows: 4,
        hidden_states: true,
    };
    let memory = plan_memory(&program, &bounds);
    let executable = Executable {
        name: "prefill-t32".to_owned(),
        phase: Phase::Prefill,
        program: 0,
        bounds,
        arena_bytes: memory.arena_bytes,
        offsets_bytes: memory.offsets_bytes,
        launches: vec![],
        workspace_bytes: 0,
        counters: 0,
    };
    let plan = KernelPlan {
        program: &program,
        executable: &executable,
        images: &[],
    };
    let expect = "executable prefill-t32 {
  bounds tokens=32 sequences=4 kv_len=8 logit_rows=4
  arena 2560 bytes
  b0 f32[T, 4] at 1536
  b1 f32[T, 12] at 0
  b2 f32[T, 4] at 2048
  b3 f32[T, 4] at 0
  b4 f32[R, 10] at 512
  b0 = embed tokens=@t positions=@p offset=2
  b1 = qkv b0 weight=@qkv [12, 4] norm=(@b, @b, 0.00001) layer=0
  b2 = attention b1 layer=0 heads=2 head_dim=2 scale=0.5
  b3 = linear b2, b0 weight=@w [4, 4] bias=@b act=gelu_new residual_norm=(@b, _, 0.5)
  b4 = linear b3 weight=@t [10, 4] rows=logits
  sample b4
  hidden b0 after kernel 0
  hidden b3 after kernel 3 norm=(@b, @b, 0.00001)
  logits b4
}
";
    assert_eq!(plan.to_string(), expect);
}

#[test]
fn an_operation_without_a_kernel_is_named() {
    let text = FUSED.replace(
        "%5 = linear %4, %2 weight=@w bias=@b act=gelu_new residual_norm=(@b, _, 0.5)",
        "%5 = add %4, %2",
    );
    let graph: Graph = text.parse().unwrap();
    let error = specialise(&graph, Phase::Decode, DType::F32).unwrap_err();
    assert_eq!(
        error.to_string(),
        "%5 is a add, which no kernel computes; fuse left it over"
    );
}
