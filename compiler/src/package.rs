//! Packs weights and writes the bundle.

use kiln_bundle::{
    BundleWriter, DType, Manifest, ManifestError, Target, TensorDecl, WeightRole, WriteError,
    packing::Layout, trace::Label,
};
use kiln_ir::{Graph, WeightId};
use kiln_models::WeightError;
use rayon::prelude::*;
use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use crate::{Progress, Stored};

/// Elements packed as one piece of work. With a few pieces in flight a thread, packing holds tens
/// of megabytes whatever the size of the model.
const BLOCK_ELEMENTS: usize = 2 << 20;

/// Why a bundle could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The checkpoint.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The output.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The compiler's mistake.
    #[error("the plan is not sound: {0}")]
    Plan(#[from] ManifestError),
    /// The caller asked for it.
    #[error("cancelled; nothing was written")]
    Cancelled,
    /// The chosen element type is too narrow for the checkpoint.
    #[error("weight {weight} holds {value}, which overflows {dtype}; choose --weights bf16 or f32")]
    Overflow {
        /// The weight.
        weight: String,
        /// Its value.
        value: f32,
        /// The element type.
        dtype: DType,
    },
}

/// Writes a target's weight file into the bundle.
///
/// # Errors
/// The checkpoint, the output, or values that the element type cannot hold.
pub fn pack_weights(
    writer: &mut BundleWriter,
    manifest: &Manifest,
    target: &Target,
    graph: &Graph,
    weights: &Stored<'_>,
    progress: &dyn Progress,
) -> Result<(), PackageError> {
    let ids: HashMap<&str, WeightId> = graph
        .weights()
        .map(|(id, weight)| (weight.name.as_str(), id))
        .collect();
    let mut uses: BTreeMap<String, WeightRole> = BTreeMap::new();
    for program in &target.programs {
        uses.extend(program.weight_uses(manifest)?);
    }
    // Matrices first: they are multiples of a cache line, and so all start on one.
    let order = |role: &WeightRole| match role {
        WeightRole::Packed { .. } => 0,
        WeightRole::Vector { .. } => 1,
        WeightRole::Table { .. } => 2,
    };
    let mut uses: Vec<(String, WeightRole)> = uses.into_iter().collect();
    uses.sort_by_key(|(_, role)| order(role));
    let tensors: Vec<TensorDecl> = uses
        .iter()
        .map(|(name, role)| {
            let shape = match role {
                // The whole table, even where the bundle's limit needs less.
                WeightRole::Table { .. } => graph.weight(ids[name.as_str()]).shape.clone(),
                _ => role.shape(target, name),
            };
            TensorDecl {
                name: name.clone(),
                dtype: role.element(target, name),
                shape,
            }
        })
        .collect();
    let total: u64 = tensors.iter().map(TensorDecl::bytes).sum();
    let roles: HashMap<&str, &WeightRole> = uses
        .iter()
        .map(|(name, role)| (name.as_str(), role))
        .collect();
    let mut done = 0;
    writer.add_tensors(&target.weights_file, &tensors, |tensor, sink| {
        let id = ids[tensor.name.as_str()];
        let blocks = blocks(graph, id, target.layout);
        let began = Instant::now();
        // A few blocks at once, written in order.
        for wave in blocks.chunks(2 * rayon::current_num_threads()) {
            if progress.cancelled() {
                return Err(PackageError::Cancelled);
            }
            let packed: Vec<Vec<u8>> = wave
                .par_iter()
                .map(|rows| {
                    let role = roles[tensor.name.as_str()];
                    let format = target.format(&tensor.name);
                    if let (WeightRole::Packed { .. }, Some(format)) = (role, format.int()) {
                        let rows = weights.int_rows(id, rows.clone(), format)?;
                        return Ok(rows.pack(target.layout));
                    }
                    let values = weights.exact_rows(id, rows.clone())?;
                    let values = match role {
                        WeightRole::Packed { k, .. } => {
                            target.layout.pack(format.element(), &values, *k)
                        }
                        WeightRole::Vector { .. } | WeightRole::Table { .. } => values,
                    };
                    encode(&values, tensor)
                })
                .collect::<Result<_, PackageError>>()?;
            for bytes in packed {
                sink.write(&bytes)?;
                done += bytes.len() as u64;
                progress.advance(done, total);
            }
        }
        let bytes = usize::try_from(tensor.bytes()).unwrap_or(usize::MAX);
        progress.worked(Label::new(tensor.name.clone()).with("bytes", bytes), began);
        Ok(())
    })
}

/// Rows of a weight in pieces of whole groups.
fn blocks(graph: &Graph, id: WeightId, layout: Layout) -> Vec<std::ops::Range<usize>> {
    let shape = &graph.weight(id).shape;
    let row_elements: usize = shape[1..].iter().product();
    let rows = (BLOCK_ELEMENTS / row_elements)
        .next_multiple_of(layout.group())
        .max(layout.group());
    (0..shape[0])
        .step_by(rows)
        .map(|first| first..(first + rows).min(shape[0]))
        .collect()
}

/// Little-endian bytes in the tensor's element type.
fn encode(values: &[f32], tensor: &TensorDecl) -> Result<Vec<u8>, PackageError> {
    let bytes: Vec<u8> = match tensor.dtype {
        DType::F32 | DType::I32 | DType::U8 => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        DType::F16 => values
            .iter()
            .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
            .collect(),
        DType::Bf16 => values
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect(),
    };
    let largest = values.iter().copied().fold(0.0, |largest: f32, value| {
        if value.abs() > largest.abs() {
            value
        } else {
            largest
        }
    });
    let overflows = match tensor.dtype {
        DType::F16 => half::f16::from_f32(largest).is_infinite(),
        DType::Bf16 => half::bf16::from_f32(largest).is_infinite(),
        DType::F32 | DType::I32 | DType::U8 => false,
    };
    if overflows {
        return Err(PackageError::Overflow {
            weight: tensor.name.clone(),
            value: largest,
            dtype: tensor.dtype,
        });
    }
    Ok(bytes)
}
