//! The kernel plan of one executable, and its text form.

use kiln_bundle::{
    Argument, Executable, Image, KernelSpec, Linear, Norm, Phase, Program, RowKind, Rows,
};
use std::fmt;

/// A program with the bounds and memory of one bucket, for printing.
#[derive(Clone, Copy, Debug)]
pub struct KernelPlan<'a> {
    /// The kernels.
    pub program: &'a Program,
    /// Bounds and offsets.
    pub executable: &'a Executable,
    /// What the executable's launches name; none on the CPU.
    pub images: &'a [Image],
}

/// `decode-b4-kv1024`, `prefill-t64`, `prefill-t512-hidden`.
pub fn executable_name(phase: Phase, bounds: &kiln_bundle::Bounds) -> String {
    match phase {
        Phase::Prefill => {
            let hidden = if bounds.hidden_states { "-hidden" } else { "" };
            format!("prefill-t{}{hidden}", bounds.max_tokens)
        }
        Phase::Decode => format!("decode-b{}-kv{}", bounds.max_sequences, bounds.max_kv_len),
    }
}

/// One line a buffer with its offset, one line a kernel.
impl fmt::Display for KernelPlan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KernelPlan {
            program,
            executable,
            images,
        } = self;
        let bounds = &executable.bounds;
        writeln!(f, "executable {} {{", executable.name)?;
        writeln!(
            f,
            "  bounds tokens={} sequences={} kv_len={} logit_rows={}",
            bounds.max_tokens, bounds.max_sequences, bounds.max_kv_len, bounds.max_logit_rows
        )?;
        writeln!(f, "  arena {} bytes", executable.arena_bytes)?;
        for (index, (buffer, offset)) in program
            .buffers
            .iter()
            .zip(&executable.offsets_bytes)
            .enumerate()
        {
            let rows = match buffer.rows {
                RowKind::Tokens => 'T',
                RowKind::Logits => 'R',
            };
            writeln!(
                f,
                "  b{index} {}[{rows}, {}] at {offset}",
                buffer.dtype, buffer.width
            )?;
        }
        for kernel in &program.kernels {
            writeln!(f, "  {}", KernelText(kernel))?;
        }
        for tap in &program.hidden_states {
            write!(
                f,
                "  hidden {} after kernel {}",
                tap.buffer, tap.after_kernel
            )?;
            write_norm(f, "norm", &tap.norm)?;
            writeln!(f)?;
        }
        writeln!(f, "  logits {}", program.logits)?;
        if !executable.launches.is_empty() {
            writeln!(
                f,
                "  workspace {} bytes, {} counters",
                executable.workspace_bytes, executable.counters
            )?;
        }
        for launch in &executable.launches {
            let entry = images
                .get(launch.image as usize)
                .map_or("?", |image| &image.entry);
            let [x, y, z] = launch.grid;
            write!(
                f,
                "  launch {entry} grid={x}x{y}x{z} for kernel {}:",
                launch.kernel
            )?;
            for argument in &launch.arguments {
                match argument {
                    Argument::Step => write!(f, " step")?,
                    Argument::Buffer(id) => write!(f, " {id}")?,
                    Argument::Weight(name) => write!(f, " @{name}")?,
                    Argument::KvLayer(layer) => write!(f, " kv[{layer}]")?,
                    Argument::Workspace { offset_bytes } => write!(f, " workspace+{offset_bytes}")?,
                    Argument::Counters => write!(f, " counters")?,
                }
            }
            writeln!(f)?;
        }
        writeln!(f, "}}")
    }
}

/// A kernel on one line: result, name, operands, attributes.
#[derive(Clone, Copy, Debug)]
pub struct KernelText<'a>(pub &'a KernelSpec);

impl fmt::Display for KernelText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(out) = self.0.writes() {
            write!(f, "{out} = ")?;
        }
        write!(f, "{}", self.0.name())?;
        for (index, read) in self.0.reads().iter().enumerate() {
            write!(f, "{}{read}", if index == 0 { " " } else { ", " })?;
        }
        match self.0 {
            KernelSpec::Embed {
                tokens,
                positions,
                position_offset,
                ..
            } => {
                if let Some(tokens) = tokens {
                    write!(f, " tokens=@{tokens}")?;
                }
                if let Some(positions) = positions {
                    write!(f, " positions=@{positions} offset={position_offset}")?;
                }
                Ok(())
            }
            KernelSpec::Linear(linear) => write_linear(f, linear),
            KernelSpec::Qkv { linear, layer } => {
                write_linear(f, linear)?;
                write!(f, " layer={layer}")
            }
            KernelSpec::Attention {
                layer,
                heads,
                head_dim,
                scale,
                ..
            } => {
                write!(
                    f,
                    " layer={layer} heads={heads} head_dim={head_dim} scale={scale}"
                )
            }
            KernelSpec::Sample { .. } => Ok(()),
        }
    }
}

fn write_linear(f: &mut fmt::Formatter<'_>, linear: &Linear) -> fmt::Result {
    write!(
        f,
        " weight=@{} [{}, {}]",
        linear.weight, linear.out_features, linear.in_features
    )?;
    write_norm(f, "norm", &linear.norm)?;
    if let Some(bias) = &linear.bias {
        write!(f, " bias=@{bias}")?;
    }
    if let Some(activation) = linear.activation {
        write!(f, " act={}", activation.name())?;
    }
    if let Some(residual) = &linear.residual {
        write_norm(f, "residual_norm", &residual.norm)?;
    }
    match linear.rows {
        Rows::All => Ok(()),
        Rows::Logits => write!(f, " rows=logits"),
    }
}

fn write_norm(f: &mut fmt::Formatter<'_>, key: &str, norm: &Option<Norm>) -> fmt::Result {
    let Some(norm) = norm else { return Ok(()) };
    let part = |name: &Option<String>| {
        name.as_ref()
            .map_or("_".to_owned(), |name| format!("@{name}"))
    };
    write!(
        f,
        " {key}=({}, {}, {})",
        part(&norm.weight),
        part(&norm.bias),
        norm.eps
    )
}
