//! Computes only the rows that the outputs need.
//!
//! ```text
//! %5 = linear %4 ..  : [T, C]             %5 = select_logit_rows %4 : [R, C]
//! %6 = add %1, %5    : [T, C]             %6 = select_logit_rows %1 : [R, C]
//! %7 = layer_norm %6 : [T, C]        =>   %7 = linear %5 ..  : [R, C]
//! %8 = select_logit_rows %7 : [R, C]      %8 = add %6, %7    : [R, C]
//!                                         %9 = layer_norm %8 : [R, C]
//! ```
//!
//! A selection of rows and an operation that computes each row by itself may change places. So the selection
//! before the LM head moves up, past the last layer's feed-forward network and the projection of its
//! attention, to the attention: what positions leave for others is in the cache by then. Of a prompt of T tokens
//! that is all of this for T - 1 rows, some two thirds of the last layer's work.

use kiln_ir::{Graph, Op, Rows, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// Moves the selection of logit rows as far up as rows are computed by themselves and nothing else needs them.
pub fn select_early(mut graph: Graph) -> Graph {
    let Some(order) = graph.schedule() else {
        return graph;
    };
    let whole = needed_whole(&graph, &order);
    let mut selected = HashMap::new();
    for value in order {
        let node = *graph.node(value);
        let operands = graph.operands(value);
        if node.op == Op::SelectLogitRows {
            let rows = selection(&mut graph, &mut selected, operands[0]);
            graph.replace(value, rows);
        } else if let Type::Rows {
            rows: Rows::Tokens,
            width,
        } = node.ty
            && is_by_row(&node.op)
            && !whole.contains(&value)
        {
            let rows = Type::Rows {
                rows: Rows::Logits,
                width,
            };
            let operands: Vec<ValueId> = operands
                .into_iter()
                .map(|operand| selection(&mut graph, &mut selected, operand))
                .collect();
            let rows = graph.add(node.op, rows, &operands);
            selected.insert(value, rows);
        }
    }
    // What only rows that are left out needed stays behind.
    graph.compact().unwrap_or(graph)
}

/// Values of which an output needs every row.
fn needed_whole(graph: &Graph, order: &[ValueId]) -> HashSet<ValueId> {
    let mut whole = HashSet::new();
    for &value in order.iter().rev() {
        let needs_all = |(user, _): (ValueId, usize)| match graph.node(user).op {
            Op::SelectLogitRows => false,
            op => !is_by_row(&op) || whole.contains(&user),
        };
        if graph.is_output(value) || graph.users(value).into_iter().any(needs_all) {
            whole.insert(value);
        }
    }
    whole
}

/// Whether a row of the result depends on that row of the operands alone.
fn is_by_row(op: &Op) -> bool {
    matches!(
        op,
        Op::Matmul { .. } | Op::Bias { .. } | Op::Activation(_) | Op::Add | Op::LayerNorm(_)
    )
}

/// The logit rows of a value, selected here unless they are there.
fn selection(
    graph: &mut Graph,
    selected: &mut HashMap<ValueId, ValueId>,
    value: ValueId,
) -> ValueId {
    *selected.entry(value).or_insert_with(|| {
        let mut ty = graph.node(value).ty;
        if let Type::Rows { rows, .. } = &mut ty {
            *rows = Rows::Logits;
        }
        graph.add(Op::SelectLogitRows, ty, &[value])
    })
}
