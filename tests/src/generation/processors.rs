//! What changes a row of scores before a token is chosen: logits in greedy decoding, log-probabilities
//! in beam search.

use super::Parameters;
use std::collections::{BTreeMap, BTreeSet};

/// The sequence that the next token is chosen for.
#[derive(Clone, Debug)]
pub struct Position {
    /// Prompt and output.
    ids: Vec<u32>,
    prompt_len: usize,
    /// The tokens that beams of earlier groups took in this step.
    taken: Vec<u32>,
}

impl Position {
    /// After an output of these ids.
    pub fn new(prompt: &[u32], output: &[u32]) -> Position {
        Position {
            ids: [prompt, output].concat(),
            prompt_len: prompt.len(),
            taken: Vec::new(),
        }
    }

    /// The same, beside beams that took these tokens.
    pub fn beside(self, taken: &[u32]) -> Position {
        let taken = taken.to_vec();
        Position { taken, ..self }
    }

    fn output(&self) -> &[u32] {
        &self.ids[self.prompt_len..]
    }
}

/// Runs every processor, in transformers' order. OpenAI's, which transformers lacks, stand where vLLM
/// has them: the bias first, the penalties behind the repetition penalty.
pub fn process(row: &mut [f32], position: &Position, parameters: &Parameters) {
    let Position {
        ids,
        prompt_len,
        taken,
    } = position;
    let output = position.output();
    let ends = parameters.ends();
    let max_length = prompt_len + parameters.max_new_tokens;

    for (&id, bias) in &parameters.logit_bias {
        row[id as usize] += bias;
    }
    add_sequence_bias(row, ids, &parameters.sequence_bias);
    for &id in taken {
        row[id as usize] -= parameters.diversity_penalty;
    }
    penalise_repetition(row, ids, parameters.repetition_penalty);
    for (id, count) in counts(output) {
        row[id as usize] -=
            count as f32 * parameters.frequency_penalty + parameters.presence_penalty;
    }
    ban_repeated_ngrams(row, ids, parameters.no_repeat_ngram_size);
    let is_end = |word: &Vec<u32>| ends.iter().any(|&end| *word == [end]);
    let banned = parameters
        .bad_words_ids
        .iter()
        .filter(|word| !is_end(word))
        .map(|word| (word.clone(), f32::NEG_INFINITY));
    add_sequence_bias(row, ids, &banned.collect::<Vec<_>>());
    // Of the two the number of new tokens counts, where both are given.
    let is_too_short = match parameters.min_new_tokens {
        0 => ids.len() < parameters.min_length,
        min_new_tokens => output.len() < min_new_tokens,
    };
    if is_too_short {
        ban(row, &ends);
    }
    if let Some(id) = parameters.forced_bos_token_id
        && ids.len() == 1
    {
        force(row, id);
    }
    if let Some(id) = parameters.forced_eos_token_id
        && ids.len() + 1 == max_length
    {
        force(row, id);
    }
    if let Some((start, factor)) = parameters.exponential_decay_length_penalty
        && output.len() > start
    {
        for &end in &ends {
            let score = &mut row[end as usize];
            if score.is_finite() {
                let beyond = (output.len() - start) as i32;
                *score += score.abs() * (f64::from(factor).powi(beyond) - 1.0) as f32;
            }
        }
    }
    ban(row, &parameters.suppress_tokens);
}

fn ban(row: &mut [f32], ids: &[u32]) {
    for &id in ids {
        row[id as usize] = f32::NEG_INFINITY;
    }
}

fn force(row: &mut [f32], id: u32) {
    row.fill(f32::NEG_INFINITY);
    row[id as usize] = 0.0;
}

/// Biases add up where several sequences end in the same id; of equal ones the last counts.
fn add_sequence_bias(row: &mut [f32], ids: &[u32], biases: &[(Vec<u32>, f32)]) {
    let biases: BTreeMap<&Vec<u32>, f32> =
        biases.iter().map(|(words, bias)| (words, *bias)).collect();
    let mut sum = vec![0.0; row.len()];
    for (words, bias) in biases {
        if let Some((&last, before)) = words.split_last()
            && ids.ends_with(before)
        {
            sum[last as usize] += bias;
        }
    }
    for (score, bias) in row.iter_mut().zip(sum) {
        *score += bias;
    }
}

fn penalise_repetition(row: &mut [f32], ids: &[u32], penalty: f32) {
    for id in ids.iter().collect::<BTreeSet<_>>() {
        let score = &mut row[*id as usize];
        *score = if *score < 0.0 {
            *score * penalty
        } else {
            *score / penalty
        };
    }
}

/// Bans what followed the last `size - 1` ids wherever they occurred before.
fn ban_repeated_ngrams(row: &mut [f32], ids: &[u32], size: usize) {
    if size == 0 || ids.len() < size {
        return;
    }
    let recent = &ids[ids.len() + 1 - size..];
    for ngram in ids.windows(size) {
        if ngram[..size - 1] == *recent {
            ban(row, &ngram[size - 1..]);
        }
    }
}

fn counts(ids: &[u32]) -> BTreeMap<u32, usize> {
    let mut counts = BTreeMap::new();
    for &id in ids {
        *counts.entry(id).or_default() += 1;
    }
    counts
}
