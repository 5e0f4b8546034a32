//! Why a table cannot be made.

use kiln_bundle::Phase;
use kiln_runtime::device::DeviceError;

/// See each.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The user's mistake, or another bundle was meant.
    #[error("{bundle} has no target `{wanted}`, only {}", found.join(", "))]
    NoTarget {
        /// The bundle's model.
        bundle: String,
        /// Asked for.
        wanted: String,
        /// What it has.
        found: Vec<String>,
    },
    /// The user's mistake.
    #[error("target {target} has no executable `{name}`; it has {}", found.join(", "))]
    NoExecutable {
        /// Asked for.
        name: String,
        /// Of what.
        target: String,
        /// What it has.
        found: Vec<String>,
    },
    /// The user's mistake.
    #[error(
        "{executable} takes 1 to {bound} positions of a sequence, not {kv_len}; give another --kv-len, or \
         an --executable for as many"
    )]
    KvLen {
        /// Asked for.
        kv_len: usize,
        /// Of which executable.
        executable: String,
        /// Its bound.
        bound: usize,
    },
    /// The user's mistake.
    #[error(
        "{executable} takes a prompt of 1 to {bound} tokens, not {tokens}; give other --tokens, or an \
         --executable for as many"
    )]
    Tokens {
        /// Asked for.
        tokens: usize,
        /// Of which executable.
        executable: String,
        /// Its bound.
        bound: usize,
    },
    /// The user's mistake.
    #[error("{flag} is for {}, and there is none among {}", phase.name(), executables.join(", "))]
    NoSuchStep {
        /// What was given.
        flag: &'static str,
        /// Of the executables that it is for.
        phase: Phase,
        /// What is to be timed.
        executables: Vec<String>,
    },
    /// The machine's memory.
    #[error(
        "{executable} needs {needed} blocks of the KV cache for {sequences} sequences of {kv_len} \
         positions, and this machine has memory for {found}; give a smaller --kv-len, or an --executable \
         for fewer sequences"
    )]
    KvCache {
        /// Of which executable.
        executable: String,
        /// B.
        sequences: usize,
        /// Positions of each.
        kv_len: usize,
        /// Blocks.
        needed: usize,
        /// Blocks.
        found: usize,
    },
    /// The device, or the bundle for it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A GPU whose datasheet is not known: the user can name one that is alike.
    #[error(
        "the datasheet of {device} is not known, and the rate of its operations is taken from there; name a GPU \
         with the same rate by --gpu: {}",
        known.join(", ")
    )]
    NoDatasheet {
        /// Its name.
        device: String,
        /// GPUs that can be named.
        known: Vec<&'static str>,
    },
    /// The device's.
    #[error("the memory bandwidth of {device} cannot be measured; is there 1 GiB free on it?")]
    NoBandwidth {
        /// Its name.
        device: String,
    },
    /// The device's.
    #[error("{device} does not tell when its kernels ran")]
    NoKernelTimes {
        /// Its name.
        device: String,
    },
    /// A GPU for which no times can be predicted: the user's mistake.
    #[error("times of {target} cannot be predicted for {gpu}; known GPUs that run it: {}", known.join(", "))]
    WrongGpu {
        /// Asked for.
        gpu: String,
        /// What it should run.
        target: String,
        /// GPUs of the target.
        known: Vec<&'static str>,
    },
    /// A bundle with sources alone: the user's mistake.
    #[error(
        "target {target} has no machine code, only sources; compile the bundle where NVRTC is \
         (scripts/fetch-nvrtc)"
    )]
    NoMachineCode {
        /// Of what.
        target: String,
    },
    /// The bundle's files.
    #[error("cannot read {path}: {problem}")]
    File {
        /// Which.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A peer that is to be measured beside: it is not there, or it failed.
    #[error("cannot measure {name}: {problem}")]
    Reference {
        /// Which.
        name: &'static str,
        /// What went wrong.
        problem: String,
    },
}
