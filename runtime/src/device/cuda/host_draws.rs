//! Draws that kernels do not make.
//!
//! For what is beyond `templates/sample.cu` the rows of logits come to the host, which chooses as the CPU
//! device does and puts the token into its sequence's slot. This is slower: the host waits for the step
//! and copies V floats for each such sequence. The others of the step keep what the kernel chose.

use super::draws::{history_len, is_made_by_kernel};
use super::{CudaDevice, Driver};
use crate::device::{DeviceError, SequenceStep, Step, StepOutput, Tokens};
use crate::sampling::{Draw, Taken};

impl<D: Driver> CudaDevice<D> {
    /// Makes the draws of a step that has run and that nothing in flight follows; `output` has what the
    /// kernel chose, and the step's logits where they are observed.
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
        let mut tokens = std::mem::take(&mut output.tokens).into_iter();
        let mut continuations = std::mem::take(&mut output.continuations).into_iter();
        for sequence in step.sequences() {
            end += sequence.logit_rows.count(sequence.tokens.len());
            let Some(draw) = sequence.draw else { continue };
            if is_made_by_kernel(&draw, self.model.vocab_size) {
                match draw.beam {
                    Some(_) => output.continuations.extend(continuations.next()),
                    None => output.tokens.extend(tokens.next()),
                }
                continue;
            }
            // The kernel chose something here too, which nobody wants.
            tokens.next();
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
            let kept = self.kept_history(index, &sequence, &draw)?;
            let draw = Draw {
                history: kept.as_deref().unwrap_or(draw.history),
                ..draw
            };
            if let Some(beam) = &draw.beam {
                let taken = Taken::default();
                let continuations = self.sampler.continuations(row, &draw, beam, &taken);
                output.continuations.push(continuations);
                continue;
            }
            let token = self.sampler.sample(row, &draw);
            output.tokens.push(token);
            // A row that is no number ends its sequence; until the engine knows, it is fed some id.
            self.put_token(index, &sequence, &draw, token.unwrap_or(0))?;
        }
        Ok(())
    }

    /// The history that a slot keeps, where a draw reads it from there.
    fn kept_history(
        &mut self,
        index: usize,
        sequence: &SequenceStep<'_>,
        draw: &Draw<'_>,
    ) -> Result<Option<Vec<u32>>, DeviceError> {
        let len = history_len(sequence, draw);
        if len == 0 || sequence.tokens != Tokens::LastSampled {
            return Ok(None);
        }
        let fetched = self.fetch(self.history_of(sequence.slot), len * size_of::<u32>());
        let fetched = fetched.map_err(|error| self.at(index, "a history", error))?;
        let words = fetched.as_chunks::<4>().0.iter();
        Ok(Some(words.map(|&word| u32::from_le_bytes(word)).collect()))
    }

    /// Leaves a token in its sequence's slot, behind its history where that is kept.
    fn put_token(
        &mut self,
        index: usize,
        sequence: &SequenceStep<'_>,
        draw: &Draw<'_>,
        token: u32,
    ) -> Result<(), DeviceError> {
        const WORD: u64 = size_of::<u32>() as u64;
        let slot = self.addresses.last_sampled;
        let slot = slot.offset(u64::from(sequence.slot) * WORD);
        let mut uploads = vec![(slot, token.to_le_bytes().to_vec())];
        let history = self.history_of(sequence.slot);
        match (history_len(sequence, draw), sequence.tokens) {
            (0, _) => {}
            (len, Tokens::LastSampled) => {
                let behind = history.offset(len as u64 * WORD);
                uploads.push((behind, token.to_le_bytes().to_vec()));
            }
            (_, Tokens::Ids(_)) => {
                let all = draw.history.iter().chain([&token]);
                uploads.push((history, all.flat_map(|id| id.to_le_bytes()).collect()));
            }
        }
        for (to, bytes) in uploads {
            let uploaded = self.driver.upload(to, &bytes);
            uploaded.map_err(|error| self.at(index, "a token", error))?;
        }
        Ok(())
    }

    fn history_of(&self, slot: u32) -> super::DeviceAddress {
        let words = u64::from(slot) * u64::from(self.history_stride);
        self.addresses
            .histories
            .offset(words * size_of::<u32>() as u64)
    }
}
