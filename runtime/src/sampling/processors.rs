//! Processors: what changes a row of scores before a token is chosen from it.
//!
//! Each is a function of the row, of its parameters and of what the sequence holds so far. The classes
//! named beside them are those of transformers' `generation/logits_process.py`. None allocates, and
//! the time of each follows from the length of the sequence or of its lists, not from V, except where
//! a token is forced.

use super::{Draw, Taken};

/// What a request asks of its tokens' scores; by default nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Processors {
    /// Added to the score of a token that would complete a sequence; several for one token add up.
    pub sequence_bias: Vec<SequenceBias>,
    /// Divides positive scores, and multiplies negative ones, of tokens that occur in prompt or
    /// output; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the scores of tokens that have been generated; 0 changes nothing.
    pub presence_penalty: f32,
    /// Subtracted from the score of a token as often as it has been generated; 0 changes nothing.
    pub frequency_penalty: f32,
    /// So many tokens in a row occur once in prompt and output; 0 is no limit.
    pub no_repeat_ngram_size: u32,
    /// Sequences that are never completed. An end-of-sequence token alone is none.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// The first token after a prompt of one token.
    pub forced_bos_token_id: Option<u32>,
    /// The last token, where a sequence reaches its maximal length.
    pub forced_eos_token_id: Option<u32>,
    /// Makes probabilities of the scores again, behind all that changes them: for the scores of a search
    /// over beams and those reported; a draw does so anyway.
    pub renormalize_logits: bool,
    /// From so many new tokens on, raises the scores of end-of-sequence tokens by powers of a factor.
    pub exponential_decay_length_penalty: Option<(u32, f32)>,
}

/// A sequence of tokens and what is added to the score of its last where the others precede it.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceBias {
    /// At least one token.
    pub ids: Vec<u32>,
    /// Finite.
    pub bias: f32,
}

impl Processors {
    /// Scores as they are.
    pub const NONE: Processors = Processors {
        sequence_bias: Vec::new(),
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        no_repeat_ngram_size: 0,
        bad_words_ids: Vec::new(),
        suppress_tokens: Vec::new(),
        begin_suppress_tokens: Vec::new(),
        forced_bos_token_id: None,
        forced_eos_token_id: None,
        renormalize_logits: false,
        exponential_decay_length_penalty: None,
    };
}

impl Default for Processors {
    fn default() -> Self {
        Processors::NONE
    }
}

/// [`Processors`] with what they need to know of their request: fixed for its whole life.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// What is asked.
    pub processors: Processors,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Most tokens generated.
    pub max_new_tokens: u32,
    /// The tokens that end the sequence.
    pub ends: Vec<u32>,
}

impl Rules {
    /// Whether they may change the scores of the token of this index. Suppressed tokens do not count:
    /// a draw brings those itself.
    pub fn apply_to(&self, index: u32) -> bool {
        let decays = |(start, _)| index > start;
        !self.processors.sequence_bias.is_empty()
            || self.processors.renormalize_logits
            || !self.processors.bad_words_ids.is_empty()
            || self.read_history()
            || self.forced(index).is_some()
            || self
                .processors
                .exponential_decay_length_penalty
                .is_some_and(decays)
    }

    /// Whether they look at the tokens of the sequence, so that the last of them must be known.
    pub fn read_history(&self) -> bool {
        let p = &self.processors;
        p.repetition_penalty != 1.0
            || p.presence_penalty != 0.0
            || p.frequency_penalty != 0.0
            || p.no_repeat_ngram_size > 0
            || p.sequence_bias
                .iter()
                .any(|sequence| sequence.ids.len() > 1)
            || p.bad_words_ids.iter().any(|word| word.len() > 1)
    }

    /// The token that this index must have. At maximal length both may apply; the end comes last.
    pub(crate) fn forced(&self, index: u32) -> Option<u32> {
        let ends = index + 1 == self.max_new_tokens;
        let begins = index == 0 && self.prompt_len == 1;
        let end = self.processors.forced_eos_token_id.filter(|_| ends);
        end.or(self.processors.forced_bos_token_id.filter(|_| begins))
    }

    /// The share of their magnitude by which the scores of the tokens that end the sequence rise for
    /// this index: `factor^(index - start) - 1`, from the first index behind `start`.
    pub(crate) fn ending_share(&self, index: u32) -> Option<f32> {
        let (start, factor) = self.processors.exponential_decay_length_penalty?;
        let power = index.checked_sub(start).filter(|&power| power > 0)?;
        let power = i32::try_from(power).unwrap_or(i32::MAX);
        Some((f64::from(factor).powi(power) - 1.0).min(f64::from(f32::MAX)) as f32)
    }
}

/// Applies everything that changes the scores (V) of a draw, in the reference's order. The scores are
/// finite before; none is +inf after. `counts` is working memory.
///
/// Suppressed tokens stand here for four processors: minimal length and minimal new tokens (for the
/// tokens that end a sequence), suppressed tokens, and those suppressed at the beginning. The last two
/// come after forcing in the reference, which makes no difference: a request that forces what it
/// always suppresses is refused.
pub(super) fn process(
    scores: &mut [f32],
    draw: &Draw<'_>,
    taken: &Taken<'_>,
    counts: &mut Vec<u32>,
) {
    let Some(rules) = draw.rules else {
        penalise_taken(scores, taken);
        return forbid(scores, draw.suppressed_ids);
    };
    let (p, history, eos) = (&rules.processors, draw.history, &rules.ends);
    let generated = history.get(rules.prompt_len..).unwrap_or_default();
    add_sequence_bias(scores, history, &p.sequence_bias);
    penalise_taken(scores, taken);
    penalise_repetition(scores, history, p.repetition_penalty, counts);
    // Not in the reference. Here, because OpenAI's formula is stated on logits as the model gives
    // them, and a penalty that follows a subtraction could change its sign.
    penalise_frequency(
        scores,
        generated,
        p.presence_penalty,
        p.frequency_penalty,
        counts,
    );
    forbid_repeated_ngrams(scores, history, p.no_repeat_ngram_size as usize);
    forbid_bad_words(scores, history, &p.bad_words_ids, eos);
    forbid(scores, draw.suppressed_ids);
    if let Some(id) = rules.forced(draw.index) {
        force(scores, id);
    }
    if let Some(share) = rules.ending_share(draw.index) {
        favour_ending(scores, eos, share);
    }
}

/// `score += bias` for the last token of each sequence whose other tokens end the history
/// (`SequenceBiasLogitsProcessor`). A sequence of one token is OpenAI's `logit_bias`.
fn add_sequence_bias(scores: &mut [f32], history: &[u32], biases: &[SequenceBias]) {
    for SequenceBias { ids, bias } in biases {
        if let Some(id) = completed_by(history, ids) {
            change(scores, id, |score| score + bias);
        }
    }
}

/// `score -= penalty` for each token that a beam of an earlier group took
/// (`HammingDiversityLogitsProcessor`, in releases 4; Vijayakumar et al., "Diverse Beam Search", 2016).
fn penalise_taken(scores: &mut [f32], taken: &Taken<'_>) {
    for &id in taken.ids {
        change(scores, id, |score| score - taken.penalty);
    }
}

/// `score < 0 ? score * penalty : score / penalty`, once for each token that occurs
/// (`RepetitionPenaltyLogitsProcessor`; Keskar et al., "CTRL", 2019).
fn penalise_repetition(scores: &mut [f32], history: &[u32], penalty: f32, counts: &mut Vec<u32>) {
    if penalty == 1.0 {
        return;
    }
    let penalised = |score: f32| match score < 0.0 {
        true => score * penalty,
        false => score / penalty,
    };
    for_each_distinct(history, scores.len(), counts, |id, _| {
        change(scores, id, penalised);
    });
}

/// `score -= presence + count * frequency` for each token generated `count` times (OpenAI's API
/// reference; the prompt does not count).
fn penalise_frequency(
    scores: &mut [f32],
    generated: &[u32],
    presence: f32,
    frequency: f32,
    counts: &mut Vec<u32>,
) {
    if presence == 0.0 && frequency == 0.0 {
        return;
    }
    for_each_distinct(generated, scores.len(), counts, |id, count| {
        change(scores, id, |score| {
            score - presence - count as f32 * frequency
        });
    });
}

/// Forbids every token that would complete `size` tokens that occur already
/// (`NoRepeatNGramLogitsProcessor`).
fn forbid_repeated_ngrams(scores: &mut [f32], history: &[u32], size: usize) {
    if size == 0 || history.len() < size {
        return;
    }
    let (_, prefix) = history.split_at(history.len() + 1 - size);
    for window in history.windows(size) {
        if let Some((&last, before)) = window.split_last()
            && before == prefix
        {
            change(scores, last, |_| f32::NEG_INFINITY);
        }
    }
}

/// Forbids the last token of each sequence whose other tokens end the history
/// (`NoBadWordsLogitsProcessor`); end-of-sequence tokens alone are left out.
fn forbid_bad_words(scores: &mut [f32], history: &[u32], words: &[Vec<u32>], eos: &[u32]) {
    for word in words {
        let ends = matches!(word[..], [id] if eos.contains(&id));
        if !ends && let Some(id) = completed_by(history, word) {
            change(scores, id, |_| f32::NEG_INFINITY);
        }
    }
}

/// Forbids tokens (`SuppressTokensLogitsProcessor`).
fn forbid(scores: &mut [f32], ids: &[u32]) {
    for &id in ids {
        change(scores, id, |_| f32::NEG_INFINITY);
    }
}

/// Leaves one token (`ForcedBOSTokenLogitsProcessor`, `ForcedEOSTokenLogitsProcessor`).
fn force(scores: &mut [f32], id: u32) {
    scores.fill(f32::NEG_INFINITY);
    change(scores, id, |_| 0.0);
}

/// `score += |score| * share` for the tokens that end a sequence (`ExponentialDecayLengthPenalty`). What
/// is forbidden stays so.
fn favour_ending(scores: &mut [f32], eos: &[u32], share: f32) {
    for &id in eos {
        change(scores, id, |score| match score.is_finite() {
            true => score + score.abs() * share,
            false => score,
        });
    }
}

/// The last token of `sequence`, where the others are the end of `history`.
fn completed_by(history: &[u32], sequence: &[u32]) -> Option<u32> {
    let (&last, before) = sequence.split_last()?;
    history.ends_with(before).then_some(last)
}

/// Changes one score. Ids beyond the row, which a prompt may hold, have none; a sum that overflows
/// stays the largest number there is, so that a row has a likeliest token.
fn change(scores: &mut [f32], id: u32, changed: impl Fn(f32) -> f32) {
    if let Some(score) = scores.get_mut(id as usize) {
        *score = changed(*score).min(f32::MAX);
    }
}

/// Calls `visit` with each of `ids` once and with how often it occurs. `counts` is all zero, before
/// and after.
fn for_each_distinct(
    ids: &[u32],
    vocab_size: usize,
    counts: &mut Vec<u32>,
    mut visit: impl FnMut(u32, u32),
) {
    if counts.len() < vocab_size {
        counts.resize(vocab_size, 0);
    }
    for &id in ids {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1;
        }
    }
    for &id in ids {
        let count = counts.get_mut(id as usize).map_or(0, std::mem::take);
        if count > 0 {
            visit(id, count);
        }
    }
}

/// The tokens that a request suppresses, by the index of the token to be chosen.
///
/// They lie in one list, those of the beginning first and those that end a sequence last, so that
/// whatever applies together is one slice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Suppression {
    ids: Vec<u32>,
    /// Where those that are suppressed always start and end.
    always: std::ops::Range<usize>,
    begin_index: u32,
    min_new_tokens: u32,
}

impl Suppression {
    /// `ending` are the tokens that end a sequence, held back before `min_new_tokens`.
    pub(crate) fn new(
        processors: &Processors,
        prompt_len: usize,
        ending: &[u32],
        min_new_tokens: u32,
    ) -> Suppression {
        let begin = &processors.begin_suppress_tokens;
        let always = &processors.suppress_tokens;
        // A forced first token does not count as the beginning
        // (`SuppressTokensAtBeginLogitsProcessor`).
        let begins_later = prompt_len == 1 && processors.forced_bos_token_id.is_some();
        Suppression {
            ids: [begin, always, ending].concat(),
            always: begin.len()..begin.len() + always.len(),
            begin_index: u32::from(begins_later),
            min_new_tokens,
        }
    }

    /// Those for the token of an index.
    pub(crate) fn at(&self, index: u32) -> &[u32] {
        let start = match index == self.begin_index {
            true => 0,
            false => self.always.start,
        };
        let end = match index < self.min_new_tokens {
            true => self.ids.len(),
            false => self.always.end,
        };
        &self.ids[start..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Draw;
    use std::sync::Arc;

    const OUT: f32 = f32::NEG_INFINITY;
    const EOS: u32 = 2;

    fn rules(processors: Processors, prompt_len: usize) -> Arc<Rules> {
        Arc::new(Rules {
            processors,
            prompt_len,
            max_new_tokens: 6,
            ends: vec![EOS],
        })
    }

    /// `scores` after `processors`, for the token behind `history`, whose first two are the prompt.
    #[track_caller]
    fn check(scores: &[f32], history: &[u32], processors: Processors, expect: &[f32]) {
        let rules = rules(processors, 2);
        let draw = Draw {
            index: history.len() as u32 - 2,
            rules: Some(&rules),
            history,
            ..Draw::GREEDY
        };
        let mut counts = Vec::new();
        // Twice, since working memory is used again.
        for _ in 0..2 {
            let mut scores = scores.to_vec();
            process(&mut scores, &draw, &Taken::default(), &mut counts);
            assert_eq!(scores, expect);
        }
    }

    #[test]
    fn nothing_asked_changes_nothing() {
        let scores = [1.0, -2.0, 0.0, 3.5];
        check(&scores, &[0, 1, 2, 2], Processors::NONE, &scores);
        let idle = rules(Processors::NONE, 2);
        assert!(!idle.read_history());
        assert!((0..6).all(|index| !idle.apply_to(index)));
    }

    #[test]
    fn biases_follow_their_prefix() {
        let bias = |ids: &[u32], bias| SequenceBias {
            ids: ids.to_vec(),
            bias,
        };
        let processors = Processors {
            sequence_bias: vec![
                bias(&[1], 0.5),
                bias(&[7, 3], 2.0),
                bias(&[6, 3], 100.0),
                bias(&[5, 7, 1], -4.0),
                bias(&[9, 9, 9, 9, 9, 0], 100.0),
            ],
            ..Processors::NONE
        };
        check(
            &[1.0, 1.0, 1.0, 1.0],
            &[6, 5, 7],
            processors,
            &[1.0, -2.5, 1.0, 3.0],
        );
    }

    #[test]
    fn repetition_is_penalised_once() {
        let processors = Processors {
            repetition_penalty: 2.0,
            ..Processors::NONE
        };
        // 0 is in the prompt, 1 twice in the output, 99 beyond the vocabulary.
        check(
            &[3.0, -1.0, 4.0, 0.0],
            &[0, 99, 1, 1, 3],
            processors,
            &[1.5, -2.0, 4.0, 0.0],
        );
    }

    #[test]
    fn frequency_counts_what_was_generated() {
        let processors = Processors {
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            ..Processors::NONE
        };
        check(
            &[1.0, 1.0, 1.0, 1.0],
            &[0, 0, 1, 3, 1, 1],
            processors,
            &[1.0, -0.75, 1.0, 0.25],
        );
    }

    #[test]
    fn frequency_comes_after_repetition() {
        let processors = Processors {
            repetition_penalty: 2.0,
            presence_penalty: 3.0,
            ..Processors::NONE
        };
        // 4 / 2 - 3; the other order would give (4 - 3) / 2.
        check(&[4.0, 4.0], &[9, 9, 0], processors, &[-1.0, 4.0]);
    }

    #[test]
    fn repeated_ngrams_are_forbidden() {
        let size = |no_repeat_ngram_size| Processors {
            no_repeat_ngram_size,
            ..Processors::NONE
        };
        let scores = [1.0, 2.0, 3.0, 4.0];
        // 1 2 has been followed by 3 and by 0.
        let history = [1, 2, 3, 1, 2, 0, 1, 2];
        check(&scores, &history, size(3), &[OUT, 2.0, 3.0, OUT]);
        check(&scores, &history, size(4), &[1.0, 2.0, 3.0, 4.0]);
        check(&scores, &[0, 3, 0], size(1), &[OUT, 2.0, 3.0, OUT]);
        // A run: the prefix itself is followed by nothing yet.
        check(&scores, &[1, 1], size(2), &[1.0, OUT, 3.0, 4.0]);
        check(&scores, &[3, 1], size(2), &scores);
        check(&scores, &[1, 1], size(3), &scores);
    }

    #[test]
    fn bad_words_are_not_completed() {
        let processors = Processors {
            bad_words_ids: vec![vec![0], vec![EOS], vec![7, 3], vec![6, 1], vec![8, 7, EOS]],
            ..Processors::NONE
        };
        check(
            &[1.0, 2.0, 3.0, 4.0],
            &[5, 7],
            processors.clone(),
            &[OUT, 2.0, 3.0, OUT],
        );
        check(
            &[1.0, 2.0, 3.0, 4.0],
            &[8, 7],
            processors,
            &[OUT, 2.0, OUT, OUT],
        );
    }

    #[test]
    fn forced_tokens_are_all_that_is_left() {
        let processors = Processors {
            forced_bos_token_id: Some(3),
            forced_eos_token_id: Some(EOS),
            ..Processors::NONE
        };
        let forced = |prompt_len, index, max_new_tokens| {
            let mut rules = Arc::unwrap_or_clone(rules(processors.clone(), prompt_len));
            rules.max_new_tokens = max_new_tokens;
            assert_eq!(rules.apply_to(index), rules.forced(index).is_some());
            rules.forced(index)
        };
        assert_eq!(forced(1, 0, 6), Some(3));
        assert_eq!(forced(2, 0, 6), None);
        assert_eq!(forced(1, 1, 6), None);
        assert_eq!(forced(2, 4, 6), None);
        assert_eq!(forced(2, 5, 6), Some(EOS));
        assert_eq!(forced(1, 0, 1), Some(EOS));
        let history = [1, 1, 0, 0, 0, 0, 0];
        check(
            &[9.0, 9.0, -9.0, 9.0],
            &history,
            processors,
            &[OUT, OUT, 0.0, OUT],
        );
    }

    #[test]
    fn ending_is_favoured_more_and_more() {
        let processors = Processors {
            exponential_decay_length_penalty: Some((1, 1.5)),
            ..Processors::NONE
        };
        let scores = [1.0, 1.0, -2.0, 1.0];
        check(&scores, &[0, 0, 0], processors.clone(), &scores);
        // One token behind the start: |-2| * (1.5 - 1). Two: |-2| * (2.25 - 1).
        check(
            &scores,
            &[0, 0, 0, 0],
            processors.clone(),
            &[1.0, 1.0, -1.0, 1.0],
        );
        check(
            &scores,
            &[0, 0, 0, 0, 0],
            processors.clone(),
            &[1.0, 1.0, 0.5, 1.0],
        );
        // What is forbidden stays forbidden.
        let both = Processors {
            bad_words_ids: vec![vec![0, EOS]],
            ..processors
        };
        check(&scores, &[0; 5], both, &[1.0, 1.0, OUT, 1.0]);
        let mut scores = [0.0, 5.0];
        let processors = Processors {
            exponential_decay_length_penalty: Some((0, 9.0)),
            ..Processors::NONE
        };
        let share = rules(processors, 2).ending_share(4_000_000).unwrap();
        favour_ending(&mut scores, &[0, 1], share);
        assert_eq!(scores, [0.0, f32::MAX]);
    }

    #[test]
    fn suppressed_tokens_are_one_slice() {
        let processors = Processors {
            suppress_tokens: vec![10, 11],
            begin_suppress_tokens: vec![20],
            ..Processors::NONE
        };
        let suppression = Suppression::new(&processors, 3, &[EOS], 2);
        assert_eq!(suppression.at(0), [20, 10, 11, EOS]);
        assert_eq!(suppression.at(1), [10, 11, EOS]);
        assert_eq!(suppression.at(2), [10, 11]);
        let free = Suppression::new(&processors, 3, &[EOS], 0);
        assert_eq!(free.at(0), [20, 10, 11]);
        let forced = Processors {
            forced_bos_token_id: Some(1),
            ..processors
        };
        let later = Suppression::new(&forced, 1, &[EOS], 0);
        assert_eq!(
            (later.at(0), later.at(1)),
            (&[10, 11][..], &[20, 10, 11][..])
        );
        assert_eq!(Suppression::new(&forced, 2, &[EOS], 0).at(0), [20, 10, 11]);
    }

    #[test]
    fn history_is_read_where_it_matters() {
        let reads = |processors| rules(processors, 2).read_history();
        let none = || Processors::NONE;
        assert!(reads(Processors {
            repetition_penalty: 1.1,
            ..none()
        }));
        assert!(reads(Processors {
            frequency_penalty: -0.1,
            ..none()
        }));
        assert!(reads(Processors {
            bad_words_ids: vec![vec![1, 2]],
            ..none()
        }));
        let single = Processors {
            bad_words_ids: vec![vec![1]],
            ..none()
        };
        assert!(!reads(single.clone()));
        assert!(rules(single, 2).apply_to(0));
    }
}
