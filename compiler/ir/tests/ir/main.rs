//! Tests of the IR: the text form and the verifier.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod text;
mod verify;

/// A small decoder-like graph that verifies.
const SOUND: &str = "graph small {
  weight @tokens [10, 4] = load \"wte\"
  weight @qkv [12, 4] = load \"c_attn\" transposed
  weight @q [4, 4] = load \"c_attn.q\" rows 0..4
  weight @up [8, 4] = load \"fc1\"
  weight @down [4, 8] = load \"fc2\"
  weight @scale [4] = load \"ln.weight\"
  weight @both [8, 4] = concat @q, @q
  %0 = token_ids : ids
  %1 = embed %0 tokens=@tokens : [T, 4]
  %2 = qkv %1 weight=@qkv norm=(@scale, _, 0.00001) layer=0 : [T, 12]
  %3 = attention %2 layer=0 heads=2 head_dim=2 scale=0.70710677 : [T, 4]
  %4 = linear %3, %1 weight=@q : [T, 4]
  %5 = linear %4 weight=@up norm=(_, _, 0.00001) act=relu : [T, 8]
  %6 = linear %5, %4 weight=@down residual_norm=(@scale, @scale, 0.00001) : [T, 4]
  %7 = linear %6 weight=@tokens rows=logits : [R, 10]
  hidden %1
  hidden %6 norm=(@scale, @scale, 0.00001)
  logits %7
}
";
