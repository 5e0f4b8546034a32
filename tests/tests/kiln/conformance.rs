//! The conformance suite on emulated CUDA, and on the CPU itself.

use kiln_bundle::{Bundle, DType};
use kiln_compiler::{TargetChoice, cuda::CudaTarget};
use kiln_runtime::device::{CpuDevice, CpuOptions, CudaDevice, CudaOptions, Device};
use kiln_tests::{
    conformance::{Outcome, Subject, accuracy, invariance, subjects},
    emulation::{EmulatedDriver, EmulationOptions},
};
use tempfile::TempDir;

fn compiled(subject: &Subject, dtype: DType) -> (TempDir, Bundle) {
    let dir = tempfile::tempdir().unwrap();
    let targets = vec![TargetChoice::Cpu, TargetChoice::Cuda(CudaTarget::Sm90a)];
    let path = dir.path().join("bundle");
    subject.compile(&path, dtype, targets, true).unwrap();
    let bundle = Bundle::open(&path).unwrap();
    (dir, bundle)
}

fn cpu(bundle: &Bundle) -> CpuDevice {
    let options = CpuOptions {
        threads: Some(2),
        ..CpuOptions::default()
    };
    CpuDevice::load(bundle, &options).unwrap()
}

fn emulated(bundle: &Bundle, seed: u64) -> CudaDevice<EmulatedDriver> {
    let options = EmulationOptions {
        seed,
        ..EmulationOptions::default()
    };
    let driver = EmulatedDriver::new(options);
    let target = &bundle.manifest().targets[1];
    let options = CudaOptions::default();
    CudaDevice::load(bundle, target, driver, &options, &mut |_, _| {}).unwrap()
}

fn expect(subject: &str, outcomes: &[Outcome]) {
    let failed: Vec<String> = outcomes
        .iter()
        .filter(|outcome| !outcome.passed)
        .map(|outcome| format!("{}: {}", outcome.case, outcome.detail))
        .collect();
    assert!(failed.is_empty(), "{subject}:\n{}", failed.join("\n"));
    assert!(!outcomes.is_empty());
}

fn conforms(name: &str, dtype: DType) {
    let subjects = subjects();
    let subject = subjects.iter().find(|s| s.name == name).unwrap();
    let (_dir, bundle) = compiled(subject, dtype);
    let mut device = emulated(&bundle, 0);
    let mut reference = cpu(&bundle);
    let outcomes = accuracy(&mut reference, &mut device, &bundle, dtype).unwrap();
    for outcome in &outcomes {
        println!("{name}: {}: {}", outcome.case, outcome.detail);
    }
    expect(name, &outcomes);
    expect(name, &invariance(&mut device, &bundle).unwrap());
}

#[test]
fn the_cpu_itself() {
    for name in ["opt-d64", "opt-post-d64", "gpt2-d64"] {
        let subjects = subjects();
        let subject = subjects.iter().find(|s| s.name == name).unwrap();
        let (_dir, bundle) = compiled(subject, DType::F16);
        let outcomes = accuracy(&mut cpu(&bundle), &mut cpu(&bundle), &bundle, DType::F16);
        expect(name, &outcomes.unwrap());
    }
}

#[test]
fn opt_with_heads_of_64_in_f16() {
    conforms("opt-d64", DType::F16);
}

#[test]
fn opt_with_heads_of_80_in_bf16() {
    conforms("opt-d80", DType::Bf16);
}

#[test]
fn opt_with_heads_of_128_in_f16() {
    conforms("opt-d128", DType::F16);
}

#[test]
fn opt_with_norms_behind_the_blocks_in_f16() {
    conforms("opt-post-d64", DType::F16);
}

#[test]
fn gpt2_in_bf16() {
    conforms("gpt2-d64", DType::Bf16);
}

#[test]
fn int8_in_f16() {
    conforms("opt-int8", DType::F16);
}

#[test]
fn int8_in_bf16() {
    conforms("opt-int8", DType::Bf16);
}

#[test]
fn groups_of_int8_in_f16() {
    conforms("opt-post-int8", DType::F16);
}

#[test]
fn groups_of_int8_in_bf16() {
    conforms("opt-post-int8", DType::Bf16);
}

#[test]
fn int4_in_f16() {
    conforms("opt-int4", DType::F16);
}

#[test]
fn int4_in_bf16() {
    conforms("gpt2-int4", DType::Bf16);
}

#[test]
fn the_cpu_keeps_to_its_own_rules() {
    let subjects = subjects();
    let (_dir, bundle) = compiled(&subjects[0], DType::F16);
    let mut device: Box<dyn Device> = Box::new(cpu(&bundle));
    expect("cpu", &invariance(device.as_mut(), &bundle).unwrap());
}
