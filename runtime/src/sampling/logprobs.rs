//! Log-probabilities of tokens: of the model's own distribution, before processors, temperature and
//! cuts.

use crate::cpu::{Isa, scores};

/// Likeliest tokens that can be asked for with each token.
pub const MAX_LOGPROBS: u32 = 20;

/// A token's log-probability, and those of the tokens that were likeliest in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest ones, falling; the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// What makes log-probabilities of the values of a row (V), finite or -inf.
pub(super) fn normaliser(row: &[f32]) -> impl Fn(f32) -> f32 + use<> {
    let isa = Isa::of_machine();
    let max = scores::max(isa, row);
    let log_total = scores::exp_sum(isa, row, max, 1.0).ln() as f32;
    // In this order: the maximum may be so large that the sum is lost beside it.
    move |value| match value {
        f32::NEG_INFINITY => value,
        _ => value - max - log_total,
    }
}

impl TokenLogprob {
    /// That of token `id` after a row of `logits` (V), with the `top` likeliest.
    pub(crate) fn new(logits: &[f32], id: u32, top: usize) -> TokenLogprob {
        let logprob = normaliser(logits);
        let mut likeliest: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
        for (other, &logit) in (0..).zip(logits) {
            let is_full = likeliest.len() == top;
            if is_full && likeliest.last().is_none_or(|&(_, last)| logit <= last) {
                continue;
            }
            let place = likeliest.partition_point(|&(_, above)| above >= logit);
            likeliest.insert(place, (other, logit));
            likeliest.truncate(top);
        }
        let own = logits.get(id as usize).copied();
        TokenLogprob {
            id,
            logprob: logprob(own.unwrap_or(f32::NEG_INFINITY)),
            top: likeliest
                .into_iter()
                .map(|(id, logit)| (id, logprob(logit)))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_normalised() {
        let probabilities = [0.125f32, 0.5, 0.25, 0.125];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 40.0).collect();
        let token = TokenLogprob::new(&logits, 3, 3);
        assert!((token.logprob - 0.125f32.ln()).abs() < 1e-5, "{token:?}");
        let ids: Vec<u32> = token.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [1, 2, 0], "the lower of equals");
        for &(id, logprob) in &token.top {
            assert!((logprob - probabilities[id as usize].ln()).abs() < 1e-5);
        }
        assert!(TokenLogprob::new(&logits, 3, 0).top.is_empty());
        assert_eq!(TokenLogprob::new(&logits, 3, 9).top.len(), 4);
    }

    #[test]
    fn large_logits_stay_finite() {
        let token = TokenLogprob::new(&[3e38, -3e38, 3e38], 0, 1);
        assert!((token.logprob - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(token.top[0].0, 0);
    }
}
