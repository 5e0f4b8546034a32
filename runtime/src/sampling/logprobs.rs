//! Log-probabilities of tokens: of the model's own distribution, before processors, temperature and
//! cuts.

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

/// The log-probabilities of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// Of the prompt's tokens from the second on, where asked for.
    pub prompt: Vec<TokenLogprob>,
    /// Of the generated tokens.
    pub generated: Vec<TokenLogprob>,
}

impl Logprobs {
    /// The log-probability of all that was generated.
    pub fn score(&self) -> f32 {
        let logprobs = self.generated.iter().map(|token| f64::from(token.logprob));
        logprobs.fold(0.0, |sum, logprob| sum + logprob) as f32
    }
}

impl TokenLogprob {
    /// That of token `id` after a row of `logits` (V), with the `top` likeliest.
    pub(crate) fn new(logits: &[f32], id: u32, top: usize) -> TokenLogprob {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps = logits.iter().map(|logit| f64::from((logit - max).exp()));
        let log_total = exps.sum::<f64>().ln() as f32;
        let logprob = |logit: f32| logit - max - log_total;
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

    #[test]
    fn a_score_is_a_sum() {
        let token = |logprob| TokenLogprob {
            id: 0,
            logprob,
            top: Vec::new(),
        };
        let logprobs = Logprobs {
            prompt: vec![token(-9.0)],
            generated: vec![token(-1.5), token(-0.25)],
        };
        assert_eq!(logprobs.score(), -1.75);
        assert!(Logprobs::default().score().is_sign_positive());
    }
}
