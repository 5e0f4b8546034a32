//! Fused graph to kernels: every node becomes one [`KernelSpec`], every value one buffer.
//!
//! The buckets of a phase share the kernels and differ in bounds and memory plan.

use kiln_bundle::{
    Activation, Buffer, BufferId, DType, KernelSpec, Linear, Norm, Phase, Program, Residual,
    RowKind, Rows, Tap,
};
use kiln_ir::{Graph, Op, Type, ValueId, WeightId};
use std::collections::{HashMap, HashSet};

/// A graph that has no place in the fused vocabulary: a pattern that `fuse` does not know.
#[derive(Debug, thiserror::Error)]
pub enum SpecialiseError {
    /// An operation that no kernel computes alone.
    #[error("{value} is a {op}, which no kernel computes; fuse left it over")]
    Unfused {
        /// The node.
        value: ValueId,
        /// Its operation.
        op: &'static str,
    },
    /// A graph that the verifier would refuse.
    #[error("the graph is not sound: {0}")]
    Unsound(&'static str),
}

/// The kernels of one phase, with activations of type `activations`.
///
/// Whatever that type, logits and the residual stream are f32: the rows that layers add to and that
/// norms read. A sum of many layers is where 16 bits would cost accuracy, and its rows are few beside
/// the weights.
///
/// # Errors
/// An operation that is not in the fused vocabulary.
pub fn specialise(
    graph: &Graph,
    phase: Phase,
    activations: DType,
) -> Result<Program, SpecialiseError> {
    let order = graph
        .schedule()
        .ok_or(SpecialiseError::Unsound("it has a cycle"))?;
    let mut lowering = Lowering {
        graph,
        buffers: vec![],
        kernels: vec![],
        of_value: HashMap::new(),
    };
    for value in order {
        lowering.node(value)?;
    }
    let logits = graph
        .logits
        .ok_or(SpecialiseError::Unsound("it has no logits"))?;
    let (logits, _) = lowering.of_value[&logits];
    lowering.kernels.push(KernelSpec::Sample { logits });
    let hidden_states = graph
        .hidden_states
        .iter()
        .map(|state| {
            let (buffer, after_kernel) = lowering.of_value[&state.value];
            Tap {
                after_kernel,
                buffer,
                norm: state.norm.map(|norm| lowering.norm(norm)),
            }
        })
        .collect();
    let name = match (phase, graph.hidden_states.is_empty()) {
        (Phase::Prefill, false) => format!("{}-hidden", phase.name()),
        _ => phase.name().to_owned(),
    };
    let mut program = Program {
        name,
        buffers: lowering.buffers,
        kernels: lowering.kernels,
        logits,
        hidden_states,
    };
    let wide = f32_buffers(&program);
    for (id, buffer) in (0..).map(BufferId).zip(&mut program.buffers) {
        if !wide.contains(&id) {
            buffer.dtype = activations;
        }
    }
    Ok(program)
}

/// The logits, the hidden states, and all that is added to or read by a norm.
fn f32_buffers(program: &Program) -> HashSet<BufferId> {
    let taps = program.hidden_states.iter().map(|tap| tap.buffer);
    let mut wide: HashSet<BufferId> = taps.chain([program.logits]).collect();
    for linear in program.kernels.iter().filter_map(KernelSpec::linear) {
        if linear.norm.is_some() {
            wide.insert(linear.input);
        }
        if let Some(residual) = &linear.residual {
            wide.extend([residual.buffer, linear.out]);
        }
    }
    wide
}

struct Lowering<'a> {
    graph: &'a Graph,
    buffers: Vec<Buffer>,
    kernels: Vec<KernelSpec>,
    /// Buffer of a value and index of the kernel that writes it.
    of_value: HashMap<ValueId, (BufferId, u32)>,
}

impl Lowering<'_> {
    fn node(&mut self, value: ValueId) -> Result<(), SpecialiseError> {
        let node = self.graph.node(value);
        let operands = self.graph.operands(value);
        let kernel = match node.op {
            // The step brings them; no kernel computes them.
            Op::TokenIds | Op::Positions => return Ok(()),
            Op::Embed { tokens, positions } => KernelSpec::Embed {
                tokens: tokens.map(|table| self.weight(table)),
                positions: positions.map(|(table, _)| self.weight(table)),
                position_offset: positions.map_or(0, |(_, offset)| offset),
                out: self.buffer(value)?,
            },
            Op::Linear(linear) => KernelSpec::Linear(self.linear(value, &linear, &operands)?),
            Op::Qkv { linear, layer } => KernelSpec::Qkv {
                linear: self.linear(value, &linear, &operands)?,
                layer,
            },
            Op::Attention {
                layer,
                heads,
                head_dim,
                scale,
            } if operands.len() == 1 => {
                let q = self.of_value[&operands[0]].0;
                KernelSpec::Attention {
                    q,
                    layer,
                    heads,
                    head_dim,
                    scale,
                    out: self.buffer(value)?,
                }
            }
            op => {
                return Err(SpecialiseError::Unfused {
                    value,
                    op: op.name(),
                });
            }
        };
        self.kernels.push(kernel);
        Ok(())
    }

    /// The buffer that the next kernel writes for a value.
    fn buffer(&mut self, value: ValueId) -> Result<BufferId, SpecialiseError> {
        let (rows, width) = self.rows(value)?;
        let id = BufferId(self.buffers.len() as u32);
        self.buffers.push(Buffer {
            rows,
            width,
            dtype: DType::F32,
        });
        self.of_value.insert(value, (id, self.kernels.len() as u32));
        Ok(id)
    }

    fn rows(&self, value: ValueId) -> Result<(RowKind, u32), SpecialiseError> {
        let Type::Rows { rows, width } = self.graph.node(value).ty else {
            return Err(SpecialiseError::Unsound(
                "a kernel's operand is no activation",
            ));
        };
        let rows = match rows {
            kiln_ir::Rows::Tokens => RowKind::Tokens,
            kiln_ir::Rows::Logits => RowKind::Logits,
        };
        Ok((rows, width as u32))
    }

    fn linear(
        &mut self,
        value: ValueId,
        linear: &kiln_ir::Linear,
        operands: &[ValueId],
    ) -> Result<Linear, SpecialiseError> {
        let (_, in_features) = self.rows(operands[0])?;
        let (_, out_features) = self.rows(value)?;
        let residual = operands.get(1).map(|operand| Residual {
            buffer: self.of_value[operand].0,
            norm: linear.residual_norm.map(|norm| self.norm(norm)),
        });
        Ok(Linear {
            input: self.of_value[&operands[0]].0,
            norm: linear.norm.map(|norm| self.norm(norm)),
            rows: match linear.rows {
                kiln_ir::Rows::Tokens => Rows::All,
                kiln_ir::Rows::Logits => Rows::Logits,
            },
            weight: self.weight(linear.weight),
            bias: linear.bias.map(|bias| self.weight(bias)),
            activation: linear.activation.map(|activation| match activation {
                kiln_ir::Activation::Relu => Activation::Relu,
                kiln_ir::Activation::GeluNew => Activation::GeluNew,
            }),
            residual,
            in_features,
            out_features,
            out: self.buffer(value)?,
        })
    }

    fn norm(&self, norm: kiln_ir::Norm) -> Norm {
        Norm {
            weight: norm.weight.map(|weight| self.weight(weight)),
            bias: norm.bias.map(|bias| self.weight(bias)),
            eps: norm.eps,
        }
    }

    fn weight(&self, id: WeightId) -> String {
        self.graph.weight(id).name.clone()
    }
}
