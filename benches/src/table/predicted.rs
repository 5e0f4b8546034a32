//! What is known of a CUDA target without a GPU: resources from the compiler, instructions from the
//! machine code, and times that are predicted.

use super::error::TableError;
use super::kinds::{Kind, kinds};
use super::measure::step_table;
use super::steps::StepPlan;
use crate::table::{Ceilings, KernelResources, Row, StepTable, Times};
use kiln_bundle::{Bundle, Executable, Image, Launch, Target};
use kiln_compiler::{GPUS, Gpu, Prediction, cuda::Resources, predict_kernels};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs, process::Command};

const WARP_THREADS: u32 = 32;

/// The GPU that times are predicted for: the one named, else the one that stands for the target.
///
/// # Errors
/// [`TableError::WrongGpu`].
pub fn gpu_for(target: &Target, named: Option<&str>) -> Result<Gpu, TableError> {
    let gpu = match named {
        Some(name) => Gpu::named(name).filter(|gpu| gpu.target.name() == target.name),
        None => Gpu::of_target(&target.name),
    };
    gpu.ok_or_else(|| TableError::WrongGpu {
        gpu: named.unwrap_or("any GPU").to_owned(),
        target: target.name.clone(),
        known: GPUS
            .iter()
            .filter(|gpu| gpu.target.name() == target.name)
            .map(|gpu| gpu.name)
            .collect(),
    })
}

/// The GPU whose datasheet is that of a device: the one named, else the one that the driver's name is of.
///
/// # Errors
/// [`TableError::NoDatasheet`].
pub fn datasheet_of(device: &str, named: Option<&str>) -> Result<Gpu, TableError> {
    /// Behind the name of a GPU these make another of it, with other rates.
    const VARIANTS: [&str; 6] = ["PCIe", "NVL", "Ti", "SUPER", "Laptop", "D"];
    let words = device.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let is_in = |list: &[&str], word: &str| list.iter().any(|has| has.eq_ignore_ascii_case(word));
    // `RTX 4090` is RTX4090 here.
    let pairs: Vec<String> = words.windows(2).map(<[&str]>::concat).collect();
    let pairs: Vec<&str> = pairs.iter().map(String::as_str).collect();
    let is_variant = words.iter().any(|word| is_in(&VARIANTS, word));
    let found = match named {
        Some(name) => Gpu::named(name),
        None => GPUS
            .into_iter()
            .find(|gpu| !is_variant && (is_in(&words, gpu.name) || is_in(&pairs, gpu.name))),
    };
    found.ok_or_else(|| TableError::NoDatasheet {
        device: device.to_owned(),
        known: GPUS.iter().map(|gpu| gpu.name).collect(),
    })
}

/// What the datasheet says.
pub fn ceilings(gpu: &Gpu) -> Ceilings {
    Ceilings {
        read_gb_per_s: gpu.gb_per_s,
        float_gflop_per_s: gpu.tflops * 1e3,
        integer_gop_per_s: None,
        bf16_pieces_gflop_per_s: None,
        bf16_gflop_per_s: None,
        int8_gop_per_s: None,
    }
}

/// Predicts the steps of a CUDA target.
///
/// # Errors
/// [`TableError::NoMachineCode`], [`TableError::File`].
pub fn predict_steps(
    bundle: &Bundle,
    target: &Target,
    plans: &[StepPlan],
    gpu: &Gpu,
) -> Result<Vec<StepTable>, TableError> {
    let reports = Reports::read(bundle, target)?;
    let mut disassembly = Disassembly::new(bundle.dir());
    let steps = plans.iter().map(|plan| {
        let executable = &target.executables[plan.executable];
        let program = &target.programs[executable.program as usize];
        let predictions = predict_kernels(target, executable, &plan.size(), gpu);
        let predictions = predictions.ok_or_else(|| {
            let problem = format!("{} has no program", executable.name);
            unreadable(bundle.dir(), &problem)
        })?;
        let total: Prediction = predictions.iter().copied().sum();
        let launches = |index: usize| -> Vec<(u32, [u32; 3])> {
            launches_of(executable, index)
                .map(|launch| (launch.image, launch.grid))
                .collect()
        };
        let mut rows = Vec::new();
        for kind in kinds(target, program, plan, launches) {
            let first = kind.kernels[0];
            let prediction = predictions[first];
            let mut resources = Vec::new();
            for launch in launches_of(executable, first) {
                let image = &target.images[launch.image as usize];
                let report = reports.of(&image.entry)?;
                let mut resources_of = resources_of(launch, image, report, &target.name);
                resources_of.instructions = disassembly.instructions(image);
                resources.push(resources_of);
            }
            rows.push(row(&kind, &prediction, total.total_us(), resources));
        }
        let time = Times::predicted(total.total_us());
        let kernels_us: f64 = rows.iter().map(Row::total_us).sum();
        // Nothing but what sums are rounded by, where every launch belongs to a kernel.
        let rest = time.median_us - kernels_us;
        let remainder_us = if rest > 1e-6 * kernels_us { rest } else { 0.0 };
        Ok(step_table(executable, plan, rows, time, remainder_us))
    });
    steps.collect()
}

fn launches_of(executable: &Executable, kernel: usize) -> impl Iterator<Item = &Launch> {
    let all = executable.launches.iter();
    all.filter(move |launch| launch.kernel as usize == kernel)
}

fn row(
    kind: &Kind,
    prediction: &Prediction,
    step_us: f64,
    mut launches: Vec<KernelResources>,
) -> Row {
    let count = kind.kernels.len();
    let resources = launches.pop();
    Row {
        kernel: kind.kernel.to_owned(),
        spec: kind.spec.clone(),
        shapes: kind.shapes.clone(),
        format: kind.format.clone(),
        count,
        bytes: prediction.bytes,
        flops: prediction.flops,
        time: Times::predicted(prediction.total_us()),
        floor_us: prediction.floor_us,
        share_of_step: prediction.total_us() * count as f64 / step_us,
        references: Vec::new(),
        resources,
        prepared_by: launches,
    }
}

fn resources_of(
    launch: &Launch,
    image: &Image,
    report: &Resources,
    target: &str,
) -> KernelResources {
    let blocks =
        report.blocks_per_multiprocessor(image.block_threads, image.dynamic_smem_bytes, target);
    // Blocks of 512 threads that need nothing else fill a multiprocessor of any target.
    let full = Resources::default().blocks_per_multiprocessor(512, 0, target) * 512;
    let threads = blocks * image.block_threads.next_multiple_of(WARP_THREADS);
    KernelResources {
        source: image.source.clone(),
        registers: report.registers,
        smem_bytes: report
            .static_smem_bytes
            .saturating_add(image.dynamic_smem_bytes),
        spill_bytes: report
            .spill_store_bytes
            .saturating_add(report.spill_load_bytes),
        grid: launch.grid,
        block: [image.block_threads, 1, 1],
        blocks_per_multiprocessor: blocks,
        occupancy: f64::from(threads) / f64::from(full.max(1)),
        instructions: Vec::new(),
    }
}

/// What the compiler said of each entry point.
struct Reports {
    path: PathBuf,
    by_entry: BTreeMap<String, Resources>,
}

impl Reports {
    fn read(bundle: &Bundle, target: &Target) -> Result<Reports, TableError> {
        let name = format!("cuda/{}/resources.json", target.name);
        if !bundle.manifest().files.contains_key(&name) {
            return Err(TableError::NoMachineCode {
                target: target.name.clone(),
            });
        }
        let path = bundle.dir().join(name);
        let text = fs::read(&path).map_err(|error| unreadable(&path, &error))?;
        let by_entry = serde_json::from_slice(&text).map_err(|error| unreadable(&path, &error))?;
        Ok(Reports { path, by_entry })
    }

    fn of(&self, entry: &str) -> Result<&Resources, TableError> {
        let found = self.by_entry.get(entry);
        found.ok_or_else(|| unreadable(&self.path, &format!("it has no entry {entry:?}")))
    }
}

fn unreadable(path: &Path, problem: &dyn std::fmt::Display) -> TableError {
    TableError::File {
        path: path.display().to_string(),
        problem: problem.to_string(),
    }
}

/// Counts the instructions of cubins, each once, where NVIDIA's disassembler is there.
struct Disassembly {
    dir: PathBuf,
    tool: Option<PathBuf>,
    known: BTreeMap<String, Vec<(String, u32)>>,
}

impl Disassembly {
    fn new(dir: &Path) -> Disassembly {
        Disassembly {
            dir: dir.to_owned(),
            tool: find_nvdisasm(),
            known: BTreeMap::new(),
        }
    }

    /// Of an image, the most frequent first; none where they cannot be told.
    fn instructions(&mut self, image: &Image) -> Vec<(String, u32)> {
        let (Some(tool), Some(cubin)) = (&self.tool, &image.cubin) else {
            return Vec::new();
        };
        let read = || {
            let output = Command::new(tool)
                .arg("-c")
                .arg(self.dir.join(cubin))
                .output();
            let output = output.ok().filter(|output| output.status.success());
            output.map_or_else(Vec::new, |output| {
                count(&String::from_utf8_lossy(&output.stdout))
            })
        };
        self.known.entry(cubin.clone()).or_insert_with(read).clone()
    }
}

/// On the search path, in the toolkit of `CUDA_HOME`, or where `scripts/fetch-nvrtc --tools` puts it: in
/// the folder `target/nvrtc` of the current directory or around this program.
fn find_nvdisasm() -> Option<PathBuf> {
    let search = env::var_os("PATH").unwrap_or_default();
    let toolkit = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let program = env::current_exe().unwrap_or_default();
    let folders = env::split_paths(&search).chain(toolkit);
    let folders = folders.chain([PathBuf::from("target/nvrtc/bin")]);
    let around = program.ancestors().map(|folder| folder.join("nvrtc/bin"));
    let mut tools = folders.chain(around).map(|folder| folder.join("nvdisasm"));
    tools.find(|tool| tool.is_file())
}

/// Instructions of a disassembly by kind: the operation, and for loads and stores of more than a word
/// how wide they are.
fn count(disassembly: &str) -> Vec<(String, u32)> {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for line in disassembly.lines() {
        // "        /*00b0*/              @P0 LDG.E.128 R8, desc[UR4][R2.64] ;"
        let Some((address, instruction)) = line
            .trim()
            .strip_prefix("/*")
            .and_then(|line| line.split_once("*/"))
        else {
            continue;
        };
        if !address.chars().all(|c| c.is_ascii_hexdigit()) {
            continue;
        }
        let mut words = instruction.split_whitespace();
        let Some(opcode) = words.find(|word| !word.starts_with('@')) else {
            continue;
        };
        let mut parts = opcode.trim_end_matches(';').split('.');
        let operation = parts.next().unwrap_or_default();
        let width = parts.find(|part| matches!(*part, "64" | "128"));
        let kind = match width {
            Some(width) if operation.starts_with("LD") || operation.starts_with("ST") => {
                format!("{operation}.{width}")
            }
            _ => operation.to_owned(),
        };
        *counts.entry(kind).or_default() += 1;
    }
    counts.remove("NOP");
    let mut counts: Vec<(String, u32)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasheets_are_found_by_the_drivers_names() {
        let found = |device: &str, named| datasheet_of(device, named).map(|gpu| gpu.name);
        for (device, expect) in [
            ("cuda:0 (NVIDIA H200, sm_90a)", "H200"),
            ("cuda:1 (NVIDIA H100 80GB HBM3, sm_90a)", "H100"),
            ("cuda:0 (NVIDIA A100-SXM4-80GB, sm_80)", "A100"),
            ("cuda:0 (NVIDIA L40S, sm_89)", "L40S"),
            ("cuda:0 (NVIDIA L4, sm_89)", "L4"),
            ("cuda:0 (NVIDIA GeForce RTX 4090, sm_89)", "RTX4090"),
        ] {
            assert_eq!(found(device, None).unwrap(), expect);
        }
        for device in [
            "NVIDIA H100 PCIe",
            "NVIDIA H100 NVL",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA GeForce RTX 3090 Ti",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA L40",
        ] {
            let message = found(device, None).unwrap_err().to_string();
            assert!(
                message.contains(device) && message.contains("--gpu: A100, A40"),
                "{message}"
            );
            assert_eq!(found(device, Some("h100")).unwrap(), "H100");
        }
        assert!(found("cuda:0 (NVIDIA H200, sm_90a)", Some("H300")).is_err());
    }

    #[test]
    fn instructions_are_counted_by_kind() {
        let text = "\
.section .text.k
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0060*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0070*/                   NOP;
";
        let expect = [("HMMA", 3), ("LDG.128", 2), ("LDG", 1), ("MOV", 1)];
        assert_eq!(count(text), expect.map(|(kind, n)| (kind.to_owned(), n)));
    }
}
