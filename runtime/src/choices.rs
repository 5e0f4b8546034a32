//! How often a prompt is continued.

use crate::beams::BeamParams;
use crate::request::{Request, RequestError, parameter};

/// Most generations of one prompt.
pub const MAX_CHOICES: u32 = 128;

/// How often a prompt is continued. Each generation has a seed of its own, which follows from the
/// request's; they share the prompt's keys and values.
///
/// ```
/// use kiln_runtime::{Choices, Prompt, Request};
///
/// // Of five samples the two that are likeliest by token.
/// let mut request = Request::new(Prompt::Ids(vec![2]));
/// request.choices = Choices { returned: 2, generated: 5 };
/// request.sampling.temperature = 1.0;
/// assert!(request.check().is_ok());
///
/// // Where nothing is drawn, all would be the same.
/// request.sampling.temperature = 0.0;
/// assert!(request.check().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Results that are returned (n).
    pub returned: u32,
    /// Results of which they have the highest log-probability per token. A search over beams returns the
    /// best of what it finds, and takes as many here.
    pub generated: u32,
}

impl Choices {
    /// Once.
    pub const ONE: Choices = Choices {
        returned: 1,
        generated: 1,
    };

    /// What is wrong with these for a request.
    ///
    /// # Errors
    /// [`RequestError::Parameter`]: out of range, fewer generated than returned, or several where all
    /// would be the same.
    pub(crate) fn check(&self, request: &Request) -> Result<(), RequestError> {
        let Choices {
            returned,
            generated,
        } = *self;
        let counts = [("num_return_sequences", returned), ("best_of", generated)];
        for (name, count) in counts {
            if !(1..=MAX_CHOICES).contains(&count) {
                return Err(parameter(name, count, format!("from 1 to {MAX_CHOICES}")));
            }
        }
        if generated < returned {
            let needed = format!("at least num_return_sequences, which is {returned}");
            return Err(parameter("best_of", generated, needed));
        }
        if let Some(BeamParams { num_beams, .. }) = request.beams {
            if returned > num_beams {
                let needed = format!("at most num_beams, which is {num_beams}");
                return Err(parameter("num_return_sequences", returned, needed));
            }
            if generated > returned {
                return Err(parameter("best_of", generated, "absent with num_beams"));
            }
            return Ok(());
        }
        for (name, count) in counts {
            if count > 1 && request.sampling.temperature == 0.0 {
                let needed = "1 where nothing is sampled; give a temperature above 0, or num_beams";
                return Err(parameter(name, count, needed));
            }
            if count > 1 && request.max_new_tokens == Some(0) {
                return Err(parameter(name, count, "1 where max_new_tokens is 0"));
            }
        }
        Ok(())
    }
}

/// The seed of a request's generation of this index: SplitMix64 of the request's, advanced by the index
/// (Steele et al., "Fast splittable pseudorandom number generators", 2014). The first is the request's
/// own.
pub(crate) fn derive_seed(seed: u64, index: u32) -> u64 {
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
    use crate::request::Prompt;

    fn request(temperature: f32) -> Request {
        let mut request = Request::new(Prompt::Ids(vec![1]));
        request.sampling.temperature = temperature;
        request
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
        fails(
            2,
            2,
            &Request {
                max_new_tokens: Some(0),
                ..request(1.0)
            },
            "num_return_sequences is 2; it must be 1 where max_new_tokens is 0",
        );
        let beams = Request {
            beams: Some(BeamParams::new(3)),
            ..request(0.0)
        };
        fails(
            4,
            4,
            &beams,
            "num_return_sequences is 4; it must be at most num_beams, which is 3",
        );
        fails(
            1,
            2,
            &beams,
            "best_of is 2; it must be absent with num_beams",
        );
        assert!(Choices::ONE.check(&request(0.0)).is_ok());
    }

    #[test]
    fn seeds_follow_from_the_first() {
        let seeds = || -> Vec<u64> { (0..8).map(|index| derive_seed(7, index)).collect() };
        assert_eq!(seeds(), seeds());
        assert_eq!(seeds()[0], 7);
        let mut distinct = seeds();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 8);
    }
}
