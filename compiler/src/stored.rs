//! A model's weights as the bundle stores them.

use crate::{ElementTypes, IntRows, integers};
use kiln_bundle::{IntFormat, WeightFormat};
use kiln_ir::{DType, Graph, Op, WeightId, WeightSource};
use kiln_models::{WeightError, Weights};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

/// The weights of a graph, and what each is rounded to.
pub struct Stored<'a> {
    graph: &'a Graph,
    weights: &'a Weights,
    types: &'a ElementTypes,
    /// The LM head, and the token table, which mostly is the same.
    heads: HashSet<WeightId>,
    position_tables: HashSet<WeightId>,
    calibrated: Calibrated,
}

/// Matrices that were rounded beforehand, by name.
pub type Calibrated = HashMap<String, Arc<IntRows>>;

impl<'a> Stored<'a> {
    /// The weights of a graph that they are bound to, some of its matrices rounded already.
    pub fn new(
        graph: &'a Graph,
        weights: &'a Weights,
        types: &'a ElementTypes,
        calibrated: Calibrated,
    ) -> Stored<'a> {
        let (mut heads, mut position_tables) = (HashSet::new(), HashSet::new());
        for value in graph.schedule().unwrap_or_default() {
            match graph.node(value).op {
                Op::EmbedTokens { table } => drop(heads.insert(table)),
                Op::EmbedPositions { table, .. } => drop(position_tables.insert(table)),
                Op::Embed { tokens, positions } => {
                    heads.extend(tokens);
                    position_tables.extend(positions.map(|(table, _)| table));
                }
                Op::Matmul { weight } if graph.logits == Some(value) => drop(heads.insert(weight)),
                Op::Linear(linear) if graph.logits == Some(value) => {
                    heads.insert(linear.weight);
                }
                _ => {}
            }
        }
        Stored {
            graph,
            weights,
            types,
            heads,
            position_tables,
            calibrated,
        }
    }

    /// Matrices that were rounded beforehand.
    pub fn calibrated(&self) -> &Calibrated {
        &self.calibrated
    }

    /// Stores a matrix as these rows.
    pub(crate) fn replace(&mut self, matrix: String, rows: IntRows) {
        self.calibrated.insert(matrix, Arc::new(rows));
    }

    /// How a matrix or a position table is stored.
    pub fn format(&self, id: WeightId) -> WeightFormat {
        if self.position_tables.contains(&id) {
            WeightFormat::of(self.types.tables).unwrap_or(WeightFormat::F32)
        } else if self.heads.contains(&id) {
            self.types.lm_head
        } else if self.types.others != self.types.weights && !self.is_integers(id) {
            self.types.others
        } else {
            self.types.weights
        }
    }

    /// Whether the checkpoint stores a weight, or all that it is joined from, as integers.
    fn is_integers(&self, id: WeightId) -> bool {
        match &self.graph.weight(id).source {
            WeightSource::Load { .. } => self.weights.integers(self.graph, id).is_some(),
            WeightSource::Concat(parts) => parts.iter().all(|&part| self.is_integers(part)),
        }
    }

    /// Whether a matrix has codes in the checkpoint that a format holds.
    pub(crate) fn keeps(&self, id: WeightId, format: IntFormat) -> bool {
        let integers = self.weights.integers(self.graph, id);
        integers.is_some_and(|integers| integers::holds(format, integers))
    }

    /// Matrices whose codes in the checkpoint their format does not hold, so that they are rounded again.
    pub(crate) fn rounded_again(&self) -> usize {
        let matrices = self.graph.weights().filter(|(id, _)| {
            let format = self.format(*id).int();
            format.is_some_and(|format| self.is_integers(*id) && !self.keeps(*id, format))
        });
        matrices
            .filter(|(_, weight)| matches!(weight.source, WeightSource::Load { .. }))
            .count()
    }

    /// How matrices are stored, but for the LM head and the token table.
    pub fn common_format(&self) -> WeightFormat {
        self.types.weights
    }

    /// Whether a weight is packed as a matrix.
    pub fn is_matrix(&self, id: WeightId) -> bool {
        self.graph.weight(id).shape.len() > 1 && !self.position_tables.contains(&id)
    }

    /// Rows of a weight as the checkpoint has them.
    ///
    /// # Errors
    /// The checkpoint.
    pub fn exact_rows(&self, id: WeightId, rows: Range<usize>) -> Result<Vec<f32>, WeightError> {
        self.weights.rows(self.graph, id, rows)
    }

    /// Rows of a matrix or table, each value as what is stored stands for.
    ///
    /// # Errors
    /// The checkpoint.
    pub fn rows(&self, id: WeightId, rows: Range<usize>) -> Result<Vec<f32>, WeightError> {
        let format = self.format(id);
        if let Some(format) = format.int() {
            return Ok(self.int_rows(id, rows, format)?.values());
        }
        let mut values = self.exact_rows(id, rows)?;
        match format.element() {
            DType::F16 => values
                .iter_mut()
                .for_each(|value| *value = half::f16::from_f32(*value).to_f32()),
            DType::Bf16 => values
                .iter_mut()
                .for_each(|value| *value = half::bf16::from_f32(*value).to_f32()),
            DType::F32 | DType::I32 | DType::U8 => {}
        }
        Ok(values)
    }

    /// Rows of a matrix as integers.
    ///
    /// # Errors
    /// The checkpoint.
    pub fn int_rows(
        &self,
        id: WeightId,
        rows: Range<usize>,
        format: IntFormat,
    ) -> Result<IntRows, WeightError> {
        let weight = self.graph.weight(id);
        let k = weight.shape[1..].iter().product();
        if let Some(rounded) = self.calibrated.get(&weight.name) {
            return Ok(rounded.rows(rows));
        }
        if let Some(integers) = self.weights.integers(self.graph, id)
            && integers::holds(format, integers)
            && let Some(rows) = self.weights.integer_rows(self.graph, id, rows.clone())?
        {
            return Ok(integers::keep(format, integers, &rows));
        }
        let WeightSource::Concat(parts) = &weight.source else {
            return Ok(IntRows::round(&self.exact_rows(id, rows)?, k, format));
        };
        // Parts that the calibrated graph had as matrices of their own.
        let mut joined = IntRows::empty(format, k);
        let mut first = 0;
        for &part in parts {
            let len = self.graph.weight(part).shape[0];
            let start = rows.start.clamp(first, first + len) - first;
            let end = rows.end.clamp(first, first + len) - first;
            if start < end {
                joined.append(self.int_rows(part, start..end, format)?);
            }
            first += len;
        }
        Ok(joined)
    }
}
