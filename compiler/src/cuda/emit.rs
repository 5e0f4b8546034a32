//! The CUDA templates, and what they are filled with.
//!
//! A template under `templates/` is one kernel; what all kernels share stands in the headers under
//! `templates/kiln/`. Emission decides nothing: which kernel runs with which tiles is chosen in
//! [`super::lower`].

use askama::Template;
use kiln_bundle::{Activation, DType, IntFormat, Norm, WeightFormat, packing::TILE_K};
use std::fmt;

/// Headers of the kernels, by the name that sources include them by.
pub const HEADERS: [(&str, &str); 10] = [
    (
        "kiln/ptx.cuh",
        include_str!("../../../templates/kiln/ptx.cuh"),
    ),
    (
        "kiln/step.cuh",
        include_str!("../../../templates/kiln/step.cuh"),
    ),
    (
        "kiln/rows.cuh",
        include_str!("../../../templates/kiln/rows.cuh"),
    ),
    (
        "kiln/weights.cuh",
        include_str!("../../../templates/kiln/weights.cuh"),
    ),
    (
        "kiln/linear.cuh",
        include_str!("../../../templates/kiln/linear.cuh"),
    ),
    (
        "kiln/kv.cuh",
        include_str!("../../../templates/kiln/kv.cuh"),
    ),
    (
        "kiln/attention.cuh",
        include_str!("../../../templates/kiln/attention.cuh"),
    ),
    (
        "kiln/sampling.cuh",
        include_str!("../../../templates/kiln/sampling.cuh"),
    ),
    (
        "kiln/processors.cuh",
        include_str!("../../../templates/kiln/processors.cuh"),
    ),
    (
        "kiln/beams.cuh",
        include_str!("../../../templates/kiln/beams.cuh"),
    ),
];

/// A layer normalisation inside a kernel.
#[derive(Clone, Debug)]
pub(super) struct NormText {
    /// As a number of CUDA, without its suffix.
    pub eps: String,
    pub weight: bool,
    pub bias: bool,
}

impl NormText {
    pub fn new(norm: &Norm) -> NormText {
        NormText {
            eps: number(norm.eps),
            weight: norm.weight.is_some(),
            bias: norm.bias.is_some(),
        }
    }

    /// `expression`, or what stands for it in a norm without weights.
    fn weight<'a>(&self, expression: &'a str) -> &'a str {
        if self.weight { expression } else { "1.0f" }
    }

    fn bias<'a>(&self, expression: &'a str) -> &'a str {
        if self.bias { expression } else { "0.0f" }
    }

    /// Four weights from `k` on.
    fn weight4(&self, pointer: &str) -> String {
        four(self.weight, pointer, "1.0f")
    }

    fn bias4(&self, pointer: &str) -> String {
        four(self.bias, pointer, "0.0f")
    }
}

fn four(present: bool, pointer: &str, default: &str) -> String {
    if present {
        format!("*reinterpret_cast<const float4*>({pointer} + k)")
    } else {
        format!("float4{{{default}, {default}, {default}, {default}}}")
    }
}

/// How a matrix is stored, and the name of its inputs in the source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    pub format: WeightFormat,
    pub inputs: &'static str,
}

impl Weights {
    /// Inputs of a lane's vectors.
    pub fn span_inputs(&self) -> u32 {
        let tiles = self.format.int().map_or(1, IntFormat::span_tiles);
        (tiles * TILE_K) as u32
    }

    /// What a kernel's name says of it: nothing of the element type.
    pub fn suffix(&self) -> String {
        let int = self.format.int();
        int.map_or_else(String::new, |format| format!("_{format}").replace(':', ""))
    }
}

/// As a type of `weights.cuh`.
impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inputs = self.inputs;
        let Some(format) = self.format.int() else {
            return write!(f, "Floats<T, {inputs}>");
        };
        let (bits, group) = (format.bits(), format.tile_group().unwrap_or(0));
        write!(f, "Integers<T, {inputs}, {bits}, {group}>")
    }
}

/// The rows that a kernel reads.
#[derive(Clone, Debug)]
pub(super) struct Input {
    /// Stored as f32, not as the element type.
    pub f32: bool,
    /// Rows of the step's `logit_rows` list.
    pub mapped: bool,
    /// The step's count of rows: `tokens` or `logit_rows`.
    pub count: &'static str,
    pub norm: Option<NormText>,
}

impl Input {
    /// The same rows once they have been normalised, converted and put in order.
    pub fn prepared(self) -> Input {
        Input {
            f32: false,
            mapped: false,
            norm: None,
            ..self
        }
    }

    /// Index of the row of the buffer that is row `row` of the kernel.
    fn row(&self, row: &str) -> String {
        if self.mapped {
            format!("step.logit_rows[{row}]")
        } else {
            row.to_owned()
        }
    }

    fn count(&self) -> &'static str {
        self.count
    }

    fn is_f32(&self) -> bool {
        self.f32
    }
}

/// Where a linear's result goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Rows of f32.
    F32,
    /// Rows of f32, with the best token of each block beside them.
    Logits,
    /// Rows of the element type.
    Element,
    /// Queries to their rows, keys and values to the cache.
    Qkv {
        hidden_size: u32,
        head_dim: u32,
        /// Elements between blocks of the cache.
        block_stride: u64,
    },
}

/// The rows that a linear adds.
#[derive(Clone, Debug)]
pub(super) struct Added {
    /// Rows of the step's `logit_rows` list.
    pub mapped: bool,
    /// Their norm, where the kernel applies it.
    pub norm: Option<NormText>,
}

impl Added {
    /// Index of the row that is added to row `row` of the kernel, which finds the step's list at `logit_rows`.
    fn row(&self, logit_rows: &str, row: &str) -> String {
        if self.mapped {
            format!("load_fresh({logit_rows} + {row})")
        } else {
            row.to_owned()
        }
    }
}

/// What happens to a linear's sums.
#[derive(Clone, Debug)]
pub(super) struct Epilogue {
    pub bias: bool,
    pub activation: Option<Activation>,
    pub residual: Option<Added>,
    pub output: Output,
}

impl Epilogue {
    fn residual_norm(&self) -> Option<&NormText> {
        self.residual.as_ref()?.norm.as_ref()
    }

    fn activation(&self) -> Option<&'static str> {
        self.activation.map(Activation::name)
    }

    fn is_qkv(&self) -> bool {
        matches!(self.output, Output::Qkv { .. })
    }

    fn best(&self) -> bool {
        self.output == Output::Logits
    }

    /// In words.
    pub fn summary(&self) -> String {
        let mut words = vec![];
        if self.bias {
            words.push("bias");
        }
        words.extend(self.activation());
        match &self.residual {
            None => {}
            Some(Added { norm: None, .. }) => words.push("residual"),
            Some(Added { norm: Some(_), .. }) => words.push("normalised residual"),
        }
        words.push(match self.output {
            Output::F32 => "rows of f32",
            Output::Logits => "logits and the best of the block",
            Output::Element => "rows",
            Output::Qkv { .. } => "queries to rows, keys and values to the cache",
        });
        words.join(", ")
    }

    fn bias_phrase(&self) -> &'static str {
        if self.bias { " and its bias" } else { "" }
    }

    fn bias_parameter(&self) -> &'static str {
        if self.bias { ", float bias" } else { "" }
    }

    fn bias_argument(&self, which: &str) -> String {
        if self.bias {
            format!(", bias_{which}")
        } else {
            String::new()
        }
    }

    /// The initialiser of the source's `Epilogue`, in the order of its fields.
    fn values(&self) -> String {
        let mut values = vec![];
        if let Some(added) = &self.residual {
            values.push("residual");
            values.extend(added.mapped.then_some("step.logit_rows"));
            if let Some(norm) = &added.norm {
                values.push("residual_sums");
                values.extend(norm.weight.then_some("residual_norm_weight"));
                values.extend(norm.bias.then_some("residual_norm_bias"));
            }
        }
        match self.output {
            Output::Qkv { .. } => values.extend(["step.kv_slots", "out", "kv"]),
            _ => values.push("out"),
        }
        values.join(", ")
    }
}

/// Few rows against many weights.
#[derive(Template)]
#[template(path = "linear.cu")]
pub(super) struct LinearText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub k: u32,
    pub n: u32,
    pub rows: u32,
    pub tiles: u32,
    pub depth: u32,
    pub weights: &'a Weights,
    pub input: &'a Input,
    pub epilogue: &'a Epilogue,
}

impl LinearText<'_> {
    fn epilogue_values(&self) -> String {
        self.epilogue.values()
    }

    fn k_guard(&self) -> &'static str {
        if self.k.is_multiple_of(self.weights.span_inputs()) {
            ""
        } else {
            " || k >= K"
        }
    }
}

/// Many rows.
#[derive(Template)]
#[template(path = "gemm.cu")]
pub(super) struct GemmText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub k: u32,
    pub n: u32,
    pub m_block: u32,
    pub n_block: u32,
    pub warp_m: u32,
    pub warp_n: u32,
    pub stages: u32,
    pub blocks_per_sm: u32,
    pub weights: &'a Weights,
    pub input: &'a Input,
    pub epilogue: &'a Epilogue,
}

impl GemmText<'_> {
    fn epilogue_values(&self) -> String {
        self.epilogue.values()
    }

    fn k_guard(&self) -> &'static str {
        if self.k.is_multiple_of(self.weights.span_inputs()) {
            ""
        } else {
            " && k < K"
        }
    }
}

/// Rows of f32, normalised or as they are, in another type.
#[derive(Template)]
#[template(path = "rows.cu")]
pub(super) struct RowsText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub width: u32,
    pub input: &'a Input,
    pub norm: Option<&'a NormText>,
    pub out_type: &'static str,
}

/// Token and position embeddings.
#[derive(Template)]
#[template(path = "embed.cu")]
pub(super) struct EmbedText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub width: u32,
    /// How the token table is stored, where there is one.
    pub tokens: Option<&'a Weights>,
    pub positions: bool,
    pub position_offset: u32,
    pub out_type: &'static str,
}

/// Attention of one new token a sequence.
#[derive(Template)]
#[template(path = "attention_decode.cu")]
pub(super) struct AttentionDecodeText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub heads: u32,
    pub head_dim: u32,
    pub scale: String,
    pub chunks: u32,
    pub block_stride: u64,
}

/// Attention of any number of new tokens a sequence.
#[derive(Template)]
#[template(path = "attention_prefill.cu")]
pub(super) struct AttentionPrefillText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub element: &'static str,
    pub heads: u32,
    pub head_dim: u32,
    pub scale: String,
    pub block_stride: u64,
}

/// The choice of the next tokens.
#[derive(Template)]
#[template(path = "sample.cu")]
pub(super) struct SampleText<'a> {
    pub entry: &'a str,
    pub parameters: &'a str,
    pub summary: &'a str,
    pub vocab_size: u32,
    /// Blocks of the LM head that left their best token; 0 where they did not.
    pub blocks: u32,
}

/// Copies of blocks of the KV cache.
#[derive(Template)]
#[template(path = "copy_blocks.cu")]
pub(super) struct CopyBlocksText<'a> {
    pub entry: &'a str,
    pub vectors: u64,
    pub depth: u64,
    /// Most copies of a launch.
    pub copies: usize,
}

/// A finite number as CUDA spells it, without its suffix.
pub(super) fn number(value: f32) -> String {
    format!("{value:?}")
}

/// The element type as CUDA spells it.
pub(super) const fn element(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        DType::F32 | DType::I32 | DType::U8 => "float",
    }
}

/// The source of a filled template.
pub(super) fn render(template: &impl Template) -> Result<String, askama::Error> {
    Ok(template.render()?.trim_end().to_owned() + "\n")
}
