//! Which steps a table is made of.

use super::error::TableError;
use kiln_bundle::{Bounds, Executable, Phase, work::StepSize};
use std::collections::HashSet;

/// KV lengths of a sweep.
const SWEEP: [usize; 8] = [16, 32, 64, 128, 256, 512, 1024, 2048];

/// What was asked for; where nothing was, see [`plan_steps`].
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// By name.
    pub executables: Vec<String>,
    /// Past and new positions of each sequence of a decode step.
    pub kv_lens: Vec<usize>,
    /// Decode steps at 16, 32, 64 ... positions as well, as far as their bounds go.
    pub sweep_kv: bool,
    /// Tokens of the prompt of a prefill step.
    pub tokens: Option<usize>,
}

/// A step of alike sequences, all with logits for their last token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// Index of the executable.
    pub executable: usize,
    /// B.
    pub sequences: usize,
    /// New tokens of a sequence.
    pub new_tokens: usize,
    /// Past and new positions of a sequence.
    pub kv_len: usize,
}

impl StepPlan {
    /// T.
    pub fn tokens(&self) -> usize {
        self.sequences * self.new_tokens
    }

    /// R.
    pub fn logit_rows(&self) -> usize {
        self.sequences
    }

    /// P.
    pub fn past(&self) -> usize {
        self.kv_len - self.new_tokens
    }

    /// What its work depends on.
    pub fn size(&self) -> StepSize {
        let mut size = StepSize::default();
        for _ in 0..self.sequences {
            size.add(self.past() as u64, self.new_tokens as u64, 1);
        }
        size
    }
}

/// The steps to time. By default: prefill of one prompt that fills the largest bucket, and decode of one
/// sequence and of as many as a step takes, in the buckets for the longest, each at its full length.
///
/// # Errors
/// [`TableError::NoExecutable`], [`TableError::NoSuchStep`], [`TableError::KvLen`], [`TableError::Tokens`].
pub fn plan_steps(
    target: &str,
    executables: &[Executable],
    wanted: &Wanted,
) -> Result<Vec<StepPlan>, TableError> {
    let chosen: Vec<usize> = if wanted.executables.is_empty() {
        defaults(executables)
    } else {
        let named = wanted.executables.iter().map(|name| {
            let found = executables.iter().position(|has| has.name == *name);
            found.ok_or_else(|| TableError::NoExecutable {
                name: name.clone(),
                target: target.to_owned(),
                found: executables.iter().map(|has| has.name.clone()).collect(),
            })
        });
        let mut named: Vec<usize> = named.collect::<Result<_, _>>()?;
        let mut seen = HashSet::new();
        named.retain(|&index| seen.insert(index));
        named
    };
    let has_decode_flags = wanted.sweep_kv || !wanted.kv_lens.is_empty();
    for (given, flag, phase) in [
        (wanted.tokens.is_some(), "--tokens", Phase::Prefill),
        (has_decode_flags, "--kv-len or --sweep-kv", Phase::Decode),
    ] {
        let is_there = |&index: &usize| executables[index].phase == phase;
        if given && !chosen.iter().any(is_there) {
            let names = chosen.iter().map(|&index| executables[index].name.clone());
            return Err(TableError::NoSuchStep {
                flag,
                phase,
                executables: names.collect(),
            });
        }
    }
    let mut plans = Vec::new();
    for index in chosen {
        let executable = &executables[index];
        match executable.phase {
            Phase::Prefill => plans.push(prefill(index, executable, wanted.tokens)?),
            Phase::Decode => plans.extend(decode(index, executable, wanted)?),
        }
    }
    Ok(plans)
}

fn defaults(executables: &[Executable]) -> Vec<usize> {
    let of = |phase| {
        let all = executables.iter().enumerate();
        all.filter(move |(_, executable)| executable.phase == phase)
    };
    let longest = |sequences: u32| {
        let decode = of(Phase::Decode).filter(|(_, has)| has.bounds.max_sequences == sequences);
        decode.max_by_key(|(_, has)| has.bounds.max_kv_len)
    };
    let prefill = of(Phase::Prefill)
        .max_by_key(|(_, has)| (has.bounds.max_tokens, !has.bounds.hidden_states));
    let batches = of(Phase::Decode).map(|(_, has)| has.bounds.max_sequences);
    let (least, most) = (batches.clone().min(), batches.max());
    let decode = [least, most.filter(|most| Some(*most) != least)];
    let decode = decode.into_iter().flatten().filter_map(longest);
    prefill
        .into_iter()
        .chain(decode)
        .map(|(index, _)| index)
        .collect()
}

fn prefill(
    index: usize,
    executable: &Executable,
    tokens: Option<usize>,
) -> Result<StepPlan, TableError> {
    let Bounds {
        max_tokens,
        max_kv_len,
        ..
    } = executable.bounds;
    let bound = max_tokens.min(max_kv_len) as usize;
    let tokens = tokens.unwrap_or(bound);
    if tokens == 0 || tokens > bound {
        return Err(TableError::Tokens {
            tokens,
            executable: executable.name.clone(),
            bound,
        });
    }
    Ok(StepPlan {
        executable: index,
        sequences: 1,
        new_tokens: tokens,
        kv_len: tokens,
    })
}

fn decode(
    index: usize,
    executable: &Executable,
    wanted: &Wanted,
) -> Result<Vec<StepPlan>, TableError> {
    let bound = executable.bounds.max_kv_len as usize;
    let mut kv_lens = wanted.kv_lens.clone();
    if wanted.sweep_kv {
        kv_lens.extend(SWEEP.into_iter().filter(|&kv_len| kv_len <= bound));
    }
    if kv_lens.is_empty() {
        kv_lens.push(bound);
    }
    kv_lens.sort_unstable();
    kv_lens.dedup();
    let plans = kv_lens.into_iter().map(|kv_len| {
        if kv_len == 0 || kv_len > bound {
            return Err(TableError::KvLen {
                kv_len,
                executable: executable.name.clone(),
                bound,
            });
        }
        Ok(StepPlan {
            executable: index,
            sequences: executable.bounds.max_sequences as usize,
            new_tokens: 1,
            kv_len,
        })
    });
    plans.collect()
}
