//! Tables for tests: figures of a made-up machine, with noise.

use crate::table::{
    Ceilings, KernelResources, Machine, ModelTable, Row, Source, StepTable, TABLE_VERSION, Table,
    Times,
};
use fastrand::Rng;
use kiln_bundle::{DType, IntFormat, Phase, WeightFormat};

/// C and the number of layers.
const WIDTH: usize = 768;
const LAYERS: usize = 12;
/// V.
const VOCABULARY: usize = 50272;
const SAMPLES: usize = 25;
const CPU: Ceilings = Ceilings {
    read_gb_per_s: 40.0,
    float_gflop_per_s: 220.0,
    integer_gop_per_s: Some(640.0),
    bf16_pieces_gflop_per_s: None,
    bf16_gflop_per_s: None,
    int8_gop_per_s: None,
};
const GPU: Ceilings = Ceilings {
    read_gb_per_s: 4800.0,
    float_gflop_per_s: 989_000.0,
    integer_gop_per_s: None,
    bf16_pieces_gflop_per_s: None,
    bf16_gflop_per_s: None,
    int8_gop_per_s: None,
};

/// What a CPU measures of opt-125m in int8: KV lengths of one decode bucket, batches, a prefill. The seed
/// changes the noise, which is of 2%, and nothing else.
pub fn table(seed: u64) -> Table {
    let rng = &mut Rng::with_seed(seed);
    let sweep = [16, 256, 512, 1024, 1536, 2048].map(|kv_len| ("decode-b1-kv2048", 1, kv_len));
    let batches = [
        ("decode-b2-kv2048", 2, 256),
        ("decode-b4-kv2048", 4, 256),
        ("decode-b8-kv2048", 8, 256),
    ];
    let mut steps: Vec<StepTable> = sweep
        .into_iter()
        .chain(batches)
        .map(|(name, sequences, kv_len)| {
            step(
                name,
                Phase::Decode,
                [sequences, sequences, kv_len],
                Some(rng),
            )
        })
        .collect();
    steps.push(step(
        "prefill-t512",
        Phase::Prefill,
        [1, 512, 512],
        Some(rng),
    ));
    let machine = Machine {
        device: "cpu (avx2, 2 threads), EPYC".to_owned(),
        threads: Some(2),
        isa: Some("avx2".to_owned()),
        profile: "release".to_owned(),
        datasheet: None,
        ceilings: CPU,
    };
    of_machine(machine, "cpu", Source::Measured, steps)
}

/// What is predicted of the same model for a GPU.
pub fn predicted_table() -> Table {
    let mut steps = vec![
        step("decode-b1-kv2048", Phase::Decode, [1, 1, 2048], None),
        step("prefill-t512", Phase::Prefill, [1, 512, 512], None),
    ];
    for (index, row) in steps.iter_mut().flat_map(|step| &mut step.rows).enumerate() {
        row.resources = Some(KernelResources {
            source: format!("cuda/{}.cu", row.kernel),
            registers: 96 + 8 * index as u32,
            smem_bytes: 49152,
            spill_bytes: 0,
            grid: [132, 1, 1],
            block: [256, 1, 1],
            blocks_per_multiprocessor: 2,
            occupancy: 0.25,
            instructions: vec![("HMMA".to_owned(), 128), ("LDG.128".to_owned(), 32)],
        });
    }
    let machine = Machine {
        device: "H200".to_owned(),
        threads: None,
        isa: None,
        profile: "release".to_owned(),
        datasheet: None,
        ceilings: GPU,
    };
    of_machine(machine, "sm_90a", Source::Predicted, steps)
}

/// The first table as if a GPU had made it: kernels that sum to more than their step.
pub fn table_of_a_gpu() -> Table {
    let mut table = table(1);
    table.machine = Machine {
        device: "cuda:0 (NVIDIA H200, sm_90a)".to_owned(),
        threads: None,
        isa: None,
        profile: "release".to_owned(),
        datasheet: Some("H200".to_owned()),
        ceilings: GPU,
    };
    let model = &mut table.models[0];
    model.target = "sm_90a".to_owned();
    for step in &mut model.steps {
        slow_down(&mut step.time, 0.8);
        step.remainder_us = step.time.median_us - step.kernels_us();
    }
    table
}

/// Makes all samples of a thing longer by a factor.
pub fn slow_down(times: &mut Times, factor: f64) {
    *times = Times::of(times.samples_us.iter().map(|us| us * factor).collect());
}

fn of_machine(machine: Machine, target: &str, source: Source, steps: Vec<StepTable>) -> Table {
    Table {
        version: TABLE_VERSION,
        kiln_version: "0.1.0".to_owned(),
        commit: Some("0123abc".to_owned()),
        made: "2025-01-02T03:04:05Z".to_owned(),
        machine,
        models: vec![ModelTable {
            model: "opt-125m".to_owned(),
            target: target.to_owned(),
            weights: WeightFormat::Int(IntFormat::Int8 { group: None }),
            activations: None,
            dtype: DType::Bf16,
            source,
            steps,
        }],
    }
}

/// Predicted without noise, measured with it. The size is B, T and KV length.
fn step(name: &str, phase: Phase, size: [usize; 3], mut noise: Option<&mut Rng>) -> StepTable {
    let [sequences, tokens, kv_len] = size;
    let ceilings = if noise.is_some() { CPU } else { GPU };
    let linear = |kernel: &str, spec: &str, count: usize, rows: usize, n: usize, k: usize| {
        let spec = format!("{spec} {k} -> {n}");
        let shapes = format!("({rows}, {k}) x ({n}, {k})");
        let bytes = n * k + 4 * rows * (n + k);
        (
            kernel.to_owned(),
            spec,
            shapes,
            "int8",
            count,
            bytes,
            2 * rows * n * k,
        )
    };
    let attention = (
        "attention".to_owned(),
        "attention 12 x 64".to_owned(),
        format!("({tokens}, {WIDTH}) x KV {kv_len}"),
        "bf16",
        LAYERS,
        4 * sequences * kv_len * WIDTH + 8 * tokens * WIDTH,
        4 * tokens * kv_len * WIDTH,
    );
    let embed = (
        "embed".to_owned(),
        "embed token + position".to_owned(),
        format!("({tokens}, {WIDTH})"),
        "int8",
        1,
        9 * tokens * WIDTH,
        tokens * WIDTH,
    );
    let sample = (
        "sample".to_owned(),
        "sample".to_owned(),
        format!("({sequences}, {VOCABULARY})"),
        "f32",
        1,
        4 * sequences * VOCABULARY,
        sequences * VOCABULARY,
    );
    let (up, down) = ("linear + bias + relu", "linear + bias + residual");
    let kernels = [
        embed,
        linear(
            "qkv",
            "layernorm + qkv + bias",
            LAYERS,
            tokens,
            3 * WIDTH,
            WIDTH,
        ),
        attention,
        linear("linear", down, LAYERS, tokens, WIDTH, WIDTH),
        linear("linear", up, LAYERS, tokens, 4 * WIDTH, WIDTH),
        linear("linear", down, LAYERS, tokens, WIDTH, 4 * WIDTH),
        linear(
            "linear",
            "layernorm + linear",
            1,
            sequences,
            VOCABULARY,
            WIDTH,
        ),
        sample,
    ];
    let mut rows: Vec<Row> = kernels
        .into_iter()
        .map(|(kernel, spec, shapes, format, count, bytes, flops)| {
            let (bytes, flops) = (bytes as f64, flops as f64);
            let peak = match format {
                "int8" => ceilings.integer_gop_per_s,
                _ => None,
            };
            let peak = peak.unwrap_or(ceilings.float_gflop_per_s);
            let floor_us = (bytes / ceilings.read_gb_per_s).max(flops / peak) / 1e3;
            Row {
                kernel,
                spec,
                shapes,
                format: format.to_owned(),
                count,
                bytes,
                flops,
                time: times(1.4 * floor_us + 1.0, noise.as_deref_mut()),
                floor_us,
                share_of_step: 0.0,
                references: vec![],
                resources: None,
                prepared_by: vec![],
            }
        })
        .collect();
    let kernels_us: f64 = rows.iter().map(Row::total_us).sum();
    let time = times(1.03 * kernels_us + 5.0, noise);
    for row in &mut rows {
        row.share_of_step = row.total_us() / time.median_us;
    }
    StepTable {
        executable: name.to_owned(),
        phase,
        sequences,
        tokens,
        kv_len,
        logit_rows: sequences,
        floor_us: rows.iter().map(|row| row.count as f64 * row.floor_us).sum(),
        remainder_us: time.median_us - kernels_us,
        rows,
        time,
    }
}

fn times(us: f64, noise: Option<&mut Rng>) -> Times {
    match noise {
        None => Times::predicted(us),
        Some(rng) => Times::of(
            (0..SAMPLES)
                .map(|_| us * (1.0 + 0.02 * rng.f64()))
                .collect(),
        ),
    }
}
