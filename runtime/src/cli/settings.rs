//! Generation settings: flags, and fields of `requests.jsonl` under the same names.

use kiln_runtime::{DEFAULT_MAX_NEW_TOKENS, Prompt, Request, SamplingParams, device::Observe};

/// How to generate. Without --temperature, --top-k, --top-p, --min-p and --seed the likeliest token
/// is taken each time; any of the last four alone samples at temperature 1
#[derive(clap::Args, Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    /// Most new tokens [default: 128, or as many as the bundle has room for]
    #[arg(long, value_name = "N")]
    pub(super) max_new_tokens: Option<u32>,
    /// New tokens before which neither an end-of-sequence nor a stop token is chosen [default: 0]
    #[arg(long, value_name = "N")]
    pub(super) min_new_tokens: Option<u32>,
    /// Divides the logits; 0 always takes the likeliest token [default: 0, or 1 with any of
    /// --top-k, --top-p, --min-p, --seed]
    #[arg(long, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub(super) temperature: Option<f32>,
    /// Samples from the K likeliest tokens; 0 is all [default: 0]
    #[arg(long, value_name = "K")]
    pub(super) top_k: Option<u32>,
    /// Samples from the fewest tokens whose probabilities sum to P [default: 1]
    #[arg(long, value_name = "P", value_parser = top_p, allow_negative_numbers = true)]
    pub(super) top_p: Option<f32>,
    /// Samples from tokens at least P times as probable as the likeliest [default: 0]
    #[arg(long, value_name = "P", value_parser = min_p, allow_negative_numbers = true)]
    pub(super) min_p: Option<f32>,
    /// Makes sampling repeatable [default: random]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Ends the text before this string; may be given several times
    #[arg(long, value_name = "STR", value_parser = stop)]
    pub(super) stop: Vec<String>,
    /// Ends the sequence after any of these tokens, besides the model's own
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub(super) stop_token_ids: Vec<u32>,
    /// Goes on after an end-of-sequence token
    #[arg(long)]
    pub(super) ignore_eos: bool,
}

impl Settings {
    /// The request for a prompt. What is said about defaults in the help is decided here and in
    /// [`Request`].
    pub(super) fn request(&self, prompt: Prompt, observe: Observe) -> Request {
        let samples = self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some()
            || self.seed.is_some();
        let greedy = SamplingParams::GREEDY;
        Request {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens.unwrap_or(0),
            sampling: SamplingParams {
                temperature: self.temperature.unwrap_or(if samples { 1.0 } else { 0.0 }),
                top_k: self.top_k.unwrap_or(greedy.top_k),
                top_p: self.top_p.unwrap_or(greedy.top_p),
                min_p: self.min_p.unwrap_or(greedy.min_p),
                seed: self.seed,
                ..greedy
            },
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            observe,
            ..Request::new(prompt)
        }
    }
}

// The help spells this out.
const _: () = assert!(DEFAULT_MAX_NEW_TOKENS == 128);

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |t| t >= 0.0 && t.is_finite(), "a number from 0 up")
}

fn top_p(text: &str) -> Result<f32, String> {
    number(text, |p| p > 0.0 && p <= 1.0, "above 0 and at most 1")
}

fn min_p(text: &str) -> Result<f32, String> {
    number(text, |p| (0.0..=1.0).contains(&p), "from 0 to 1")
}

fn number(text: &str, fits: impl Fn(f32) -> bool, needed: &str) -> Result<f32, String> {
    text.parse()
        .ok()
        .filter(|&value| fits(value))
        .ok_or_else(|| format!("it must be {needed}"))
}

fn stop(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("it must not be empty".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(settings: Settings) -> SamplingParams {
        settings
            .request(Prompt::Ids(vec![1]), Observe::default())
            .sampling
    }

    #[test]
    fn greedy_unless_sampling_is_asked_for() {
        assert_eq!(sampling(Settings::default()), SamplingParams::GREEDY);
        let temperature = |settings| sampling(settings).temperature;
        assert_eq!(
            temperature(Settings {
                seed: Some(1),
                ..Settings::default()
            }),
            1.0
        );
        assert_eq!(
            temperature(Settings {
                top_k: Some(5),
                ..Settings::default()
            }),
            1.0
        );
        let both = Settings {
            top_p: Some(0.5),
            temperature: Some(0.3),
            ..Settings::default()
        };
        assert_eq!(temperature(both), 0.3);
    }

    #[test]
    fn impossible_values_are_wrong_usage() {
        assert!(temperature("-1").is_err() && temperature("NaN").is_err());
        assert!(top_p("0").is_err() && top_p("1.01").is_err() && top_p("1").is_ok());
        assert!(min_p("-0.1").is_err() && min_p("x").is_err() && min_p("0").is_ok());
    }
}
