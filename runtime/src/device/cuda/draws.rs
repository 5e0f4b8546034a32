//! Draws as `templates/sample.cu` reads them.
//!
//! The kernel applies processors, takes the likeliest token, samples by temperature, top-k, top-p and
//! min-p, and ranks the continuations of a beam. What it does not do is left to the host
//! ([`super::host_draws`]).
//!
//! Where processors read the tokens of a sequence, its slot keeps them on the device: a step that feeds
//! ids brings all that there are, and each draw appends its token. So the next step can be enqueued
//! before the host has read the token of the last one.

use crate::device::{SequenceStep, Tokens};
use crate::sampling::{BeamDraw, Draw, DrawParams, Processors, Rules};
use kiln_bundle::{MAX_CONTINUATIONS, NO_TOKEN, StepDraw, TokenRule};

/// Most words that processors read for a draw, its history apart.
pub(super) const MAX_DRAW_WORDS: usize = 2048;

/// Where the tokens of a slot's sequence come from: [`StepDraw::given`].
const GIVEN_IN_LISTS: u32 = 1;
const GIVEN_BY_SLOT: u32 = 2;

/// What a slot keeps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    /// Whether it holds a token.
    pub(super) sampled: bool,
    /// Tokens of its history; 0 where it keeps none.
    pub(super) history_len: usize,
    /// Whether they are counted.
    pub(super) counted: bool,
}

/// Tokens of a sequence that a draw's rules read: none where they read none.
pub(super) fn history_len(sequence: &SequenceStep<'_>, draw: &Draw<'_>) -> usize {
    match draw.rules {
        Some(rules) if rules.read_history() => sequence.past_len as usize + sequence.tokens.len(),
        Some(_) | None => 0,
    }
}

/// Whether the kernel makes a draw.
pub(super) fn is_made_by_kernel(draw: &Draw<'_>, vocab_size: u32) -> bool {
    let DrawParams {
        temperature,
        typical_p,
        epsilon_cutoff,
        eta_cutoff,
        ..
    } = draw.params;
    let renormalises = draw
        .rules
        .is_some_and(|rules| rules.processors.renormalize_logits);
    let ranks = draw
        .beam
        .is_none_or(|beam| temperature == 0.0 && !renormalises && beam.count <= MAX_CONTINUATIONS);
    let forced = draw.rules.and_then(|rules| rules.forced(draw.index));
    ranks
        && typical_p >= 1.0
        && epsilon_cutoff == 0.0
        && eta_cutoff == 0.0
        && forced.is_none_or(|id| id < vocab_size && draw.beam.is_none())
        && words(draw) <= MAX_DRAW_WORDS
}

/// Most words that the draw's lists take.
fn words(draw: &Draw<'_>) -> usize {
    const RULE_WORDS: usize = size_of::<TokenRule>() / size_of::<u32>();
    let rules = draw.rules.map_or(0, |rules| {
        let Processors {
            sequence_bias,
            bad_words_ids,
            ..
        } = &rules.processors;
        let biases = sequence_bias.iter().map(|bias| bias.ids.len());
        let words = bad_words_ids.iter().map(Vec::len);
        let sequences = biases.chain(words);
        sequences.map(|len| RULE_WORDS + len).sum::<usize>() + rules.ends.len()
    });
    draw.suppressed_ids.len() + rules
}

/// Writes what a draw needs to the end of `words`, of which the lists start at `start`.
pub(super) struct DrawWriter<'a> {
    pub(super) words: &'a mut Vec<u32>,
    pub(super) start: usize,
    pub(super) vocab_size: u32,
}

impl DrawWriter<'_> {
    /// The kernel's draw for a sequence whose slot keeps its history at `kept`. Row and continuations
    /// are still to be set.
    pub(super) fn describe(
        &mut self,
        sequence: &SequenceStep<'_>,
        draw: &Draw<'_>,
        slot: &Slot,
        kept: u32,
    ) -> StepDraw {
        let mut described = StepDraw {
            slot: sequence.slot,
            history: kept,
            history_len: history_len(sequence, draw) as u32,
            ..parameters(draw)
        };
        if described.history_len > 0 {
            match sequence.tokens {
                Tokens::Ids(_) => {
                    described.given = GIVEN_IN_LISTS;
                    (described.given_from, _) = self.list(draw.history.iter().copied());
                }
                Tokens::LastSampled if !slot.counted => described.given = GIVEN_BY_SLOT,
                Tokens::LastSampled => {}
            }
        }
        let mut suppressed: Vec<u32> = draw.suppressed_ids.to_vec();
        if let Some(rules) = draw.rules {
            self.describe_rules(draw.index, rules, &mut described, &mut suppressed);
        }
        suppressed.retain(|&id| id < self.vocab_size);
        (described.suppressed, described.suppressed_len) = self.list(suppressed);
        if let Some(BeamDraw { score, count, .. }) = draw.beam {
            described.beam_score = score;
            described.continuations_len = count;
        }
        let lists = [
            described.biases_len,
            described.words_len,
            described.suppressed_len,
            described.ends_len,
            described.no_repeat_ngram_size,
        ];
        let penalises = described.repetition_penalty != 1.0
            || described.presence_penalty != 0.0
            || described.frequency_penalty != 0.0;
        described.processed = (penalises || lists != [0; 5]).into();
        described
    }

    fn describe_rules(
        &mut self,
        index: u32,
        rules: &Rules,
        described: &mut StepDraw,
        suppressed: &mut Vec<u32>,
    ) {
        // All of them, so that none is left out: those without a use here are in the draw's suppressed ids,
        // or are asked for below; a choice of one token need not renormalise.
        let Processors {
            sequence_bias,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            no_repeat_ngram_size,
            bad_words_ids,
            suppress_tokens: _,
            begin_suppress_tokens: _,
            forced_bos_token_id: _,
            forced_eos_token_id: _,
            renormalize_logits: _,
            exponential_decay_length_penalty: _,
        } = &rules.processors;
        described.prompt_len = u32::try_from(rules.prompt_len).unwrap_or(u32::MAX);
        described.forced = rules.forced(index).unwrap_or(NO_TOKEN);
        described.repetition_penalty = *repetition_penalty;
        described.presence_penalty = *presence_penalty;
        described.frequency_penalty = *frequency_penalty;
        described.no_repeat_ngram_size = *no_repeat_ngram_size;

        let biases = sequence_bias.iter();
        let biases = biases.map(|bias| (bias.ids.as_slice(), bias.bias));
        (described.biases, described.biases_len) = self.rules(biases);
        let is_end = |word: &[u32]| matches!(word, [id] if rules.ends.contains(id));
        let words = bad_words_ids.iter().map(Vec::as_slice);
        let words = words.filter(|word| !is_end(word));
        suppressed.extend(words.clone().filter_map(|word| match word {
            [id] => Some(*id),
            _ => None,
        }));
        let sequences = words.filter(|word| word.len() > 1);
        (described.words, described.words_len) = self.rules(sequences.map(|word| (word, 0.0)));
        if let Some(share) = rules.ending_share(index) {
            let known = |&id: &u32| id < self.vocab_size;
            let ends: Vec<u32> = rules.ends.iter().copied().filter(known).collect();
            (described.ends, described.ends_len) = self.list(ends);
            described.ending_share = share;
        }
    }

    /// Appends a list; returns where it starts, and its length.
    fn list(&mut self, words: impl IntoIterator<Item = u32>) -> (u32, u32) {
        let start = self.words.len();
        self.words.extend(words);
        let len = self.words.len() - start;
        ((start - self.start) as u32, len as u32)
    }

    /// Appends sequences, each with a bias, as rules by rising token; those of a token stay in order.
    fn rules<'s>(&mut self, sequences: impl Iterator<Item = (&'s [u32], f32)>) -> (u32, u32) {
        let mut all: Vec<TokenRule> = Vec::new();
        for (ids, bias) in sequences {
            if let Some((&token, before)) = ids.split_last()
                && token < self.vocab_size
            {
                let (before, before_len) = self.list(before.iter().copied());
                all.push(TokenRule {
                    token,
                    bias,
                    before,
                    before_len,
                });
            }
        }
        all.sort_by_key(|rule| rule.token);
        let (start, _) = self.list(all.iter().flat_map(rule_words));
        (start, all.len() as u32)
    }
}

fn rule_words(rule: &TokenRule) -> [u32; size_of::<TokenRule>() / size_of::<u32>()] {
    let TokenRule {
        token,
        bias,
        before,
        before_len,
    } = *rule;
    [token, bias.to_bits(), before, before_len]
}

/// What the kernel chooses for a sequence whose draw the host makes: what is least work.
pub(super) fn placeholder(slot: u32) -> StepDraw {
    StepDraw {
        slot,
        ..parameters(&Draw::GREEDY)
    }
}

fn parameters(draw: &Draw<'_>) -> StepDraw {
    let params = draw.params;
    StepDraw {
        index: draw.index,
        top_k: params.top_k,
        temperature: params.temperature,
        top_p: params.top_p,
        min_p: params.min_p,
        seed_low: params.seed as u32,
        seed_high: (params.seed >> 32) as u32,
        forced: NO_TOKEN,
        repetition_penalty: 1.0,
        ..StepDraw::default()
    }
}
