//! Merges operations until every node is one kernel.
//!
//! ```text
//! %2 = layer_norm %1 norm=N            %2 = linear %1 weight=@w norm=N bias=@b act=relu
//! %3 = matmul %2 weight=@w        =>   %3 = linear %2 weight=@v residual %1
//! %4 = bias %3 bias=@b
//! %5 = relu %4
//! %6 = matmul %5 weight=@v
//! %7 = add %1, %6
//! ```
//!
//! It pays because a step at batch 1 is a chain of short phases: each that goes away saves its
//! launch and the trip of its activations through memory. A pre-norm layer of some twenty
//! operations becomes five kernels; so does a post-norm layer, since a norm disappears into *all*
//! its users: into the prologue of linears that read it and into the epilogue of those that add it.

use kiln_ir::{Graph, Linear, Norm, Op, Rows, Type, ValueId, Weight, WeightId, WeightSource};
use std::collections::BTreeMap;

/// Fuses the whole graph.
pub fn fuse(mut graph: Graph) -> Graph {
    turn_matmuls_into_linears(&mut graph);
    // Bias, activation, residual: the order in which the epilogue applies them.
    fold_biases(&mut graph);
    fold_activations(&mut graph);
    merge_embeddings(&mut graph);
    fold_residuals(&mut graph);
    // Selections stand between norms and linears, so they go first.
    fold_row_selection(&mut graph);
    fold_norms(&mut graph);
    // Last: q, k and v agree in everything that was folded into them.
    merge_qkv(&mut graph);
    // What was merged into a new node is no longer needed and stays behind.
    graph.compact().unwrap_or(graph)
}

fn turn_matmuls_into_linears(graph: &mut Graph) {
    for value in graph.values() {
        if let Op::Matmul { weight } = graph.node(value).op {
            graph.node_mut(value).op = Op::Linear(Linear::new(weight));
        }
    }
}

/// The linear behind `operand` when `user` is all that uses it and nothing follows its product yet.
fn open_linear(graph: &Graph, user: ValueId, operand: ValueId) -> Option<Linear> {
    match graph.node(operand).op {
        Op::Linear(linear)
            if graph.only_user(operand) == Some(user) && graph.operands(operand).len() == 1 =>
        {
            Some(linear)
        }
        _ => None,
    }
}

fn fold_biases(graph: &mut Graph) {
    for value in graph.values() {
        let Op::Bias { bias } = graph.node(value).op else {
            continue;
        };
        let product = graph.operands(value)[0];
        match open_linear(graph, value, product) {
            Some(linear) if linear.bias.is_none() && linear.activation.is_none() => {
                graph.node_mut(product).op = Op::Linear(Linear {
                    bias: Some(bias),
                    ..linear
                });
                graph.replace(value, product);
            }
            _ => {}
        }
    }
}

fn fold_activations(graph: &mut Graph) {
    for value in graph.values() {
        let Op::Activation(activation) = graph.node(value).op else {
            continue;
        };
        let product = graph.operands(value)[0];
        match open_linear(graph, value, product) {
            Some(linear) if linear.activation.is_none() => {
                graph.node_mut(product).op = Op::Linear(Linear {
                    activation: Some(activation),
                    ..linear
                });
                graph.replace(value, product);
            }
            _ => {}
        }
    }
}

/// `add(embed_positions, embed_tokens)` becomes one `embed`; a lone table becomes an `embed` too.
fn merge_embeddings(graph: &mut Graph) {
    for value in graph.values() {
        if graph.node(value).op != Op::Add {
            continue;
        }
        let mut sides = graph.operands(value);
        sides.sort_by_key(|&side| matches!(graph.node(side).op, Op::EmbedPositions { .. }));
        let [first, second] = [sides[0], sides[1]];
        let (
            Op::EmbedTokens { table },
            Op::EmbedPositions {
                table: rows,
                offset,
            },
        ) = (graph.node(first).op, graph.node(second).op)
        else {
            continue;
        };
        if graph.only_user(first) != Some(value) || graph.only_user(second) != Some(value) {
            continue;
        }
        let operands = [graph.operands(first)[0], graph.operands(second)[0]];
        let op = Op::Embed {
            tokens: Some(table),
            positions: Some((rows, offset)),
        };
        let embed = graph.add(op, graph.node(value).ty, &operands);
        graph.replace(value, embed);
    }
    for value in graph.values() {
        let op = &mut graph.node_mut(value).op;
        match *op {
            Op::EmbedTokens { table } => {
                *op = Op::Embed {
                    tokens: Some(table),
                    positions: None,
                }
            }
            Op::EmbedPositions { table, offset } => {
                *op = Op::Embed {
                    tokens: None,
                    positions: Some((table, offset)),
                };
            }
            _ => {}
        }
    }
}

fn fold_residuals(graph: &mut Graph) {
    for value in graph.values() {
        if graph.node(value).op != Op::Add {
            continue;
        }
        // The branch stands second in the models; either side will do.
        let sides = graph.operands(value);
        let Some(branch) = [1, 0]
            .into_iter()
            .find(|&side| open_linear(graph, value, sides[side]).is_some())
        else {
            continue;
        };
        let (product, residual) = (sides[branch], sides[1 - branch]);
        graph.push_operand(product, residual);
        graph.replace(value, product);
    }
}

/// A linear selects the rows of its operands itself, where it has no operand but selections that are its own.
fn fold_row_selection(graph: &mut Graph) {
    for user in graph.values() {
        let Op::Linear(linear) = graph.node(user).op else {
            continue;
        };
        let operands = graph.operands(user);
        let is_its_own = |&operand: &ValueId| {
            graph.node(operand).op == Op::SelectLogitRows && graph.only_user(operand) == Some(user)
        };
        if !operands.iter().all(is_its_own) {
            continue;
        }
        graph.node_mut(user).op = Op::Linear(Linear {
            rows: Rows::Logits,
            ..linear
        });
        for selection in operands {
            let all = graph.operands(selection)[0];
            graph.replace(selection, all);
        }
    }
}

/// A norm goes when all its users can apply it themselves.
fn fold_norms(graph: &mut Graph) {
    for value in graph.values() {
        let Op::LayerNorm(norm) = graph.node(value).op else {
            continue;
        };
        if graph.logits == Some(value) {
            continue;
        }
        let mut users = graph.users(value).into_iter();
        let absorbed = users.try_fold(BTreeMap::new(), |mut ops, (user, position)| {
            // A user may read the value at both its operands.
            let op = ops.get(&user).copied().unwrap_or(graph.node(user).op);
            ops.insert(user, absorb(op, position, norm)?);
            Some(ops)
        });
        let Some(absorbed) = absorbed else { continue };
        for (user, op) in absorbed {
            graph.node_mut(user).op = op;
        }
        for state in graph
            .hidden_states
            .iter_mut()
            .filter(|state| state.value == value)
        {
            state.norm = Some(norm);
        }
        let input = graph.operands(value)[0];
        graph.replace(value, input);
    }
}

/// The user with the norm inside, if it has room for it at that operand.
fn absorb(user: Op, position: usize, norm: Norm) -> Option<Op> {
    match (user, position) {
        (Op::Linear(linear), 0) if linear.norm.is_none() => Some(Op::Linear(Linear {
            norm: Some(norm),
            ..linear
        })),
        (Op::Linear(linear), 1) if linear.residual_norm.is_none() => Some(Op::Linear(Linear {
            residual_norm: Some(norm),
            ..linear
        })),
        _ => None,
    }
}

/// `attention(q, kv_write(k, v))` of three linears over one input becomes `attention(qkv)`.
fn merge_qkv(graph: &mut Graph) {
    for attention in graph.values() {
        let Op::Attention { layer, .. } = graph.node(attention).op else {
            continue;
        };
        let [q, kv] = graph.operands(attention)[..] else {
            continue;
        };
        let [k, v] = graph.operands(kv)[..] else {
            continue;
        };
        let parts = [q, k, v].map(|part| (part, graph.node(part)));
        let linears = parts.map(|(part, node)| match node.op {
            Op::Linear(linear) if graph.users(part).len() == 1 && !graph.is_output(part) => {
                Some(linear)
            }
            _ => None,
        });
        let [Some(lq), Some(lk), Some(lv)] = linears else {
            continue;
        };
        let plain = |linear: Linear| Linear {
            weight: lq.weight,
            bias: None,
            ..linear
        };
        let alike = plain(lq) == plain(lk) && plain(lq) == plain(lv);
        let input = graph.operands(q);
        let same_input =
            input.len() == 1 && graph.operands(k) == input && graph.operands(v) == input;
        let bare = lq.activation.is_none() && lq.rows == Rows::Tokens;
        let Type::Rows { width, .. } = graph.node(q).ty else {
            continue;
        };
        if !(alike && same_input && bare) {
            continue;
        }
        let biases = match [lq.bias, lk.bias, lv.bias] {
            [Some(q), Some(k), Some(v)] => Some([q, k, v]),
            [None, None, None] => None,
            _ => continue,
        };
        let weight = concat(graph, [lq.weight, lk.weight, lv.weight]);
        let bias = biases.map(|biases| concat(graph, biases));
        let linear = Linear { weight, bias, ..lq };
        let ty = Type::Rows {
            rows: Rows::Tokens,
            width: 3 * width,
        };
        let qkv = graph.add(Op::Qkv { linear, layer }, ty, &input);
        let merged = graph.add(graph.node(attention).op, graph.node(attention).ty, &[qkv]);
        graph.replace(attention, merged);
    }
}

/// Declares the concatenation of q, k and v, named after q: `attention.q.weight` gives
/// `attention.qkv.weight`.
fn concat(graph: &mut Graph, parts: [WeightId; 3]) -> WeightId {
    let q = graph.weight(parts[0]);
    let name = match q.name.rsplit_once(".q.") {
        Some((before, after)) => format!("{before}.qkv.{after}"),
        None => format!("{}.qkv", q.name),
    };
    let mut shape = q.shape.clone();
    shape[0] = parts.iter().map(|&part| graph.weight(part).shape[0]).sum();
    graph.add_weight(Weight {
        name,
        shape,
        source: WeightSource::Concat(parts.to_vec()),
    })
}
