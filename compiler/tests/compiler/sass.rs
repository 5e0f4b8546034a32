//! Reads the machine code of cubins with NVIDIA's disassembler, of `scripts/fetch-nvrtc --tools`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What `scripts/fetch-nvrtc` fills.
pub fn nvrtc_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc")
}

/// The instructions of a cubin, one a line, without addresses:
/// `@P0 LDG.E.NA.128.CONSTANT R4, desc[UR4][R2.64] ;`.
pub fn sass(cubin: &[u8]) -> String {
    let nvdisasm = nvrtc_folder().join("bin/nvdisasm");
    assert!(
        nvdisasm.is_file(),
        "no {}: run scripts/fetch-nvrtc --tools",
        nvdisasm.display()
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kernel.cubin");
    fs::write(&file, cubin).unwrap();
    let output = Command::new(nvdisasm).arg("-c").arg(file).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    let text = String::from_utf8(output.stdout).unwrap();
    // "        /*00b0*/                   LDG.E R8, desc[UR4][R2.64] ;"
    let instructions = text.lines().filter_map(|line| {
        let (address, instruction) = line.trim().strip_prefix("/*")?.split_once("*/")?;
        let address = address.chars().all(|c| c.is_ascii_hexdigit());
        address.then(|| format!("{}\n", instruction.trim()))
    });
    instructions.collect()
}

/// The operation of each instruction: `LDG.E.NA.128.CONSTANT`.
pub fn opcodes(sass: &str) -> Vec<&str> {
    let instructions = sass.lines().map(|line| {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        let opcode = if first.starts_with('@') {
            words.next()
        } else {
            Some(first)
        };
        opcode.unwrap_or("").trim_end_matches(';')
    });
    instructions.collect()
}

/// How many operations begin with `family` (`LDG`) and have `modifier` (`128`; empty for any).
pub fn count(opcodes: &[&str], family: &str, modifier: &str) -> usize {
    let matching = opcodes.iter().filter(|opcode| {
        let mut parts = opcode.split('.');
        parts.next() == Some(family) && (modifier.is_empty() || parts.any(|part| part == modifier))
    });
    matching.count()
}
