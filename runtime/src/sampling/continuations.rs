//! What a step of beam search needs of a row of logits: the beam's best continuations by one token.
//!
//! As in transformers, processors see log-probabilities here, no longer normalised after them, and
//! whoever samples draws without replacement from the softmax of *accumulated* scores: those of the
//! beam so far and of the token. Such a draw is a ranking: each score plus noise of its own, the
//! largest first (Vieira, "Gumbel-max trick and weighted reservoir sampling", 2014; Kool et al.,
//! "Stochastic beams and where to find them", 2019). So each row gives its best by rank, and the best
//! of all beams are among them.

use super::cuts::{self, Candidate};
use super::sampler::{Sampler, philox};
use super::{Draw, processors};
use crate::cpu::scores;
use std::cmp::Ordering;

/// What a draw of continuations needs besides [`Draw`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamDraw {
    /// Index of the beam in its request.
    pub beam: u32,
    /// The beam's score so far.
    pub score: f32,
    /// How many are wanted.
    pub count: u32,
    /// Tokens that cuts leave at least.
    pub least_kept: u32,
}

/// What the beams of other groups took in this step, for diverse beam search.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Taken<'a> {
    /// Tokens, each as often as it was taken.
    pub ids: &'a [u32],
    /// What each costs.
    pub penalty: f32,
}

/// A beam and one more token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation {
    /// The token.
    pub id: u32,
    /// The beam's score with it.
    pub score: f32,
    /// What the best are chosen by: the score, or where tokens are drawn the score with noise.
    pub rank: f32,
}

impl Continuation {
    /// The best first; of equals the lower id.
    fn best_first(a: &Continuation, b: &Continuation) -> Ordering {
        b.rank.total_cmp(&a.rank).then(a.id.cmp(&b.id))
    }
}

impl Sampler {
    /// The best continuations of the beam that a row of `logits` (V) belongs to, at most as many as
    /// asked for and best first; none where a logit is no finite number.
    pub fn continuations(
        &mut self,
        logits: &[f32],
        draw: &Draw<'_>,
        beam: &BeamDraw,
        taken: &Taken<'_>,
    ) -> Vec<Continuation> {
        if scores::finite_max(self.isa, logits).is_none() {
            return Vec::new();
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        self.renormalise();
        processors::process(&mut self.scores, draw, taken, &mut self.counts);
        let mut best = Best::new((beam.count as usize).min(logits.len()));
        let renormalises = draw.rules.is_some_and(|r| r.processors.renormalize_logits);
        if draw.params.temperature == 0.0 {
            if renormalises {
                self.renormalise();
            }
            for (id, &score) in (0..).zip(&self.scores) {
                let score = score + beam.score;
                best.push(Continuation {
                    id,
                    score,
                    rank: score,
                });
            }
            return best.finish();
        }
        let temperature = draw.params.temperature;
        let max = scores::max(self.isa, &self.scores);
        self.gather(max, &draw.params, beam.least_kept as usize);
        let likeliest = beam.score
            + match renormalises {
                true => -cuts::log_total(&self.candidates),
                false => max / temperature,
            };
        for &Candidate { id, score } in &self.candidates {
            let score = score + likeliest;
            let noise = gumbel(draw.params.seed, [draw.index, 1 + beam.beam, id, 0]);
            let rank = score + noise;
            best.push(Continuation { id, score, rank });
        }
        best.finish()
    }
}

/// The best of many, found in one pass.
struct Best {
    count: usize,
    /// At most twice `count`; sorted and cut to `count` when full.
    kept: Vec<Continuation>,
    /// A rank that `count` of the kept reach.
    floor: f32,
}

impl Best {
    fn new(count: usize) -> Best {
        Best {
            count,
            kept: Vec::with_capacity(2 * count),
            floor: f32::NEG_INFINITY,
        }
    }

    /// Ids come in rising, so that of equals those that are there stay.
    fn push(&mut self, continuation: Continuation) {
        if self.kept.len() >= self.count && continuation.rank <= self.floor {
            return;
        }
        self.kept.push(continuation);
        if self.kept.len() >= 2 * self.count {
            self.trim();
        }
    }

    fn trim(&mut self) {
        self.kept.sort_unstable_by(Continuation::best_first);
        self.kept.truncate(self.count);
        if let Some(last) = self.kept.last().filter(|_| self.kept.len() == self.count) {
            self.floor = last.rank;
        }
    }

    fn finish(mut self) -> Vec<Continuation> {
        self.trim();
        self.kept
    }
}

/// A number from the standard Gumbel distribution that follows from its arguments alone.
fn gumbel(seed: u64, counter: [u32; 4]) -> f32 {
    let [low, high, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    // Strictly between 0 and 1.
    let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    -(-uniform.ln()).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::DrawParams;

    const NONE_TAKEN: Taken<'static> = Taken {
        ids: &[],
        penalty: 0.0,
    };

    fn beam(count: u32, score: f32) -> BeamDraw {
        BeamDraw {
            beam: 0,
            score,
            count,
            least_kept: 1,
        }
    }

    fn ids(found: &[Continuation]) -> Vec<u32> {
        found.iter().map(|continuation| continuation.id).collect()
    }

    #[test]
    fn the_best_come_in_order() {
        let row: Vec<f32> = (0..1000u32)
            .map(|id| (id * 7919 % 1009) as f32 / 100.0)
            .collect();
        let mut order: Vec<u32> = (0..1000).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        let total: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        for count in [1, 2, 7, 64, 2000] {
            let found = Sampler::default().continuations(
                &row,
                &Draw::GREEDY,
                &beam(count, -3.0),
                &NONE_TAKEN,
            );
            assert_eq!(ids(&found), order[..1000.min(count as usize)]);
            for continuation in found {
                let logprob = f64::from(row[continuation.id as usize]) - total.ln();
                assert!((f64::from(continuation.score) - (logprob - 3.0)).abs() < 1e-5);
                assert_eq!(continuation.score, continuation.rank);
            }
        }
    }

    #[test]
    fn of_equals_the_lower_ids_come_first() {
        let sampler = &mut Sampler::default();
        let row = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0];
        let found = sampler.continuations(&row, &Draw::GREEDY, &beam(4, 0.0), &NONE_TAKEN);
        assert_eq!(ids(&found), [1, 3, 5, 0]);
        // Beams that only fill a place have scores so low that all tokens are equal.
        let found = sampler.continuations(&row, &Draw::GREEDY, &beam(3, -1e9), &NONE_TAKEN);
        assert_eq!(ids(&found), [0, 1, 2]);
        // What cannot be chosen comes last, and does come.
        let draw = Draw {
            suppressed_ids: &[1, 3, 0, 2, 4],
            ..Draw::GREEDY
        };
        let found = sampler.continuations(&row, &draw, &beam(3, 0.0), &NONE_TAKEN);
        assert_eq!(ids(&found), [5, 0, 1]);
        assert_eq!(found[1].score, f32::NEG_INFINITY);
        let broken = [0.0, f32::NAN];
        assert!(
            sampler
                .continuations(&broken, &Draw::GREEDY, &beam(1, 0.0), &NONE_TAKEN)
                .is_empty()
        );
    }

    #[test]
    fn draws_are_without_replacement_and_by_probability() {
        // P(first = i, second = j) = p_i * p_j / (1 - p_i).
        let p = [0.1f32, 0.2, 0.3, 0.4];
        let row: Vec<f32> = p.iter().map(|p| p.ln() + 5.0).collect();
        let sampler = &mut Sampler::default();
        let mut counts = [[0u32; 4]; 4];
        let draws = 40_000;
        for index in 0..draws {
            let params = DrawParams {
                temperature: 1.0,
                seed: 3,
                ..DrawParams::GREEDY
            };
            let draw = Draw {
                params,
                index,
                ..Draw::GREEDY
            };
            let found = sampler.continuations(&row, &draw, &beam(2, -2.0), &NONE_TAKEN);
            let [first, second] = found[..] else {
                panic!("{found:?}")
            };
            assert!((first.score - (p[first.id as usize].ln() - 2.0)).abs() < 1e-5);
            counts[first.id as usize][second.id as usize] += 1;
        }
        let mut chi_squared = 0.0;
        for (i, row) in counts.iter().enumerate() {
            for (j, &count) in row.iter().enumerate() {
                let share = f64::from(p[i]) * f64::from(p[j]) / (1.0 - f64::from(p[i]));
                let expected = if i == j {
                    0.0
                } else {
                    share * f64::from(draws)
                };
                if expected == 0.0 {
                    assert_eq!(count, 0);
                } else {
                    chi_squared += (f64::from(count) - expected).powi(2) / expected;
                }
            }
        }
        // Eleven degrees of freedom: 31.3 is exceeded once in a thousand.
        assert!(chi_squared < 31.3, "{chi_squared}");
    }

    #[test]
    fn cuts_leave_enough_to_go_on_with() {
        let row = [5.0, 4.0, 3.0, 0.0];
        let mut params = DrawParams {
            temperature: 0.5,
            ..DrawParams::GREEDY
        };
        for change in [
            |p: &mut DrawParams| p.top_k = 1,
            |p: &mut DrawParams| p.top_p = 0.1,
            |p: &mut DrawParams| p.min_p = 0.9,
            |p: &mut DrawParams| p.epsilon_cutoff = 0.9,
            |p: &mut DrawParams| p.eta_cutoff = 0.9,
            |p: &mut DrawParams| p.typical_p = 0.01,
        ] {
            change(&mut params);
            let draw = Draw {
                params,
                ..Draw::GREEDY
            };
            let wanted = BeamDraw {
                least_kept: 2,
                ..beam(4, 0.0)
            };
            let found = Sampler::default().continuations(&row, &draw, &wanted, &NONE_TAKEN);
            assert_eq!(found.len(), 2, "{params:?}");
            assert!(found.iter().any(|continuation| continuation.id == 0));
        }
    }
}
