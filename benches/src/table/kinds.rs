//! Kernels of a step that are alike, in words: what a row of the table stands for.

use super::steps::StepPlan;
use kiln_bundle::{
    Activations, BufferId, DType, KernelSpec, Linear, Program, RowKind, Rows, Target, WeightFormat,
    work::{Work, kernel_work},
};

/// Kernels that differ in layer, buffers and names of weights alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Kind {
    /// Such as `linear`.
    pub kernel: &'static str,
    /// The spec in words.
    pub spec: String,
    /// Shapes of its operands.
    pub shapes: String,
    /// How its matrix is stored, or what else it reads.
    pub format: String,
    /// What its products are made of, where its device has such products.
    pub arithmetic: Arithmetic,
    /// Of one.
    pub work: Work,
    /// What another program would have to compute for the same; none where it is no matrix product.
    pub shape: Option<Shape>,
    /// Indices into the program's kernels.
    pub kernels: Vec<usize>,
}

/// Numbers that are multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 on a CPU, what the target computes in on a GPU.
    #[default]
    Float,
    /// f32 by bf16 on a CPU.
    FloatByBf16,
    /// bf16 on a CPU.
    Bf16,
    /// Integers of 16 bits.
    Int16,
    /// Integers of 8 bits.
    Int8,
}

impl Arithmetic {
    fn of(weights: WeightFormat, activations: Option<Activations>) -> Arithmetic {
        let rounded = activations.filter(|activations| activations.suit(weights));
        match (weights, rounded) {
            (_, Some(Activations::Bf16)) => Arithmetic::Bf16,
            (_, Some(Activations::Int8)) => Arithmetic::Int8,
            (WeightFormat::Int(_), None) => Arithmetic::Int16,
            (WeightFormat::Bf16, None) => Arithmetic::FloatByBf16,
            (_, None) => Arithmetic::Float,
        }
    }
}

/// The product of a kernel, for other programs to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Shape {
    /// (rows, k) x (n, k)^T.
    Linear {
        /// M.
        rows: usize,
        /// N.
        n: usize,
        /// K.
        k: usize,
    },
    /// Causal, of the last `queries` of `positions` positions of each sequence.
    Attention {
        /// B.
        sequences: usize,
        /// New tokens of a sequence.
        queries: usize,
        /// Past and new.
        positions: usize,
        /// H.
        heads: usize,
        /// D.
        head_dim: usize,
    },
}

/// The kinds of kernels of a step, in order of first use. Kernels for which `apart` differs are not
/// alike.
pub fn kinds<A: PartialEq>(
    target: &Target,
    program: &Program,
    plan: &StepPlan,
    apart: impl Fn(usize) -> A,
) -> Vec<Kind> {
    let mut found: Vec<(A, Kind)> = Vec::new();
    for (index, kernel) in program.kernels.iter().enumerate() {
        let (apart, kind) = (apart(index), kind(target, program, kernel, plan));
        let known = found.iter_mut().find(|(its, known)| {
            *its == apart
                && (&known.spec, &known.shapes, &known.format, known.work)
                    == (&kind.spec, &kind.shapes, &kind.format, kind.work)
        });
        match known {
            Some((_, known)) => known.kernels.push(index),
            None => found.push((
                apart,
                Kind {
                    kernels: vec![index],
                    ..kind
                },
            )),
        }
    }
    found.into_iter().map(|(_, kind)| kind).collect()
}

fn kind(target: &Target, program: &Program, kernel: &KernelSpec, plan: &StepPlan) -> Kind {
    let buffer = |id: BufferId| &program.buffers[id.0 as usize];
    let rows = |id: BufferId| match buffer(id).rows {
        RowKind::Tokens => plan.tokens(),
        RowKind::Logits => plan.logit_rows(),
    };
    let mut shape = None;
    let mut arithmetic = Arithmetic::default();
    let (spec, shapes, format) = match kernel {
        KernelSpec::Embed {
            tokens,
            positions,
            out,
            ..
        } => {
            let tables = [(tokens, "token"), (positions, "position")];
            let tables: Vec<&str> = tables
                .into_iter()
                .filter_map(|(table, name)| table.as_ref().map(|_| name))
                .collect();
            let format = match tokens {
                Some(name) => target.format(name).to_string(),
                None => target.tables.to_string(),
            };
            (
                format!("{} embedding", tables.join(" + ")),
                format!("({}, {})", rows(*out), buffer(*out).width),
                format,
            )
        }
        KernelSpec::Linear(linear) | KernelSpec::Qkv { linear, .. } => {
            let (rows, n, k) = (
                rows(linear.out),
                linear.out_features as usize,
                linear.in_features as usize,
            );
            shape = Some(Shape::Linear { rows, n, k });
            let format = target.format(&linear.weight);
            arithmetic = Arithmetic::of(format, target.activations);
            (
                linear_in_words(kernel.name(), linear),
                format!("({rows}, {k}) x ({n}, {k})"),
                format.to_string(),
            )
        }
        KernelSpec::Attention {
            heads,
            head_dim,
            out,
            ..
        } => {
            shape = Some(Shape::Attention {
                sequences: plan.sequences,
                queries: plan.new_tokens,
                positions: plan.kv_len,
                heads: *heads as usize,
                head_dim: *head_dim as usize,
            });
            if target.activations.is_some() && target.dtype == DType::Bf16 {
                arithmetic = Arithmetic::Bf16;
            }
            (
                format!("attention, {heads} heads of {head_dim}"),
                format!(
                    "({}, {}) over {} x {} positions",
                    rows(*out),
                    buffer(*out).width,
                    plan.sequences,
                    plan.kv_len
                ),
                target.dtype.to_string(),
            )
        }
        KernelSpec::Sample { logits } => (
            "choose tokens".to_owned(),
            format!("({}, {})", rows(*logits), buffer(*logits).width),
            buffer(*logits).dtype.to_string(),
        ),
    };
    Kind {
        kernel: kernel.name(),
        spec,
        shapes,
        format,
        arithmetic,
        work: kernel_work(target, program, kernel, &plan.size()),
        shape,
        kernels: Vec::new(),
    }
}

/// `layernorm + linear 768 -> 3072 + bias + relu`.
fn linear_in_words(name: &str, linear: &Linear) -> String {
    let mut words = String::new();
    if linear.norm.is_some() {
        words += "layernorm + ";
    }
    words += &format!("{name} {} -> {}", linear.in_features, linear.out_features);
    if linear.bias.is_some() {
        words += " + bias";
    }
    if let Some(activation) = linear.activation {
        words = format!("{words} + {}", activation.name());
    }
    if let Some(residual) = &linear.residual {
        words += match residual.norm {
            Some(_) => " + layernorm(residual)",
            None => " + residual",
        };
    }
    if linear.rows == Rows::Logits {
        words += ", rows of logits";
    }
    words
}
