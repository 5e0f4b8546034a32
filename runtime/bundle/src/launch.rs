//! How a CUDA target runs its KernelSpecs: images, launch records, and what their arguments mean.
//!
//! Every size is fixed by the bucket; what differs from step to step lies in device memory behind
//! the [`Argument::Step`] argument. An executable's launches are therefore one chain that can be
//! captured as a graph and replayed.

use crate::BufferId;
use serde::{Deserialize, Serialize};

/// A compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its entry point: `extern "C"` in the source.
    pub entry: String,
    /// Path of the CUDA source.
    pub source: String,
    /// Path of the cubin; absent where only sources were emitted.
    pub cubin: Option<String>,
    /// Threads of a block, along x.
    pub block_threads: u32,
    /// Dynamic shared memory of a block.
    pub dynamic_smem_bytes: u32,
}

/// One launch of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Index of the KernelSpec that it computes, or helps to compute, in the program.
    pub kernel: u32,
    /// Index into the target's images.
    pub image: u32,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// In the order of the entry point's parameters.
    pub arguments: Vec<Argument>,
}

/// How a target copies blocks of the KV cache. The number of copies differs from step to step, so they
/// are no part of an executable's launches: they are made before those.
///
/// The image's parameters are a [`BlockCopies`], by value, and the address of block 0 of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyLaunch {
    /// Index into the target's images.
    pub image: u32,
    /// Blocks along x, which share a copy. Along y there is one for each copy.
    pub grid_x: u32,
}

/// Most copies of a launch.
pub const COPIES_PER_LAUNCH: usize = 64;

/// The copies of a launch, made at once: blocks to read and to write. Those beyond the launch's grid
/// mean nothing.
pub type BlockCopies = [[u32; 2]; COPIES_PER_LAUNCH];

/// What a parameter of an entry point is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Argument {
    /// A [`StepPointers`], by value.
    Step,
    /// Address of an activation buffer.
    Buffer(BufferId),
    /// Address of a tensor of the weight file.
    Weight(String),
    /// Address of a layer's keys in block 0 of the KV cache; see [`kv_layer_bytes`].
    KvLayer(u32),
    /// Address in the executable's workspace, which nothing outlives a step in.
    Workspace {
        /// From its start.
        offset_bytes: u64,
    },
    /// Address of the executable's counters (u32), zero before and after every step.
    Counters,
}

/// Counts of a step, the first words of [`StepPointers::counts`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// T.
    pub tokens: u32,
    /// B.
    pub sequences: u32,
    /// R.
    pub logit_rows: u32,
    /// Entries of [`StepPointers::tiles`].
    pub tiles: u32,
    /// Entries of [`StepPointers::draws`].
    pub draws: u32,
}

/// Device addresses of a step's lists: the value of [`Argument::Step`], `struct Step` in
/// `templates/kiln/step.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepPointers {
    /// A [`StepCounts`].
    pub counts: u64,
    /// u32 (T): token ids; [`LAST_SAMPLED`] + slot stands for what the slot holds.
    pub token_ids: u64,
    /// u32 (T): position of each token in its sequence.
    pub positions: u64,
    /// u32 (T): block * [`crate::BLOCK_TOKENS`] + offset of each token's keys and values.
    pub kv_slots: u64,
    /// u32 (R): rows of T.
    pub logit_rows: u64,
    /// [`StepSequence`] (B).
    pub sequences: u64,
    /// [`StepTile`]: the queries of the step in tiles of [`TILE_QUERIES`] rows of one sequence.
    pub tiles: u64,
    /// [`StepDraw`], one for each sequence that draws.
    pub draws: u64,
    /// u32: block tables and what processors read, found by the offsets of sequences and draws.
    pub lists: u64,
    /// u32 by slot: the token last chosen for it.
    pub last_sampled: u64,
    /// u32 by draw: the token chosen, [`NO_TOKEN`] where the row is no finite number.
    pub chosen: u64,
    /// [`StepContinuation`], found by the offsets of draws: what draws of continuations give. The first has
    /// [`NO_TOKEN`] where the row is no finite number.
    pub continuations: u64,
    /// u32: the tokens of the slots' sequences, found by the offsets of draws.
    pub histories: u64,
    /// u32 (slots, V): how often each token of the vocabulary was generated, and in the highest bit
    /// whether the prompt has it. Of use for slots whose draws keep a history.
    pub token_counts: u64,
}

/// Added to a slot in [`StepPointers::token_ids`].
pub const LAST_SAMPLED: u32 = 1 << 31;
/// In [`StepPointers::chosen`]: a logit is no finite number, or every token is suppressed.
pub const NO_TOKEN: u32 = u32::MAX;
/// Query rows of a tile of prefill attention.
pub const TILE_QUERIES: u32 = 64;

/// A sequence of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSequence {
    /// Its first row of T.
    pub first_row: u32,
    /// Its new tokens.
    pub rows: u32,
    /// P.
    pub past_len: u32,
    /// Where its block table starts in [`StepPointers::lists`].
    pub block_table: u32,
}

/// Up to [`TILE_QUERIES`] consecutive query rows of one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTile {
    /// Index of the sequence in the step.
    pub sequence: u32,
    /// First row, counted from the sequence's first.
    pub first_row: u32,
}

/// How the next token of a sequence is chosen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepDraw {
    /// Row of the logits.
    pub row: u32,
    /// Slot that keeps the token.
    pub slot: u32,
    /// Index of the token among its request's generated ones.
    pub index: u32,
    /// Keeps the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Divides the logits; 0 takes the likeliest.
    pub temperature: f32,
    /// Keeps the fewest tokens whose probabilities sum to this.
    pub top_p: f32,
    /// Keeps the tokens at least this share as probable as the likeliest.
    pub min_p: f32,
    /// Seed of the request, low word.
    pub seed_low: u32,
    /// And high word.
    pub seed_high: u32,
    /// Whether processors change the scores: whether anything but `forced` follows from the fields below.
    pub processed: u32,
    /// The token that is chosen whatever the scores; [`NO_TOKEN`] for none.
    pub forced: u32,
    /// Where its slot's history starts in [`StepPointers::histories`].
    pub history: u32,
    /// Tokens of the history before this draw, whose token is appended; 0 where none is kept.
    pub history_len: u32,
    /// How many of them are the prompt's.
    pub prompt_len: u32,
    /// Where the history comes from: the slot has it and its counts (0), it lies in
    /// [`StepPointers::lists`] (1), the slot has it but for the counts (2).
    pub given: u32,
    /// Where it starts in [`StepPointers::lists`].
    pub given_from: u32,
    /// Where its biases start in [`StepPointers::lists`], each a [`TokenRule`], by rising token.
    pub biases: u32,
    /// How many there are.
    pub biases_len: u32,
    /// Divides positive scores and multiplies negative ones of tokens of the history; 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted from scores of generated tokens.
    pub presence_penalty: f32,
    /// Subtracted as often as they have been generated.
    pub frequency_penalty: f32,
    /// So many tokens in a row occur once; 0 is no limit.
    pub no_repeat_ngram_size: u32,
    /// Where its forbidden sequences start in [`StepPointers::lists`], each a [`TokenRule`].
    pub words: u32,
    /// How many there are.
    pub words_len: u32,
    /// Where its suppressed ids start in [`StepPointers::lists`].
    pub suppressed: u32,
    /// How many there are.
    pub suppressed_len: u32,
    /// Where the ids start in [`StepPointers::lists`] whose scores are raised.
    pub ends: u32,
    /// How many there are.
    pub ends_len: u32,
    /// The share of a score's magnitude that they are raised by.
    pub ending_share: f32,
    /// Of a draw of continuations: the beam's score so far.
    pub beam_score: f32,
    /// Where they start in [`StepPointers::continuations`].
    pub continuations: u32,
    /// How many are wanted, at most [`MAX_CONTINUATIONS`]; 0 where a token is drawn.
    pub continuations_len: u32,
}

/// Most continuations of a draw.
pub const MAX_CONTINUATIONS: u32 = 256;

/// A token whose score changes where its sequence ends in certain tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenRule {
    /// The token, of the vocabulary.
    pub token: u32,
    /// What is added, where it is a bias.
    pub bias: f32,
    /// Where the tokens before it start in [`StepPointers::lists`].
    pub before: u32,
    /// How many there are.
    pub before_len: u32,
}

/// A token after a beam.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepContinuation {
    /// The token.
    pub token: u32,
    /// The beam's score with it.
    pub score: f32,
}

/// Bytes of one layer's keys and values in a block of a CUDA target's KV cache.
///
/// The cache is (blocks, L, 2, H, D/16, 256) elements: for each block, layer, keys or values, and
/// head, tiles of 16 positions by 16 components whose elements lie in the order in which the lanes
/// of a warp hold them as operands of `mma.m16n8k16` (`templates/kiln/kv.cuh`). A block is one piece
/// of memory, so copying it is one copy, and its address does not depend on the size of the cache.
pub const fn kv_layer_bytes(hidden_size: u64, element_bytes: u64) -> u64 {
    2 * hidden_size * crate::BLOCK_TOKENS as u64 * element_bytes
}
