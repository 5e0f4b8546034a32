//! Draws that kernels do not make.
//!
//! `templates/sample.cu` takes the likeliest token, or samples by temperature, top-k, top-p and min-p,
//! of tokens that are not suppressed. For everything else the rows of logits come to the host, which
//! chooses as the CPU device does and puts the token into its sequence's slot. This is slower: the
//! host waits for the step and copies V floats for each such sequence. The others of the step keep
//! the tokens that the kernel chose.

use super::{CudaDevice, Driver};
use crate::device::{DeviceError, Step, StepOutput};
use crate::sampling::{Draw, DrawParams, Taken};

/// Suppressed ids that a kernel looks through for one sequence.
pub(super) const MAX_SUPPRESSED_IDS: usize = 1024;

/// Whether the kernel makes a draw.
pub(super) fn is_made_by_kernel(draw: &Draw<'_>) -> bool {
    let DrawParams {
        typical_p,
        epsilon_cutoff,
        eta_cutoff,
        ..
    } = draw.params;
    draw.rules.is_none()
        && draw.beam.is_none()
        && typical_p >= 1.0
        && epsilon_cutoff == 0.0
        && eta_cutoff == 0.0
        && draw.suppressed_ids.len() <= MAX_SUPPRESSED_IDS
}

/// Whether the host has draws of a step to make.
pub(super) fn any(step: &Step) -> bool {
    let mut draws = step.sequences().filter_map(|sequence| sequence.draw);
    draws.any(|draw| !is_made_by_kernel(&draw))
}

impl<D: Driver> CudaDevice<D> {
    /// Makes the draws of a step that has run and that nothing in flight follows; `output` has the
    /// kernel's tokens, and the step's logits where they are observed.
    pub(super) fn draw_on_host(
        &mut self,
        index: usize,
        step: &Step,
        output: &mut StepOutput,
    ) -> Result<(), DeviceError> {
        let executable = &self.target.executables[index];
        let logits = self.target.programs[executable.program as usize].logits;
        let vocab_size = self.model.vocab_size as usize;
        let mut end = 0;
        let mut by_kernel = std::mem::take(&mut output.tokens).into_iter();
        for sequence in step.sequences() {
            end += sequence.logit_rows.count(sequence.tokens.len());
            let Some((draw, token)) = sequence
                .draw
                .and_then(|draw| Some((draw, by_kernel.next()?)))
            else {
                continue;
            };
            if is_made_by_kernel(&draw) {
                output.tokens.push(token);
                continue;
            }
            // A checked step draws from a row.
            let row = end - 1;
            let observed = output.logits.get(row * vocab_size..end * vocab_size);
            let fetched;
            let row = match observed {
                Some(row) => row,
                None => {
                    fetched = self.fetch_rows(index, logits, row as u32, 1)?;
                    &fetched
                }
            };
            if let Some(beam) = &draw.beam {
                let taken = Taken::default();
                let continuations = self.sampler.continuations(row, &draw, beam, &taken);
                output.continuations.push(continuations);
                continue;
            }
            let token = self.sampler.sample(row, &draw);
            output.tokens.push(token);
            let slot_bytes = u64::from(sequence.slot) * size_of::<u32>() as u64;
            let to = self.addresses.last_sampled.offset(slot_bytes);
            // A row that is no number ends its sequence; until the engine knows, it is fed some id.
            let id = token.unwrap_or(0).to_le_bytes();
            let uploaded = self.driver.upload(to, &id);
            uploaded.map_err(|error| self.at(index, "a token", error))?;
        }
        Ok(())
    }
}
