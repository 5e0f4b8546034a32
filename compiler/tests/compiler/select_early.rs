//! `select_early`: text in, text out.

use kiln_compiler::passes::{fuse, select_early};
use kiln_ir::Graph;

const WEIGHTS: &str = "  weight @t [10, 4] = load \"t\"
  weight @w [4, 4] = load \"w\"
  weight @b [4] = load \"b\"
";

/// A pre-norm layer without k and v of its own, which reads all rows of what comes before it.
const LAYER: &str = "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = kv_write %1, %1 layer=0 : kv
  %3 = attention %1, %2 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %4 = matmul %3 weight=@w : [T, 4]
  %5 = add %1, %4 : [T, 4]
  %6 = layer_norm %5 norm=(@b, @b, 0.00001) : [T, 4]
  %7 = matmul %6 weight=@w : [T, 4]
  %8 = bias %7 bias=@b : [T, 4]
  %9 = relu %8 : [T, 4]
  %10 = add %5, %9 : [T, 4]
  %11 = select_logit_rows %10 : [R, 4]
  %12 = matmul %11 weight=@t : [R, 10]
";

fn graph(body: &str) -> Graph {
    crate::graph(WEIGHTS, body)
}

fn body(graph: &Graph) -> String {
    crate::body(WEIGHTS, graph)
}

#[test]
fn what_computes_rows_by_themselves_computes_those_that_are_needed() {
    let early = select_early(graph(&format!("{LAYER}  logits %12\n")));
    assert_eq!(
        body(&early),
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = select_logit_rows %1 : [R, 4]
  %3 = kv_write %1, %1 layer=0 : kv
  %4 = attention %1, %3 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %5 = select_logit_rows %4 : [R, 4]
  %6 = matmul %5 weight=@w : [R, 4]
  %7 = add %2, %6 : [R, 4]
  %8 = layer_norm %7 norm=(@b, @b, 0.00001) : [R, 4]
  %9 = matmul %8 weight=@w : [R, 4]
  %10 = bias %9 bias=@b : [R, 4]
  %11 = relu %10 : [R, 4]
  %12 = add %7, %11 : [R, 4]
  %13 = matmul %12 weight=@t : [R, 10]
  logits %13
"
    );
    // The linear behind the attention gathers its input and its residual.
    assert_eq!(
        body(&fuse(early)),
        "  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = kv_write %1, %1 layer=0 : kv
  %3 = attention %1, %2 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %4 = linear %3, %1 weight=@w rows=logits : [R, 4]
  %5 = linear %4, %4 weight=@w norm=(@b, @b, 0.00001) bias=@b act=relu : [R, 4]
  %6 = linear %5 weight=@t : [R, 10]
  logits %6
"
    );
}

#[test]
fn rows_that_are_observed_stay_whole() {
    // All of the layer's result is to be seen: the selection stays where it is.
    let observed = graph(&format!("{LAYER}  hidden %10\n  logits %12\n"));
    assert_eq!(body(&select_early(observed.clone())), body(&observed));
    // Of the layer's middle: it moves up to there.
    let text = body(&select_early(graph(&format!(
        "{LAYER}  hidden %5\n  logits %12\n"
    ))));
    assert!(text.contains("%5 = add %1, %4 : [T, 4]\n  %6 = select_logit_rows %5 : [R, 4]\n"));
}

#[test]
fn rows_that_other_positions_read_stay_whole() {
    let text = body(&select_early(graph(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = layer_norm %1 norm=(@b, @b, 0.00001) : [T, 4]
  %3 = kv_write %2, %2 layer=0 : kv
  %4 = attention %2, %3 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %5 = add %2, %4 : [T, 4]
  %6 = select_logit_rows %5 : [R, 4]
  %7 = matmul %6 weight=@t : [R, 10]
  logits %7
",
    )));
    assert!(
        text.contains("%3 = select_logit_rows %2 : [R, 4]\n"),
        "{text}"
    );
    assert!(text.contains("= attention %2, %4"), "{text}");
}
