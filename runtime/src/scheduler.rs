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
//! The scheduler works ahead of the tokens' values: a sequence whose next token is still in flight
//! is known to be one longer, and is fed [`Tokens::LastSampled`]. Where a draw reads the tokens of its
//! sequence ([`Rules::read_history`]), all of them must be known: such a sequence takes part in no step
//! while a token of it is in flight, and is fed its last one by value.

use crate::device::{Extent, LogitRows, Observe, SequenceStep, Step, Tokens};
use crate::kv::{BlockPool, blocks_for};
use crate::sampling::{Draw, DrawParams, Rules, Suppression};
use kiln_bundle::{Bounds, Executable, Limits, Phase};
use std::collections::VecDeque;
use std::sync::Arc;

/// A sequence; older ones have lower ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SequenceId(pub(crate) u64);

/// What a sequence starts from.
#[derive(Clone, Debug)]
pub(crate) struct NewSequence {
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) max_new_tokens: usize,
    pub(crate) params: DrawParams,
    pub(crate) suppression: Suppression,
    pub(crate) rules: Arc<Rules>,
    /// With either of these, the last token is fed too, so that every position has its row.
    pub(crate) observe: Observe,
    /// Whether the logits that tokens are chosen from are to be seen.
    pub(crate) see_draws: bool,
    /// Whether those after each token of the prompt are to be seen too.
    pub(crate) see_prompt: bool,
}

/// What a submitted step was: needed to read its output.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) phase: Phase,
    pub(crate) sequences: Vec<Planned>,
}

/// A sequence's part of a [`Plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) id: SequenceId,
    /// Position of its first new token.
    pub(crate) start: usize,
    /// New tokens.
    pub(crate) len: usize,
    pub(crate) logit_rows: LogitRows,
    /// Whether a token is chosen.
    pub(crate) draws: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler {
    executables: Vec<(Phase, Bounds)>,
    /// The bucket that chunks are cut for.
    prefill: Bounds,
    pool: BlockPool,
    free_slots: Vec<u32>,
    /// By age, preempted sequences first.
    waiting: VecDeque<Sequence>,
    /// By age.
    running: Vec<Sequence>,
    last_phase: Phase,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    new: NewSequence,
    /// Prompt and generated tokens whose values are known.
    tokens: Vec<u32>,
    /// Tokens chosen in flight.
    pending: usize,
    /// Positions whose keys and values are, or will be by the steps in flight, in the cache.
    computed: usize,
    /// Positions whose rows have been asked for.
    observed: usize,
    /// Whether the slot's last sampled token is this sequence's next.
    decoding: bool,
    /// Whether its last token has been chosen.
    done: bool,
    slot: u32,
    block_table: Vec<u32>,
}

impl Sequence {
    /// Tokens that exist, in flight or known.
    fn len(&self) -> usize {
        self.tokens.len() + self.pending
    }

    fn generated(&self) -> usize {
        self.len() - self.new.prompt_ids.len()
    }

    fn draws_more(&self) -> bool {
        !self.done && self.generated() < self.new.max_new_tokens
    }

    fn reads_history(&self) -> bool {
        self.new.rules.read_history()
    }

    /// Whether nothing can be done before a token is known.
    fn waits(&self) -> bool {
        self.pending > 0 && self.reads_history()
    }

    /// Tokens to be fed now.
    fn remaining(&self) -> usize {
        if self.waits() {
            return 0;
        }
        let goal = if self.draws_more() {
            self.len()
        } else if self.new.observe == Observe::default() {
            match self.new.see_prompt {
                true => self.new.prompt_ids.len(),
                false => 0,
            }
        } else if self.done {
            self.tokens.len()
        } else {
            self.len()
        };
        goal.saturating_sub(self.computed)
    }

    fn prefills(&self) -> bool {
        !self.decoding && self.remaining() > 0
    }

    fn decodes(&self) -> bool {
        self.decoding && self.remaining() > 0
    }

    /// Rows of logits for the next `len` tokens.
    fn logit_rows(&self, len: usize, draws: bool) -> LogitRows {
        let end = self.computed + len;
        let in_prompt = self.observed < self.new.prompt_ids.len();
        let see_all = self.new.observe.logits || self.new.see_prompt && in_prompt;
        match (see_all && end > self.observed, draws) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::Last,
            (false, false) => LogitRows::None,
        }
    }

    /// Adds its next `len` tokens to a step.
    fn feed(&mut self, len: usize, step: &mut Step, plan: &mut Plan) {
        let start = self.computed;
        let draws = start + len == self.len() && self.draws_more();
        let logit_rows = self.logit_rows(len, draws);
        let index = self.generated() as u32;
        let tokens = if self.decoding && !self.reads_history() {
            Tokens::LastSampled
        } else {
            Tokens::Ids(&self.tokens[start..start + len])
        };
        let rules = &self.new.rules;
        step.push(&SequenceStep {
            slot: self.slot,
            tokens,
            past_len: start as u32,
            block_table: &self.block_table,
            logit_rows,
            draw: draws.then_some(Draw {
                params: self.new.params,
                index,
                suppressed_ids: self.new.suppression.at(index),
                rules: rules.apply_to(index).then_some(rules),
                history: match rules.read_history() {
                    true => &self.tokens,
                    false => &[],
                },
            }),
        });
        step.observe.logits |=
            self.new.observe.logits || self.new.see_draws && logit_rows != LogitRows::None;
        step.observe.hidden_states |= self.new.observe.hidden_states;
        plan.sequences.push(Planned {
            id: self.id,
            start,
            len,
            logit_rows,
            draws,
        });
        self.computed += len;
        self.observed = self.observed.max(self.computed);
        if draws {
            self.pending += 1;
            self.decoding = true;
        }
    }
}

impl Scheduler {
    /// A scheduler for a device of `slots` slots and `kv_blocks` blocks; none where `executables`
    /// lack a phase that reaches the longest sequence, which a sound manifest excludes.
    pub(crate) fn new(
        executables: &[Executable],
        limits: &Limits,
        slots: u32,
        kv_blocks: u32,
    ) -> Option<Scheduler> {
        let executables: Vec<_> = executables.iter().map(|e| (e.phase, e.bounds)).collect();
        let full_length = |phase: Phase| {
            let reaches = move |bounds: &&Bounds| bounds.max_kv_len >= limits.max_seq_len;
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
            free_slots: (0..slots).rev().collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            last_phase: Phase::Decode,
        })
    }

    /// Positions that the KV cache can hold.
    pub(crate) fn cache_tokens(&self) -> usize {
        self.pool.capacity() * kiln_bundle::BLOCK_TOKENS
    }

    /// Queues a sequence, younger than all before it. Its full length fits the cache.
    pub(crate) fn add(&mut self, id: SequenceId, new: NewSequence) {
        debug_assert!(new.prompt_ids.len() + new.max_new_tokens <= self.cache_tokens());
        self.waiting.push_back(Sequence {
            id,
            tokens: new.prompt_ids.clone(),
            pending: 0,
            computed: 0,
            observed: 0,
            decoding: false,
            done: new.max_new_tokens == 0,
            slot: 0,
            block_table: Vec::new(),
            new,
        });
    }

    /// Fills `step` with what is to run next; none when there is nothing, or nothing before a step
    /// in flight is collected.
    pub(crate) fn plan(&mut self, step: &mut Step) -> Option<Plan> {
        // A round that only sends sequences back to the queue is followed by one that takes them up.
        for _ in 0..2 {
            self.admit();
            let prefill = self.running.iter().any(Sequence::prefills);
            let decode = self.running.iter().any(Sequence::decodes);
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
                    Phase::Decode => self.fill_decode(step, &mut plan),
                }
                if plan.sequences.is_empty() {
                    continue;
                }
                step.executable = self.choose(phase, &step.extent())?;
                self.last_phase = phase;
                return Some(plan);
            }
        }
        None
    }

    /// Takes note of the tokens that a step chose, `None` for those that were dropped or could not
    /// be chosen. Returns each sequence that is still wanted, with its token.
    pub(crate) fn collect(
        &mut self,
        plan: &Plan,
        tokens: &[Option<u32>],
    ) -> Vec<(SequenceId, Option<u32>)> {
        let mut chosen = Vec::new();
        let drawing = plan.sequences.iter().filter(|planned| planned.draws);
        for (planned, &token) in drawing.zip(tokens) {
            let Some(sequence) = self.find(planned.id) else {
                continue;
            };
            sequence.pending -= 1;
            if sequence.done {
                continue;
            }
            sequence.tokens.extend(token);
            chosen.push((planned.id, token));
        }
        chosen
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
            self.pool.release(&mut sequence.block_table);
            self.free_slots.push(sequence.slot);
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
    /// prefilled with and for one more of every running one.
    fn admit(&mut self) {
        while let Some(first) = self.waiting.front() {
            let spare = self.running.len();
            let fits = blocks_for(first.len()) + spare <= self.pool.free_blocks();
            if first.pending > 0 || !fits {
                return;
            }
            let Some(slot) = self.free_slots.pop() else {
                return;
            };
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            let len = sequence.len();
            let grown = self.pool.grow(&mut sequence.block_table, len);
            debug_assert!(grown, "blocks were counted above");
            sequence.slot = slot;
            let place = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(place, sequence);
        }
    }

    /// Sends the youngest running sequence back to the front of the queue.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else {
            return;
        };
        self.pool.release(&mut sequence.block_table);
        self.free_slots.push(sequence.slot);
        sequence.computed = 0;
        sequence.decoding = false;
        self.waiting.push_front(sequence);
    }

    fn fill_prefill(&mut self, step: &mut Step, plan: &mut Plan) {
        let mut extent = Extent::default();
        let bounds = &self.prefill;
        for sequence in self
            .running
            .iter_mut()
            .filter(|sequence| sequence.prefills())
        {
            let tokens_left = bounds.max_tokens as usize - extent.tokens;
            let rows_left = bounds.max_logit_rows as usize - extent.logit_rows;
            if tokens_left == 0 || extent.sequences == bounds.max_sequences as usize {
                break;
            }
            let mut len = sequence.remaining().min(tokens_left);
            let draws = len == sequence.remaining() && sequence.draws_more();
            if sequence.logit_rows(len, draws).count(len) > rows_left {
                len = rows_left;
            }
            if len == 0 {
                break;
            }
            sequence.feed(len, step, plan);
            if let Some(planned) = plan.sequences.last() {
                extent.add(planned.start, len, planned.logit_rows);
            }
        }
    }

    fn fill_decode(&mut self, step: &mut Step, plan: &mut Plan) {
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            if !sequence.decodes() {
                index += 1;
            } else if self
                .pool
                .grow(&mut sequence.block_table, sequence.computed + 1)
            {
                sequence.feed(1, step, plan);
                index += 1;
            } else {
                // The youngest is this one or one that comes later: none that is in the step.
                self.preempt_youngest();
            }
        }
    }
}
