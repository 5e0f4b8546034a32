//! Choosing the next token from a row of logits.
//!
//! The transforms and their order are those of `generate()` in transformers: temperature, top-k,
//! top-p, min-p (`generation/logits_process.py`). The draw itself takes one uniform number, a
//! function of the request's seed and of the index of the token alone, so that a request gives the
//! same ids in whatever company it runs.

use std::cmp::Ordering;

/// How the tokens of a request are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the k likeliest tokens and those that equal the last of them; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keeps the tokens at least this share as probable as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// What the draws follow from; none takes one at random.
    pub seed: Option<u64>,
}

impl SamplingParams {
    /// Always the likeliest token.
    pub const GREEDY: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: None,
    };
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams::GREEDY
    }
}

/// [`SamplingParams`] as a device gets them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawParams {
    /// As in [`SamplingParams`].
    pub temperature: f32,
    /// As in [`SamplingParams`].
    pub top_k: u32,
    /// As in [`SamplingParams`].
    pub top_p: f32,
    /// As in [`SamplingParams`].
    pub min_p: f32,
    /// The request's seed.
    pub seed: u64,
}

impl DrawParams {
    /// Always the likeliest token.
    pub const GREEDY: DrawParams = SamplingParams::GREEDY.with_seed(0);
}

impl SamplingParams {
    /// These, with the seed decided.
    pub const fn with_seed(self, seed: u64) -> DrawParams {
        let SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self;
        DrawParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
        }
    }
}

/// One choice of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw<'a> {
    /// How.
    pub params: DrawParams,
    /// Index of the token among the generated ones of its request.
    pub index: u32,
    /// Tokens that cannot be chosen.
    pub suppressed_ids: &'a [u32],
}

/// Chooses tokens on the CPU; keeps its working memory.
#[derive(Debug, Default)]
pub struct Sampler {
    candidates: Vec<Candidate>,
    scores: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    /// Tempered logit less that of the likeliest: at most 0.
    score: f32,
}

impl Candidate {
    /// Probability as a share of the likeliest's.
    fn weight(&self) -> f64 {
        f64::from(self.score.exp())
    }

    /// Likeliest first. Of equals the higher id comes first: transformers sorts upwards, stably, and
    /// cuts from below.
    fn rank(a: &Candidate, b: &Candidate) -> Ordering {
        b.score.total_cmp(&a.score).then(b.id.cmp(&a.id))
    }
}

impl Sampler {
    /// The token for a row of `logits` (V), or none where a logit is no finite number or every token
    /// is suppressed.
    pub fn sample(&mut self, logits: &[f32], draw: &Draw<'_>) -> Option<u32> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        for &id in draw.suppressed_ids {
            if let Some(score) = self.scores.get_mut(id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
        let (likeliest, max) = argmax(&self.scores)?;
        if draw.params.temperature == 0.0 {
            return Some(likeliest);
        }
        self.gather(max, draw.params.temperature);
        self.keep_top_k(draw.params.top_k);
        self.keep_top_p(draw.params.top_p);
        let min_p = f64::from(draw.params.min_p);
        self.candidates
            .retain(|candidate| candidate.weight() >= min_p);
        self.pick(uniform(draw.params.seed, draw.index))
    }

    /// Makes every token that has a chance at all a candidate, by rising id.
    fn gather(&mut self, max: f32, temperature: f32) {
        self.candidates.clear();
        for (id, &logit) in (0..).zip(&self.scores) {
            let score = (logit - max) / temperature;
            if score > f32::NEG_INFINITY {
                self.candidates.push(Candidate { id, score });
            }
        }
    }

    fn keep_top_k(&mut self, top_k: u32) {
        let k = top_k as usize;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        self.scores.clear();
        self.scores
            .extend(self.candidates.iter().map(|candidate| candidate.score));
        let (_, &mut threshold, _) = self
            .scores
            .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        self.candidates
            .retain(|candidate| candidate.score >= threshold);
    }

    /// A token stays when those ranked above it sum to less than `top_p`.
    fn keep_top_p(&mut self, top_p: f32) {
        if top_p >= 1.0 {
            return;
        }
        let candidates = &mut self.candidates;
        let wanted = f64::from(top_p) * candidates.iter().map(Candidate::weight).sum::<f64>();
        // Most rows need few of their tokens: rank a small part first, and more while it falls short.
        let mut ranked = 64;
        loop {
            ranked = candidates.len().min(ranked);
            if ranked < candidates.len() {
                candidates.select_nth_unstable_by(ranked, Candidate::rank);
            }
            candidates[..ranked].sort_unstable_by(Candidate::rank);
            let mut above = 0.0;
            let fits = |candidate: &&Candidate| {
                let stays = above < wanted;
                above += candidate.weight();
                stays
            };
            let keep = candidates[..ranked].iter().take_while(fits).count();
            if keep < ranked || ranked == candidates.len() {
                candidates.truncate(keep.max(1));
                break;
            }
            ranked *= 8;
        }
        candidates.sort_unstable_by_key(|candidate| candidate.id);
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

/// The largest value and its index, the lowest among equals; none where there is none above -inf.
fn argmax(values: &[f32]) -> Option<(u32, f32)> {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let index = values.iter().position(|&value| value == max)?;
    (max > f32::NEG_INFINITY).then_some((index as u32, max))
}

/// A number in [0, 1) that follows from its arguments alone.
fn uniform(seed: u64, index: u32) -> f64 {
    let [low, high, ..] = philox([index, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(high) << 32 | u64::from(low);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as
/// 1, 2, 3" (SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
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

    const FREE: DrawParams = DrawParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
    };

    fn draw(params: DrawParams, index: u32) -> Draw<'static> {
        Draw {
            params,
            index,
            suppressed_ids: &[],
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
