//! What the next step holds: continuous batching over the buckets of a target.
//!
//! A sequence waits, then runs until it is finished. Running, it has a slot of the device and blocks
//! of the KV cache: first it is *prefilled*, in chunks that share steps with other sequences'
//! chunks, then *decoded*, one token a step together with all other decoding sequences. Prefill and
//! decode steps alternate where there is work for both, so that a long prompt slows decoding down
//! and does not stop it.
//!
//! Where the blocks run out, the youngest running sequence goes back to the front of the queue and
//! is later prefilled again, generated tokens included. It continues with the same ids, since a
//! row's bits do not depend on how it came into a step.
//!
//! A sequence starts from what the cache still holds of its beginning. One that is to begin like
//! another one waits for that one's prompt.
//!
//! A sequence may have several *branches*, the beams of a search, which have the same length and go on
//! together, in one step. They begin as one. Each step, the engine says which branch each of the next
//! ones continues ([`Scheduler::branch`]); they share their blocks as long as none writes into them.
//!
//! The scheduler works ahead of the tokens' values: a sequence whose next token is still in flight
//! is known to be one longer, and is fed [`Tokens::LastSampled`]. Where a draw reads the tokens of its
//! sequence ([`Rules::read_history`]) and the device does not keep them, all of them must be known, and
//! where the engine chooses them, it must have done so: such a sequence takes part in no step while a token of it is in flight, and is
//! fed its last one by value.

use crate::completion::RequestId;
use crate::device::{Extent, LogitRows, Observe, SequenceStep, Step, Tokens};
use crate::kv::{BlockCopy, BlockPool, Prefix, blocks_for};
use crate::record::{Recorder, StepPart};
use crate::sampling::{BeamDraw, Draw, DrawParams, Rules, Suppression};
use kiln_bundle::{Bounds, Executable, Limits, Phase};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// A sequence; older ones have lower ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SequenceId {
    pub(crate) request: RequestId,
    /// Among those of the request.
    pub(crate) index: u32,
}

/// What a sequence starts from.
#[derive(Clone, Debug)]
pub(crate) struct NewSequence {
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) max_new_tokens: usize,
    pub(crate) params: DrawParams,
    pub(crate) suppression: Suppression,
    pub(crate) rules: Arc<Rules>,
    pub(crate) pick: Pick,
    /// One with the same prompt, whose keys and values it waits for.
    pub(crate) after: Option<SequenceId>,
    /// With either of these, the last token is fed too, so that every position has its row.
    pub(crate) observe: Observe,
    /// Whether the logits that tokens are chosen from are to be seen.
    pub(crate) see_draws: bool,
    /// Whether those after each token of the prompt are to be seen too.
    pub(crate) see_prompt: bool,
}

/// What a row of logits is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pick {
    /// The sequence's next token.
    Token,
    /// Continuations of its branches, from which the engine chooses.
    Beams {
        /// Most branches.
        beams: usize,
        /// Continuations of each.
        count: u32,
        /// Tokens that cuts leave at least.
        least_kept: u32,
        /// Whether it is the engine that finds them, from the rows.
        by_engine: bool,
    },
}

impl Pick {
    /// Slots that a sequence takes.
    fn slots(self) -> usize {
        match self {
            Pick::Token => 1,
            Pick::Beams { beams, .. } => beams,
        }
    }

    /// Whether the engine chooses from the rows themselves.
    fn is_by_engine(self) -> bool {
        matches!(
            self,
            Pick::Beams {
                by_engine: true,
                ..
            }
        )
    }
}

/// A branch of the next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NextBranch {
    /// Index of the branch that it continues.
    pub(crate) parent: usize,
    /// By this token.
    pub(crate) id: u32,
    /// Its score with it.
    pub(crate) score: f32,
}

/// What a submitted step was: needed to read its output.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) phase: Phase,
    pub(crate) sequences: Vec<Planned>,
}

/// A branch's part of a [`Plan`]. Those of a sequence are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) id: SequenceId,
    pub(crate) branch: usize,
    /// Position of its first new token.
    pub(crate) start: usize,
    /// New tokens.
    pub(crate) len: usize,
    pub(crate) logit_rows: LogitRows,
    /// What is chosen, if anything.
    pub(crate) picks: Option<Pick>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler {
    executables: Vec<(Phase, Bounds)>,
    /// The bucket that chunks are cut for.
    prefill: Bounds,
    pool: BlockPool,
    /// To be made by the next step.
    copies: Vec<BlockCopy>,
    slots: usize,
    /// Whether the device's slots keep the tokens of their sequences.
    keeps_histories: bool,
    free_slots: Vec<u32>,
    /// By age, preempted sequences first.
    waiting: VecDeque<Sequence>,
    /// By age.
    running: Vec<Sequence>,
    last_phase: Phase,
    most_blocks_used: usize,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    new: NewSequence,
    /// At least one.
    branches: Vec<Branch>,
    /// Tokens chosen in flight.
    pending: usize,
    /// Positions whose rows have been asked for.
    observed: usize,
    /// Whether the slot's last sampled token is this sequence's next.
    in_slot: bool,
    /// Whether every token must be known before the next is chosen.
    awaits_tokens: bool,
    /// Whether its last token has been chosen.
    done: bool,
    /// At least as many as branches, while it runs.
    slots: Vec<u32>,
}

#[derive(Debug, Default)]
struct Branch {
    /// Prompt and generated tokens whose values are known.
    tokens: Vec<u32>,
    /// Positions whose keys and values are, or will be by the steps in flight, in the cache.
    computed: usize,
    /// Those that the pool knows of.
    recorded: usize,
    block_table: Vec<u32>,
    score: f32,
}

impl Branch {
    fn release(&mut self, pool: &mut BlockPool) {
        self.record(pool);
        pool.release(&mut self.block_table);
        self.computed = 0;
        self.recorded = 0;
    }

    fn record(&mut self, pool: &mut BlockPool) {
        let known = self.computed.min(self.tokens.len());
        if known > self.recorded {
            pool.record(&self.block_table, &self.tokens[..known], self.recorded);
            self.recorded = known;
        }
    }
}

impl Sequence {
    /// Tokens of a branch that exist, in flight or known.
    fn len(&self) -> usize {
        let known = self
            .branches
            .first()
            .map_or(0, |branch| branch.tokens.len());
        known + self.pending
    }

    fn generated(&self) -> usize {
        self.len() - self.new.prompt_ids.len()
    }

    fn draws_more(&self) -> bool {
        !self.done && self.generated() < self.new.max_new_tokens
    }

    /// Positions that are to be fed by now.
    fn goal(&self) -> usize {
        if self.pending > 0 && self.awaits_tokens {
            return 0;
        }
        if self.draws_more() {
            return self.len();
        }
        if self.new.observe.is_any() {
            return if self.done {
                self.len() - self.pending
            } else {
                self.len()
            };
        }
        match self.new.see_prompt {
            true => self.new.prompt_ids.len(),
            false => 0,
        }
    }

    /// What it takes part in next: branches decode together, and are prefilled one after the other.
    fn phase(&self) -> Option<Phase> {
        let goal = self.goal();
        let mut phase = None;
        for branch in &self.branches {
            match goal.saturating_sub(branch.computed) {
                0 => {}
                1 if branch.computed > 0 => {
                    phase.get_or_insert(Phase::Decode);
                }
                _ => phase = Some(Phase::Prefill),
            }
        }
        phase
    }

    fn decodes(&self) -> bool {
        self.phase() == Some(Phase::Decode)
    }

    /// Whether something is chosen after the tokens up to a position.
    fn draws_at(&self, end: usize) -> bool {
        end == self.len() && self.draws_more()
    }

    /// Rows of logits for the next `len` tokens of a branch.
    fn logit_rows(&self, start: usize, len: usize) -> LogitRows {
        let end = start + len;
        let in_prompt = self.observed < self.new.prompt_ids.len();
        let see_all = self.new.observe.logits || self.new.see_prompt && in_prompt;
        match (see_all && end > self.observed, self.draws_at(end)) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::Last,
            (false, false) => LogitRows::None,
        }
    }

    /// Positions, from the first, whose rows nobody waits for.
    fn reusable(&self) -> usize {
        let waits_for_rows = self.new.observe.is_any()
            || self.new.see_prompt && self.observed < self.new.prompt_ids.len();
        let most = self.len().saturating_sub(1);
        match waits_for_rows {
            true => self.observed.min(most),
            false => most,
        }
    }

    /// The next branch to be prefilled, and how many tokens it lacks. Where there are several, each
    /// keeps its last for the step in which they all go on.
    fn to_prefill(&self) -> Option<(usize, usize)> {
        let kept = usize::from(self.branches.len() > 1);
        let goal = self.goal().saturating_sub(kept);
        let lacking = |branch: &Branch| goal.saturating_sub(branch.computed);
        let mut branches = self.branches.iter().map(lacking).enumerate();
        branches.find(|&(_, lacking)| lacking > 0)
    }

    /// How a branch's token of this index is chosen.
    fn draw(&self, index: usize, token_index: usize) -> Draw<'_> {
        let (branch, rules) = (&self.branches[index], &self.new.rules);
        let token_index = token_index as u32;
        let beam = match self.new.pick {
            Pick::Beams {
                count, least_kept, ..
            } => Some(BeamDraw {
                beam: index as u32,
                score: branch.score,
                count,
                least_kept,
            }),
            Pick::Token => None,
        };
        Draw {
            params: self.new.params,
            index: token_index,
            suppressed_ids: self.new.suppression.at(token_index),
            rules: rules.apply_to(token_index).then_some(rules),
            history: match rules.read_history() {
                true => &branch.tokens,
                false => &[],
            },
            beam,
        }
    }

    /// Adds the next `len` tokens of branches to a step.
    fn feed(&mut self, branches: Range<usize>, len: usize, step: &mut Step, plan: &mut Plan) {
        let by_engine = self.new.pick.is_by_engine();
        let mut draws = false;
        for index in branches.clone() {
            let branch = &self.branches[index];
            let start = branch.computed;
            draws = self.draws_at(start + len);
            let logit_rows = self.logit_rows(start, len);
            let tokens = match self.in_slot && !self.awaits_tokens {
                true => Tokens::LastSampled,
                false => Tokens::Ids(&branch.tokens[start..start + len]),
            };
            let draw = (draws && !by_engine).then(|| self.draw(index, self.generated()));
            step.push(&SequenceStep {
                slot: self.slots[index],
                tokens,
                past_len: start as u32,
                block_table: &branch.block_table,
                logit_rows,
                draw: draw.map(|draw| match tokens {
                    // Not all of it is known here, and the slot keeps it.
                    Tokens::LastSampled => Draw {
                        history: &[],
                        ..draw
                    },
                    Tokens::Ids(_) => draw,
                }),
            });
            step.observe.logits |= self.new.observe.logits
                || (self.new.see_draws || by_engine) && logit_rows != LogitRows::None;
            step.observe.hidden_states |= self.new.observe.hidden_states;
            plan.sequences.push(Planned {
                id: self.id,
                branch: index,
                start,
                len,
                logit_rows,
                picks: draws.then_some(self.new.pick),
            });
        }
        for branch in &mut self.branches[branches] {
            branch.computed += len;
            self.observed = self.observed.max(branch.computed);
        }
        if draws {
            self.pending += 1;
            self.in_slot = true;
        }
    }
}

impl Scheduler {
    /// A scheduler for a device of `slots` slots and `kv_blocks` blocks; none where `executables`
    /// lack a phase that reaches the longest sequence and shows hidden states, which a sound manifest excludes.
    pub(crate) fn new(
        executables: &[Executable],
        limits: &Limits,
        slots: u32,
        kv_blocks: u32,
        keeps_histories: bool,
    ) -> Option<Scheduler> {
        let executables: Vec<_> = executables.iter().map(|e| (e.phase, e.bounds)).collect();
        let full_length = |phase: Phase| {
            // One of these takes every step of its phase, whatever is to be seen of it.
            let reaches = move |bounds: &&Bounds| {
                bounds.max_kv_len >= limits.max_seq_len && bounds.hidden_states
            };
            executables
                .iter()
                .filter(move |(p, _)| *p == phase)
                .map(|(_, b)| b)
                .filter(reaches)
        };
        let prefill = *full_length(Phase::Prefill).max_by_key(|bounds| bounds.max_tokens)?;
        // Any choice of running sequences then fits one decode step.
        let decode_batch = full_length(Phase::Decode)
            .map(|bounds| bounds.max_sequences)
            .max()?;
        let slots = slots.min(decode_batch).min(limits.max_batch);
        Some(Scheduler {
            executables,
            prefill,
            pool: BlockPool::new(kv_blocks),
            copies: Vec::new(),
            slots: slots as usize,
            keeps_histories,
            free_slots: (0..slots).rev().collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            last_phase: Phase::Decode,
            most_blocks_used: 0,
        })
    }

    /// Blocks that the KV cache has.
    pub(crate) fn cache_blocks(&self) -> usize {
        self.pool.capacity()
    }

    /// Branches that can run at a time.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Most blocks that were held at a time.
    pub(crate) fn most_blocks_used(&self) -> usize {
        self.most_blocks_used
    }

    /// Queues a sequence, younger than all before it. All its branches at full length fit the cache and
    /// the slots.
    pub(crate) fn add(&mut self, id: SequenceId, new: NewSequence) {
        let prompt = Branch {
            tokens: new.prompt_ids.clone(),
            ..Branch::default()
        };
        self.waiting.push_back(Sequence {
            id,
            branches: vec![prompt],
            pending: 0,
            observed: 0,
            in_slot: false,
            awaits_tokens: new.pick != Pick::Token
                || new.rules.read_history() && !self.keeps_histories,
            done: new.max_new_tokens == 0,
            slots: Vec::new(),
            new,
        });
    }

    /// Fills `step` with what is to run next; none when there is nothing, or nothing before a step
    /// in flight is collected.
    pub(crate) fn plan(&mut self, step: &mut Step, recorder: &mut Recorder) -> Option<Plan> {
        // A round that only sends sequences back to the queue is followed by one that takes them up.
        for _ in 0..2 {
            self.admit(recorder);
            let any = |phase| self.running.iter().any(|s| s.phase() == Some(phase));
            let (prefill, decode) = (any(Phase::Prefill), any(Phase::Decode));
            let prefill_first = !decode || self.last_phase == Phase::Decode;
            let phases = match prefill && prefill_first {
                true => [Phase::Prefill, Phase::Decode],
                false => [Phase::Decode, Phase::Prefill],
            };
            for phase in phases {
                step.clear();
                let mut plan = Plan {
                    phase,
                    sequences: Vec::new(),
                };
                match phase {
                    Phase::Prefill => self.fill_prefill(step, &mut plan),
                    Phase::Decode => {
                        let began = recorder.now();
                        self.prepare_decode();
                        recorder.part(StepPart::BlockTables, began);
                        self.fill_decode(step, &mut plan);
                    }
                }
                if plan.sequences.is_empty() {
                    continue;
                }
                let began = recorder.now();
                self.record_blocks();
                recorder.part(StepPart::BlockTables, began);
                step.executable = self.choose(phase, &step.extent())?;
                step.copies.append(&mut self.copies);
                self.last_phase = phase;
                self.most_blocks_used = self.most_blocks_used.max(self.pool.used_blocks());
                return Some(plan);
            }
        }
        None
    }

    /// Takes note of a token that a step chose, `None` where none could be. Returns whether the
    /// sequence still wants one.
    pub(crate) fn take(&mut self, id: SequenceId, token: Option<u32>) -> bool {
        let Some(sequence) = self.find(id) else {
            return false;
        };
        sequence.pending -= 1;
        if sequence.done {
            return false;
        }
        if let Some(branch) = sequence.branches.first_mut() {
            branch.tokens.extend(token);
        }
        true
    }

    /// How the token after those that are known is chosen.
    pub(crate) fn draw(&self, id: SequenceId, branch: usize) -> Option<Draw<'_>> {
        let all = self.running.iter().chain(&self.waiting);
        let sequence = all.into_iter().find(|sequence| sequence.id == id)?;
        let known = sequence.branches.get(branch)?.tokens.len();
        Some(sequence.draw(branch, known - sequence.new.prompt_ids.len()))
    }

    /// Goes on with these branches, at least one and no more than there are slots. The sequence's rows
    /// have been collected.
    pub(crate) fn branch(&mut self, id: SequenceId, next: &[NextBranch]) {
        let mut all = self.running.iter_mut().chain(&mut self.waiting);
        let Some(sequence) = all.find(|sequence| sequence.id == id) else {
            return;
        };
        let pool = &mut self.pool;
        let mut continued = |&NextBranch { parent, id, score }: &NextBranch| {
            let parent = &sequence.branches[parent];
            let mut tokens = Vec::with_capacity(parent.tokens.len() + 1);
            tokens.extend_from_slice(&parent.tokens);
            tokens.push(id);
            Branch {
                tokens,
                block_table: pool.share(&parent.block_table),
                score,
                ..*parent
            }
        };
        let branches = next.iter().map(&mut continued).collect();
        for mut branch in std::mem::replace(&mut sequence.branches, branches) {
            branch.release(pool);
        }
        sequence.pending -= 1;
    }

    /// Chooses no further tokens for a sequence; what it still has to be fed for observation is fed.
    pub(crate) fn stop(&mut self, id: SequenceId) {
        if let Some(sequence) = self.find(id) {
            sequence.done = true;
        }
    }

    /// Drops a sequence. Steps in flight still write to its blocks, but before any later step does.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(index);
            self.retire(&mut sequence);
        }
    }

    /// Blocks and slots that nobody holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> (usize, usize) {
        (self.pool.free_blocks(), self.free_slots.len())
    }

    fn find(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running
            .iter_mut()
            .chain(&mut self.waiting)
            .find(|sequence| sequence.id == id)
    }

    /// The smallest executable for a step.
    fn choose(&self, phase: Phase, extent: &Extent) -> Option<usize> {
        self.executables
            .iter()
            .position(|(p, bounds)| *p == phase && extent.fits(bounds))
    }

    /// Starts waiting sequences while there are slots, and blocks for all that they will be
    /// prefilled with and for one more of every running branch.
    fn admit(&mut self, recorder: &mut Recorder) {
        let mut index = 0;
        while let Some(sequence) = self.waiting.get(index) {
            if sequence
                .new
                .after
                .is_some_and(|other| self.is_coming(other))
            {
                index += 1;
                continue;
            }
            let slots = sequence.new.pick.slots();
            if sequence.pending > 0 || slots > self.free_slots.len() {
                return;
            }
            let began = recorder.now();
            let start = Start::of(sequence, &self.pool);
            recorder.part(StepPart::BlockTables, began);
            let branches = self.running.iter().map(|other| other.branches.len());
            let spare: usize = branches.sum();
            if start.blocks + spare > self.pool.free_blocks() {
                return;
            }
            let Some(mut sequence) = self.waiting.remove(index) else {
                return;
            };
            let began = recorder.now();
            start.take(&mut sequence, &mut self.pool, &mut self.copies);
            recorder.part(StepPart::BlockTables, began);
            let slots = self.free_slots.len() - slots..;
            sequence.slots = self.free_slots.drain(slots).collect();
            let place = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(place, sequence);
        }
    }

    /// Whether a sequence's prompt will be in the cache, and is not yet.
    fn is_coming(&self, id: SequenceId) -> bool {
        let is_prefilled = |sequence: &Sequence| {
            let computed = sequence.branches.first().map_or(0, |b| b.computed);
            computed >= sequence.new.prompt_ids.len()
        };
        let running = self.running.iter().find(|sequence| sequence.id == id);
        match running {
            Some(sequence) => !is_prefilled(sequence),
            None => self.waiting.iter().any(|sequence| sequence.id == id),
        }
    }

    /// Sends the youngest running sequence back to the front of the queue.
    fn preempt_youngest(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            self.retire(&mut sequence);
            self.waiting.push_front(sequence);
        }
    }

    /// Takes blocks and slots from a sequence.
    fn retire(&mut self, sequence: &mut Sequence) {
        for branch in &mut sequence.branches {
            branch.release(&mut self.pool);
        }
        sequence.in_slot = false;
        self.free_slots.append(&mut sequence.slots);
    }

    fn fill_prefill(&mut self, step: &mut Step, plan: &mut Plan) {
        let mut extent = Extent::default();
        let bounds = &self.prefill;
        let prefills = |sequence: &&mut Sequence| sequence.phase() == Some(Phase::Prefill);
        for sequence in self.running.iter_mut().filter(prefills) {
            let tokens_left = bounds.max_tokens as usize - extent.tokens;
            let rows_left = bounds.max_logit_rows as usize - extent.logit_rows;
            if tokens_left == 0 || extent.sequences == bounds.max_sequences as usize {
                break;
            }
            let Some((branch, lacking)) = sequence.to_prefill() else {
                continue;
            };
            let start = sequence.branches[branch].computed;
            let mut len = lacking.min(tokens_left);
            if sequence.logit_rows(start, len).count(len) > rows_left {
                len = rows_left;
            }
            if len == 0 {
                break;
            }
            sequence.feed(branch..branch + 1, len, step, plan);
            if let Some(planned) = plan.sequences.last() {
                extent.add(planned.start, len, planned.logit_rows);
            }
        }
    }

    /// Gives every decoding sequence the blocks of its next position.
    fn prepare_decode(&mut self) {
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            let (pool, copies) = (&mut self.pool, &mut self.copies);
            let mut prepare = |branch: &mut Branch| {
                let new = branch.computed..branch.computed + 1;
                pool.prepare(&mut branch.block_table, new, copies)
            };
            if !sequence.decodes() || sequence.branches.iter_mut().all(&mut prepare) {
                index += 1;
            } else {
                // The youngest is this one or one that comes later: none that has its blocks.
                self.preempt_youngest();
            }
        }
    }

    fn fill_decode(&mut self, step: &mut Step, plan: &mut Plan) {
        for sequence in self.running.iter_mut().filter(|s| s.decodes()) {
            sequence.feed(0..sequence.branches.len(), 1, step, plan);
        }
    }

    /// Tells the pool what the steps so far have put into blocks.
    fn record_blocks(&mut self) {
        for sequence in &mut self.running {
            for branch in &mut sequence.branches {
                branch.record(&mut self.pool);
            }
        }
    }
}

/// What a sequence starts to run from: nothing, or what the cache has of it.
struct Start {
    prefix: Prefix,
    /// For each further branch, one before it and the whole blocks that they have in common.
    shared: Vec<(usize, usize)>,
    /// Blocks that it takes.
    blocks: usize,
}

impl Start {
    fn of(sequence: &Sequence, pool: &BlockPool) -> Start {
        let len = sequence.len();
        let Some((first, further)) = sequence.branches.split_first() else {
            return Start {
                prefix: Prefix::default(),
                shared: Vec::new(),
                blocks: 0,
            };
        };
        let prefix = pool.find_prefix(&first.tokens[..sequence.reusable()]);
        let mut blocks = pool.blocks_to_take(&prefix, len);
        let mut shared = Vec::new();
        for (before, branch) in (1..).zip(further) {
            // All but the last token, which is fed.
            let tokens = &branch.tokens[..len - 1];
            let in_common = |other: &Branch| {
                let same = tokens.iter().zip(&other.tokens).take_while(|(a, b)| a == b);
                same.count() / kiln_bundle::BLOCK_TOKENS
            };
            let others = sequence.branches[..before]
                .iter()
                .map(in_common)
                .enumerate();
            let (other, whole) = others.max_by_key(|&(_, whole)| whole).unwrap_or_default();
            blocks += blocks_for(len) - whole;
            shared.push((other, whole));
        }
        Start {
            prefix,
            shared,
            blocks,
        }
    }

    /// Gives the sequence its blocks, of which there are enough.
    fn take(&self, sequence: &mut Sequence, pool: &mut BlockPool, copies: &mut Vec<BlockCopy>) {
        let len = sequence.len();
        for index in 0..sequence.branches.len() {
            let (table, computed) = match index.checked_sub(1) {
                None => (pool.take_prefix(&self.prefix, copies), self.prefix.tokens()),
                Some(further) => {
                    let (other, whole) = self.shared[further];
                    let table = pool.share(&sequence.branches[other].block_table[..whole]);
                    (table, whole * kiln_bundle::BLOCK_TOKENS)
                }
            };
            let branch = &mut sequence.branches[index];
            branch.block_table = table;
            branch.computed = computed;
            branch.recorded = computed;
            let ready = pool.prepare(&mut branch.block_table, computed..len, copies);
            debug_assert!(ready, "blocks were counted above");
        }
    }
}
