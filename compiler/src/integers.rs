//! Matrices that the checkpoint stores as integers already, by GPTQ: whether a format of the bundle holds
//! their codes, and their rows in it.
//!
//! A code of 4 bits is a code of `int4`, and a group's zero point z and scale s become the minimum
//! `-s * z`. A code of 8 bits is one of `int8` less 128, where the zero points are 128. A group of the
//! format must lie within one of the checkpoint; several may lie in the same. What does not fit, above all
//! inputs that GPTQ has taken in the order of their activations (`desc_act`), is read as what the
//! integers stand for.

use crate::{IntRows, quantise::Grid};
use kiln_bundle::{GroupSize, IntFormat, WeightFormat};
use kiln_ir::{Graph, WeightId, WeightSource};
use kiln_models::{IntegerRows, Weights, checkpoint::Integers};

/// How a checkpoint's matrices are stored by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFormat {
    /// Of integers where it has such and a format holds all of them, else its floating-point type.
    pub format: WeightFormat,
    /// Why integers of the checkpoint are not held.
    pub note: Option<String>,
}

impl OwnFormat {
    /// Of a graph's weights, whose floating-point type is `float`.
    pub fn of(graph: &Graph, weights: &Weights, float: WeightFormat) -> OwnFormat {
        let matrices: Vec<(WeightId, &Integers)> = graph
            .weights()
            .filter_map(|(id, _)| Some((id, weights.integers(graph, id)?)))
            .collect();
        let Some((_, first)) = matrices.first() else {
            return OwnFormat {
                format: float,
                note: None,
            };
        };
        let bits = first.bits;
        let refused = |format| {
            matrices
                .iter()
                .find(|(_, integers)| !holds(format, integers))
        };
        let found = formats(bits, weights.group_size()).find(|&format| refused(format).is_none());
        let problem = match (found, mixed(graph, weights)) {
            (Some(format), None) => {
                return OwnFormat {
                    format: WeightFormat::Int(format),
                    note: None,
                };
            }
            (_, Some(mixed)) => format!("{mixed} is joined from integers and other weights"),
            (None, None) => {
                let smallest = formats(bits, None).last().and_then(refused);
                let (id, integers) = smallest.unwrap_or(&matrices[0]);
                let reason = match integers.bits == 8 && !integers.symmetric {
                    true => "zero points are not all 128",
                    false => {
                        "groups are not of neighbouring inputs in a multiple of 32 (desc_act, or small groups)"
                    }
                };
                format!("in {} {reason}", graph.weight(*id).name)
            }
        };
        OwnFormat {
            format: float,
            note: Some(format!(
                "the checkpoint's {bits}-bit integers are stored as the floating-point numbers that they stand \
                 for: {problem}; --weights int{bits} would round them again"
            )),
        }
    }
}

/// Formats of integers, the one with the checkpoint's own groups first, then from wide groups to narrow.
fn formats(bits: u32, group_size: Option<usize>) -> impl Iterator<Item = IntFormat> {
    let own = group_size.and_then(|size| GroupSize::new(u32::try_from(size).ok()?));
    let others = (1..=GroupSize::MAX / GroupSize::STEP).rev();
    let others = others.filter_map(|steps| GroupSize::new(steps * GroupSize::STEP));
    let whole = (bits == 8 && group_size.is_none()).then_some(IntFormat::Int8 { group: None });
    let grouped = own.into_iter().chain(others).map(move |group| match bits {
        8 => IntFormat::Int8 { group: Some(group) },
        _ => IntFormat::Int4 { group },
    });
    whole.into_iter().chain(grouped)
}

/// A matrix that is joined from parts only some of which are integers.
fn mixed<'a>(graph: &'a Graph, weights: &Weights) -> Option<&'a str> {
    let joined = graph.weights().find(|(_, weight)| match &weight.source {
        WeightSource::Concat(parts) => {
            let integers = |part: &&WeightId| weights.integers(graph, **part).is_some();
            let count = parts.iter().filter(integers).count();
            count != 0 && count != parts.len()
        }
        WeightSource::Load { .. } => false,
    });
    joined.map(|(_, weight)| weight.name.as_str())
}

/// Whether a format holds a matrix's codes.
pub(crate) fn holds(format: IntFormat, integers: &Integers) -> bool {
    let fits = match format {
        IntFormat::Int4 { .. } => integers.bits == 4,
        IntFormat::Int8 { .. } => integers.bits == 8 && integers.symmetric,
    };
    let groups = integers
        .group_of
        .chunks(format.group(integers.group_of.len()));
    fits && groups
        .into_iter()
        .all(|group| group.iter().all(|of| *of == group[0]))
}

/// Rows in a format that holds them: the same codes, with scales and minima of bf16.
pub(crate) fn keep(format: IntFormat, integers: &Integers, rows: &IntegerRows) -> IntRows {
    let k = integers.group_of.len();
    let groups = rows.scales.len() * k / rows.codes.len().max(1);
    let middle = match format {
        IntFormat::Int4 { .. } => 0,
        IntFormat::Int8 { .. } => 128,
    };
    let codes: Vec<i8> = rows
        .codes
        .iter()
        .map(|&code| (i16::from(code) - middle) as i8)
        .collect();
    let size = format.group(k);
    let mut grids = vec![];
    for (row, codes) in codes.chunks(k).enumerate() {
        for (codes, group_of) in codes.chunks(size).zip(integers.group_of.chunks(size)) {
            let at = row * groups + group_of[0] as usize;
            let zero = f64::from(rows.zeros[at]) - f64::from(middle);
            grids.push(Grid::nearest(
                codes,
                f64::from(rows.scales[at]),
                zero,
                format,
            ));
        }
    }
    IntRows::of(format, k, codes, &grids)
}
