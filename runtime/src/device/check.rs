//! Whether a step keeps to what kernels take for granted.

use super::{DeviceError, DeviceFacts, LogitRows, Step, Tokens};
use crate::kv::blocks_for;
use kiln_bundle::Executable;

/// What a device knows that a step is held against.
pub(super) struct Ground<'a> {
    pub(super) executables: &'a [Executable],
    pub(super) facts: &'a DeviceFacts,
    /// V.
    pub(super) vocab_size: u32,
}

/// The step's executable, where the step is sound. `sampled` tells whether a slot holds a token.
///
/// # Errors
/// [`DeviceError::Step`] with the first thing that is wrong.
pub(super) fn check_step<'a>(
    step: &Step,
    ground: &Ground<'a>,
    sampled: impl Fn(u32) -> bool,
) -> Result<&'a Executable, DeviceError> {
    let refuse = |problem: String| Err(DeviceError::Step(problem));
    let Some(executable) = ground.executables.get(step.executable) else {
        return refuse(format!("executable {} does not exist", step.executable));
    };
    let extent = step.extent();
    if !extent.fits(&executable.bounds) {
        return refuse(format!(
            "{extent:?} exceeds {}: {:?}",
            executable.name, executable.bounds
        ));
    }
    for copy in &step.copies {
        if copy.from.max(copy.to) >= ground.facts.kv_blocks {
            return refuse(format!("{copy:?} is outside the KV cache"));
        }
    }
    for sequence in step.sequences() {
        let slot = sequence.slot;
        if slot >= ground.facts.slots {
            return refuse(format!("slot {slot} does not exist"));
        }
        match sequence.tokens {
            Tokens::Ids([]) => return refuse(format!("slot {slot} gets no tokens")),
            Tokens::Ids(ids) if ids.iter().any(|&id| id >= ground.vocab_size) => {
                return refuse(format!("slot {slot} gets an id outside the vocabulary"));
            }
            Tokens::LastSampled if !sampled(slot) => {
                return refuse(format!("slot {slot} has sampled no token"));
            }
            Tokens::Ids(_) | Tokens::LastSampled => {}
        }
        let needed = blocks_for(sequence.past_len as usize + sequence.tokens.len());
        if sequence.block_table.len() < needed
            || sequence
                .block_table
                .iter()
                .any(|&block| block >= ground.facts.kv_blocks)
        {
            return refuse(format!("slot {slot} has no sound table of {needed} blocks"));
        }
        if sequence.draw.is_some() && sequence.logit_rows == LogitRows::None {
            return refuse(format!("slot {slot} draws from no row"));
        }
    }
    Ok(executable)
}
