//! What generation means, written to be read and compared with: greedy decoding and beam search as
//! transformers 5 defines them, over the logits of any model.
//!
//! Nothing here is fast. Every step asks for the logits after a whole prefix, every candidate of a
//! step is sorted, and no state is kept but ids and scores. It shares no code with kiln's engine; its
//! own judge is what transformers gave, in `tests/fixtures/expected/generation`, whose
//! `make_generation.py` describes the cases.
//!
//! - [`generate`]: a request's sequences.
//! - [`process`]: what changes a row of scores before a token is chosen from it.
//! - [`warp`]: what cuts a row before a token is drawn. Draws differ between implementations; the ids
//!   left to draw from do not.

mod groups;
mod parameters;
mod processors;
mod warpers;

pub use parameters::{EarlyStopping, Parameters};
pub use processors::{Position, process};
pub use warpers::warp;

/// Score of a beam that is there to fill a place.
const UNFILLED: f32 = -1.0e9;

/// A model: the logits (V) after a sequence of ids.
pub type Model<'a> = dyn FnMut(&[u32]) -> Vec<f32> + 'a;

/// Ids that were generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// New tokens, the one that ended them included.
    pub ids: Vec<u32>,
    /// Of beam search: the sum of log-probabilities over length ^ `length_penalty`.
    pub score: Option<f32>,
}

/// Where implementations of beam search part ways. The default is transformers'; the others are
/// mistakes that comparisons have to catch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// The length in a score counts the prompt.
    pub prompt_has_length: bool,
    /// A step looks at this many candidates a beam, however many end-of-sequence ids there are.
    pub candidates_per_beam: Option<usize>,
}

/// Continues a prompt: `num_return_sequences` sequences by beam search, best first, or a greedy one.
///
/// Nothing is drawn: `temperature` and the cuts are for [`warp`].
pub fn generate(model: &mut Model<'_>, prompt: &[u32], parameters: &Parameters) -> Vec<Sequence> {
    generate_by(Rules::default(), model, prompt, parameters)
}

/// [`generate`] by other rules of beam search.
pub fn generate_by(
    rules: Rules,
    model: &mut Model<'_>,
    prompt: &[u32],
    parameters: &Parameters,
) -> Vec<Sequence> {
    if parameters.num_beam_groups > 1 {
        groups::group_beam_search(model, prompt, parameters)
    } else if parameters.num_beams > 1 {
        beam_search(rules, model, prompt, parameters)
    } else {
        vec![greedy(model, prompt, parameters)]
    }
}

/// The likeliest token each time, by processed logits.
fn greedy(model: &mut Model<'_>, prompt: &[u32], parameters: &Parameters) -> Sequence {
    let ends = parameters.ends();
    let mut ids = Vec::new();
    while ids.len() < parameters.max_new_tokens {
        let mut row = model(&[prompt, &ids].concat());
        process(&mut row, &Position::new(prompt, &ids), parameters);
        let token = argmax(&row);
        ids.push(token);
        if ends.contains(&token) {
            break;
        }
    }
    Sequence { ids, score: None }
}

/// A sequence that beam search goes on with.
#[derive(Clone, Debug)]
struct Beam {
    ids: Vec<u32>,
    /// Sum of processed log-probabilities.
    score: f32,
}

impl Beam {
    /// `count` beams without a token. All but the first would only repeat it.
    fn start(count: usize) -> Vec<Beam> {
        let score = |beam| if beam == 0 { 0.0 } else { UNFILLED };
        (0..count)
            .map(|beam| Beam {
                ids: Vec::new(),
                score: score(beam),
            })
            .collect()
    }
}

/// A beam and one more token.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    beam: usize,
    token: u32,
    score: f32,
}

impl Candidate {
    fn extend(&self, beams: &[Beam]) -> Beam {
        let mut ids = beams[self.beam].ids.clone();
        ids.push(self.token);
        let score = self.score;
        Beam { ids, score }
    }
}

/// `_beam_search` of transformers' `generation/utils.py`, for one prompt.
fn beam_search(
    rules: Rules,
    model: &mut Model<'_>,
    prompt: &[u32],
    parameters: &Parameters,
) -> Vec<Sequence> {
    let num_beams = parameters.num_beams;
    let ends = parameters.ends();
    // Enough that num_beams go on, should the others be ends, whichever ends they are.
    let per_beam = rules.candidates_per_beam.unwrap_or(1 + ends.len()).max(2);
    let normalise = |score: f32, new_tokens: usize| {
        let prompt = if rules.prompt_has_length {
            prompt.len()
        } else {
            0
        };
        length_normalised(score, prompt + new_tokens, parameters.length_penalty)
    };

    let mut running = Beam::start(num_beams);
    // Best first, at most num_beams; scores are normalised.
    let mut pool: Vec<Beam> = Vec::new();
    for length in 1..=parameters.max_new_tokens {
        let mut candidates = candidates(model, prompt, &running, &[], parameters);
        candidates.truncate(per_beam * num_beams);
        let stops = |candidate: &Candidate| {
            ends.contains(&candidate.token) || length == parameters.max_new_tokens
        };

        // Only the first num_beams may finish; the others stand by for those that do.
        let finished = candidates[..num_beams]
            .iter()
            .filter(|candidate| stops(candidate));
        for candidate in finished {
            let beam = candidate.extend(&running);
            let score = normalise(beam.score, length);
            pool.push(Beam { score, ..beam });
        }
        sort_best_first(&mut pool, |beam| beam.score);
        pool.truncate(num_beams);

        // What stopped is pushed to the end, not out.
        let all_stop = candidates.iter().all(stops);
        for candidate in &mut candidates {
            if stops(candidate) {
                candidate.score += UNFILLED;
            }
        }
        sort_best_first(&mut candidates, |candidate| candidate.score);
        running = candidates[..num_beams]
            .iter()
            .map(|candidate| candidate.extend(&running))
            .collect();

        let is_full = pool.len() == num_beams;
        let best_length = best_length(length, parameters);
        let best_possible = normalise(running[0].score, best_length);
        let cannot_improve =
            is_full && pool.last().is_none_or(|worst| best_possible <= worst.score);
        if cannot_improve || all_stop || is_full && parameters.early_stopping == EarlyStopping::Yes
        {
            break;
        }
    }
    pool.truncate(parameters.num_return_sequences);
    pool.into_iter()
        .map(|Beam { ids, score }| Sequence {
            ids,
            score: Some(score),
        })
        .collect()
}

/// Every continuation of the beams by a token, best first. Processors see log-probabilities here, and
/// are not followed by a normalisation. `taken` is what beams of other groups took in this step.
fn candidates(
    model: &mut Model<'_>,
    prompt: &[u32],
    beams: &[Beam],
    taken: &[u32],
    parameters: &Parameters,
) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for (beam, Beam { ids, score }) in beams.iter().enumerate() {
        let mut row = log_softmax(&model(&[prompt, ids].concat()));
        let position = Position::new(prompt, ids).beside(taken);
        process(&mut row, &position, parameters);
        if parameters.renormalize_logits {
            row = log_softmax(&row);
        }
        candidates.extend((0..).zip(row).map(|(token, log_probability)| Candidate {
            beam,
            token,
            score: log_probability + score,
        }));
    }
    sort_best_first(&mut candidates, |candidate| candidate.score);
    candidates
}

/// The length at which a running beam of `length` tokens is given its best chance: as it is, or, to
/// search on as long as a longer one could win, the greatest where length is rewarded.
fn best_length(length: usize, parameters: &Parameters) -> usize {
    let looks_ahead =
        parameters.early_stopping == EarlyStopping::Never && parameters.length_penalty > 0.0;
    if looks_ahead {
        parameters.max_new_tokens
    } else {
        length
    }
}

fn length_normalised(score: f32, length: usize, penalty: f32) -> f32 {
    score / (length as f64).powf(f64::from(penalty)) as f32
}

/// Equals stay in their order.
fn sort_best_first<T>(items: &mut [T], score: impl Fn(&T) -> f32) {
    items.sort_by(|a, b| score(b).total_cmp(&score(a)));
}

/// Index of the largest value, the lowest of equals.
fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &value) in row.iter().enumerate() {
        if value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// Logarithms of the probabilities that a row of scores stands for, in f32.
fn log_softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = row.iter().map(|score| (score - max).exp()).sum();
    row.iter().map(|score| score - max - sum.ln()).collect()
}

/// The probabilities that a row of scores stands for, in f32.
fn softmax(row: &[f32]) -> Vec<f32> {
    log_softmax(row).into_iter().map(f32::exp).collect()
}
