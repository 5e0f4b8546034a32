//! Each rule of the specification, broken.

use crate::SOUND;
use kiln_ir::Graph;

/// The sound graph with one piece of its text replaced must break the rule with this message.
fn breaks(old: &str, new: &str, message: &str) {
    assert!(SOUND.contains(old), "{old:?} is not in the text");
    let graph: Graph = SOUND.replacen(old, new, 1).parse().unwrap();
    assert_eq!(graph.verify().unwrap_err().to_string(), message);
}

#[test]
fn weights() {
    breaks(
        "[4, 8]",
        "[4, 0]",
        "@down: its shape is [4, 0]; one or two dimensions above zero are needed",
    );
    breaks(
        "[4] = load \"ln.weight\"",
        "[4] = load \"ln.weight\" transposed",
        "@scale: only matrices can be transposed",
    );
    breaks(
        "rows 0..4",
        "rows 0..3",
        "@q: it takes rows 0..3, but its first dimension is 4",
    );
    breaks(
        "concat @q, @q",
        "concat @q",
        "@both: a concatenation needs two or more weights declared before it",
    );
    breaks(
        "concat @q, @q",
        "concat @q, @down",
        "@both: its part @down has shape [4, 8], its own is [8, 4]",
    );
    breaks(
        "concat @q, @q",
        "concat @q, @up",
        "@both: its parts have 12 rows, its shape is [8, 4]",
    );
}

#[test]
fn types() {
    breaks(
        ": [T, 8]",
        ": [T, 9]",
        "%5: its type is [T, 9], its operation gives [T, 8]",
    );
    breaks(
        "%4 weight=@down",
        "%4 weight=@q",
        "%6: @q of shape [4, 4] does not take 8 inputs",
    );
    breaks(
        "linear %5, %4",
        "linear %5, %5",
        "%6: its input is [T, 8], its residual [T, 8], its result [T, 4]",
    );
    breaks(
        "linear %5, %4",
        "linear %5",
        "%6: it has a residual_norm and no residual",
    );
    breaks(
        "heads=2",
        "heads=3",
        "%3: 3 heads of 2 do not make the width 4",
    );
    breaks(
        "attention %2 layer=0",
        "attention %2 layer=1",
        "%3: its operands ([T, 12]) are neither q and the kv_write of layer 1 nor its qkv",
    );
    breaks(
        "norm=(@scale, _, 0.00001)",
        "norm=(@scale, _, -1)",
        "%2: eps is -1",
    );
    breaks(
        "(_, _, 0.00001) act",
        "(@qkv, _, 0.00001) act",
        "%5: @qkv has shape [12, 4], needed is [4]",
    );
    breaks(
        "embed %0 tokens=@tokens",
        "embed %0, %0 tokens=@tokens",
        "%1: it has 1 tables and operands (ids, ids)",
    );
    breaks("scale=0.70710677", "scale=inf", "%3: scale is inf");
}

#[test]
fn outputs() {
    breaks("  logits %7\n", "", "%7: no output needs it");
    breaks("logits %7", "logits %6", "%7: no output needs it");
    breaks(
        " rows=logits : [R, 10]",
        " : [T, 10]",
        "outputs: the logits %7 are [T, 10], not [R, V]",
    );
    breaks(
        "hidden %1\n",
        "hidden %5\n",
        "outputs: the hidden states differ in width",
    );
}

#[test]
fn cache_is_written_once_a_layer() {
    let text = SOUND
        .replace("%4 = linear %3, %1", "%8 = qkv %3 weight=@qkv layer=0 : [T, 12]\n  %9 = attention %8 layer=0 heads=2 head_dim=2 scale=1 : [T, 4]\n  %4 = linear %9, %1");
    let graph: Graph = text.parse().unwrap();
    assert_eq!(
        graph.verify().unwrap_err().to_string(),
        "%4: layer 0 of the cache is written twice"
    );
}
