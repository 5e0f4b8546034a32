//! The graph: nodes, operand edges, weights, outputs.

use crate::{Norm, Op};
use petgraph::{Direction, stable_graph::NodeIndex, stable_graph::StableDiGraph, visit::EdgeRef};
use std::{collections::HashMap, fmt, ops::Range};

/// A value of the graph: the result of one node. Spelled `%12`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

impl ValueId {
    fn index(self) -> NodeIndex {
        NodeIndex::new(self.0 as usize)
    }
}

impl From<NodeIndex> for ValueId {
    fn from(index: NodeIndex) -> ValueId {
        ValueId(index.index() as u32)
    }
}

/// Index of a weight in its graph. Spelled by the weight's name, `@layers.0.ffn.up.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

/// What a row of a value stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// A new token (T of them).
    Tokens,
    /// A row whose logits are asked for (R of them).
    Logits,
}

/// Type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Integers (T).
    Ids,
    /// Floating-point rows.
    Rows {
        /// Meaning of a row.
        rows: Rows,
        /// Elements of a row.
        width: usize,
    },
    /// The fact that a layer's cache holds the new tokens.
    Kv,
}

/// An operation with the type of its result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Type of the result.
    pub ty: Type,
}

/// Where a weight's elements come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// A tensor of the checkpoint, or some rows of it.
    Load {
        /// Name in the checkpoint.
        tensor: String,
        /// The checkpoint holds the transpose (GPT-2's `Conv1D`).
        transposed: bool,
        /// Rows, after transposition; all when absent.
        rows: Option<Range<usize>>,
    },
    /// Other weights one after the other along the first axis.
    Concat(Vec<WeightId>),
}

/// A named constant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Unique in the graph.
    pub name: String,
    /// Dimensions, outermost first: (N, K), (rows, C) or (N).
    pub shape: Vec<usize>,
    /// Where its elements come from.
    pub source: WeightSource,
}

/// An observable value: the embedding output or a layer's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HiddenState {
    /// The value.
    pub value: ValueId,
    /// Still to be applied to each row.
    pub norm: Option<Norm>,
}

/// One decoder step.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Name of the model.
    pub name: String,
    /// The L+1 hidden states.
    pub hidden_states: Vec<HiddenState>,
    /// (R, V); set before verification.
    pub logits: Option<ValueId>,
    weights: Vec<Weight>,
    // Edges run from the producer to the user and carry the operand's position.
    nodes: StableDiGraph<Node, u32>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph {
            name: name.into(),
            ..Graph::default()
        }
    }

    /// Declares a weight.
    pub fn add_weight(&mut self, weight: Weight) -> WeightId {
        self.weights.push(weight);
        WeightId(self.weights.len() as u32 - 1)
    }

    /// A weight.
    ///
    /// # Panics
    /// On an id of another graph.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }

    /// All weights, in the order of declaration.
    pub fn weights(&self) -> impl ExactSizeIterator<Item = (WeightId, &Weight)> {
        self.weights
            .iter()
            .enumerate()
            .map(|(index, weight)| (WeightId(index as u32), weight))
    }

    /// Adds a node with its operands.
    pub fn add(&mut self, op: Op, ty: Type, operands: &[ValueId]) -> ValueId {
        let node = self.nodes.add_node(Node { op, ty });
        for (position, operand) in operands.iter().enumerate() {
            self.nodes.add_edge(operand.index(), node, position as u32);
        }
        node.into()
    }

    /// A node.
    ///
    /// # Panics
    /// On an id that is not in the graph.
    pub fn node(&self, value: ValueId) -> &Node {
        &self.nodes[value.index()]
    }

    /// A node, to be changed in place.
    ///
    /// # Panics
    /// On an id that is not in the graph.
    pub fn node_mut(&mut self, value: ValueId) -> &mut Node {
        &mut self.nodes[value.index()]
    }

    /// All values by rising id.
    pub fn values(&self) -> Vec<ValueId> {
        self.nodes.node_indices().map(ValueId::from).collect()
    }

    /// Operands of a node, in order.
    pub fn operands(&self, value: ValueId) -> Vec<ValueId> {
        let mut operands: Vec<(u32, ValueId)> = self
            .nodes
            .edges_directed(value.index(), Direction::Incoming)
            .map(|edge| (*edge.weight(), edge.source().into()))
            .collect();
        operands.sort_unstable();
        operands.into_iter().map(|(_, operand)| operand).collect()
    }

    /// Users of a value with the operand position at which they use it, by rising id.
    pub fn users(&self, value: ValueId) -> Vec<(ValueId, usize)> {
        let mut users: Vec<(ValueId, usize)> = self
            .nodes
            .edges_directed(value.index(), Direction::Outgoing)
            .map(|edge| (edge.target().into(), *edge.weight() as usize))
            .collect();
        users.sort_unstable();
        users
    }

    /// Whether a value is an output of the graph.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.logits == Some(value) || self.hidden_states.iter().any(|state| state.value == value)
    }

    /// The only user of a value that is no output.
    pub fn only_user(&self, value: ValueId) -> Option<ValueId> {
        match self.users(value)[..] {
            [(user, _)] if !self.is_output(value) => Some(user),
            _ => None,
        }
    }

    /// Appends an operand to a node.
    pub fn push_operand(&mut self, user: ValueId, operand: ValueId) {
        let position = self.operands(user).len() as u32;
        self.nodes.add_edge(operand.index(), user.index(), position);
    }

    /// Lets every user and output of `old` use `new` instead, then removes `old`.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        for (user, position) in self.users(old) {
            if user != new {
                self.nodes
                    .add_edge(new.index(), user.index(), position as u32);
            }
        }
        for state in &mut self.hidden_states {
            if state.value == old {
                state.value = new;
            }
        }
        if self.logits == Some(old) {
            self.logits = Some(new);
        }
        self.nodes.remove_node(old.index());
    }

    /// Values that the outputs need, producers before users; `None` if the graph has a cycle.
    pub fn schedule(&self) -> Option<Vec<ValueId>> {
        // Depth first from the outputs in order, operands in order: the order in which a person
        // would write the program, and the same for equal graphs.
        #[derive(Clone, Copy, PartialEq)]
        enum State {
            Open,
            Done,
        }
        let outputs = self
            .hidden_states
            .iter()
            .map(|state| state.value)
            .chain(self.logits);
        let mut order = Vec::with_capacity(self.nodes.node_count());
        let mut states = HashMap::new();
        for output in outputs {
            let mut stack = vec![output];
            while let Some(&value) = stack.last() {
                match states.get(&value) {
                    Some(State::Done) => {
                        stack.pop();
                    }
                    Some(State::Open) => {
                        states.insert(value, State::Done);
                        order.push(value);
                        stack.pop();
                    }
                    None => {
                        states.insert(value, State::Open);
                        for operand in self.operands(value).into_iter().rev() {
                            match states.get(&operand) {
                                None => stack.push(operand),
                                Some(State::Open) => return None,
                                Some(State::Done) => {}
                            }
                        }
                    }
                }
            }
        }
        Some(order)
    }

    /// The same graph with values numbered in the order of [`Graph::schedule`] and nothing else
    /// in it; `None` if the graph has a cycle.
    pub fn compact(&self) -> Option<Graph> {
        let mut compact = Graph {
            name: self.name.clone(),
            weights: self.weights.clone(),
            ..Graph::default()
        };
        let mut renumbered = HashMap::new();
        for value in self.schedule()? {
            let operands: Vec<ValueId> = self
                .operands(value)
                .iter()
                .map(|operand| renumbered[operand])
                .collect();
            let node = self.node(value);
            renumbered.insert(value, compact.add(node.op, node.ty, &operands));
        }
        compact.hidden_states = self
            .hidden_states
            .iter()
            .map(|state| HiddenState {
                value: renumbered[&state.value],
                ..*state
            })
            .collect();
        compact.logits = self.logits.map(|logits| renumbered[&logits]);
        Some(compact)
    }
}
