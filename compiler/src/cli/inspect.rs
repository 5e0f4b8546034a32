//! `kilnc inspect`.

use anyhow::Result;
use clap::Args;
use indicatif::HumanBytes;
use kiln_bundle::{
    Bundle, Executable, Manifest, Program, Target,
    work::{StepSize, step_work},
};
use kiln_compiler::{GPUS, Gpu, KernelText, predict};
use serde_json::{Value, json};
use std::{fmt::Write, path::PathBuf};

#[derive(Args)]
pub struct Arguments {
    /// The bundle.
    bundle: PathBuf,
    /// List the kernels of each program as well.
    #[arg(long)]
    kernels: bool,
    /// Predict times of CUDA targets for this GPU [default: one of the target's]
    #[arg(long, value_name = "NAME", value_parser = gpu)]
    gpu: Option<Gpu>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

fn gpu(name: &str) -> Result<Gpu, String> {
    let known: Vec<&str> = GPUS.iter().map(|gpu| gpu.name).collect();
    Gpu::named(name).ok_or_else(|| format!("known are {}", known.join(", ")))
}

/// The GPU that times of a target are predicted for: none for a CPU, nor for a GPU that does not run
/// the target.
fn predicted_for(target: &Target, asked: Option<Gpu>) -> Option<Gpu> {
    match asked {
        Some(gpu) => Some(gpu).filter(|gpu| gpu.target.name() == target.name),
        None => Gpu::of_target(&target.name),
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bundle = Bundle::open(&arguments.bundle)?;
    let manifest = bundle.manifest();
    let text = match arguments.json {
        true => to_json(manifest, arguments.kernels, arguments.gpu).to_string(),
        false => to_text(manifest, arguments.kernels, arguments.gpu)?,
    };
    super::print(text.trim_end())
}

fn to_json(manifest: &Manifest, kernels: bool, gpu: Option<Gpu>) -> Value {
    let target = |target: &Target| {
        let gpu = predicted_for(target, gpu);
        let executable = |executable: &Executable| {
            let program = &target.programs[executable.program as usize];
            let mut value = json!({
                "name": executable.name,
                "phase": executable.phase,
                "bounds": executable.bounds,
                "kernels": program.kernels.len(),
                "arena_bytes": executable.arena_bytes,
                "weights_bytes_per_step": step_weight_bytes(program, target),
                "flops_per_token": flops_per_token(program, target),
            });
            if let Some(prediction) = gpu.and_then(|gpu| predict(target, executable, &gpu)) {
                value["launches"] = json!(executable.launches.len());
                value["predicted"] = json!({
                    "gpu": gpu.map(|gpu| gpu.name),
                    "bytes": prediction.bytes,
                    "flops": prediction.flops,
                    "floor_us": prediction.floor_us,
                    "launch_us": prediction.launch_us,
                    "total_us": prediction.total_us(),
                });
            }
            if kernels {
                value["kernel_specs"] = json!(program.kernels);
            }
            value
        };
        json!({
            "name": target.name,
            "weights": target.weights,
            "lm_head": target.lm_head(),
            "activations": target.activations,
            "dtype": target.dtype,
            "weights_bytes": manifest.files.get(&target.weights_file).map(|file| file.bytes),
            "executables": target.executables.iter().map(executable).collect::<Vec<_>>(),
        })
    };
    json!({
        "format_version": manifest.format_version,
        "kiln_version": manifest.kiln_version,
        "model": manifest.model,
        "limits": manifest.limits,
        "kv_bytes_per_token": manifest.targets.iter().map(|target| manifest.model.kv_bytes_per_token(target.dtype)).collect::<Vec<_>>(),
        "targets": manifest.targets.iter().map(target).collect::<Vec<_>>(),
        "files": manifest.files,
    })
}

fn to_text(manifest: &Manifest, kernels: bool, gpu: Option<Gpu>) -> Result<String> {
    let (model, limits) = (&manifest.model, &manifest.limits);
    let mut text = String::new();
    writeln!(
        text,
        "{} ({}): {} layers, hidden {}, {} heads of {}, vocabulary {}",
        model.name,
        model.architecture,
        model.layers,
        model.hidden_size,
        model.heads,
        model.head_dim,
        model.vocab_size
    )?;
    writeln!(
        text,
        "bundle format {}, written by kiln {}; up to {} sequences of {} positions",
        manifest.format_version, manifest.kiln_version, limits.max_batch, limits.max_seq_len
    )?;
    for target in &manifest.targets {
        let weights = manifest
            .files
            .get(&target.weights_file)
            .map_or(0, |file| file.bytes);
        writeln!(
            text,
            "\ntarget {}: weights {} ({}), KV cache {} ({} a token)\n",
            target.name,
            super::formats(target),
            HumanBytes(weights),
            target.dtype,
            HumanBytes(manifest.model.kv_bytes_per_token(target.dtype))
        )?;
        let gpu = predicted_for(target, gpu);
        let predicted =
            gpu.map(|gpu| [format!("{} floor us", gpu.name), "predicted us".to_owned()]);
        let mut headings = vec![
            "executable",
            "tokens",
            "sequences",
            "kv length",
            "logit rows",
            "kernels",
            "arena",
            "weights read",
            "MFLOP/token",
        ];
        headings.extend(predicted.iter().flatten().map(String::as_str));
        let mut table = super::table(&headings);
        for executable in &target.executables {
            let program = &target.programs[executable.program as usize];
            let bounds = &executable.bounds;
            let mut row = vec![
                executable.name.clone(),
                bounds.max_tokens.to_string(),
                bounds.max_sequences.to_string(),
                bounds.max_kv_len.to_string(),
                bounds.max_logit_rows.to_string(),
                program.kernels.len().to_string(),
                HumanBytes(executable.arena_bytes).to_string(),
                HumanBytes(step_weight_bytes(program, target)).to_string(),
                format!("{:.0}", flops_per_token(program, target) as f64 / 1e6),
            ];
            if let Some(prediction) = gpu.and_then(|gpu| predict(target, executable, &gpu)) {
                row.push(format!("{:.1}", prediction.floor_us));
                row.push(format!("{:.1}", prediction.total_us()));
            }
            table.add_row(row);
        }
        writeln!(text, "{}", table.trim_fmt())?;
        if let Some(gpu) = gpu {
            writeln!(
                text,
                "\npredicted for a {} of {} GB/s and {} TFLOP/s with {} us a launch, at the bounds; not measured",
                gpu.name,
                gpu.gb_per_s,
                gpu.tflops,
                gpu.launch_us()
            )?;
        }
        if kernels {
            for program in &target.programs {
                writeln!(text, "\nprogram {}", program.name)?;
                for (index, kernel) in program.kernels.iter().enumerate() {
                    writeln!(text, "  {index:3}  {}", KernelText(kernel))?;
                }
            }
        }
    }
    Ok(text)
}

/// Bytes of matrices, biases and norms that a step reads once, whatever the number of its tokens.
fn step_weight_bytes(program: &Program, target: &Target) -> u64 {
    step_work(target, program, &StepSize::default()).weight_bytes
}

/// Multiplications and additions of products with weights for a token whose logits are computed.
fn flops_per_token(program: &Program, target: &Target) -> u64 {
    let size = StepSize {
        tokens: 1,
        logit_rows: 1,
        ..StepSize::default()
    };
    step_work(target, program, &size).flops as u64
}
