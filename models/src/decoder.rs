//! The decoder graph that OPT and GPT-2 share; what differs is in [`ModelConfig`] and in the names
//! of the checkpoint's tensors.

use crate::{Architecture, ModelConfig, NormPlacement, gpt2, opt};
use kiln_ir::{Graph, HiddenState, Norm, Op, Rows, Type, ValueId, Weight, WeightId, WeightSource};
use std::fmt;

/// A role that a tensor has in the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// (V, E), E being C unless the model projects.
    TokenTable,
    /// (positions + offset, C).
    PositionTable,
    /// (C, E).
    ProjectIn,
    /// (E, C).
    ProjectOut,
    /// The norm after the last layer.
    FinalNorm(Param),
    /// (V, E), where it is not the token table.
    Head,
    /// A part of a layer.
    Layer(usize, Part, Param),
}

/// A parameterised part of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    FfnNorm,
    Up,
    Down,
}

/// Weight or bias of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Param {
    Weight,
    Bias,
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Param::Weight => "weight",
            Param::Bias => "bias",
        })
    }
}

/// kiln's own name of a tensor, the same for every architecture.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::TokenTable => write!(f, "embed.tokens"),
            Role::PositionTable => write!(f, "embed.positions"),
            Role::ProjectIn => write!(f, "project_in.weight"),
            Role::ProjectOut => write!(f, "project_out.weight"),
            Role::FinalNorm(param) => write!(f, "final_norm.{param}"),
            Role::Head => write!(f, "head.weight"),
            Role::Layer(layer, part, param) => {
                let part = match part {
                    Part::AttentionNorm => "attention.norm",
                    Part::Query => "attention.q",
                    Part::Key => "attention.k",
                    Part::Value => "attention.v",
                    Part::Output => "attention.out",
                    Part::FfnNorm => "ffn.norm",
                    Part::Up => "ffn.up",
                    Part::Down => "ffn.down",
                };
                write!(f, "layers.{layer}.{part}.{param}")
            }
        }
    }
}

/// The graph of one decoder step, unfused.
pub fn build(config: &ModelConfig) -> Graph {
    let mut decoder = Decoder {
        config,
        graph: Graph::new(config.architecture.model_type()),
    };
    let (mut x, token_table) = decoder.embedding();
    decoder.hidden_state(x);
    for layer in 0..config.layers {
        x = decoder.attention_block(layer, x);
        x = decoder.ffn_block(layer, x);
        decoder.hidden_state(x);
    }
    decoder.head(x, token_table);
    decoder.graph
}

struct Decoder<'a> {
    config: &'a ModelConfig,
    graph: Graph,
}

impl Decoder<'_> {
    fn embedding(&mut self) -> (ValueId, WeightId) {
        let config = self.config;
        let ids = self.graph.add(Op::TokenIds, Type::Ids, &[]);
        let table = self.weight(Role::TokenTable, &[config.vocab_size, config.embed_size]);
        let mut tokens = self.add(Op::EmbedTokens { table }, config.embed_size, &[ids]);
        if config.has_projections() {
            tokens = self.matmul(
                Role::ProjectIn,
                tokens,
                config.embed_size,
                config.hidden_size,
            );
        }
        let positions = self.graph.add(Op::Positions, Type::Ids, &[]);
        let rows = config.position_rows();
        let offset = config.position_offset as u32;
        let position_table = self.weight(Role::PositionTable, &[rows, config.hidden_size]);
        let op = Op::EmbedPositions {
            table: position_table,
            offset,
        };
        let positions = self.add(op, config.hidden_size, &[positions]);
        (
            self.add(Op::Add, config.hidden_size, &[positions, tokens]),
            table,
        )
    }

    fn attention_block(&mut self, layer: usize, x: ValueId) -> ValueId {
        let c = self.config.hidden_size;
        self.residual_block(layer, Part::AttentionNorm, x, |decoder, h| {
            let [q, k, v] = [Part::Query, Part::Key, Part::Value]
                .map(|part| decoder.linear(layer, part, h, c, c));
            let layer_id = layer as u32;
            let kv = decoder
                .graph
                .add(Op::KvWrite { layer: layer_id }, Type::Kv, &[k, v]);
            let op = Op::Attention {
                layer: layer_id,
                heads: decoder.config.heads as u32,
                head_dim: decoder.config.head_dim() as u32,
                scale: decoder.config.layer_attention_scale(layer),
            };
            let attended = decoder.add(op, c, &[q, kv]);
            decoder.linear(layer, Part::Output, attended, c, c)
        })
    }

    fn ffn_block(&mut self, layer: usize, x: ValueId) -> ValueId {
        let (c, f) = (self.config.hidden_size, self.config.ffn_size);
        self.residual_block(layer, Part::FfnNorm, x, |decoder, h| {
            let up = decoder.linear(layer, Part::Up, h, c, f);
            let up = decoder.add(Op::Activation(decoder.config.activation), f, &[up]);
            decoder.linear(layer, Part::Down, up, f, c)
        })
    }

    /// `x + branch(norm(x))`, or `norm(x + branch(x))` in post-norm models.
    fn residual_block(
        &mut self,
        layer: usize,
        norm: Part,
        x: ValueId,
        branch: impl FnOnce(&mut Self, ValueId) -> ValueId,
    ) -> ValueId {
        let c = self.config.hidden_size;
        let norm = move |param| Role::Layer(layer, norm, param);
        match self.config.norm_placement {
            NormPlacement::Pre => {
                let h = self.layer_norm(norm, x);
                let out = branch(self, h);
                self.add(Op::Add, c, &[x, out])
            }
            NormPlacement::Post => {
                let out = branch(self, x);
                let sum = self.add(Op::Add, c, &[x, out]);
                self.layer_norm(norm, sum)
            }
        }
    }

    fn head(&mut self, mut x: ValueId, token_table: WeightId) {
        let config = self.config;
        if config.final_norm {
            x = self.layer_norm(Role::FinalNorm, x);
        }
        let (c, e) = (config.hidden_size, config.embed_size);
        let selected = |width| Type::Rows {
            rows: Rows::Logits,
            width,
        };
        x = self.graph.add(Op::SelectLogitRows, selected(c), &[x]);
        if config.has_projections() {
            let weight = self.weight(Role::ProjectOut, &[e, c]);
            x = self.graph.add(Op::Matmul { weight }, selected(e), &[x]);
        }
        let weight = match config.tied_head {
            true => token_table,
            false => self.weight(Role::Head, &[config.vocab_size, e]),
        };
        let logits = self
            .graph
            .add(Op::Matmul { weight }, selected(config.vocab_size), &[x]);
        self.graph.logits = Some(logits);
    }

    fn hidden_state(&mut self, value: ValueId) {
        self.graph
            .hidden_states
            .push(HiddenState { value, norm: None });
    }

    fn layer_norm(&mut self, role: impl Fn(Param) -> Role, x: ValueId) -> ValueId {
        let c = self.config.hidden_size;
        let [weight, bias] = [Param::Weight, Param::Bias].map(|param| {
            self.config
                .norm_affine
                .then(|| self.weight(role(param), &[c]))
        });
        self.add(
            Op::LayerNorm(Norm {
                weight,
                bias,
                eps: self.config.norm_eps,
            }),
            c,
            &[x],
        )
    }

    fn linear(
        &mut self,
        layer: usize,
        part: Part,
        x: ValueId,
        inputs: usize,
        outputs: usize,
    ) -> ValueId {
        let role = |param| Role::Layer(layer, part, param);
        let product = self.matmul(role(Param::Weight), x, inputs, outputs);
        if !self.config.linear_bias {
            return product;
        }
        let bias = self.weight(role(Param::Bias), &[outputs]);
        self.add(Op::Bias { bias }, outputs, &[product])
    }

    fn matmul(&mut self, role: Role, x: ValueId, inputs: usize, outputs: usize) -> ValueId {
        let weight = self.weight(role, &[outputs, inputs]);
        self.add(Op::Matmul { weight }, outputs, &[x])
    }

    /// A node with rows of new tokens.
    fn add(&mut self, op: Op, width: usize, operands: &[ValueId]) -> ValueId {
        self.graph.add(
            op,
            Type::Rows {
                rows: Rows::Tokens,
                width,
            },
            operands,
        )
    }

    fn weight(&mut self, role: Role, shape: &[usize]) -> WeightId {
        let source: WeightSource = match self.config.architecture {
            Architecture::Opt => opt::source(role),
            Architecture::Gpt2 => gpt2::source(role, self.config),
        };
        self.graph.add_weight(Weight {
            name: role.to_string(),
            shape: shape.to_vec(),
            source,
        })
    }
}
