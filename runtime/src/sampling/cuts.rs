//! Cuts: which tokens a draw is made from. Each keeps some of the candidates, at least as many as it
//! is told, and leaves them by rising id.

use super::DrawParams;
use std::cmp::Ordering;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) id: u32,
    /// Tempered score less that of the likeliest: at most 0.
    pub(super) score: f32,
}

impl Candidate {
    /// Probability as a share of the likeliest's.
    pub(super) fn weight(&self) -> f64 {
        f64::from(self.score.exp())
    }

    /// Likeliest first. Of equals the higher id comes first: transformers sorts upwards, stably, and
    /// cuts from below.
    fn rank(a: &Candidate, b: &Candidate) -> Ordering {
        b.score.total_cmp(&a.score).then(b.id.cmp(&a.id))
    }
}

/// Whether `params` ask for any cut.
pub(super) fn any(params: &DrawParams) -> bool {
    params.top_k > 0
        || params.top_p < 1.0
        || params.min_p > 0.0
        || params.typical_p < 1.0
        || params.epsilon_cutoff > 0.0
        || params.eta_cutoff > 0.0
}

/// Makes all the cuts that `params` ask for, in the reference's order, but keeps `least` candidates of
/// each. `scores` is working memory.
pub(super) fn cut(
    candidates: &mut Vec<Candidate>,
    params: &DrawParams,
    least: usize,
    scores: &mut Vec<f32>,
) {
    keep_top_k(candidates, params.top_k as usize, least, scores);
    keep_top_p(candidates, params.top_p, least);
    keep_min_p(candidates, params.min_p, least, scores);
    keep_typical_p(candidates, params.typical_p, least);
    keep_epsilon(candidates, params.epsilon_cutoff, least, scores);
    keep_eta(candidates, params.eta_cutoff, least, scores);
}

/// The logarithm of the sum of weights: that of the likeliest is 1.
pub(super) fn log_total(candidates: &[Candidate]) -> f32 {
    candidates.iter().map(Candidate::weight).sum::<f64>().ln() as f32
}

/// Keeps the `k` likeliest, and what equals the last of them (`TopKLogitsWarper`). 0 keeps all.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize, least: usize, scores: &mut Vec<f32>) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    let threshold = score_of_rank(candidates, k.max(least), scores);
    candidates.retain(|candidate| candidate.score >= threshold);
}

/// The score of the candidate of a rank, counted from 1; that of the last where there are fewer.
fn score_of_rank(candidates: &[Candidate], rank: usize, scores: &mut Vec<f32>) -> f32 {
    let all = candidates.iter().map(|candidate| candidate.score);
    if rank == 1 {
        return all.fold(f32::NEG_INFINITY, f32::max);
    }
    scores.clear();
    scores.extend(all);
    let index = rank.min(scores.len()).saturating_sub(1);
    if index >= scores.len() {
        return f32::NEG_INFINITY;
    }
    *scores
        .select_nth_unstable_by(index, |a, b| b.total_cmp(a))
        .1
}

/// Keeps a token when those ranked above it sum to less than `top_p` (`TopPLogitsWarper`; Holtzman et
/// al., "The curious case of neural text degeneration", 2020).
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32, least: usize) {
    if top_p >= 1.0 {
        return;
    }
    let keep = rank_share(candidates, f64::from(top_p), least, Candidate::rank);
    candidates.truncate(keep);
    sort_by_id(candidates);
}

/// Keeps the tokens at least `min_p` times as probable as the likeliest (`MinPLogitsWarper`).
fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f32, least: usize, scores: &mut Vec<f32>) {
    if min_p > 0.0 {
        // The cuts before this one keep the likeliest, whose weight is 1.
        keep_probable(candidates, f64::from(min_p), 1.0, least, scores);
    }
}

/// Keeps the tokens whose information, `-ln p`, is closest to its expectation, the entropy: the fewest
/// whose probabilities sum to at least `typical_p`, and what is as close as the last of them
/// (`TypicalLogitsWarper`; Meister et al., "Locally typical sampling", 2022).
fn keep_typical_p(candidates: &mut Vec<Candidate>, typical_p: f32, least: usize) {
    if typical_p >= 1.0 {
        return;
    }
    let Spread { total, entropy } = Spread::of(candidates);
    // |-ln p - entropy| is the distance of a score from this.
    let typical = (total.ln() - entropy) as f32;
    let distance = |candidate: &Candidate| (typical - candidate.score).abs();
    let closest = |a: &Candidate, b: &Candidate| {
        let by_distance = distance(a).total_cmp(&distance(b));
        by_distance.then(a.id.cmp(&b.id))
    };
    let keep = rank_share(candidates, f64::from(typical_p), least, closest);
    if let Some(last) = keep.checked_sub(1).and_then(|last| candidates.get(last)) {
        let farthest = distance(last);
        candidates.retain(|candidate| distance(candidate) <= farthest);
    }
    sort_by_id(candidates);
}

/// Keeps the tokens of at least probability `epsilon`, and the likeliest (`EpsilonLogitsWarper`; Hewitt
/// et al., "Truncation sampling as language model desmoothing", 2022).
fn keep_epsilon(
    candidates: &mut Vec<Candidate>,
    epsilon: f32,
    least: usize,
    scores: &mut Vec<f32>,
) {
    if epsilon > 0.0 {
        let total = candidates.iter().map(Candidate::weight).sum();
        keep_probable(candidates, f64::from(epsilon), total, least, scores);
    }
}

/// Keeps the tokens of at least probability `min(eta, sqrt(eta) * exp(-entropy))`, and the likeliest
/// (`EtaLogitsWarper`; Hewitt et al., 2022).
fn keep_eta(candidates: &mut Vec<Candidate>, eta: f32, least: usize, scores: &mut Vec<f32>) {
    if eta > 0.0 {
        let Spread { total, entropy } = Spread::of(candidates);
        let eta = f64::from(eta);
        let probability = eta.min(eta.sqrt() * (-entropy).exp());
        keep_probable(candidates, probability, total, least, scores);
    }
}

fn keep_probable(
    candidates: &mut Vec<Candidate>,
    probability: f64,
    total: f64,
    least: usize,
    scores: &mut Vec<f32>,
) {
    // Typical-p may have dropped the likeliest of all.
    let kept = score_of_rank(candidates, least, scores);
    candidates
        .retain(|candidate| candidate.weight() >= probability * total || candidate.score >= kept);
}

/// A distribution's sum of weights, and its entropy in nats.
struct Spread {
    total: f64,
    entropy: f64,
}

impl Spread {
    fn of(candidates: &[Candidate]) -> Spread {
        let (mut total, mut moment) = (0.0, 0.0);
        for candidate in candidates {
            let weight = candidate.weight();
            total += weight;
            moment += weight * f64::from(candidate.score);
        }
        // -sum(p * (score - ln total)).
        let entropy = total.ln() - moment / total;
        Spread { total, entropy }
    }
}

/// Puts candidates in order, as far as needed, and returns how many come first whose weights sum to at
/// least `share` of all, and `least` of them.
fn rank_share(
    candidates: &mut [Candidate],
    share: f64,
    least: usize,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
) -> usize {
    let wanted = share * candidates.iter().map(Candidate::weight).sum::<f64>();
    // Most rows need few of their tokens: rank a small part first, and more while it falls short.
    let mut ranked = least.max(64);
    loop {
        ranked = candidates.len().min(ranked);
        if ranked < candidates.len() {
            candidates.select_nth_unstable_by(ranked, &order);
        }
        candidates[..ranked].sort_unstable_by(&order);
        let mut above = 0.0;
        let fits = |candidate: &&Candidate| {
            let stays = above < wanted;
            above += candidate.weight();
            stays
        };
        let keep = candidates[..ranked].iter().take_while(fits).count();
        if keep < ranked || ranked == candidates.len() {
            return keep.max(least).min(ranked);
        }
        ranked *= 8;
    }
}

fn sort_by_id(candidates: &mut [Candidate]) {
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids that a cut keeps of tokens with these probabilities.
    fn kept(probabilities: &[f64], cut: impl Fn(&mut Vec<Candidate>)) -> Vec<u32> {
        let largest = probabilities.iter().copied().fold(0.0, f64::max);
        let candidate = |(id, p): (u32, &f64)| Candidate {
            id,
            score: (p / largest).ln() as f32,
        };
        let mut candidates: Vec<_> = (0..).zip(probabilities).map(candidate).collect();
        cut(&mut candidates);
        candidates.iter().map(|candidate| candidate.id).collect()
    }

    #[test]
    fn typical_tokens_are_as_informative_as_expected() {
        // Entropy: 0.5 ln 2 + 0.25 ln 4 + 0.15 ln 6.67 + 0.1 ln 10 = 1.2080. Distances: 0.515, 0.178,
        // 0.689, 1.095.
        let probabilities = [0.5, 0.25, 0.15, 0.1];
        let typical = |p| kept(&probabilities, move |c| keep_typical_p(c, p, 1));
        assert_eq!(typical(0.2), [1]);
        assert_eq!(typical(0.25), [1]);
        assert_eq!(typical(0.26), [0, 1]);
        assert_eq!(typical(0.76), [0, 1, 2]);
        assert_eq!(typical(0.95), [0, 1, 2, 3]);
        assert_eq!(typical(1.0), [0, 1, 2, 3]);
        // What is as close as the last one stays.
        assert_eq!(
            kept(&[0.25; 4], |c| keep_typical_p(c, 0.3, 1)),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn typical_p_ranks_as_many_as_it_needs() {
        let probabilities: Vec<f64> = (1..=900).map(f64::from).collect();
        let ids = kept(&probabilities, |c| keep_typical_p(c, 0.5, 1));
        let all: f64 = probabilities.iter().sum();
        let sum: f64 = ids.iter().map(|&id| probabilities[id as usize]).sum();
        assert!(
            sum >= 0.5 * all && sum < 0.5 * all + 900.0,
            "{sum} of {all}"
        );
        assert!(ids.is_sorted());
    }

    #[test]
    fn epsilon_is_a_probability() {
        let probabilities = [0.1, 0.2, 0.3, 0.4];
        let epsilon = |e| {
            kept(&probabilities, move |c| {
                keep_epsilon(c, e, 1, &mut Vec::new())
            })
        };
        assert_eq!(epsilon(0.0), [0, 1, 2, 3]);
        assert_eq!(epsilon(0.15), [1, 2, 3]);
        assert_eq!(epsilon(0.35), [3]);
        // The likeliest stays however unlikely it is.
        assert_eq!(epsilon(0.9), [3]);
        assert_eq!(
            kept(&[0.4, 0.4, 0.2], |c| keep_epsilon(
                c,
                0.5,
                1,
                &mut Vec::new()
            )),
            [0, 1]
        );
    }

    #[test]
    fn eta_falls_where_the_distribution_is_flat() {
        // Entropy 1.2799, exp(-entropy) 0.2781.
        let probabilities = [0.1, 0.2, 0.3, 0.4];
        let eta = |e| kept(&probabilities, move |c| keep_eta(c, e, 1, &mut Vec::new()));
        assert_eq!(eta(0.0), [0, 1, 2, 3]);
        // min(0.05, 0.2236 * 0.2781 = 0.0622) is below all.
        assert_eq!(eta(0.05), [0, 1, 2, 3]);
        // min(0.3, 0.5477 * 0.2781 = 0.1523): epsilon alone would keep two.
        assert_eq!(eta(0.3), [1, 2, 3]);
        // sqrt(0.64) * 0.2781 = 0.2225.
        assert_eq!(eta(0.64), [2, 3]);
    }

    #[test]
    fn cuts_go_on_from_what_is_left() {
        // Of 0.25, 0.15 and 0.1, halved: 0.5, 0.3, 0.2.
        let ids = kept(&[0.5, 0.25, 0.15, 0.1], |c| {
            c.retain(|candidate| candidate.id > 0);
            keep_epsilon(c, 0.25, 1, &mut Vec::new());
        });
        assert_eq!(ids, [1, 2]);
    }
}
