//! Runs a program's KernelSpecs over the arena.

use super::weights::{Places, Weights};
use super::{CpuDevice, plan_error};
use crate::cpu::{self, Attention, Embedding, Rows, RowsMut, Sequence as Ragged, StorageError};
use crate::device::{DeviceError, KernelTime, SequenceStep, Step, StepOutput, SubmitPart, Tokens};
use crate::record::StepPart;
use crate::sampling::{Sampler, Taken};
use kiln_bundle::{BLOCK_TOKENS, BufferId, Executable, KernelSpec, Linear, Program, RowKind};
use std::ops::Range;
use std::time::{Duration, Instant};

/// A step's lists in the form that kernels take.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// (T).
    token_ids: Vec<u32>,
    /// (T): position of each token in its sequence.
    positions: Vec<u32>,
    /// (T): row of the position table, for the embedding at hand.
    position_rows: Vec<u32>,
    /// (T): where keys and values go.
    slot_mapping: Vec<u32>,
    /// (R): rows of T.
    logit_rows: Vec<u32>,
}

impl Batch {
    pub(super) fn fill(&mut self, step: &Step, last_sampled: &[Option<u32>]) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.logit_rows.clear();
        for sequence in step.sequences() {
            match sequence.tokens {
                Tokens::Ids(ids) => self.token_ids.extend_from_slice(ids),
                Tokens::LastSampled => self.token_ids.extend(last_sampled[sequence.slot as usize]),
            }
            let new = sequence.tokens.len();
            for position in sequence.past_len..sequence.past_len + new as u32 {
                let (block, offset) = (
                    position as usize / BLOCK_TOKENS,
                    position as usize % BLOCK_TOKENS,
                );
                let slot = sequence.block_table[block] as usize * BLOCK_TOKENS + offset;
                self.positions.push(position);
                self.slot_mapping.push(slot as u32);
            }
            let end = self.positions.len();
            let rows = sequence.logit_rows.count(new);
            self.logit_rows
                .extend((end - rows..end).map(|row| row as u32));
        }
    }

    /// T or R.
    fn rows(&self, kind: RowKind) -> usize {
        match kind {
            RowKind::Tokens => self.positions.len(),
            RowKind::Logits => self.logit_rows.len(),
        }
    }
}

/// Where an executable's buffers lie, for the rows of one step.
struct Layout<'a> {
    program: &'a Program,
    executable: &'a Executable,
    tokens: usize,
    logit_rows: usize,
}

impl Layout<'_> {
    fn rows(&self, id: BufferId) -> usize {
        match self.program.buffers[id.0 as usize].rows {
            RowKind::Tokens => self.tokens,
            RowKind::Logits => self.logit_rows,
        }
    }

    fn width(&self, id: BufferId) -> usize {
        self.program.buffers[id.0 as usize].width as usize
    }

    /// In elements of the arena.
    fn range(&self, id: BufferId) -> Range<usize> {
        let start = self.executable.offsets_bytes[id.0 as usize] as usize / size_of::<f32>();
        start..start + self.rows(id) * self.width(id)
    }

    fn read<'a>(&self, arena: &'a [f32], id: BufferId) -> Rows<'a> {
        Rows::new(&arena[self.range(id)], self.rows(id), self.width(id))
    }

    /// `out` to write and everything else to read.
    fn split<'a>(&self, arena: &'a mut [f32], out: BufferId) -> (RowsMut<'a>, Rest<'a>) {
        let range = self.range(out);
        let (before, tail) = arena.split_at_mut(range.start);
        let (written, after) = tail.split_at_mut(range.len());
        let rest = Rest {
            before,
            after,
            after_start: range.end,
        };
        (RowsMut::new(written, self.rows(out), self.width(out)), rest)
    }
}

/// The arena without the buffer that a kernel writes.
struct Rest<'a> {
    before: &'a [f32],
    after: &'a [f32],
    after_start: usize,
}

impl<'a> Rest<'a> {
    /// A buffer to read; a sound manifest lets none overlap what is written.
    fn slice(&self, layout: &Layout<'_>, id: BufferId) -> Result<&'a [f32], DeviceError> {
        let range = layout.range(id);
        let data = match range.start.checked_sub(self.after_start) {
            Some(start) => self.after.get(start..start + range.len()),
            None => self.before.get(range),
        };
        data.ok_or_else(|| plan_error(format!("{id} is read and overwritten")))
    }

    fn read(&self, layout: &Layout<'_>, id: BufferId) -> Result<Rows<'a>, DeviceError> {
        Ok(Rows::new(
            self.slice(layout, id)?,
            layout.rows(id),
            layout.width(id),
        ))
    }
}

fn kv_error(error: StorageError) -> DeviceError {
    plan_error(format!("KV cache: {error}"))
}

impl CpuDevice {
    /// Runs a checked step whose lists are in `self.batch`.
    pub(super) fn execute(
        &mut self,
        step: &Step,
        mut clock: Clock,
    ) -> Result<StepOutput, DeviceError> {
        let executable = &self.target.executables[step.executable];
        let program = &self.target.programs[executable.program as usize];
        let layout = Layout {
            program,
            executable,
            tokens: self.batch.rows(RowKind::Tokens),
            logit_rows: self.batch.rows(RowKind::Logits),
        };
        let arena: &mut [f32] = bytemuck::cast_slice_mut(&mut self.arena);
        let mut hidden_states = Vec::new();
        if step.observe.hidden_states {
            let hidden_size = self.manifest.model.hidden_size as usize;
            hidden_states = vec![0.0; program.hidden_states.len() * layout.tokens * hidden_size];
        }
        for &copy in &step.copies {
            self.kv.copy(copy);
        }
        let sequences = sequences(step);
        let launching = clock.now();
        let kernels = program
            .kernels
            .iter()
            .zip(self.weights.kernels(executable.program));
        for (index, (kernel, places)) in (0..).zip(kernels) {
            let mut machine = Machine {
                weights: &self.weights,
                cpu: &mut self.cpu,
                kv: &mut self.kv,
                batch: &mut self.batch,
                sequences: &sequences,
                clock: &mut clock,
            };
            machine.run(kernel, places, &layout, arena)?;
            if hidden_states.is_empty() {
                continue;
            }
            let part = hidden_states.len() / program.hidden_states.len();
            let taps = program
                .hidden_states
                .iter()
                .zip(hidden_states.chunks_exact_mut(part));
            let taps = taps.enumerate();
            for (i, (tap, out)) in taps.filter(|(_, (tap, _))| tap.after_kernel == index) {
                let rows = layout.read(arena, tap.buffer);
                match self.weights.hidden_state_norm(executable.program, i)? {
                    Some(norm) => {
                        let out = RowsMut::new(out, rows.rows(), rows.cols());
                        cpu::layer_norm(&mut self.cpu, rows, &norm, out);
                    }
                    None => out.copy_from_slice(&arena[layout.range(tap.buffer)]),
                }
            }
        }
        let mut output = StepOutput {
            hidden_states,
            ..StepOutput::default()
        };
        self.submit_parts.extend(launching.map(|began| SubmitPart {
            part: StepPart::Launch,
            ran: began..Instant::now(),
        }));
        let rows = &arena[layout.range(program.logits)];
        clock.kernel();
        clock.time(|| {
            sample(
                step,
                rows.chunks_exact(layout.width(program.logits)),
                &mut self.sampler,
                &mut self.last_sampled,
                &mut output,
            );
        });
        output.kernel_times = clock.times(&program.kernels);
        if step.observe.logits {
            let logits = &arena[layout.range(program.logits)];
            output.logits.extend_from_slice(logits);
        }
        Ok(output)
    }
}

/// Notes when kernels run since it was made, where that is to be seen.
pub(super) struct Clock {
    began: Option<Instant>,
    times: Vec<KernelTime>,
}

impl Clock {
    pub(super) fn new(wanted: bool) -> Clock {
        Clock {
            began: wanted.then(Instant::now),
            times: Vec::new(),
        }
    }

    /// When something begins that is to be seen.
    fn now(&self) -> Option<Instant> {
        self.began.map(|_| Instant::now())
    }

    /// The next kernel begins.
    fn kernel(&mut self) {
        self.times.extend(self.began.map(|began| KernelTime {
            start: began.elapsed(),
            length: Duration::ZERO,
        }));
    }

    /// Does the kernel's work, or a part of it: what comes before the first is not the kernel's time.
    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let Some(began) = self.began else {
            return work();
        };
        let start = began.elapsed();
        let result = work();
        let end = began.elapsed();
        if let Some(time) = self.times.last_mut() {
            if time.length.is_zero() {
                time.start = start;
            }
            time.length = end - time.start;
        }
        result
    }

    /// Of each kernel, when the draws have been timed last: they are what [`KernelSpec::Sample`] stands for.
    fn times(mut self, kernels: &[KernelSpec]) -> Vec<KernelTime> {
        if let Some(draws) = self.times.pop() {
            let sample = |kernel: &KernelSpec| matches!(kernel, KernelSpec::Sample { .. });
            let times = kernels.iter().zip(&mut self.times);
            times
                .filter(|(kernel, _)| sample(kernel))
                .for_each(|(_, time)| *time = draws);
        }
        self.times
    }
}

/// Makes the draws of a step from its `rows` of logits (R, V), and leaves tokens in their slots.
fn sample<'a>(
    step: &Step,
    mut rows: impl Iterator<Item = &'a [f32]>,
    sampler: &mut Sampler,
    last_sampled: &mut [Option<u32>],
    output: &mut StepOutput,
) {
    for sequence in step.sequences() {
        let row = match sequence.logit_rows.count(sequence.tokens.len()) {
            0 => None,
            count => rows.nth(count - 1),
        };
        let (Some(row), Some(draw)) = (row, sequence.draw) else {
            continue;
        };
        if let Some(beam) = &draw.beam {
            let continuations = sampler.continuations(row, &draw, beam, &Taken::default());
            output.continuations.push(continuations);
            continue;
        }
        let token = sampler.sample(row, &draw);
        // A row that is no number ends its sequence; until the host knows, it is fed some id.
        last_sampled[sequence.slot as usize] = Some(token.unwrap_or(0));
        output.tokens.push(token);
    }
}

/// The step's sequences as attention takes them.
fn sequences(step: &Step) -> Vec<Ragged<'_>> {
    let mut first_row = 0;
    let mut ragged = Vec::new();
    for SequenceStep {
        tokens,
        past_len,
        block_table,
        ..
    } in step.sequences()
    {
        let (rows, past) = (tokens.len(), past_len as usize);
        ragged.push(Ragged {
            first_row,
            rows,
            past,
            block_table,
        });
        first_row += rows;
    }
    ragged
}

/// What kernels work with, apart from the arena.
struct Machine<'a> {
    weights: &'a Weights,
    cpu: &'a mut cpu::Cpu,
    kv: &'a mut super::KvMemory,
    batch: &'a mut Batch,
    sequences: &'a [Ragged<'a>],
    clock: &'a mut Clock,
}

impl Machine<'_> {
    fn run(
        &mut self,
        kernel: &KernelSpec,
        places: &Places,
        layout: &Layout<'_>,
        arena: &mut [f32],
    ) -> Result<(), DeviceError> {
        self.clock.kernel();
        match kernel {
            KernelSpec::Embed {
                position_offset,
                out,
                ..
            } => {
                let tokens = self.weights.matrix(places)?;
                if tokens.is_none() {
                    arena[layout.range(*out)].fill(0.0);
                }
                let tokens = tokens.map(|table| (table, self.batch.token_ids.as_slice()));
                let rows = &mut self.batch.position_rows;
                rows.clear();
                rows.extend(self.batch.positions.iter().map(|p| p + position_offset));
                let positions = self.weights.positions(places, layout.width(*out))?;
                let positions = positions.map(|table| (table, rows.as_slice()));
                let (out, _) = layout.split(arena, *out);
                let embedding = Embedding { tokens, positions };
                self.clock.time(|| cpu::embed(self.cpu, &embedding, out));
            }
            KernelSpec::Linear(linear) => self.linear(linear, places, layout, arena)?,
            KernelSpec::Qkv { linear, layer } => {
                self.linear(linear, places, layout, arena)?;
                let all = &arena[layout.range(linear.out)];
                let (rows, stride) = (layout.rows(linear.out), layout.width(linear.out));
                let cols = stride / 3;
                let part = |index: usize| {
                    Rows::strided(
                        all.get(index * cols..).unwrap_or_default(),
                        rows,
                        cols,
                        stride,
                    )
                };
                let mut cache = self.kv.layer_mut(*layer as usize).map_err(kv_error)?;
                let slots = &self.batch.slot_mapping;
                self.clock
                    .time(|| cpu::write_kv(self.cpu, part(1), part(2), slots, &mut cache));
            }
            KernelSpec::Attention {
                q,
                layer,
                scale,
                out,
                ..
            } => {
                let (out_rows, rest) = layout.split(arena, *out);
                let queries = rest.slice(layout, *q)?;
                let (rows, cols, stride) = (layout.rows(*q), layout.width(*out), layout.width(*q));
                let attention = Attention {
                    queries: Rows::strided(queries, rows, cols, stride),
                    sequences: self.sequences,
                    cache: self.kv.layer(*layer as usize).map_err(kv_error)?,
                    scale: *scale,
                    activations: self.weights.activations(),
                };
                self.clock
                    .time(|| cpu::attention(self.cpu, &attention, out_rows));
            }
            // Logits stay where they are until the program has ended; the device samples then.
            KernelSpec::Sample { .. } => {}
        }
        Ok(())
    }

    fn linear(
        &mut self,
        linear: &Linear,
        places: &Places,
        layout: &Layout<'_>,
        arena: &mut [f32],
    ) -> Result<(), DeviceError> {
        if layout.rows(linear.out) == 0 {
            return Ok(());
        }
        let mut op = self.weights.linear(linear, places)?;
        let (out, rest) = layout.split(arena, linear.out);
        if linear.rows == kiln_bundle::Rows::Logits {
            op.row_map = Some(&self.batch.logit_rows);
        }
        if let Some(residual) = &linear.residual {
            op.residual = Some(cpu::Residual {
                rows: Some(rest.read(layout, residual.buffer)?),
                norm: self.weights.residual_norm(places)?,
            });
        }
        let input = rest.read(layout, linear.input)?;
        self.clock.time(|| cpu::linear(self.cpu, &op, input, out));
        Ok(())
    }
}
