//! A graph's weights bound to a checkpoint's tensors.

use crate::{Architecture, Checkpoint, CheckpointError, checkpoint::Integers, gpt2, opt};
use kiln_ir::{Graph, Weight, WeightId, WeightSource};
use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// Why a checkpoint does not hold a model's weights.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The checkpoint is incomplete, or its config.json describes another model.
    #[error(
        "{}: tensor {tensor:?} is missing (for the weight {weight}); the checkpoint has {count} \
         tensors, such as {first:?}",
        origin.display()
    )]
    Missing {
        /// Where the tensors come from.
        origin: PathBuf,
        /// The tensor's name, without the prefix that checkpoints may have.
        tensor: String,
        /// kiln's name of the weight.
        weight: String,
        /// Tensors in the checkpoint.
        count: usize,
        /// One of them.
        first: String,
    },
    /// The checkpoint's config.json describes another model.
    #[error(
        "{}: tensor {tensor:?} has shape {found:?}, config.json asks for {needed:?}",
        origin.display()
    )]
    Shape {
        /// Where the tensors come from.
        origin: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the model needs.
        needed: Vec<usize>,
    },
    /// The checkpoint holds more than the model that its config.json describes.
    #[error(
        "{}: tensor {tensor:?}{} has no place in the model that config.json describes; remove it \
         or correct config.json",
        origin.display(),
        if *more == 0 { String::new() } else { format!(" (and {more} more)") }
    )]
    Extra {
        /// Where the tensors come from.
        origin: PathBuf,
        /// The first of them.
        tensor: String,
        /// How many others there are.
        more: usize,
    },
    /// The checkpoint is damaged, or training diverged.
    #[error("{}: tensor {tensor:?} holds {value} in row {row}; weights must be finite", origin.display())]
    NotFinite {
        /// Where the tensors come from.
        origin: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the weight, as the model uses it.
        row: usize,
        /// What it holds.
        value: f32,
    },
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Rows of a weight that the checkpoint stores as integers: [`Integers`] says which group an input is in.
#[derive(Clone, Debug, PartialEq)]
pub struct IntegerRows {
    /// (rows, K).
    pub codes: Vec<u8>,
    /// (rows, groups).
    pub zeros: Vec<u8>,
    /// (rows, groups).
    pub scales: Vec<f32>,
}

/// The weights of a graph, read on demand as f32 rows.
pub struct Weights {
    checkpoint: Box<dyn Checkpoint>,
    /// Names in the checkpoint by names in the graph.
    tensors: BTreeMap<String, String>,
    /// The tensor transposed last: its slices (q, k, v) are read one after the other.
    transposed: Mutex<Option<(String, Arc<Vec<f32>>)>>,
}

impl Weights {
    /// Finds every tensor that the graph loads and checks its shape.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape, or has no place in the graph.
    pub fn bind(
        graph: &Graph,
        architecture: Architecture,
        checkpoint: Box<dyn Checkpoint>,
    ) -> Result<Weights, WeightError> {
        let (prefixes, is_inert): (&[&str], fn(&str) -> bool) = match architecture {
            Architecture::Opt => (opt::PREFIXES, opt::is_inert),
            Architecture::Gpt2 => (gpt2::PREFIXES, gpt2::is_inert),
        };
        let available = checkpoint.tensors();
        let origin = || checkpoint.origin().to_owned();
        let mut tensors = BTreeMap::new();
        for (tensor, (weight, needed)) in loads(graph) {
            let found = prefixes
                .iter()
                .find_map(|prefix| available.get(&format!("{prefix}{tensor}")));
            let Some(found) = found else {
                return Err(WeightError::Missing {
                    origin: origin(),
                    tensor,
                    weight,
                    count: available.len(),
                    first: available.keys().next().cloned().unwrap_or_default(),
                });
            };
            if found.shape != needed {
                return Err(WeightError::Shape {
                    origin: origin(),
                    tensor: found.name.clone(),
                    found: found.shape.clone(),
                    needed,
                });
            }
            tensors.insert(tensor, found.name.clone());
        }
        let used: HashSet<&String> = tensors.values().collect();
        let extra: Vec<&String> = available
            .keys()
            .filter(|&name| {
                let bare = prefixes
                    .iter()
                    .find_map(|prefix| name.strip_prefix(prefix))
                    .unwrap_or(name);
                // A tied head that is saved as well repeats the token table.
                !used.contains(name) && !is_inert(bare) && name != "lm_head.weight"
            })
            .collect();
        if let [first, rest @ ..] = &extra[..] {
            return Err(WeightError::Extra {
                origin: origin(),
                tensor: (*first).clone(),
                more: rest.len(),
            });
        }
        Ok(Weights {
            checkpoint,
            tensors,
            transposed: Mutex::new(None),
        })
    }

    /// Rows of a weight as f32, row-major: (rows, K) of a matrix, (rows) of a vector.
    ///
    /// # Errors
    /// A tensor that cannot be read or holds values that are not finite.
    ///
    /// # Panics
    /// On a graph that the weights were not bound to, or rows that the weight has not.
    pub fn rows(
        &self,
        graph: &Graph,
        id: WeightId,
        rows: Range<usize>,
    ) -> Result<Vec<f32>, WeightError> {
        let weight = graph.weight(id);
        match &weight.source {
            WeightSource::Load {
                tensor,
                transposed,
                rows: slice,
            } => {
                let start = slice.as_ref().map_or(0, |slice| slice.start);
                let tensor = &self.tensors[tensor];
                let values = match transposed {
                    false => self
                        .checkpoint
                        .read_rows(tensor, start + rows.start..start + rows.end)?
                        .to_f32()?,
                    true => {
                        let outputs = self.checkpoint.info(tensor)?.shape[1];
                        let all = self.whole(tensor)?;
                        (start + rows.start..start + rows.end)
                            .flat_map(|output| all.iter().skip(output).step_by(outputs).copied())
                            .collect()
                    }
                };
                match values.iter().position(|value| !value.is_finite()) {
                    Some(at) => Err(WeightError::NotFinite {
                        origin: self.checkpoint.origin().to_owned(),
                        tensor: tensor.clone(),
                        row: rows.start + at / row_len(weight),
                        value: values[at],
                    }),
                    None => Ok(values),
                }
            }
            WeightSource::Concat(parts) => {
                let mut values = Vec::with_capacity(rows.len() * row_len(weight));
                let mut first = 0;
                for &part in parts {
                    let len = graph.weight(part).shape[0];
                    let start = rows.start.clamp(first, first + len) - first;
                    let end = rows.end.clamp(first, first + len) - first;
                    if start < end {
                        values.extend(self.rows(graph, part, start..end)?);
                    }
                    first += len;
                }
                Ok(values)
            }
        }
    }

    /// Inputs of a group where the checkpoint has integers, if all its matrices have the same.
    pub fn group_size(&self) -> Option<usize> {
        self.checkpoint.quantised()?.group_size()
    }

    /// What is known of a weight that the checkpoint stores as integers. Those that are joined from
    /// others have none of their own.
    pub fn integers(&self, graph: &Graph, id: WeightId) -> Option<&Integers> {
        match &graph.weight(id).source {
            WeightSource::Load { tensor, .. } => {
                let tensor = self.tensors.get(tensor)?;
                self.checkpoint.quantised()?.matrix(tensor)
            }
            WeightSource::Concat(_) => None,
        }
    }

    /// Rows of a weight of which [`Weights::integers`] are known, else none.
    ///
    /// # Errors
    /// Tensors that cannot be read.
    ///
    /// # Panics
    /// On rows that the weight has not.
    pub fn integer_rows(
        &self,
        graph: &Graph,
        id: WeightId,
        rows: Range<usize>,
    ) -> Result<Option<IntegerRows>, WeightError> {
        let WeightSource::Load {
            tensor,
            rows: slice,
            ..
        } = &graph.weight(id).source
        else {
            return Ok(None);
        };
        let tensor = &self.tensors[tensor];
        let Some(checkpoint) = self
            .checkpoint
            .quantised()
            .filter(|checkpoint| checkpoint.matrix(tensor).is_some())
        else {
            return Ok(None);
        };
        let start = slice.as_ref().map_or(0, |slice| slice.start);
        let outputs = start + rows.start..start + rows.end;
        let matrix = checkpoint.codes(tensor)?;
        let k = graph.weight(id).shape[1];
        let n = matrix.codes.len() / k;
        Ok(Some(IntegerRows {
            codes: columns(&matrix.codes, n, &outputs),
            zeros: columns(&matrix.zeros, n, &outputs),
            scales: columns(&matrix.scales, n, &outputs),
        }))
    }

    fn whole(&self, tensor: &str) -> Result<Arc<Vec<f32>>, WeightError> {
        let mut cached = self
            .transposed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((name, values)) if name == tensor => Ok(values.clone()),
            _ => {
                let values = Arc::new(self.checkpoint.read(tensor)?.to_f32()?);
                *cached = Some((tensor.to_owned(), values.clone()));
                Ok(values)
            }
        }
    }
}

/// Some columns of a matrix of `n`, as rows.
fn columns<T: Copy + Default>(matrix: &[T], n: usize, columns: &Range<usize>) -> Vec<T> {
    let height = matrix.len() / n;
    let mut rows = vec![T::default(); columns.len() * height];
    for (at, line) in matrix.chunks(n).enumerate() {
        let places = rows.iter_mut().skip(at).step_by(height);
        for (place, &value) in places.zip(&line[columns.clone()]) {
            *place = value;
        }
    }
    rows
}

fn row_len(weight: &Weight) -> usize {
    weight.shape[1..].iter().product()
}

/// Every tensor that the graph loads, with the weight that it is for and the shape that it must
/// have in the checkpoint.
fn loads(graph: &Graph) -> BTreeMap<String, (String, Vec<usize>)> {
    let mut loads: BTreeMap<String, (String, Vec<usize>)> = BTreeMap::new();
    for (_, weight) in graph.weights() {
        let WeightSource::Load {
            tensor,
            transposed,
            rows,
        } = &weight.source
        else {
            continue;
        };
        let mut shape = weight.shape.clone();
        if let Some(rows) = rows {
            shape[0] = rows.end;
        }
        if *transposed {
            shape.reverse();
        }
        // Slices of one tensor end at different rows; the last one says how many there are.
        loads
            .entry(tensor.clone())
            .and_modify(|(_, known)| {
                for (known, dim) in known.iter_mut().zip(&shape) {
                    *known = (*known).max(*dim);
                }
            })
            .or_insert((weight.name.clone(), shape));
    }
    loads
}
