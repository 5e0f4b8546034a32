//! `kilnc compile`.

use super::model::ModelArguments;
use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kiln_bundle::trace::{Label, Trace};
use kiln_bundle::{Activations, DType, WeightFormat, WholeFile};
use kiln_compiler::{CompileOptions, Compiled, Progress, TargetChoice, compile, cuda::native_gpu};
use serde_json::json;
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The bundle to write; a bundle that is there is replaced once the new one is whole.
    #[arg(short, long, value_name = "BUNDLE")]
    output: PathBuf,
    /// What to compile for, repeatable: cpu, sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120a, or native,
    /// which is this machine's GPU where it has one, else its CPU.
    #[arg(long, value_name = "TARGET", default_value = "native", value_parser = target)]
    target: Vec<TargetName>,
    /// Element type of activations and the KV cache; of the KV cache alone on the CPU, which computes
    /// in f32 [default: f32 for the CPU, bf16 with --activations; the weights' for CUDA]
    #[arg(long, value_enum)]
    dtype: Option<FloatType>,
    /// How the weight matrices are stored: f32 (for the CPU alone), f16, bf16, or as integers: int8 (a scale for
    /// each output), int8:gN (a scale for N inputs of an output), int4:gN (a scale and a minimum for N
    /// inputs; int4 is int4:g64). N is a multiple of 32 up to 1024 [default: as in the checkpoint, which may
    /// be integers of GPTQ; for CUDA, f16 instead of f32]
    #[arg(long, value_name = "FORMAT")]
    weights: Option<WeightFormat>,
    /// How the LM head is stored, and with it the token table, which mostly is the same matrix
    /// [default: int8 where --weights are integers, else as --weights or in the checkpoint]
    #[arg(long, value_name = "FORMAT")]
    lm_head: Option<WeightFormat>,
    /// What the CPU rounds rows of activations to before products with numbers of the same kind: int8 (a scale
    /// for each 128 inputs of a row) beside weights of int8 or int4, bf16 beside weights of bf16; with either,
    /// attention multiplies bf16 where the KV cache is of that.
    /// Prompts and batches are computed faster on processors with AVX-512 VNNI or BF16, with int8 also on those
    /// of Arm with DotProd, and logits are less exact [default: f32 stays f32, and becomes integers of 16 bits
    /// beside integers]
    #[arg(long, value_name = "TYPE", value_enum)]
    activations: Option<ActivationsName>,
    /// A text like those that the model is for, UTF-8. Matrices of integers are rounded so that what they
    /// compute on it changes least (GPTQ), instead of each weight to the nearest; its first 8192 tokens
    /// are used
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// A text, UTF-8, whose perplexity is told, as the checkpoint has it and as the bundle will. It is
    /// that of `kiln eval` without flags, for the beginning of the text
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Tokens that --eval reads at most; each is computed about four times
    #[arg(long, value_name = "N", default_value_t = 4096, requires = "eval",
          value_parser = clap::value_parser!(u32).range(2..=65536))]
    eval_tokens: u32,
    /// Most sequences in one step.
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_batch: u32,
    /// Most positions of a sequence, prompt and generated [default: the model's own]
    #[arg(long, value_name = "N")]
    max_seq_len: Option<u32>,
    /// Bounds on the new tokens of a prefill step, one executable each.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "16,64,256,512"
    )]
    prefill_buckets: Vec<u32>,
    /// Bounds on the sequences of a decode step; --max-batch is always one.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "1,2,4,8,16"
    )]
    decode_batch: Vec<u32>,
    /// Bounds on the longest sequence of a decode step; --max-seq-len is always one.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "256,1024"
    )]
    decode_kv: Vec<u32>,
    /// Write the text of every stage into a directory.
    #[arg(long, value_name = "DIR")]
    dump_ir: Option<PathBuf>,
    /// Emit the sources of CUDA targets without compiling them.
    #[arg(long)]
    emit_only: bool,
    /// Threads to compile with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Write what ran when: the stages, the layers and matrices that texts and the self-test go through,
    /// the kernels compiled, the tensors packed. Chrome trace JSON, for chrome://tracing and
    /// ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print times and sizes as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy)]
enum TargetName {
    Native,
    Named(TargetChoice),
}

fn target(name: &str) -> Result<TargetName, String> {
    match name {
        "native" => Ok(TargetName::Native),
        "cpu" => Ok(TargetName::Named(TargetChoice::Cpu)),
        gpu => gpu
            .parse()
            .map(|gpu| TargetName::Named(TargetChoice::Cuda(gpu)))
            .map_err(|_| {
                "known are native, cpu, sm_80, sm_86, sm_89, sm_90a, sm_100a and sm_120a".to_owned()
            }),
    }
}

impl TargetName {
    fn choice(self) -> TargetChoice {
        match self {
            TargetName::Native => native_gpu().map_or(TargetChoice::Cpu, TargetChoice::Cuda),
            TargetName::Named(choice) => choice,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum FloatType {
    F32,
    F16,
    Bf16,
}

impl From<FloatType> for DType {
    fn from(float: FloatType) -> DType {
        match float {
            FloatType::F32 => DType::F32,
            FloatType::F16 => DType::F16,
            FloatType::Bf16 => DType::Bf16,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ActivationsName {
    Bf16,
    Int8,
}

impl From<ActivationsName> for Activations {
    fn from(name: ActivationsName) -> Activations {
        match name {
            ActivationsName::Bf16 => Activations::Bf16,
            ActivationsName::Int8 => Activations::Int8,
        }
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let trace_file = arguments
        .trace
        .as_deref()
        .map(WholeFile::create)
        .transpose()?;
    if let Some(jobs) = arguments.jobs {
        rayon::ThreadPoolBuilder::new()
            .num_threads(jobs.into())
            .build_global()
            .map_err(|error| anyhow!("cannot start {jobs} threads: {error}"))?;
    }
    let options = CompileOptions {
        model_name: arguments.model.name(),
        targets: arguments.target.iter().map(|t| t.choice()).collect(),
        dtype: arguments.dtype.map(DType::from),
        emit_only: arguments.emit_only,
        weights: arguments.weights,
        lm_head: arguments.lm_head,
        activations: arguments.activations.map(Activations::from),
        calibrate: arguments.calibrate.clone(),
        eval: arguments.eval.clone(),
        eval_tokens: arguments.eval_tokens as usize,
        max_batch: arguments.max_batch,
        max_seq_len: arguments.max_seq_len,
        prefill_buckets: arguments.prefill_buckets.clone(),
        decode_batch: arguments.decode_batch.clone(),
        decode_kv: arguments.decode_kv.clone(),
        dump_ir: arguments.dump_ir.clone(),
    };
    let bar = Bar::new(std::io::stderr().is_terminal());
    let interrupted = bar.interrupted.clone();
    ctrlc::set_handler(move || {
        // The second time at once, whatever is left behind.
        if interrupted.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .map_err(|error| anyhow!("cannot listen for Ctrl-C: {error}"))?;
    let model = arguments.model.find()?;
    let compiled = compile(model, &arguments.output, &options, &bar)?;
    let manifest = &compiled.manifest;
    let (trace, stages) = bar.finish();
    if let Some(file) = trace_file {
        file.finish(|to| trace.write("kilnc compile", to))?;
    }
    for note in &compiled.notes {
        eprintln!("note: {note}");
    }
    let bytes: u64 = manifest.files.values().map(|file| file.bytes).sum();
    let total_ms: f64 = stages.iter().map(|(_, ms)| ms).sum();
    if arguments.json {
        return super::print(&report(&arguments.output, &compiled, &stages, bytes).to_string());
    }
    eprintln!(
        "{}: {}, {} (weights {}) in {:.1} s",
        arguments.output.display(),
        count(manifest.targets[0].executables.len(), "executable"),
        indicatif::HumanBytes(bytes),
        super::formats(&manifest.targets[0]),
        total_ms / 1000.0,
    );
    if let Some(evaluated) = &compiled.evaluated {
        let (before, after) = (evaluated.perplexity_before, evaluated.perplexity_after);
        eprintln!(
            "perplexity {before:.4} as the checkpoint has it, {after:.4} as stored ({:+.2}%): {} of {}, windows of {}, stride {}",
            100.0 * (after / before - 1.0),
            count(evaluated.tokens, "token"),
            evaluated.text_tokens,
            evaluated.window,
            evaluated.stride,
        );
    }
    Ok(())
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn report(
    output: &Path,
    compiled: &Compiled,
    stages: &[(&'static str, f64)],
    bytes: u64,
) -> serde_json::Value {
    let manifest = &compiled.manifest;
    let mut report = json!({
        "bundle": output,
        "model": manifest.model.name,
        "targets": manifest.targets.iter().map(|target| json!({
            "name": target.name,
            "weights": target.weights,
            "lm_head": target.lm_head(),
            "activations": target.activations,
            "dtype": target.dtype,
            "executables": target.executables.len(),
            "weights_bytes": manifest.files.get(&target.weights_file).map(|file| file.bytes),
        })).collect::<Vec<_>>(),
        "bundle_bytes": bytes,
        "stages": stages.iter().map(|(name, ms)| json!({"name": name, "ms": ms})).collect::<Vec<_>>(),
    });
    if !compiled.notes.is_empty() {
        report["notes"] = json!(compiled.notes);
    }
    if let Some(evaluated) = &compiled.evaluated {
        report["eval"] = json!({
            "text_tokens": evaluated.text_tokens,
            "tokens": evaluated.tokens,
            "scored": evaluated.scored,
            "window": evaluated.window,
            "stride": evaluated.stride,
            "perplexity_before": evaluated.perplexity_before,
            "perplexity_after": evaluated.perplexity_after,
        });
    }
    report
}

/// Progress on a terminal, and what ran when.
struct Bar {
    bar: ProgressBar,
    record: Mutex<Record>,
    interrupted: Arc<AtomicBool>,
}

struct Record {
    trace: Trace,
    stage: Option<(&'static str, Instant)>,
    /// Those that are over, with their milliseconds: a trace that is full has them no more.
    stages: Vec<(&'static str, f64)>,
}

/// The track of the stages.
const STAGES: &str = "stages";

impl Record {
    fn end_stage(&mut self) {
        if let Some((name, began)) = self.stage.take() {
            let track = self.trace.track(STAGES);
            let length = began.elapsed();
            self.trace.add(track, Label::new(name), began, length);
            self.stages.push((name, length.as_secs_f64() * 1e3));
        }
    }
}

impl Bar {
    fn new(visible: bool) -> Bar {
        let bar = if visible {
            ProgressBar::no_length()
        } else {
            ProgressBar::hidden()
        };
        let template = "{msg:10} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar()),
        );
        Bar {
            bar,
            record: Mutex::new(Record {
                trace: Trace::new(),
                stage: None,
                stages: Vec::new(),
            }),
            interrupted: Arc::default(),
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What ran when, and name and milliseconds of each stage.
    fn finish(self) -> (Trace, Vec<(&'static str, f64)>) {
        self.bar.finish_and_clear();
        self.record().end_stage();
        let record = self.record.into_inner();
        let Record { trace, stages, .. } = record.unwrap_or_else(PoisonError::into_inner);
        (trace, stages)
    }
}

impl Progress for Bar {
    fn stage(&self, name: &'static str) {
        self.bar.set_message(name);
        let mut record = self.record();
        record.end_stage();
        record.stage = Some((name, Instant::now()));
    }

    fn advance(&self, done_bytes: u64, total_bytes: u64) {
        self.bar.set_length(total_bytes);
        self.bar.set_position(done_bytes);
    }

    fn worked(&self, what: Label, began: Instant) {
        let length = began.elapsed();
        let mut record = self.record();
        let track = match rayon::current_thread_index() {
            Some(worker) => record.trace.track(&format!("worker {worker}")),
            None => record.trace.track("main"),
        };
        record.trace.add(track, what, began, length);
    }

    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
