//! `fuse`: text in, text out.

use kiln_compiler::passes::fuse;
use kiln_ir::Graph;

/// Weights that the cases use, declared once.
const WEIGHTS: &str = "  weight @t [10, 4] = load \"t\"
  weight @p [8, 4] = load \"p\"
  weight @w [4, 4] = load \"w\"
  weight @a.q.weight [4, 4] = load \"q\"
  weight @a.k.weight [4, 4] = load \"k\"
  weight @a.v.weight [4, 4] = load \"v\"
  weight @b [4] = load \"b\"
";

fn graph(body: &str) -> Graph {
    crate::graph(WEIGHTS, body)
}

/// Fuses `input` and compares everything after the weights above.
fn check(input: &str, expect: &str) {
    assert_eq!(crate::body(WEIGHTS, &fuse(graph(input))), expect);
}

#[test]
fn bias_activation_and_residual_go_into_the_linear() {
    check(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = matmul %1 weight=@w : [T, 4]
  %3 = bias %2 bias=@b : [T, 4]
  %4 = relu %3 : [T, 4]
  %5 = add %1, %4 : [T, 4]
  %6 = select_logit_rows %5 : [R, 4]
  %7 = matmul %6 weight=@t : [R, 10]
  logits %7
",
        "  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = linear %1, %1 weight=@w bias=@b act=relu : [T, 4]
  %3 = linear %2 weight=@t rows=logits : [R, 10]
  logits %3
",
    );
}

#[test]
fn tables_merge_into_one_embedding() {
    check(
        "  %0 = positions : ids
  %1 = embed_positions %0 table=@p offset=2 : [T, 4]
  %2 = token_ids : ids
  %3 = embed_tokens %2 table=@t : [T, 4]
  %4 = add %1, %3 : [T, 4]
  %5 = select_logit_rows %4 : [R, 4]
  %6 = matmul %5 weight=@t : [R, 10]
  hidden %4
  logits %6
",
        "  %0 = token_ids : ids
  %1 = positions : ids
  %2 = embed %0, %1 tokens=@t positions=@p offset=2 : [T, 4]
  %3 = linear %2 weight=@t rows=logits : [R, 10]
  hidden %2
  logits %3
",
    );
}

#[test]
fn a_norm_goes_into_all_its_users() {
    // Post-norm: the norm's value is read by a linear, added as a residual, and observed.
    check(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = layer_norm %1 norm=(@b, @b, 0.00001) : [T, 4]
  %3 = matmul %2 weight=@w : [T, 4]
  %4 = add %2, %3 : [T, 4]
  %5 = select_logit_rows %4 : [R, 4]
  %6 = matmul %5 weight=@t : [R, 10]
  hidden %2
  logits %6
",
        "  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = linear %1, %1 weight=@w norm=(@b, @b, 0.00001) residual_norm=(@b, @b, 0.00001) : [T, 4]
  %3 = linear %2 weight=@t rows=logits : [R, 10]
  hidden %1 norm=(@b, @b, 0.00001)
  logits %3
",
    );
}

#[test]
fn q_k_and_v_become_one_product() {
    check(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = layer_norm %1 norm=(@b, @b, 0.00001) : [T, 4]
  %3 = matmul %2 weight=@a.q.weight : [T, 4]
  %4 = matmul %2 weight=@a.k.weight : [T, 4]
  %5 = matmul %2 weight=@a.v.weight : [T, 4]
  %6 = kv_write %4, %5 layer=0 : kv
  %7 = attention %3, %6 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %8 = select_logit_rows %7 : [R, 4]
  %9 = matmul %8 weight=@t : [R, 10]
  logits %9
",
        "  weight @a.qkv.weight [12, 4] = concat @a.q.weight, @a.k.weight, @a.v.weight
  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = qkv %1 weight=@a.qkv.weight norm=(@b, @b, 0.00001) layer=0 : [T, 12]
  %3 = attention %2 layer=0 heads=2 head_dim=2 scale=0.5 : [T, 4]
  %4 = linear %3 weight=@t rows=logits : [R, 10]
  logits %4
",
    );
}

#[test]
fn a_product_with_two_users_keeps_its_value() {
    // The bias cannot go into the product: the sum needs the product without it.
    check(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = matmul %1 weight=@w : [T, 4]
  %3 = bias %2 bias=@b : [T, 4]
  %4 = add %2, %3 : [T, 4]
  %5 = select_logit_rows %4 : [R, 4]
  %6 = matmul %5 weight=@t : [R, 10]
  logits %6
",
        "  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = linear %1 weight=@w : [T, 4]
  %3 = bias %2 bias=@b : [T, 4]
  %4 = add %2, %3 : [T, 4]
  %5 = linear %4 weight=@t rows=logits : [R, 10]
  logits %5
",
    );
}

#[test]
fn an_observed_value_is_not_changed() {
    // The hidden state is the product before the residual.
    check(
        "  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@t : [T, 4]
  %2 = matmul %1 weight=@w : [T, 4]
  %3 = add %1, %2 : [T, 4]
  %4 = select_logit_rows %3 : [R, 4]
  %5 = matmul %4 weight=@t : [R, 10]
  hidden %2
  logits %5
",
        "  %0 = token_ids : ids
  %1 = embed %0 tokens=@t : [T, 4]
  %2 = linear %1 weight=@w : [T, 4]
  %3 = add %1, %2 : [T, 4]
  %4 = linear %3 weight=@t rows=logits : [R, 10]
  hidden %2
  logits %4
",
    );
}
