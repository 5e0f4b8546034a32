//! What is printed parses to the same text, and what is no graph is refused with its line.

use crate::SOUND;
use kiln_ir::Graph;
use proptest::prelude::*;

fn refuses(text: &str, message: &str) {
    let error = text.parse::<Graph>().map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), message, "for:\n{text}");
}

/// The sound text with one piece replaced.
fn with(old: &str, new: &str) -> String {
    assert!(SOUND.contains(old), "{old:?} is not in the text");
    SOUND.replacen(old, new, 1)
}

#[test]
fn prints_what_it_parsed() {
    let graph: Graph = SOUND.parse().unwrap();
    assert_eq!(graph.to_string(), SOUND);
    assert_eq!(graph.verify(), Ok(()));
}

#[test]
fn comments_and_blank_lines_are_skipped() {
    let graph: Graph = with("  %0 =", "\n  ; the step's tokens\n  %0 =")
        .parse()
        .unwrap();
    assert_eq!(graph.to_string(), SOUND);
}

#[test]
fn values_that_no_output_needs_are_not_printed() {
    let graph: Graph = with("embed %0 tokens", "embed tokens").parse().unwrap();
    let printed = graph.to_string();
    assert!(!printed.contains("token_ids"), "{printed}");
    assert!(printed.contains("  %1 = embed tokens=@tokens"), "{printed}");
    let again: Graph = printed.parse().unwrap();
    assert!(again.to_string().contains("  %0 = embed tokens=@tokens"));
}

#[test]
fn unfused_operations_print_and_parse() {
    let text = "graph unfused {
  weight @tokens [10, 4] = load \"wte\"
  weight @positions [8, 4] = load \"wpe\"
  weight @w [4, 4] = load \"w\"
  weight @b [4] = load \"b\"
  %0 = token_ids : ids
  %1 = embed_tokens %0 table=@tokens : [T, 4]
  %2 = positions : ids
  %3 = embed_positions %2 table=@positions offset=2 : [T, 4]
  %4 = add %1, %3 : [T, 4]
  %5 = layer_norm %4 norm=(@b, @b, 0.00001) : [T, 4]
  %6 = matmul %5 weight=@w : [T, 4]
  %7 = kv_write %6, %6 layer=0 : kv
  %8 = attention %6, %7 layer=0 heads=1 head_dim=4 scale=0.5 : [T, 4]
  %9 = bias %8 bias=@b : [T, 4]
  %10 = gelu_new %9 : [T, 4]
  %11 = select_logit_rows %10 : [R, 4]
  %12 = matmul %11 weight=@tokens : [R, 10]
  hidden %4
  hidden %10
  logits %12
}
";
    let graph: Graph = text.parse().unwrap();
    assert_eq!(graph.to_string(), text);
    assert_eq!(graph.verify(), Ok(()));
}

#[test]
fn text_that_is_no_graph_is_refused() {
    refuses("", "line 1: the text ends before `}`");
    refuses(
        "module x {",
        "line 1: found \"module\", needed is `graph NAME {`",
    );
    refuses(
        &SOUND.replace("\n}", ""),
        "line 19: the text ends before `}`",
    );
    refuses(
        &with("hidden %1", "hidden %9"),
        "line 17: %9 is not defined",
    );
    refuses(
        &with("embed %0", "embd %0"),
        "line 10: there is no operation \"embd\"",
    );
    refuses(
        &with("tokens=@tokens", "tokens=@token"),
        "line 10: @token is not declared",
    );
    refuses(
        &with("tokens=@tokens", "tokens=@tokens size=3"),
        "line 10: there is no attribute size here",
    );
    refuses(
        &with("layer=0 heads", "heads"),
        "line 12: the attribute layer is missing",
    );
    refuses(
        &with("heads=2", "heads=two"),
        "line 12: found heads=two, needed is a number",
    );
    refuses(
        &with("%1 = embed", "%0 = embed"),
        "line 10: %0 is defined twice",
    );
    refuses(
        &with("weight @q ", "weight @qkv "),
        "line 4: @qkv is declared twice",
    );
    refuses(&with("\"wte\"", "\"wte"), "line 2: a string is not closed");
    refuses(
        &with("[T, 4]", "[S, 4]"),
        "line 10: found \"S\", needed is T or R",
    );
    refuses(
        &with("act=relu", "act=silu"),
        "line 14: there is no activation \"silu\"",
    );
    refuses(
        &with("(_, _, 0.00001)", "(_, 0.00001)"),
        "line 14: found \"(_,0.00001)\", needed is a norm (@weight, @bias, eps)",
    );
    refuses(
        &with("logits %7", "logits %7\n  logits %7"),
        "line 20: the logits are given twice",
    );
    refuses(
        &format!("{SOUND}graph"),
        "line 21: found \"graph\" after `}`",
    );
}

proptest! {
    /// Whatever the text, parsing and verifying end in a value or an error.
    #[test]
    fn mutated_text_never_panics(at in 0..SOUND.len(), length in 0usize..12, insert in "[ -~\n]{0,8}") {
        let end = (at + length).min(SOUND.len());
        let text = format!("{}{insert}{}", &SOUND[..at], &SOUND[end..]);
        if let Ok(graph) = text.parse::<Graph>() {
            let printed = graph.to_string();
            let again = printed.parse::<Graph>().unwrap().to_string();
            // Without values that no output needs, which are left out, numbers stay what they are.
            if graph.verify().is_ok() {
                prop_assert_eq!(again, printed);
            }
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in "(graph|weight|%[0-9]|@a|[ ={}:,\\[\\]().\"\n]|\\PC){0,60}") {
        let _ = text.parse::<Graph>();
    }
}
