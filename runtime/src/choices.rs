//! Several generations of one prompt: as many requests, each with a seed of its own, and the best of
//! what comes of them.

use crate::device::Observe;
use crate::engine::Completion;
use crate::request::{Request, RequestError, parameter};

/// Most generations of one prompt.
pub const MAX_CHOICES: u32 = 128;

/// How often a prompt is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Results that are returned (n).
    pub returned: u32,
    /// Results that they are the best of.
    pub generated: u32,
}

impl Choices {
    /// One.
    pub const ONE: Choices = Choices {
        returned: 1,
        generated: 1,
    };

    /// What is wrong with these for a request.
    ///
    /// # Errors
    /// [`RequestError::Parameter`]: out of range, fewer generated than returned, or several where all
    /// would be the same.
    pub fn check(&self, request: &Request) -> Result<(), RequestError> {
        let counts = [
            ("num_return_sequences", self.returned),
            ("best_of", self.generated),
        ];
        for (name, count) in counts {
            if !(1..=MAX_CHOICES).contains(&count) {
                return Err(parameter(name, count, format!("from 1 to {MAX_CHOICES}")));
            }
        }
        let Choices {
            returned,
            generated,
        } = *self;
        if generated < returned {
            let needed = format!("at least num_return_sequences, which is {returned}");
            return Err(parameter("best_of", generated, needed));
        }
        for (name, count) in counts {
            let needed = match (request.sampling.temperature, request.observe) {
                _ if count == 1 => continue,
                (0.0, _) => "1 where nothing is sampled; give a temperature above 0",
                (_, observe) if observe != Observe::default() => {
                    "1 where logits or hidden states are written"
                }
                _ => continue,
            };
            return Err(parameter(name, count, needed));
        }
        Ok(())
    }

    /// A request for each generation. The first is the request itself; the seeds of the others follow
    /// from its seed, where it has one.
    pub fn requests(&self, request: &Request) -> Vec<Request> {
        let one = |index: u32| {
            let mut one = request.clone();
            one.sampling.seed = request.sampling.seed.map(|seed| derive_seed(seed, index));
            if self.generated > self.returned {
                one.logprobs.get_or_insert(0);
            }
            one
        };
        (0..self.generated).map(one).collect()
    }

    /// Which of the generations to return: those of the highest log-probability per token, best first.
    /// All of them keep their order.
    pub fn best(&self, mut completions: Vec<Completion>) -> Vec<Completion> {
        if completions.len() > self.returned as usize {
            // Stable: of equals the earlier stays ahead.
            completions.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
            completions.truncate(self.returned as usize);
        }
        completions
    }
}

fn mean_logprob(completion: &Completion) -> f32 {
    let score = completion.score().unwrap_or(f32::NEG_INFINITY);
    score / completion.ids.len().max(1) as f32
}

/// SplitMix64 of the seed, advanced by the index (Steele et al., "Fast splittable pseudorandom number
/// generators", 2014).
fn derive_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{FinishReason, RequestId};
    use crate::request::Prompt;
    use crate::sampling::{Logprobs, TokenLogprob};

    fn request(temperature: f32) -> Request {
        let mut request = Request::new(Prompt::Ids(vec![1]));
        request.sampling.temperature = temperature;
        request
    }

    fn completion(id: u64, logprobs: &[f32]) -> Completion {
        let token = |&logprob: &f32| TokenLogprob {
            id: 0,
            logprob,
            top: Vec::new(),
        };
        Completion {
            request: RequestId(id),
            prompt_ids: vec![1],
            ids: vec![0; logprobs.len()],
            text: String::new(),
            finish_reason: FinishReason::Length,
            logprobs: Some(Logprobs {
                prompt: Vec::new(),
                generated: logprobs.iter().map(token).collect(),
            }),
            logits: Vec::new(),
            hidden_states: Vec::new(),
            timing: Default::default(),
        }
    }

    #[test]
    fn mistakes_are_named() {
        let fails = |returned, generated, request: &Request, expect: &str| {
            let choices = Choices {
                returned,
                generated,
            };
            let error = choices.check(request).unwrap_err().to_string();
            assert!(error.contains(expect), "{error:?} lacks {expect:?}");
        };
        let sampled = request(1.0);
        fails(
            0,
            1,
            &sampled,
            "num_return_sequences is 0; it must be from 1 to 128",
        );
        fails(1, 129, &sampled, "best_of is 129; it must be from 1 to 128");
        fails(
            3,
            2,
            &sampled,
            "best_of is 2; it must be at least num_return_sequences, which is 3",
        );
        fails(
            2,
            2,
            &request(0.0),
            "num_return_sequences is 2; it must be 1 where nothing is sampled",
        );
        fails(
            1,
            2,
            &request(0.0),
            "best_of is 2; it must be 1 where nothing is sampled",
        );
        let mut observed = sampled.clone();
        observed.observe.logits = true;
        fails(
            2,
            2,
            &observed,
            "it must be 1 where logits or hidden states are written",
        );
        assert!(Choices::ONE.check(&request(0.0)).is_ok());
    }

    #[test]
    fn seeds_follow_from_the_first() {
        let mut seeded = request(1.0);
        seeded.sampling.seed = Some(7);
        let choices = Choices {
            returned: 2,
            generated: 4,
        };
        let seeds = || -> Vec<_> {
            let requests = choices.requests(&seeded);
            requests
                .iter()
                .map(|request| request.sampling.seed)
                .collect()
        };
        assert_eq!(seeds(), seeds());
        assert_eq!(seeds()[0], Some(7));
        let mut distinct = seeds();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 4);
        assert_eq!(choices.requests(&seeded)[3].logprobs, Some(0));
        assert_eq!(choices.requests(&request(1.0))[3].sampling.seed, None);
    }

    #[test]
    fn the_best_have_the_likeliest_tokens() {
        let choices = Choices {
            returned: 2,
            generated: 3,
        };
        // Sums of -2, -2.5 and -3; means of -2, -0.5 and -1.
        let all = vec![
            completion(0, &[-2.0]),
            completion(1, &[-0.5; 5]),
            completion(2, &[-1.0; 3]),
        ];
        let ids =
            |best: Vec<Completion>| -> Vec<u64> { best.iter().map(|c| c.request.0).collect() };
        assert_eq!(ids(choices.best(all.clone())), [1, 2]);
        let every = Choices {
            returned: 3,
            generated: 3,
        };
        assert_eq!(ids(every.best(all)), [0, 1, 2]);
    }
}
