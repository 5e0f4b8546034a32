//! What a step lets the host see besides its tokens: logits, hidden states, and times of kernels.
//!
//! Where hidden states are to be seen, launches run one by one, since buffers share memory and a hidden
//! state is gone when a later kernel has run. The host applies the norms that are still to be applied.
//! Logits are there until the next step.
//!
//! Kernels are timed by events between the launches of a graph that is recorded for this alone: launches
//! with an event between them do not overlap, which those of other steps may. A step that shows its hidden
//! states tells no times.

use super::{CudaDevice, Driver, DriverError};
use crate::device::{DeviceError, KernelTime, Observe, StepOutput};
use kiln_bundle::{BufferId, DType, Executable, Launch, Norm, StepCounts, Tap, WeightFile};
use std::time::Duration;

/// Rows are fetched in pieces of this size, which bounds the pinned memory that they take.
const FETCH_BYTES: usize = 8 << 20;

impl<D: Driver> CudaDevice<D> {
    /// Runs a step whose lists are on the device, and waits for what is to be seen of it. Nothing
    /// else is in flight.
    pub(super) fn run_observed(
        &mut self,
        index: usize,
        counts: &StepCounts,
        observe: Observe,
        draws: &[u32],
    ) -> Result<StepOutput, DeviceError> {
        let mut output = StepOutput::default();
        if observe.hidden_states {
            output.hidden_states = self.run_tapped(index, counts)?;
        } else if observe.kernel_times {
            output.kernel_times = self.run_timed(index)?;
        } else {
            self.run(index)?;
        }
        if observe.logits {
            let program = self.target.executables[index].program as usize;
            let logits = self.target.programs[program].logits;
            output.logits = self.fetch_rows(index, logits, 0, counts.logit_rows)?;
        }
        let chosen = self.fetch(self.addresses.chosen, self.chosen_bytes(draws));
        let chosen = chosen.map_err(|error| self.at(index, "tokens", error))?;
        let StepOutput {
            tokens,
            continuations,
            ..
        } = self.chosen(&chosen, draws);
        Ok(StepOutput {
            tokens,
            continuations,
            ..output
        })
    }

    /// Runs an executable's kernels with events around its launches, and waits for them.
    fn run_timed(&mut self, index: usize) -> Result<Vec<KernelTime>, DeviceError> {
        let times = self.time_launches(index);
        let times = times.map_err(|error| self.at(index, "its kernel times", error))?;
        let executable = &self.target.executables[index];
        let program = &self.target.programs[executable.program as usize];
        Ok(kernel_times(
            program.kernels.len(),
            &executable.launches,
            &times,
        ))
    }

    fn time_launches(&mut self, index: usize) -> Result<Vec<Duration>, DriverError> {
        let chain = &mut self.chains[index];
        let graph = match chain.timed_graph {
            Some(graph) => graph,
            None => *chain
                .timed_graph
                .insert(self.driver.record_timed(&chain.launches)?),
        };
        self.driver.replay(graph)?;
        self.driver.launch_times(graph)
    }

    /// Launches an executable's kernels and fetches its hidden states between them, (L+1, T, C).
    fn run_tapped(&mut self, index: usize, counts: &StepCounts) -> Result<Vec<f32>, DeviceError> {
        let executable = &self.target.executables[index];
        let kernels: Vec<u32> = executable
            .launches
            .iter()
            .map(|launch| launch.kernel)
            .collect();
        let program = &self.target.programs[executable.program as usize];
        let taps = program.hidden_states.clone();
        let mut states = vec![Vec::new(); taps.len()];
        for (position, _) in kernels.iter().enumerate() {
            self.driver.launch(&self.chains[index].launches[position])?;
            // Up to the next launch, kernels that have none of their own are done as well.
            let next = kernels.get(position + 1).copied().unwrap_or(u32::MAX);
            for (tap, state) in taps.iter().zip(&mut states) {
                if (kernels[position]..next).contains(&tap.after_kernel) {
                    *state = self.fetch_hidden(index, tap, counts)?;
                }
            }
        }
        Ok(states.concat())
    }

    /// A hidden state, (T, C).
    fn fetch_hidden(
        &mut self,
        index: usize,
        tap: &Tap,
        counts: &StepCounts,
    ) -> Result<Vec<f32>, DeviceError> {
        let mut rows = self.fetch_rows(index, tap.buffer, 0, counts.tokens)?;
        if let Some(norm) = &tap.norm {
            let weight = self.vector(norm.weight.as_deref())?;
            let bias = self.vector(norm.bias.as_deref())?;
            for row in rows.chunks_exact_mut(self.model.hidden_size as usize) {
                normalise(row, weight, bias, norm);
            }
        }
        Ok(rows)
    }

    /// Rows of a buffer from `first` on, as f32.
    pub(super) fn fetch_rows(
        &mut self,
        index: usize,
        id: BufferId,
        first: u32,
        rows: u32,
    ) -> Result<Vec<f32>, DeviceError> {
        let executable: &Executable = &self.target.executables[index];
        let buffer = &self.target.programs[executable.program as usize].buffers[id.0 as usize];
        let dtype = buffer.dtype;
        let row_bytes = buffer.width as usize * dtype.size_bytes();
        let start = u64::from(first) * row_bytes as u64;
        let from = executable.offsets_bytes[id.0 as usize] + start;
        let bytes = rows as usize * row_bytes;
        let fetched = self.fetch(self.addresses.arena.offset(from), bytes);
        let fetched = fetched.map_err(|error| self.at(index, &id.to_string(), error))?;
        Ok(to_f32(&fetched, dtype))
    }

    pub(super) fn fetch(
        &mut self,
        from: super::DeviceAddress,
        bytes: usize,
    ) -> Result<Vec<u8>, DriverError> {
        let mut fetched = Vec::with_capacity(bytes);
        while fetched.len() < bytes {
            let piece = FETCH_BYTES.min(bytes - fetched.len());
            let ticket = self
                .driver
                .download(from.offset(fetched.len() as u64), piece)?;
            fetched.extend(self.driver.wait(ticket)?);
        }
        Ok(fetched)
    }

    fn vector(&self, name: Option<&str>) -> Result<Option<&[f32]>, DeviceError> {
        name.map(|name| {
            vector(&self.weights, name).ok_or_else(|| DeviceError::Plan {
                target: self.target.name.clone(),
                problem: format!("vector {name:?} is missing or not f32"),
            })
        })
        .transpose()
    }
}

/// Of each kernel of a program, its launches together; none of its own is no time. A manifest has
/// launches in the order of their kernels.
fn kernel_times(kernels: usize, launches: &[Launch], times: &[Duration]) -> Vec<KernelTime> {
    let mut launched = launches.iter().zip(times).peekable();
    let mut now = Duration::ZERO;
    let time = |kernel: usize| {
        let start = now;
        while let Some((_, time)) = launched.next_if(|(launch, _)| launch.kernel as usize == kernel)
        {
            now += *time;
        }
        KernelTime {
            start,
            length: now - start,
        }
    };
    (0..kernels).map(time).collect()
}

fn vector<'a>(weights: &'a WeightFile, name: &str) -> Option<&'a [f32]> {
    let tensor = weights.tensor(name)?;
    let data = (tensor.dtype == DType::F32).then_some(tensor.data)?;
    bytemuck::try_cast_slice(data).ok()
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over a row.
fn normalise(row: &mut [f32], weight: Option<&[f32]>, bias: Option<&[f32]>, norm: &Norm) {
    let len = row.len() as f32;
    let mean = row.iter().sum::<f32>() / len;
    let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / len;
    let scale = 1.0 / (variance + norm.eps).sqrt();
    for (i, x) in row.iter_mut().enumerate() {
        let weight = weight.map_or(1.0, |weight| weight[i]);
        let bias = bias.map_or(0.0, |bias| bias[i]);
        *x = (*x - mean) * scale * weight + bias;
    }
}

/// Little-endian elements as f32.
fn to_f32(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let words = bytes.as_chunks::<4>().0.iter();
    let halves = bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::F32 => words.map(|&word| f32::from_le_bytes(word)).collect(),
        DType::F16 => halves
            .map(|&half| half::f16::from_le_bytes(half).to_f32())
            .collect(),
        DType::Bf16 => halves
            .map(|&half| half::bf16::from_le_bytes(half).to_f32())
            .collect(),
        // A sound manifest has no such buffer.
        DType::I32 => words.map(|&word| i32::from_le_bytes(word) as f32).collect(),
        DType::U8 => bytes.iter().map(|&byte| f32::from(byte)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_become_f32() {
        assert_eq!(to_f32(&[0, 0, 0x80, 0x3f], DType::F32), [1.0]);
        assert_eq!(to_f32(&[0, 0x3c, 0, 0xc0], DType::F16), [1.0, -2.0]);
        assert_eq!(to_f32(&[0x80, 0x3f, 0, 0xc0], DType::Bf16), [1.0, -2.0]);
    }

    #[test]
    fn a_row_is_normalised() {
        let norm = Norm {
            weight: None,
            bias: None,
            eps: 0.0,
        };
        let mut row = [1.0, 3.0];
        normalise(&mut row, None, None, &norm);
        assert_eq!(row, [-1.0, 1.0]);
        let mut row = [1.0, 3.0];
        normalise(&mut row, Some(&[2.0, 3.0]), Some(&[0.5, 0.0]), &norm);
        assert_eq!(row, [-1.5, 3.0]);
    }
}
