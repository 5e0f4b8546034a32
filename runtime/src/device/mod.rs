//! What the engine needs of a device.
//!
//! A device holds the weights, the KV cache and a few *slots*: one for each sequence that may run
//! at a time. The engine hands it [`Step`]s: which executable, and for each sequence its new tokens,
//! its cached length, its KV blocks and what is wanted of it. A step is *submitted* and later
//! *collected*, and steps take effect in the order of their submission.
//!
//! The token that a step chooses for a sequence stays in the sequence's slot on the device. A decode
//! step therefore says "feed what the slot holds" ([`Tokens::LastSampled`]), and a device that works
//! behind the host's back ([`Device::pipeline_depth`] above 0) gets the next step before the host
//! has read the token of the last one.

mod check;
mod choose;
mod cpu;
pub mod cuda;
mod memory;

pub use choose::{DeviceChoice, LoadOptions, load};
pub use cpu::{CpuDevice, CpuOptions};
pub use cuda::{CudaDevice, CudaOptions};
pub use memory::available_bytes;

use crate::kv::BlockCopy;
use crate::record::StepPart;
use crate::sampling::{BeamDraw, Continuation, Draw, DrawParams, Rules};
use cuda::{DriverError, NvidiaGpu};
use kiln_bundle::{BundleError, Executable};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs the executables of one target of a bundle.
pub trait Device: Send {
    /// What the device offers.
    fn facts(&self) -> &DeviceFacts;

    /// What it can run, as the bundle's target lists it.
    fn executables(&self) -> &[Executable];

    /// Steps that may be in flight while the host prepares another: 0 where a step is done when
    /// `submit` returns.
    fn pipeline_depth(&self) -> usize;

    /// Whether slots keep the tokens of their sequences, so that a draw that reads them
    /// ([`Rules::read_history`]) can follow one that is in flight.
    fn keeps_histories(&self) -> bool {
        false
    }

    /// Starts a step. The device takes what it needs of `step` before it returns.
    ///
    /// # Errors
    /// A step outside its executable's bounds, or a failure of the device.
    fn submit(&mut self, step: &Step) -> Result<StepId, DeviceError>;

    /// What the last `submit` did when, of that which is a part of its own; nothing where
    /// [`Observe::times`] was not asked for.
    fn submit_parts(&self) -> &[SubmitPart] {
        &[]
    }

    /// Waits for a submitted step. Steps are collected in the order of their submission, each once.
    ///
    /// # Errors
    /// A failure of the device, or an id that is not the oldest one in flight.
    fn collect(&mut self, id: StepId) -> Result<StepOutput, DeviceError>;

    /// Whether a step whose kernels are timed runs as any other, so that a run may be recorded with them.
    fn times_in_passing(&self) -> bool {
        false
    }

    /// Measures how fast the device's memory is, in GB/s (10^9 bytes a second): the yardstick of
    /// everything that is bound by it. A CPU reads, a GPU copies, and bytes read and bytes written
    /// count. None where it cannot be measured.
    fn read_bandwidth(&mut self) -> Option<f64> {
        None
    }
}

/// What a loaded device offers.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// For people: what it runs on.
    pub name: String,
    /// Name of the bundle's target that it runs.
    pub target: String,
    /// The GPU's number, as the driver counts; none of a CPU.
    pub gpu: Option<u32>,
    /// Sequences that may hold a slot at a time.
    pub slots: u32,
    /// Blocks of the KV cache.
    pub kv_blocks: u32,
    /// What it holds in memory.
    pub memory: MemoryNeed,
    /// Bytes that were free before it was loaded, where the system tells.
    pub available_bytes: Option<u64>,
}

/// What a device holds in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights; the CPU maps them.
    pub weight_bytes: u64,
    /// Activations.
    pub arena_bytes: u64,
    /// The KV cache.
    pub kv_bytes: u64,
}

impl MemoryNeed {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes
            .saturating_add(self.arena_bytes)
            .saturating_add(self.kv_bytes)
    }
}

/// Names a step in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// When a device did a part of `submit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubmitPart {
    /// [`StepPart::Launch`] or [`StepPart::Sampling`].
    pub part: StepPart,
    /// From when to when.
    pub ran: Range<Instant>,
}

/// One run of an executable.
///
/// The lists of all sequences are kept end to end, so that a step that is filled again and again
/// stops allocating, and a device copies a few arrays and not one for each sequence.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Index of the executable.
    pub executable: usize,
    /// What the host wants to see besides the sampled tokens.
    pub observe: Observe,
    /// Blocks of the KV cache that are copied, one after the other, before anything else is done.
    pub copies: Vec<BlockCopy>,
    sequences: Vec<Entry>,
    token_ids: Vec<u32>,
    block_tables: Vec<u32>,
    suppressed_ids: Vec<u32>,
    histories: Vec<u32>,
}

/// What a step reports besides its sampled tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observe {
    /// Every row of logits that the step computes.
    pub logits: bool,
    /// Every row of the L+1 hidden states.
    pub hidden_states: bool,
    /// When the parts of `submit` run, and each kernel where that costs it nothing.
    pub times: bool,
    /// How long each kernel takes, where the device can tell. On a GPU kernels then run one after another,
    /// and the step is waited for.
    pub kernel_times: bool,
}

impl Observe {
    /// Whether there are any values.
    pub fn is_any(self) -> bool {
        self.logits || self.hidden_states
    }
}

/// A sequence's part in a step.
#[derive(Clone, Copy, Debug)]
pub struct SequenceStep<'a> {
    /// Its slot, no other sequence's.
    pub slot: u32,
    /// What it is fed.
    pub tokens: Tokens<'a>,
    /// P: positions already in the KV cache.
    pub past_len: u32,
    /// Blocks of the KV cache, enough for P and the new tokens.
    pub block_table: &'a [u32],
    /// Which of the new tokens' logits are computed.
    pub logit_rows: LogitRows,
    /// How the next token, or the continuations of a beam, are chosen from the last of these rows; none
    /// chooses nothing.
    pub draw: Option<Draw<'a>>,
}

/// New tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens<'a> {
    /// These.
    Ids(&'a [u32]),
    /// The one that the slot's last draw chose.
    LastSampled,
}

impl Tokens<'_> {
    /// How many there are.
    #[allow(
        clippy::len_without_is_empty,
        reason = "a step of a sequence is never empty"
    )]
    pub fn len(&self) -> usize {
        match self {
            Tokens::Ids(ids) => ids.len(),
            Tokens::LastSampled => 1,
        }
    }
}

/// Which rows of logits a sequence wants of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: more of the prompt is to come.
    None,
    /// That of its last new token.
    Last,
    /// Those of all its new tokens.
    All,
}

impl LogitRows {
    /// Rows for `new_tokens` tokens.
    pub fn count(self, new_tokens: usize) -> usize {
        match self {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => new_tokens,
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    slot: u32,
    /// None: the slot's last sampled.
    token_ids: Option<Range<usize>>,
    past_len: u32,
    block_table: Range<usize>,
    logit_rows: LogitRows,
    draw: Option<EntryDraw>,
}

#[derive(Clone, Debug)]
struct EntryDraw {
    params: DrawParams,
    index: u32,
    suppressed_ids: Range<usize>,
    rules: Option<Arc<Rules>>,
    history: Range<usize>,
    beam: Option<BeamDraw>,
}

impl Step {
    /// Makes it an empty step of an executable, its memory kept.
    pub fn clear(&mut self) {
        self.observe = Observe::default();
        self.copies.clear();
        self.sequences.clear();
        self.token_ids.clear();
        self.block_tables.clear();
        self.suppressed_ids.clear();
        self.histories.clear();
    }

    /// Adds a sequence.
    pub fn push(&mut self, sequence: &SequenceStep<'_>) {
        let token_ids = match sequence.tokens {
            Tokens::Ids(ids) => Some(append(&mut self.token_ids, ids)),
            Tokens::LastSampled => None,
        };
        let block_table = append(&mut self.block_tables, sequence.block_table);
        let draw = sequence.draw.map(|draw| EntryDraw {
            params: draw.params,
            index: draw.index,
            suppressed_ids: append(&mut self.suppressed_ids, draw.suppressed_ids),
            rules: draw.rules.cloned(),
            history: append(&mut self.histories, draw.history),
            beam: draw.beam,
        });
        self.sequences.push(Entry {
            slot: sequence.slot,
            token_ids,
            past_len: sequence.past_len,
            block_table,
            logit_rows: sequence.logit_rows,
            draw,
        });
    }

    /// The sequences, in the order in which they were added.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = SequenceStep<'_>> {
        self.sequences.iter().map(|entry| SequenceStep {
            slot: entry.slot,
            tokens: match &entry.token_ids {
                Some(range) => Tokens::Ids(&self.token_ids[range.clone()]),
                None => Tokens::LastSampled,
            },
            past_len: entry.past_len,
            block_table: &self.block_tables[entry.block_table.clone()],
            logit_rows: entry.logit_rows,
            draw: entry.draw.as_ref().map(|draw| Draw {
                params: draw.params,
                index: draw.index,
                suppressed_ids: &self.suppressed_ids[draw.suppressed_ids.clone()],
                rules: draw.rules.as_ref(),
                history: &self.histories[draw.history.clone()],
                beam: draw.beam,
            }),
        })
    }

    /// What the step asks of its executable.
    pub fn extent(&self) -> Extent {
        let mut extent = Extent {
            hidden_states: self.observe.hidden_states,
            ..Extent::default()
        };
        for sequence in self.sequences() {
            extent.add(
                sequence.past_len as usize,
                sequence.tokens.len(),
                sequence.logit_rows,
            );
        }
        extent
    }
}

fn append(all: &mut Vec<u32>, items: &[u32]) -> Range<usize> {
    let start = all.len();
    all.extend_from_slice(items);
    start..all.len()
}

/// The sizes of a step, to be held against an executable's bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// T.
    pub tokens: usize,
    /// B.
    pub sequences: usize,
    /// The longest past plus new positions of a sequence.
    pub kv_len: usize,
    /// R.
    pub logit_rows: usize,
    /// Whether hidden states are to be seen.
    pub hidden_states: bool,
}

impl Extent {
    /// Counts one more sequence.
    pub fn add(&mut self, past_len: usize, new_tokens: usize, rows: LogitRows) {
        self.tokens += new_tokens;
        self.sequences += 1;
        self.kv_len = self.kv_len.max(past_len + new_tokens);
        self.logit_rows += rows.count(new_tokens);
    }

    /// Whether it keeps to `bounds`.
    pub fn fits(&self, bounds: &kiln_bundle::Bounds) -> bool {
        self.tokens <= bounds.max_tokens as usize
            && self.sequences <= bounds.max_sequences as usize
            && self.kv_len <= bounds.max_kv_len as usize
            && self.logit_rows <= bounds.max_logit_rows as usize
            && (bounds.hidden_states || !self.hidden_states)
    }
}

/// What a step left behind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// For each sequence with a draw of a token, in order: the token chosen, or none where its row of
    /// logits held a value that is no finite number.
    pub tokens: Vec<Option<u32>>,
    /// For each with a draw of continuations, in order: those, best first; none where its row held a
    /// value that is no finite number.
    pub continuations: Vec<Vec<Continuation>>,
    /// (R, V), where observed.
    pub logits: Vec<f32>,
    /// (L+1, T, C), where observed.
    pub hidden_states: Vec<f32>,
    /// One for each kernel of the program, in its order, where observed and known.
    pub kernel_times: Vec<KernelTime>,
}

/// When a kernel ran. On a GPU it is from one event to the next, so that its launches are part of it,
/// and no other kernel hides them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelTime {
    /// From the beginning of the step on the device.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

/// Why a device cannot be loaded or a step not run.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The bundle's files.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The bundle was compiled for other devices: the user's mistake.
    #[error(
        "this bundle has no executables for `{wanted}`; it was compiled for {}. \
         Compile it with `--target {wanted}`",
        found.join(", ")
    )]
    NoTarget {
        /// The target looked for.
        wanted: &'static str,
        /// The targets of the bundle.
        found: Vec<String>,
    },
    /// The machine, or its GPU, is too small.
    #[error(
        "not enough memory on {place}: {} needed ({} weights, {} activations, {} KV cache for one sequence of \
         {max_seq_len} positions), {} available. Compile with a smaller --max-seq-len or --weights, \
         or free some memory",
        mib(need.total_bytes()), mib(need.weight_bytes), mib(need.arena_bytes), mib(need.kv_bytes),
        mib(*available_bytes)
    )]
    Memory {
        /// Where: this machine, or the GPU.
        place: String,
        /// The least that it takes.
        need: MemoryNeed,
        /// What the system says is free.
        available_bytes: u64,
        /// Positions of the one sequence counted.
        max_seq_len: u32,
    },
    /// A KV cache was asked for that cannot hold a sequence: the user's mistake.
    #[error(
        "a KV cache of {} is too small: one sequence of {max_seq_len} positions takes {}",
        mib(*asked_bytes), mib(*needed_bytes)
    )]
    KvCacheTooSmall {
        /// Size asked for.
        asked_bytes: u64,
        /// The least.
        needed_bytes: u64,
        /// Positions of a full sequence.
        max_seq_len: u32,
    },
    /// The system refuses memory or threads that seemed to be there.
    #[error("the system refuses {what}: {source}")]
    Refused {
        /// What was asked for.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bundle asks for something that this device does not do.
    #[error("the bundle's plan for `{target}` cannot be run: {problem}")]
    Plan {
        /// The target.
        target: String,
        /// What was found.
        problem: String,
    },
    /// A GPU or its driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// There is no such GPU: the user's mistake.
    #[error("there is no GPU cuda:{ordinal}: this machine has {}", list(found))]
    NoGpu {
        /// The one asked for.
        ordinal: u32,
        /// Those that there are.
        found: Vec<NvidiaGpu>,
    },
    /// The bundle was compiled for other GPUs: the user's mistake.
    #[error(
        "this bundle has no executables for {gpu}; it was compiled for {}. {}",
        found.join(", "), advice(gpu)
    )]
    WrongGpu {
        /// The GPU.
        gpu: NvidiaGpu,
        /// The targets of the bundle.
        found: Vec<String>,
    },
    /// The bundle was compiled for nothing that this machine has: the user's mistake.
    #[error(
        "nothing here runs this bundle: it was compiled for {}, and this machine has a cpu and {}. \
         Compile it with `--target cpu`{}",
        found.join(", "),
        gpus.as_ref().map_or_else(|error| format!("no usable GPU ({error})"), |gpus| list(gpus)),
        gpus.iter().flatten().filter_map(target_for).map(|t| format!(" or `--target {t}`")).next()
            .unwrap_or_default()
    )]
    NoDevice {
        /// The targets of the bundle.
        found: Vec<String>,
        /// The GPUs of the machine, or why they cannot be used.
        gpus: Result<Vec<NvidiaGpu>, DriverError>,
    },
    /// A step outside its executable's bounds: the engine's mistake.
    #[error("a step was refused: {0}")]
    Step(String),
}

fn list(gpus: &[NvidiaGpu]) -> String {
    if gpus.is_empty() {
        return "no GPU".to_owned();
    }
    let names: Vec<String> = gpus.iter().map(ToString::to_string).collect();
    names.join(", ")
}

fn target_for(gpu: &NvidiaGpu) -> Option<&'static str> {
    cuda::target_to_compile(gpu.compute_capability)
}

fn advice(gpu: &NvidiaGpu) -> String {
    match target_for(gpu) {
        Some(target) => format!("Compile it with `--target {target}`"),
        None => "kilnc has no target for this GPU; compile with `--target cpu`".to_owned(),
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Processors;

    #[test]
    fn a_step_gives_back_what_was_pushed() {
        let rules = Arc::new(Rules {
            processors: Processors::NONE,
            prompt_len: 1,
            max_new_tokens: 9,
            ends: vec![2],
        });
        let mut step = Step::default();
        for _ in 0..2 {
            step.clear();
            let draw = Draw {
                index: 3,
                suppressed_ids: &[2, 9],
                rules: Some(&rules),
                history: &[7, 7, 1],
                ..Draw::GREEDY
            };
            step.push(&SequenceStep {
                slot: 1,
                tokens: Tokens::Ids(&[5, 6, 7]),
                past_len: 16,
                block_table: &[4, 2],
                logit_rows: LogitRows::All,
                draw: Some(draw),
            });
            step.push(&SequenceStep {
                slot: 0,
                tokens: Tokens::LastSampled,
                past_len: 40,
                block_table: &[8, 9, 1],
                logit_rows: LogitRows::Last,
                draw: None,
            });
            let sequences: Vec<_> = step.sequences().collect();
            assert_eq!(sequences.len(), 2);
            assert_eq!(sequences[0].tokens, Tokens::Ids(&[5, 6, 7]));
            assert_eq!(sequences[0].block_table, [4, 2]);
            assert_eq!(sequences[0].draw, Some(draw));
            assert_eq!(sequences[1].tokens, Tokens::LastSampled);
            assert_eq!(sequences[1].block_table, [8, 9, 1]);
            assert!(sequences[1].draw.is_none());
            let extent = Extent {
                tokens: 4,
                sequences: 2,
                kv_len: 41,
                logit_rows: 4,
                hidden_states: false,
            };
            assert_eq!(step.extent(), extent);
        }
    }
}
