//! The CUDA targets: which launches a model gets, what the emitted sources look like, and what becomes
//! of them as machine code.

use crate::sass::{count, nvrtc_folder, opcodes, sass};
use kiln_bundle::{
    Argument, Bounds, CopyLaunch, DType, Executable, KernelSpec, ModelInfo, Phase, Program,
    WeightFormat,
};
use kiln_compiler::{
    CompileOptions, Silent,
    cuda::{
        Cache, CudaTarget, EmittedKernel, Formats, HEADERS, Kernel, LowerError, Nvrtc, build_with,
        lower_all,
    },
    executable_name,
    passes::fuse,
    specialise,
};
use kiln_models::{ModelConfig, build, builtin};
use std::collections::BTreeSet;

/// A model's programs, its executables with their launches, and its kernels.
struct Lowered {
    programs: Vec<Program>,
    executables: Vec<Executable>,
    kernels: Vec<Kernel>,
    copy_blocks: CopyLaunch,
}

fn info(config: &ModelConfig) -> ModelInfo {
    ModelInfo {
        name: String::new(),
        architecture: String::new(),
        vocab_size: config.vocab_size as u32,
        hidden_size: config.hidden_size as u32,
        layers: config.layers as u32,
        heads: config.heads as u32,
        head_dim: config.head_dim() as u32,
        max_positions: config.max_positions as u32,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
    }
}

/// Matrices as `weights`, and the LM head with the token table as int8 where those are integers.
fn formats(programs: &[Program], weights: WeightFormat) -> Formats {
    let heads = programs.iter().filter_map(Program::lm_head);
    let int8: WeightFormat = "int8".parse().unwrap();
    let exceptions = heads.map(|head| (head.weight.clone(), int8));
    Formats {
        weights,
        exceptions: exceptions.filter(|_| weights.int().is_some()).collect(),
    }
}

fn lowered(config: ModelConfig, dtype: DType, options: &CompileOptions) -> Lowered {
    let weights = options.weights.or(WeightFormat::of(dtype)).unwrap();
    let limits = options.limits(&config).unwrap();
    let model = info(&config);
    let graph = fuse(build(&config));
    let programs =
        [Phase::Prefill, Phase::Decode].map(|phase| specialise(&graph, phase, dtype).unwrap());
    let executable = |(phase, bounds): (Phase, Bounds)| Executable {
        name: executable_name(phase, &bounds),
        phase,
        program: u32::from(phase == Phase::Decode),
        bounds,
        arena_bytes: 0,
        offsets_bytes: vec![],
        launches: vec![],
        workspace_bytes: 0,
        counters: 0,
    };
    let buckets = options.buckets(&limits).unwrap();
    let mut executables: Vec<Executable> = buckets.into_iter().map(executable).collect();
    let formats = formats(&programs, weights);
    let (kernels, copy_blocks) =
        lower_all(&programs, &mut executables, &model, dtype, &formats).unwrap();
    Lowered {
        programs: programs.to_vec(),
        executables,
        kernels,
        copy_blocks,
    }
}

/// A model with matrices of integers.
fn integers(name: &str, dtype: DType, weights: &str, max_batch: u32) -> Lowered {
    let options = CompileOptions {
        weights: Some(weights.parse().unwrap()),
        max_batch,
        prefill_buckets: vec![64, 2048],
        ..CompileOptions::default()
    };
    lowered(builtin(name).unwrap(), dtype, &options)
}

fn model(name: &str) -> Lowered {
    lowered(
        builtin(name).unwrap(),
        DType::F16,
        &CompileOptions::default(),
    )
}

impl Lowered {
    fn executable(&self, name: &str) -> &Executable {
        self.executables.iter().find(|e| e.name == name).unwrap()
    }

    fn entries(&self, executable: &str) -> Vec<&str> {
        let launches = &self.executable(executable).launches;
        launches
            .iter()
            .map(|launch| self.kernels[launch.image as usize].entry.as_str())
            .collect()
    }

    fn kernel(&self, entry: &str) -> &Kernel {
        self.kernels.iter().find(|k| k.entry == entry).unwrap()
    }
}

#[test]
fn a_decode_layer_is_five_launches() {
    // opt-350m has its norms behind the blocks, the others before them.
    for name in ["opt-125m", "opt-350m", "gpt2"] {
        let lowered = model(name);
        let layers = builtin(name).unwrap().layers;
        // Above eight sequences, rows are normalised once by a kernel of their own.
        let few = |e: &&Executable| e.phase == Phase::Decode && e.bounds.max_sequences <= 8;
        for executable in lowered.executables.iter().filter(few) {
            let program = &lowered.programs[executable.program as usize];
            assert_eq!(executable.launches.len(), program.kernels.len(), "{name}");
            let outside = program
                .kernels
                .iter()
                .filter(|kernel| match kernel {
                    KernelSpec::Embed { .. } | KernelSpec::Sample { .. } => true,
                    KernelSpec::Linear(linear) => {
                        linear.weight.contains("project") || linear.out == program.logits
                    }
                    _ => false,
                })
                .count();
            assert_eq!(program.kernels.len() - outside, 5 * layers, "{name}");
        }
    }
}

#[test]
fn buckets_and_layers_share_kernels() {
    let lowered = model("opt-125m");
    let small = lowered.entries("decode-b2-kv256");
    for other in ["decode-b8-kv256", "decode-b4-kv2048"] {
        assert_eq!(small, lowered.entries(other));
    }
    let distinct: BTreeSet<&str> = small.iter().copied().collect();
    assert_eq!(distinct.len(), 8, "{distinct:?}");
    assert!(lowered.kernels.len() < 40, "{}", lowered.kernels.len());
}

#[test]
fn grids_cover_the_bounds_and_workspaces_what_is_in_them() {
    let lowered = model("opt-2.7b");
    for executable in &lowered.executables {
        let program = &lowered.programs[executable.program as usize];
        let mut kernels: Vec<u32> = executable.launches.iter().map(|l| l.kernel).collect();
        assert!(kernels.is_sorted());
        kernels.dedup();
        assert_eq!(kernels.len(), program.kernels.len());
        for launch in &executable.launches {
            for argument in &launch.arguments {
                if let Argument::Workspace { offset_bytes } = argument {
                    assert!(*offset_bytes < executable.workspace_bytes);
                }
            }
        }
        if executable.phase == Phase::Decode {
            let bounds = &executable.bounds;
            assert_eq!(executable.counters, bounds.max_sequences * 32);
            let attention = executable
                .launches
                .iter()
                .find(|l| {
                    matches!(
                        program.kernels[l.kernel as usize],
                        KernelSpec::Attention { .. }
                    )
                })
                .unwrap();
            let [heads, sequences, groups] = attention.grid;
            assert_eq!([heads, sequences], [32, bounds.max_sequences]);
            assert!(groups * 4 * 64 >= bounds.max_kv_len);
        }
    }
}

#[test]
fn all_of_a_block_is_copied() {
    let lowered = model("opt-2.7b");
    let CopyLaunch { image, grid_x } = lowered.copy_blocks;
    // 32 layers of keys and values, 2560 wide, of 16 positions, in vectors of 16 bytes.
    let vectors: u32 = 32 * 2 * 2560 * 16 * 2 / 16;
    let kernel = &lowered.kernels[image as usize];
    assert_eq!(kernel.entry, format!("copy_blocks_{vectors}"));
    assert_eq!(grid_x, vectors.div_ceil(kernel.block_threads * 4));
}

#[test]
fn what_the_kernels_cannot_run_is_refused() {
    let mut config = builtin("opt-125m").unwrap();
    let programs = [Phase::Prefill, Phase::Decode]
        .map(|phase| specialise(&fuse(build(&config)), phase, DType::F16).unwrap());
    let formats = formats(&programs, WeightFormat::F16);
    let error = lower_all(&programs, &mut [], &info(&config), DType::F32, &formats).unwrap_err();
    assert!(matches!(error, LowerError::DType(DType::F32)));
    config.heads = 4;
    let error = lower_all(&programs, &mut [], &info(&config), DType::F16, &formats).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the CUDA targets cannot run this model: head_dim is 192; it must be a multiple of 16, up to 128"
    );
}

/// The emitted sources of the kernels that a layer is made of; a change of them is read in the diff.
#[test]
fn sources_read_as_cuda() {
    let opt = model("opt-125m");
    for entry in [
        "embed_tokens_positions_768_f16",
        "linear_norm_768x2304_r8_bias_qkv_f16",
        "attention_decode_h12_d64_f16",
        "linear_3072x768_r8_bias_residual_f32_f16",
        "linear_norm_768x50272_r8_logits_f16",
        "sample_50272_of_1571",
        "rows_norm_768_f16_tokens",
        "gemm_768x3072_b64x64_bias_relu_f16",
        "attention_prefill_h12_d64_f16",
        "copy_blocks_36864",
    ] {
        insta::assert_snapshot!(entry, opt.kernel(entry).source);
    }
    let int = integers("opt-125m", DType::F16, "int4", 8);
    for entry in [
        "embed_tokens_positions_768_int8_f16",
        "linear_3072x768_int4g64_r8_bias_residual_f32_f16",
        "gemm_768x768_int4g64_b64x64_bias_residual_f32_f16",
    ] {
        insta::assert_snapshot!(entry, int.kernel(entry).source);
    }
    let post = model("opt-350m");
    let entry = "linear_4096x1024_r8_bias_normresidual_f32_f16";
    insta::assert_snapshot!(entry, post.kernel(entry).source);
}

/// A kernel may run while the one before it still writes; what that one writes is not constant.
#[test]
fn only_parameters_of_the_model_are_constant() {
    let parameters = [
        "weight",
        "bias",
        "norm_weight",
        "norm_bias",
        "residual_norm_weight",
        "residual_norm_bias",
        "tokens",
        "positions",
    ];
    for name in ["opt-125m", "opt-350m", "gpt2"] {
        for kernel in model(name).kernels {
            let (_, rest) = kernel
                .source
                .split_once(&format!("{}(", kernel.entry))
                .unwrap();
            let (list, _) = rest.split_once(") {").unwrap();
            let pointers = list.split(',').map(str::trim);
            for pointer in pointers.filter(|p| p.starts_with("const") && p.contains("__restrict__"))
            {
                let name = pointer.rsplit(' ').next().unwrap();
                assert!(parameters.contains(&name), "{}: {pointer}", kernel.entry);
            }
        }
    }
}

#[test]
fn the_same_model_gives_the_same_sources() {
    assert_eq!(model("gpt2").kernels, model("gpt2").kernels);
}

/// The template that an entry point comes from, or the first word of its name.
fn kind(entry: &str) -> &str {
    entry.split('_').next().unwrap_or_default()
}

/// Most registers of a thread with which `blocks` blocks of `threads` fit a multiprocessor.
fn register_budget(threads: u32, blocks: u32) -> u32 {
    65536 / (threads * blocks) / 8 * 8
}

/// Compiles kernels and holds reports and machine code against what they are meant to be.
fn check_machine_code(kernels: &[Kernel], targets: &[CudaTarget]) {
    let emitted: Vec<EmittedKernel> = kernels.iter().map(EmittedKernel::from).collect();
    let names: Vec<&str> = targets.iter().map(|target| target.name()).collect();
    let built = build_with(
        &Nvrtc::open(&nvrtc_folder()).unwrap(),
        &Cache::from_env(),
        &emitted,
        &HEADERS,
        &names,
        &Silent,
    );
    let built = built.unwrap();
    assert_eq!(built.len(), kernels.len() * targets.len());
    for (kernel, built) in kernels.iter().cycle().zip(&built) {
        let place = format!("{} for {}", built.entry, built.arch);
        let resources = &built.resources;
        assert_eq!(resources.stack_bytes, 0, "{place} uses local memory");
        let spills = resources.spill_store_bytes + resources.spill_load_bytes;
        assert_eq!(spills, 0, "{place} spills");
        // Blocks of a multiprocessor that hide the latency of its loads.
        let blocks = match kind(&built.entry) {
            "gemm" if built.entry.contains("b128x128") => 1,
            "attention" if built.entry.contains("decode") => 4,
            _ => 2,
        };
        let registers = register_budget(kernel.block_threads, blocks);
        assert!(
            resources.registers <= registers,
            "{place} takes {} registers of {registers}",
            resources.registers
        );
        let smem_bytes = resources.static_smem_bytes + kernel.dynamic_smem_bytes;
        assert!(smem_bytes <= 99 << 10, "{place} takes {smem_bytes} bytes");
    }
    // Disassembling is slow; one target shows what the source asks for.
    for (kernel, built) in kernels.iter().zip(&built) {
        let code = sass(&built.cubin);
        let opcodes = opcodes(&code);
        let has = |family: &str, modifier: &str| count(&opcodes, family, modifier) > 0;
        let place = format!("{} for {}", built.entry, built.arch);
        assert!(
            !has("LDL", "") && !has("STL", ""),
            "{place} has local memory"
        );
        let tensor_cores = has("HMMA", "") || has("HGMMA", "");
        match kind(&kernel.entry) {
            "linear" => {
                assert!(has("LDG", "128"), "{place} has no 128-bit loads");
                assert!(tensor_cores, "{place} has no tensor-core instruction");
            }
            "gemm" | "attention" => {
                assert!(tensor_cores, "{place} has no tensor-core instruction");
            }
            _ => {}
        }
        if kind(&kernel.entry) == "copy" {
            assert_eq!(count(&opcodes, "LDG", "128"), 4, "{place}");
            assert_eq!(count(&opcodes, "STG", "128"), 4, "{place}");
        }
        if built.arch == "sm_90a" {
            // Every kernel waits for the one before, and lets the one behind it start.
            assert!(
                has("ACQBULK", ""),
                "{place} does not wait for its predecessor"
            );
            assert!(
                has("PREEXIT", ""),
                "{place} does not let its successor start"
            );
            if kind(&kernel.entry) == "linear" {
                let first = |family: &str| opcodes.iter().position(|code| code.starts_with(family));
                let (load, wait) = (first("LDG.E.NA.128"), first("ACQBULK"));
                assert!(
                    load.is_some() && load < wait,
                    "{place} waits before it loads weights"
                );
            }
        }
    }
}

#[test]
fn machine_code_of_head_size_80_for_every_target() {
    check_machine_code(&model("opt-2.7b").kernels, &CudaTarget::ALL);
}

#[test]
fn machine_code_of_head_size_128_and_bf16() {
    let options = CompileOptions {
        max_batch: 64,
        prefill_buckets: vec![2048],
        ..CompileOptions::default()
    };
    let lowered = lowered(builtin("opt-6.7b").unwrap(), DType::Bf16, &options);
    check_machine_code(&lowered.kernels, &[CudaTarget::Sm90a]);
}

#[test]
fn machine_code_of_gpt2_and_of_norms_behind_the_blocks() {
    check_machine_code(&model("gpt2").kernels, &[CudaTarget::Sm90a]);
    check_machine_code(&model("opt-350m").kernels, &[CudaTarget::Sm90a]);
}

#[test]
fn machine_code_of_integers() {
    for (name, dtype, weights) in [
        ("opt-125m", DType::F16, "int8"),
        ("opt-125m", DType::F16, "int4"),
        ("opt-125m", DType::Bf16, "int8:g32"),
        ("opt-6.7b", DType::F16, "int4"),
        ("opt-6.7b", DType::Bf16, "int4:g96"),
        ("opt-6.7b", DType::F16, "int8"),
    ] {
        let lowered = integers(name, dtype, weights, 64);
        check_machine_code(&lowered.kernels, &[CudaTarget::Sm90a]);
    }
}
