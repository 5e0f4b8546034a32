//! The CPU's choice of a token: processors, cuts and a draw.

use super::cuts::{self, Candidate};
use super::{Draw, DrawParams, Taken, logprobs, processors};
use crate::cpu::{Isa, scores};

/// Chooses tokens on the CPU; keeps its working memory.
#[derive(Debug)]
pub struct Sampler {
    pub(super) isa: Isa,
    pub(super) candidates: Vec<Candidate>,
    pub(super) scores: Vec<f32>,
    pub(super) counts: Vec<u32>,
}

impl Default for Sampler {
    fn default() -> Sampler {
        Sampler {
            isa: Isa::of_machine(),
            candidates: Vec::new(),
            scores: Vec::new(),
            counts: Vec::new(),
        }
    }
}

impl Sampler {
    /// The token for a row of `logits` (V), or none where a logit is no finite number or every token
    /// is suppressed.
    pub fn sample(&mut self, logits: &[f32], draw: &Draw<'_>) -> Option<u32> {
        scores::finite_max(self.isa, logits)?;
        self.process(logits, draw);
        let max = self.likeliest()?;
        let params = &draw.params;
        if params.temperature == 0.0 {
            let index = self.scores.iter().position(|&score| score == max)?;
            return Some(index as u32);
        }
        let share = uniform(params.seed, draw.index);
        if !cuts::any(params) {
            return self.pick_from_all(max, params.temperature, share);
        }
        self.gather(max, params, 1);
        self.pick(share)
    }

    /// The largest score, where there is one above -inf.
    pub(super) fn likeliest(&self) -> Option<f32> {
        let max = scores::max(self.isa, &self.scores);
        (max > f32::NEG_INFINITY).then_some(max)
    }

    /// What [`Sampler::sample`] chooses by (V): scores as the processors leave them, and where it draws
    /// those over the temperature, with -inf for what is cut.
    pub fn scores(&mut self, logits: &[f32], draw: &Draw<'_>) -> &[f32] {
        self.process(logits, draw);
        let renormalises = draw.rules.is_some_and(|r| r.processors.renormalize_logits);
        let temperature = draw.params.temperature;
        let Some(max) = self.likeliest() else {
            return &self.scores;
        };
        if temperature > 0.0 {
            self.gather(max, &draw.params, 1);
            self.scores.clear();
            self.scores.resize(logits.len(), f32::NEG_INFINITY);
            for candidate in &self.candidates {
                self.scores[candidate.id as usize] = candidate.score + max / temperature;
            }
        }
        if renormalises {
            self.renormalise();
        }
        &self.scores
    }

    /// Makes log-probabilities of the scores.
    pub(super) fn renormalise(&mut self) {
        let logprob = logprobs::normaliser(&self.scores);
        for score in &mut self.scores {
            *score = logprob(*score);
        }
    }

    /// Makes scores of a row of `logits` (V).
    fn process(&mut self, logits: &[f32], draw: &Draw<'_>) {
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        processors::process(&mut self.scores, draw, &Taken::default(), &mut self.counts);
    }

    /// Makes the tokens that the cuts leave candidates, by rising id: of each cut at least `least`. `max` is
    /// the largest score. The scores are gone after it.
    pub(super) fn gather(&mut self, max: f32, params: &DrawParams, least: usize) {
        self.candidates.clear();
        for (id, &logit) in (0..).zip(&self.scores) {
            let score = (logit - max) / params.temperature;
            if score > f32::NEG_INFINITY {
                self.candidates.push(Candidate { id, score });
            }
        }
        cuts::cut(&mut self.candidates, params, least, &mut self.scores);
    }

    /// The token at `share` of the cumulated probability, by rising id, where all can be drawn.
    fn pick_from_all(&self, max: f32, temperature: f32, share: f64) -> Option<u32> {
        let scale = temperature.recip().min(f32::MAX);
        let sum = |block: &[f32]| scores::exp_sum(self.isa, block, max, scale);
        let pick = |block: &[f32], start: usize, mut left: f64| {
            let mut last = None;
            for (id, score) in (start..).zip(block) {
                let weight = f64::from(((score - max) * scale).exp());
                left -= weight;
                if weight > 0.0 {
                    last = Some(id as u32);
                }
                if left < 0.0 {
                    break;
                }
            }
            last
        };
        let mut left = share * sum(&self.scores);
        let mut last = (&self.scores[..0], 0);
        let starts = (0..).step_by(scores::BLOCK);
        for (block, start) in self.scores.chunks(scores::BLOCK).zip(starts) {
            let sum = sum(block);
            if left < sum {
                return pick(block, start, left);
            }
            if sum > 0.0 {
                last = (block, start);
            }
            left -= sum;
        }
        // Rounding left a remainder; it falls to the last one that can be drawn.
        pick(last.0, last.1, f64::INFINITY)
    }

    /// The candidate at `share` of the cumulated probability, by rising id.
    fn pick(&self, share: f64) -> Option<u32> {
        let mut left = share * self.candidates.iter().map(Candidate::weight).sum::<f64>();
        for candidate in &self.candidates {
            left -= candidate.weight();
            if left < 0.0 {
                return Some(candidate.id);
            }
        }
        // Rounding left a remainder; it falls to the last one that can be drawn.
        self.candidates
            .iter()
            .rev()
            .find(|candidate| candidate.weight() > 0.0)
            .map(|c| c.id)
    }
}

/// A number in [0, 1) that follows from its arguments alone.
fn uniform(seed: u64, index: u32) -> f64 {
    let [low, high, ..] = philox([index, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as
/// 1, 2, 3" (SC 2011).
pub(super) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::{Processors, Rules, SequenceBias};
    use std::sync::Arc;

    const FREE: DrawParams = DrawParams {
        temperature: 1.0,
        seed: 1,
        ..DrawParams::GREEDY
    };

    fn draw(params: DrawParams, index: u32) -> Draw<'static> {
        Draw {
            params,
            index,
            ..Draw::GREEDY
        }
    }

    /// Ids that occur in many draws from `probabilities`.
    fn support(probabilities: &[f32], params: DrawParams) -> Vec<u32> {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 3.0).collect();
        let mut sampler = Sampler::default();
        let mut ids: Vec<u32> = (0..4000)
            .filter_map(|i| sampler.sample(&logits, &draw(params, i)))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn philox_gives_its_published_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut sampler = Sampler::default();
        let greedy = draw(DrawParams::GREEDY, 0);
        assert_eq!(sampler.sample(&[1.0, 7.0, -2.0, 7.0], &greedy), Some(1));
        let suppressed = Draw {
            suppressed_ids: &[1, 99],
            ..greedy
        };
        assert_eq!(sampler.sample(&[1.0, 7.0, -2.0, 7.0], &suppressed), Some(3));
    }

    #[test]
    fn values_that_are_no_numbers_are_refused() {
        let mut sampler = Sampler::default();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for params in [DrawParams::GREEDY, FREE] {
                assert_eq!(sampler.sample(&[1.0, bad, 0.0], &draw(params, 0)), None);
            }
        }
        let all = Draw {
            suppressed_ids: &[0, 1],
            ..draw(FREE, 0)
        };
        assert_eq!(sampler.sample(&[1.0, 2.0], &all), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let probabilities = [0.1f32, 0.2, 0.3, 0.4];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut sampler = Sampler::default();
        let mut counts = [0u32; 4];
        for index in 0..20_000 {
            counts[sampler.sample(&logits, &draw(FREE, index)).unwrap() as usize] += 1;
        }
        for (count, p) in counts.iter().zip(probabilities) {
            let share = *count as f32 / 20_000.0;
            assert!((share - p).abs() < 0.015, "{share} of {p}");
        }
    }

    #[test]
    fn temperature_sharpens_before_the_cuts() {
        // At temperature 1/2 the shares are those of the squares: 0.53, 0.3, 0.13, 0.03.
        let probabilities = [0.4, 0.3, 0.2, 0.1];
        let params = DrawParams {
            temperature: 0.5,
            top_p: 0.83,
            ..FREE
        };
        assert_eq!(support(&probabilities, params), [0, 1]);
        assert_eq!(
            support(
                &probabilities,
                DrawParams {
                    temperature: 1.0,
                    ..params
                }
            ),
            [0, 1, 2]
        );
    }

    #[test]
    fn tiny_temperatures_stay_finite() {
        let mut sampler = Sampler::default();
        let params = DrawParams {
            temperature: f32::MIN_POSITIVE,
            ..FREE
        };
        assert_eq!(
            sampler.sample(&[90.0, 91.0, 89.0], &draw(params, 5)),
            Some(1)
        );
    }

    #[test]
    fn top_k_keeps_what_equals_the_last() {
        let probabilities = [0.1, 0.2, 0.2, 0.5];
        assert_eq!(
            support(&probabilities, DrawParams { top_k: 1, ..FREE }),
            [3]
        );
        assert_eq!(
            support(&probabilities, DrawParams { top_k: 2, ..FREE }),
            [1, 2, 3]
        );
        assert_eq!(
            support(&probabilities, DrawParams { top_k: 9, ..FREE }),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses() {
        let probabilities = [0.1, 0.2, 0.3, 0.4];
        assert_eq!(
            support(&probabilities, DrawParams { top_p: 0.3, ..FREE }),
            [3]
        );
        assert_eq!(
            support(&probabilities, DrawParams { top_p: 0.5, ..FREE }),
            [2, 3]
        );
        assert_eq!(
            support(
                &probabilities,
                DrawParams {
                    top_p: 0.95,
                    ..FREE
                }
            ),
            [0, 1, 2, 3]
        );
        assert_eq!(
            support(
                &probabilities,
                DrawParams {
                    top_p: 1e-6,
                    ..FREE
                }
            ),
            [3]
        );
    }

    #[test]
    fn of_equals_top_p_cuts_the_lower_ids() {
        let probabilities = [0.25, 0.25, 0.25, 0.25];
        assert_eq!(
            support(&probabilities, DrawParams { top_p: 0.4, ..FREE }),
            [2, 3]
        );
    }

    #[test]
    fn top_p_ranks_as_many_as_it_needs() {
        let mut sampler = Sampler::default();
        let logits = vec![0.5f32; 3000];
        let params = DrawParams { top_p: 0.5, ..FREE };
        let ids: Vec<u32> = (0..500)
            .map(|i| sampler.sample(&logits, &draw(params, i)).unwrap())
            .collect();
        assert!(ids.iter().all(|&id| id >= 1499), "{:?}", ids.iter().min());
        assert!(ids.iter().any(|&id| id < 1700) && ids.iter().any(|&id| id > 2800));
    }

    #[test]
    fn min_p_is_a_share_of_the_likeliest() {
        let probabilities = [0.1, 0.2, 0.3, 0.4];
        assert_eq!(
            support(&probabilities, DrawParams { min_p: 0.6, ..FREE }),
            [2, 3]
        );
        assert_eq!(
            support(&probabilities, DrawParams { min_p: 1.0, ..FREE }),
            [3]
        );
        let both = DrawParams {
            top_p: 0.65,
            min_p: 0.3,
            ..FREE
        };
        assert_eq!(support(&probabilities, both), [2, 3]);
    }

    /// The distribution that a draw is made from, written after the reference, in f64, with every
    /// intermediate in full.
    fn reference(logits: &[f32], draw: &Draw<'_>) -> Vec<f64> {
        let vocab_size = logits.len();
        let mut scores: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        if let Some(rules) = draw.rules {
            let p = &rules.processors;
            let generated = &draw.history[rules.prompt_len..];
            for (id, score) in scores.iter_mut().enumerate() {
                let count = |ids: &[u32]| ids.iter().filter(|&&x| x as usize == id).count() as f64;
                for bias in &p.sequence_bias {
                    assert_eq!(bias.ids.len(), 1);
                    if bias.ids[0] as usize == id {
                        *score += f64::from(bias.bias);
                    }
                }
                if count(draw.history) > 0.0 {
                    let penalty = f64::from(p.repetition_penalty);
                    *score *= if *score < 0.0 { penalty } else { 1.0 / penalty };
                }
                let times = count(generated);
                *score -= f64::from(p.frequency_penalty) * times;
                *score -= f64::from(p.presence_penalty) * times.min(1.0);
            }
        }
        for &id in draw.suppressed_ids {
            scores[id as usize] = f64::NEG_INFINITY;
        }
        let params = draw.params;
        for score in &mut scores {
            *score /= f64::from(params.temperature);
        }
        let softmax = |scores: &[f64]| -> Vec<f64> {
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
            scores
                .iter()
                .map(|score| (score - max).exp() / total)
                .collect()
        };
        let entropy = |p: &[f64]| -> f64 {
            let terms = p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln());
            terms.sum()
        };
        let drop = |scores: &mut [f64], dropped: &dyn Fn(usize) -> bool| {
            for (id, score) in scores.iter_mut().enumerate() {
                if dropped(id) {
                    *score = f64::NEG_INFINITY;
                }
            }
        };
        let sorted = |key: &dyn Fn(usize) -> f64| -> Vec<usize> {
            let mut ids: Vec<usize> = (0..vocab_size).collect();
            ids.sort_by(|&a, &b| key(a).total_cmp(&key(b)));
            ids
        };
        if params.top_k > 0 {
            let before = scores.clone();
            let threshold = before[sorted(&|id| -before[id])[params.top_k as usize - 1]];
            drop(&mut scores, &|id| before[id] < threshold);
        }
        if params.top_p < 1.0 {
            let p = softmax(&scores);
            let order = sorted(&|id| p[id]);
            let mut sum = 0.0;
            for &id in &order[..vocab_size - 1] {
                sum += p[id];
                if sum <= 1.0 - f64::from(params.top_p) {
                    scores[id] = f64::NEG_INFINITY;
                }
            }
        }
        let p = softmax(&scores);
        let largest = p.iter().copied().fold(0.0, f64::max);
        drop(&mut scores, &|id| p[id] < f64::from(params.min_p) * largest);
        if params.typical_p < 1.0 {
            let p = softmax(&scores);
            let expected = entropy(&p);
            let shift = |id: usize| match p[id] > 0.0 {
                true => (-p[id].ln() - expected).abs(),
                false => f64::INFINITY,
            };
            let mut sum = 0.0;
            let mut last = 0.0;
            for id in sorted(&shift) {
                last = shift(id);
                sum += p[id];
                if sum >= f64::from(params.typical_p) {
                    break;
                }
            }
            drop(&mut scores, &|id| shift(id) > last);
        }
        for eta in [false, true] {
            let p = softmax(&scores);
            let largest = p.iter().copied().fold(0.0, f64::max);
            let bound = match eta {
                false => f64::from(params.epsilon_cutoff),
                true => {
                    let eta = f64::from(params.eta_cutoff);
                    eta.min(eta.sqrt() * (-entropy(&p)).exp())
                }
            };
            drop(&mut scores, &|id| p[id] < bound && p[id] < largest);
        }
        softmax(&scores)
    }

    const DRAWS: u32 = 20_000;

    /// Pearson's statistic of many draws against `expected`, as standard deviations above its mean.
    /// Infinite where a token is drawn that cannot be.
    fn deviation(logits: &[f32], draw: &Draw<'_>, expected: &[f64]) -> f64 {
        let mut sampler = Sampler::default();
        let mut counts = vec![0u32; logits.len()];
        for seed in 0..u64::from(DRAWS) {
            let mut draw = *draw;
            draw.params.seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            counts[sampler.sample(logits, &draw).unwrap() as usize] += 1;
        }
        let (mut statistic, mut freedom) = (0.0, -1.0);
        for (&count, &p) in counts.iter().zip(expected) {
            let mean = p * f64::from(DRAWS);
            if mean == 0.0 {
                if count > 0 {
                    return f64::INFINITY;
                }
                continue;
            }
            statistic += (f64::from(count) - mean).powi(2) / mean;
            freedom += 1.0;
        }
        match freedom > 0.0 {
            true => (statistic - freedom) / (2.0 * freedom).sqrt(),
            false => statistic,
        }
    }

    /// Parameter sets that every processor and cut is part of.
    fn parameter_sets() -> Vec<(DrawParams, Processors)> {
        let penalties = Processors {
            repetition_penalty: 1.3,
            presence_penalty: 0.2,
            frequency_penalty: 0.3,
            ..Processors::NONE
        };
        let biased = Processors {
            sequence_bias: vec![SequenceBias {
                ids: vec![4],
                bias: 1.5,
            }],
            ..Processors::NONE
        };
        let plain = |params| (params, Processors::NONE);
        vec![
            plain(FREE),
            plain(DrawParams {
                temperature: 0.7,
                ..FREE
            }),
            plain(DrawParams { top_k: 5, ..FREE }),
            plain(DrawParams { top_p: 0.8, ..FREE }),
            plain(DrawParams { min_p: 0.2, ..FREE }),
            plain(DrawParams {
                typical_p: 0.6,
                ..FREE
            }),
            plain(DrawParams {
                epsilon_cutoff: 0.05,
                ..FREE
            }),
            plain(DrawParams {
                eta_cutoff: 0.2,
                ..FREE
            }),
            (FREE, penalties.clone()),
            (FREE, biased.clone()),
            (
                DrawParams {
                    temperature: 1.4,
                    top_k: 10,
                    top_p: 0.95,
                    min_p: 0.05,
                    typical_p: 0.9,
                    epsilon_cutoff: 0.02,
                    eta_cutoff: 0.01,
                    ..FREE
                },
                penalties,
            ),
            (DrawParams { top_p: 0.9, ..FREE }, biased),
        ]
    }

    /// Twelve tokens, the first two of them suppressed, and a history.
    fn each_set(mut check: impl FnMut(&[f32], &Draw<'_>)) {
        let logits: Vec<f32> = (0..12u8)
            .map(|i| f32::from(i * 7 % 12) * 0.31 - 1.2)
            .collect();
        for (params, processors) in parameter_sets() {
            let rules = Arc::new(Rules {
                processors,
                prompt_len: 2,
                max_new_tokens: 9,
                ends: vec![],
            });
            let draw = Draw {
                params,
                index: 4,
                suppressed_ids: &[0, 1],
                rules: Some(&rules),
                history: &[7, 3, 5, 5, 9, 5],
                beam: None,
            };
            check(&logits, &draw);
        }
    }

    #[test]
    fn draws_have_the_exact_distribution() {
        each_set(|logits, draw| {
            let expected = reference(logits, draw);
            let found = deviation(logits, draw, &expected);
            assert!(found < 5.0, "{found} standard deviations for {draw:?}");
        });
    }

    #[test]
    fn another_distribution_is_told_apart() {
        let mut seen = 0;
        each_set(|logits, draw| {
            // Each set against that of a higher temperature.
            let mut other = *draw;
            other.params.temperature *= 1.3;
            let found = deviation(logits, draw, &reference(logits, &other));
            assert!(found > 5.0, "{found} standard deviations for {draw:?}");
            seen += 1;
        });
        assert_eq!(seen, parameter_sets().len());
    }

    #[test]
    fn a_draw_depends_on_seed_and_index_alone() {
        let logits: Vec<f32> = (0..100u16).map(|i| f32::from(i % 17) * 0.1).collect();
        let ids = |sampler: &mut Sampler, seed| -> Vec<u32> {
            (0..50)
                .map(|i| {
                    sampler
                        .sample(&logits, &draw(DrawParams { seed, ..FREE }, i))
                        .unwrap()
                })
                .collect()
        };
        let mut used = Sampler::default();
        let first = ids(&mut used, 7);
        assert_eq!(ids(&mut used, 7), first);
        assert_eq!(ids(&mut Sampler::default(), 7), first);
        assert_ne!(ids(&mut used, 8), first);
    }
}
