//! The compiler as one page.

use crate::{
    Calibrated, CompileError, CompileOptions, ElementTypes, EvalText, Evaluated, LogitRows, Model,
    OwnFormat, Progress, Stored, TargetChoice, calibrate, cuda, executable_name, interpret,
    pack_weights, passes, plan::KernelPlan, plan_memory, specialise, tokenizer,
};
use kiln_bundle::{
    Activations, Bounds, BundleWriter, DType, Executable, FORMAT_VERSION, Limits, Manifest,
    ModelInfo, Phase, Program, SelfTest, TOKENIZER_FILE, Target, WeightFormat, packing::Layout,
    trace::Label,
};
use kiln_ir::{Graph, WeightId, WeightSource};
use kiln_models::{ModelConfig, Weights, build};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Instant,
};

/// What came of a compilation.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The bundle's manifest.
    pub manifest: Manifest,
    /// Where a text was given to evaluate on.
    pub evaluated: Option<Evaluated>,
    /// What the caller may not expect.
    pub notes: Vec<String>,
}

/// Compiles a model into a bundle at `output`.
///
/// # Errors
/// Any of [`CompileError`]; nothing is left at `output` then.
pub fn compile(
    model: Model,
    output: &Path,
    options: &CompileOptions,
    progress: &dyn Progress,
) -> Result<Compiled, CompileError> {
    let Model {
        config,
        checkpoint,
        tokenizer_dir,
    } = model;
    let limits = options.limits(&config)?;
    let buckets = options.buckets(&limits)?;
    let mut dump = Dump::new(options.dump_ir.as_deref());

    progress.stage("build");
    let graph = build(&config);
    verified("build", &graph)?;
    dump.write("build.ir", &graph)?;
    let weights = Weights::bind(&graph, config.architecture, checkpoint)?;
    let float = WeightFormat::of(config.dtype).unwrap_or(WeightFormat::F32);
    let own = OwnFormat::of(&passes::fuse(graph.clone()), &weights, float);
    let types = options.element_types(&config, own.format)?;
    let gpus = options.cuda_targets();
    // Without a toolchain nothing that follows is of use.
    let toolchain = match gpus.is_empty() || options.emit_only {
        true => None,
        false => Some(cuda::Nvrtc::find()?),
    };
    let tokenizer = tokenizer_dir
        .map(|dir| tokenizer::build(&dir, &config))
        .transpose()?
        .flatten();

    // What is wrong with it is said before anything takes long.
    let text = match &options.eval {
        Some(path) => Some(eval_text(path, tokenizer.as_deref(), options, &limits)?),
        None => None,
    };

    progress.stage("fuse");
    let fused = passes::fuse(graph.clone());
    verified("fuse", &fused)?;
    dump.write("fuse.ir", &fused)?;
    // Most steps show no hidden states, and of these prompts need fewer rows.
    let mut unobserved = graph.clone();
    unobserved.hidden_states.clear();
    let unobserved = passes::select_early(unobserved);
    verified("select_early", &unobserved)?;
    dump.write("prefill-select_early.ir", &unobserved)?;
    let prefill = passes::fuse(unobserved);
    verified("fuse", &prefill)?;
    dump.write("prefill-fuse.ir", &prefill)?;

    let mut exact = Stored::new(&graph, &weights, &types, Calibrated::new());
    let notes = notes(own, &types, options, &exact);
    if let Some(path) = &options.calibrate {
        progress.stage("calibrate");
        let windows = calibration_windows(path, tokenizer.as_deref(), &config)?;
        if calibrate(&graph, &mut exact, &windows, progress)? == 0 {
            return Err(CompileError::Calibrate {
                path: path.clone(),
                problem: "the checkpoint's own integers are kept, and nothing is left to round"
                    .to_owned(),
            });
        }
    }
    let evaluated = match text {
        Some((text_tokens, text)) => {
            progress.stage("evaluate");
            Some(evaluate(
                &graph,
                &weights,
                &exact,
                text_tokens,
                &text,
                progress,
            )?)
        }
        None => None,
    };
    let stored = Stored::new(&fused, &weights, &types, exact.calibrated().clone());

    progress.stage("specialise");
    let mut manifest = manifest(&config, options, limits);
    let formats = cuda::Formats {
        weights: types.weights,
        exceptions: exceptions(&fused, &stored),
    };
    if options.targets.contains(&TargetChoice::Cpu) {
        let (programs, executables) = plan(&fused, &prefill, &buckets, DType::F32)?;
        manifest.targets.push(Target {
            name: "cpu".to_owned(),
            weights: types.weights,
            exceptions: formats.exceptions.clone(),
            tables: types.tables,
            dtype: types.dtype,
            activations: types.activations,
            layout: Layout::Panels,
            weights_file: "weights-cpu.safetensors".to_owned(),
            programs,
            executables,
            images: vec![],
            copy_blocks: None,
        });
    }
    let mut writer = BundleWriter::create(output)?;
    if !gpus.is_empty() {
        let (programs, mut executables) = plan(&fused, &prefill, &buckets, types.dtype)?;
        let (kernels, copy_blocks) = cuda::lower_all(
            &programs,
            &mut executables,
            &manifest.model,
            types.dtype,
            &formats,
        )?;
        progress.stage("kernels");
        let images =
            cuda::build_images(&mut writer, &kernels, &gpus, toolchain.as_ref(), progress)?;
        for (gpu, images) in gpus.iter().zip(images) {
            manifest.targets.push(Target {
                name: gpu.name().to_owned(),
                weights: types.weights,
                exceptions: formats.exceptions.clone(),
                tables: types.tables,
                dtype: types.dtype,
                activations: None,
                layout: Layout::Tiles,
                weights_file: "weights-cuda.safetensors".to_owned(),
                programs: programs.clone(),
                executables: executables.clone(),
                images,
                copy_blocks: Some(copy_blocks.clone()),
            });
        }
    }
    dump.plans(&manifest.targets)?;

    progress.stage("pack");
    let mut packed = BTreeSet::new();
    for target in &manifest.targets {
        // GPUs share one file.
        if packed.insert(&target.weights_file) {
            pack_weights(&mut writer, &manifest, target, &fused, &stored, progress)?;
        }
    }
    if let Some(tokenizer) = tokenizer {
        writer.add_file(TOKENIZER_FILE, tokenizer.as_bytes())?;
    }

    progress.stage("self-test");
    manifest.self_test = self_test(&graph, &exact, &manifest, &types, progress)?;
    let manifest = writer.finish(manifest)?;
    Ok(Compiled {
        manifest,
        evaluated,
        notes,
    })
}

/// What becomes of a checkpoint's integers, where they are not kept and nobody asked for it.
fn notes(
    own: OwnFormat,
    types: &ElementTypes,
    options: &CompileOptions,
    stored: &Stored<'_>,
) -> Vec<String> {
    let mut notes = vec![];
    if options.weights.is_none() {
        notes.extend(own.note);
    }
    match stored.rounded_again() {
        0 => {}
        count => notes.push(format!(
            "{count} matrices that the checkpoint has as other integers are rounded again, to {}",
            types.weights
        )),
    }
    notes
}

/// Tokens that matrices are calibrated on at most, and those of a window.
const CALIBRATION_TOKENS: usize = 8192;
const CALIBRATION_WINDOW: usize = 512;

/// A text cut into windows, each of which begins as the tokenizer begins the text.
fn calibration_windows(
    path: &Path,
    tokenizer: Option<&str>,
    config: &ModelConfig,
) -> Result<Vec<Vec<u32>>, CompileError> {
    let fail = |problem: String| CompileError::Calibrate {
        path: path.to_owned(),
        problem,
    };
    let mut ids = token_ids(path, tokenizer).map_err(fail)?;
    ids.truncate(CALIBRATION_TOKENS);
    let start = ids
        .first()
        .copied()
        .filter(|&id| Some(id) == config.bos_token_id);
    let ids = &ids[usize::from(start.is_some())..];
    if ids.is_empty() {
        return Err(fail("it has no tokens".to_owned()));
    }
    let window = CALIBRATION_WINDOW.min(config.max_positions);
    let windows = ids.chunks((window - usize::from(start.is_some())).max(1));
    Ok(windows
        .map(|window| start.iter().chain(window).copied().collect())
        .collect())
}

/// The tokens of a file; else what is wrong.
fn token_ids(path: &Path, tokenizer: Option<&str>) -> Result<Vec<u32>, String> {
    let tokenizer = tokenizer.ok_or("the model has no tokenizer")?;
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    tokenizer::encode(tokenizer, &text)
}

/// The number of a text's tokens, and the first of them in windows of the bundle's longest sequence.
fn eval_text(
    path: &Path,
    tokenizer: Option<&str>,
    options: &CompileOptions,
    limits: &Limits,
) -> Result<(usize, EvalText), CompileError> {
    let fail = |problem: String| CompileError::Eval {
        path: path.to_owned(),
        problem,
    };
    let ids = token_ids(path, tokenizer).map_err(fail)?;
    let read = &ids[..ids.len().min(options.eval_tokens)];
    if read.len() < 2 {
        return Err(fail("it has fewer than two tokens".to_owned()));
    }
    let window = limits.max_seq_len as usize;
    if window < 2 {
        return Err(fail("--max-seq-len 1 leaves no token a context".to_owned()));
    }
    Ok((ids.len(), EvalText::new(read, window)))
}

/// The text's perplexity by the checkpoint's weights and by those that are stored.
fn evaluate(
    graph: &Graph,
    weights: &Weights,
    stored: &Stored<'_>,
    text_tokens: usize,
    text: &EvalText,
    progress: &dyn Progress,
) -> Result<Evaluated, CompileError> {
    let total = 2 * text.work(graph);
    let mut done = 0;
    let mut advance = |work| {
        done += work;
        progress.advance(done, total);
    };
    let exact = ElementTypes::of(DType::F32, WeightFormat::F32);
    let exact = Stored::new(graph, weights, &exact, Calibrated::new());
    let mut perplexity = |name, weights| {
        let began = Instant::now();
        let perplexity = text.perplexity(graph, weights, progress, &mut advance)?;
        progress.worked(Label::new(name), began);
        Ok::<f64, CompileError>(perplexity)
    };
    Ok(Evaluated {
        text_tokens,
        tokens: text.scored + 1,
        scored: text.scored,
        window: text.window,
        stride: text.stride,
        perplexity_before: perplexity("weights of the checkpoint", &exact)?,
        perplexity_after: perplexity("weights of the bundle", stored)?,
    })
}

/// The programs, and an executable for each bucket. `prefill` is the graph of prompts whose hidden states are not
/// to be seen.
fn plan(
    fused: &Graph,
    prefill: &Graph,
    buckets: &[(Phase, Bounds)],
    activations: DType,
) -> Result<(Vec<Program>, Vec<Executable>), CompileError> {
    let programs = [
        specialise(prefill, Phase::Prefill, activations)?,
        specialise(fused, Phase::Prefill, activations)?,
        specialise(fused, Phase::Decode, activations)?,
    ];
    let executables = buckets
        .iter()
        .map(|&(phase, bounds)| {
            let program = match (phase, bounds.hidden_states) {
                (Phase::Prefill, false) => 0,
                (Phase::Prefill, true) => 1,
                (Phase::Decode, _) => 2,
            };
            let plan = plan_memory(&programs[program], &bounds);
            Executable {
                name: executable_name(phase, &bounds),
                phase,
                program: program as u32,
                bounds,
                arena_bytes: plan.arena_bytes,
                offsets_bytes: plan.offsets_bytes,
                launches: vec![],
                workspace_bytes: 0,
                counters: 0,
            }
        })
        .collect();
    Ok((programs.into(), executables))
}

/// Matrices that are not stored as the others.
fn exceptions(graph: &Graph, stored: &Stored<'_>) -> BTreeMap<String, WeightFormat> {
    // What a matrix is joined from is not stored by itself.
    let parts: BTreeSet<WeightId> = graph
        .weights()
        .filter_map(|(_, weight)| match &weight.source {
            WeightSource::Concat(parts) => Some(parts),
            WeightSource::Load { .. } => None,
        })
        .flatten()
        .copied()
        .collect();
    let matrices = graph
        .weights()
        .filter(|(id, _)| stored.is_matrix(*id) && !parts.contains(id));
    matrices
        .map(|(id, weight)| (weight.name.clone(), stored.format(id)))
        .filter(|(_, format)| *format != stored.common_format())
        .collect()
}

fn verified(pass: &'static str, graph: &Graph) -> Result<(), CompileError> {
    graph
        .verify()
        .map_err(|error| CompileError::Verify { pass, error })
}

fn manifest(config: &ModelConfig, options: &CompileOptions, limits: Limits) -> Manifest {
    let in_vocabulary = |id: &u32| (*id as usize) < config.vocab_size;
    Manifest {
        format_version: FORMAT_VERSION,
        kiln_version: env!("CARGO_PKG_VERSION").to_owned(),
        model: ModelInfo {
            name: options.model_name.clone(),
            architecture: config.architecture.model_type().to_owned(),
            vocab_size: config.vocab_size as u32,
            hidden_size: config.hidden_size as u32,
            layers: config.layers as u32,
            heads: config.heads as u32,
            head_dim: config.head_dim() as u32,
            max_positions: config.max_positions as u32,
            bos_token_id: config.bos_token_id.filter(in_vocabulary),
            eos_token_ids: config
                .eos_token_ids
                .iter()
                .copied()
                .filter(in_vocabulary)
                .collect(),
            pad_token_id: config.pad_token_id.filter(in_vocabulary),
        },
        limits,
        targets: vec![],
        self_test: SelfTest {
            token_ids: vec![],
            top_logits: vec![],
            tolerance: 0.0,
        },
        files: BTreeMap::new(),
    }
}

/// Tokens of the self-test's prompt, and logits that it keeps.
const SELF_TEST_TOKENS: u32 = 4;
const SELF_TEST_LOGITS: usize = 8;

fn self_test(
    graph: &Graph,
    weights: &Stored<'_>,
    manifest: &Manifest,
    types: &ElementTypes,
    progress: &dyn Progress,
) -> Result<SelfTest, CompileError> {
    let vocabulary = manifest.model.vocab_size;
    let tokens = SELF_TEST_TOKENS.min(manifest.limits.max_seq_len);
    // Spread over the vocabulary, so that rows from several panels of the table are read.
    let token_ids: Vec<u32> = (1..=tokens)
        .map(|token| {
            (u64::from(vocabulary - 1) * u64::from(token) / u64::from(SELF_TEST_TOKENS + 1)) as u32
        })
        .collect();
    let evaluation = interpret(graph, weights, &token_ids, LogitRows::Last, progress)?;
    let mut ranked: Vec<(u32, f32)> = (0..).zip(evaluation.logits).collect();
    if let Some(&(id, logit)) = ranked.iter().find(|(_, logit)| !logit.is_finite()) {
        return Err(CompileError::NotFinite {
            token_ids,
            id,
            logit,
        });
    }
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.truncate(SELF_TEST_LOGITS);
    // Only what a target rounds and the interpreter does not: the cache, activations, and f32 sums.
    let tolerance: f32 = match types.dtype {
        DType::F32 | DType::I32 | DType::U8 => 5e-4,
        DType::F16 => 5e-3,
        DType::Bf16 => 4e-2,
    };
    let tolerance = match types.activations {
        None => tolerance,
        Some(Activations::Bf16 | Activations::Int8) => tolerance.max(2e-2),
    };
    Ok(SelfTest {
        token_ids,
        top_logits: ranked,
        tolerance,
    })
}

/// Numbered text files of the stages.
struct Dump<'a> {
    dir: Option<&'a Path>,
    next: usize,
}

impl Dump<'_> {
    fn new(dir: Option<&Path>) -> Dump<'_> {
        Dump { dir, next: 0 }
    }

    fn plans(&mut self, targets: &[Target]) -> Result<(), CompileError> {
        for target in targets {
            for executable in &target.executables {
                let program = &target.programs[executable.program as usize];
                let plan = KernelPlan {
                    program,
                    executable,
                    images: &target.images,
                };
                self.write(&format!("{}-{}.plan", target.name, executable.name), plan)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, name: &str, text: impl std::fmt::Display) -> Result<(), CompileError> {
        let Some(dir) = self.dir else { return Ok(()) };
        let path = dir.join(format!("{:02}-{name}", self.next));
        self.next += 1;
        fs::create_dir_all(dir)
            .and_then(|()| fs::write(&path, text.to_string()))
            .map_err(|source| CompileError::Dump { path, source })
    }
}
