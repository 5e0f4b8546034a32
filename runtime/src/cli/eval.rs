//! `kiln eval`: the perplexity of a text.
//!
//! The text is cut into windows that begin `stride` tokens apart. In each, the tokens that no earlier
//! window had are scored, so that every token but the first counts once, with at least
//! `window - stride` tokens before it (but for those at the start of the text). With `--bos` every
//! window begins with the token that the model knows as the beginning, and the first token counts too.

use super::{DeviceArgs, Loaded, load, milliseconds, read_file};
use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kiln_runtime::{Engine, Event, Prompt, Request, RequestId};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `kiln eval`.
#[derive(clap::Args)]
pub(super) struct EvalArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    /// The text, UTF-8; `-` is standard input
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window [default: the most positions that the bundle takes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    window: Option<u32>,
    /// Tokens from the start of a window to that of the next, fewer than a window has: the fewer, the
    /// more context each token has, and the longer it takes [default: half a window]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Begin every window with the beginning-of-sequence token, as the model has learnt to read; without
    /// it only the text begins as the tokenizer begins it
    #[arg(long)]
    bos: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    /// Tokens of the text, and those of them that were scored.
    tokens: usize,
    scored: usize,
    window: usize,
    stride: usize,
    bos: bool,
    /// exp of the mean.
    perplexity: f64,
    /// Mean of -ln p.
    nats_per_token: f64,
    bits_per_byte: f64,
    ms: f64,
    /// Tokens computed, those of overlaps each time.
    tokens_per_s: f64,
}

pub(super) fn run(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    let path = &args.file;
    let text = String::from_utf8(read_file(path)?)
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    let Loaded {
        mut engine, bundle, ..
    } = load(&args.bundle, &args.device)?;
    let limit = bundle.manifest().limits.max_seq_len;
    let window = args.window.unwrap_or(limit);
    ensure!(
        (2..=limit).contains(&window),
        "--window is {window}; the bundle takes from 2 to {limit} positions"
    );
    let stride = args.stride.unwrap_or(window / 2);
    ensure!(
        stride < window,
        "--stride is {stride}; it must be below the window of {window}"
    );
    let (window, stride) = (window as usize, stride as usize);
    let tokenizer = engine.tokenizer().context("the bundle has no tokenizer")?;
    let mut ids = tokenizer.encode(&text)?;
    let bos = match args.bos {
        true => Some(
            bundle
                .manifest()
                .model
                .bos_token_id
                .context("the model has no beginning-of-sequence token")?,
        ),
        false => None,
    };
    if bos.is_some() && ids.first() == bos.as_ref() {
        ids.remove(0);
    }
    ensure!(
        ids.len() > 1,
        "{} has fewer than two tokens",
        path.display()
    );

    // The token put in front takes a place, and gives the first one a context.
    let windows = match bos {
        Some(_) => windows(ids.len(), window - 1, stride, 0),
        None => windows(ids.len(), window, stride, 1),
    };
    let start = Instant::now();
    let nats = total_nats(&mut engine, &ids, bos, &windows)?;
    let elapsed = start.elapsed();
    let computed: usize = windows.iter().map(|window| window.tokens.len()).sum();
    let scored = ids.len() - usize::from(bos.is_none());
    let mean = nats / scored as f64;
    let report = Report {
        model: bundle.manifest().model.name.clone(),
        device: engine.facts().name.clone(),
        tokens: ids.len(),
        scored,
        window,
        stride,
        bos: args.bos,
        perplexity: mean.exp(),
        nats_per_token: mean,
        bits_per_byte: nats / std::f64::consts::LN_2 / text.len() as f64,
        ms: milliseconds(elapsed),
        tokens_per_s: computed as f64 / elapsed.as_secs_f64(),
    };
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(
            out,
            "perplexity {:.4} a token, {:.4} bits a byte: {} tokens, windows of {window}, stride {stride}",
            report.perplexity, report.bits_per_byte, report.scored
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A stretch of the text, and the first of its tokens that is scored.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    tokens: Range<usize>,
    first_scored: usize,
}

/// The windows of a text of `len` tokens, of which those from `first` on are scored.
fn windows(len: usize, window: usize, stride: usize, first: usize) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for start in (0..len).step_by(stride) {
        let done = windows.last().map_or(first, |last| last.tokens.end);
        if done >= len {
            break;
        }
        windows.push(Window {
            tokens: start..len.min(start + window),
            first_scored: done,
        });
    }
    windows
}

/// The sum of -ln p over all scored tokens.
fn total_nats(
    engine: &mut Engine,
    ids: &[u32],
    bos: Option<u32>,
    windows: &[Window],
) -> anyhow::Result<f64> {
    let style = ProgressStyle::with_template("scoring {bar:40} {pos}/{len} windows {eta}")?;
    let bar = ProgressBar::new(windows.len() as u64).with_style(style);
    let mut asked: HashMap<RequestId, &Window> = HashMap::new();
    let mut windows = windows.iter();
    let mut nats = 0.0;
    loop {
        // Enough to keep the device busy; a text may have very many.
        while asked.len() < 2 * engine.facts().slots as usize
            && let Some(window) = windows.next()
        {
            let prompt = bos.iter().chain(&ids[window.tokens.clone()]).copied();
            let mut request = Request::new(Prompt::Ids(prompt.collect()));
            request.max_new_tokens = Some(0);
            request.logprobs = Some(0);
            request.echo = true;
            asked.insert(engine.submit(request)?, window);
        }
        if engine.is_idle() {
            break;
        }
        for event in engine.step()? {
            match event {
                Event::Finished(completion) => {
                    let window = asked
                        .remove(&completion.request)
                        .context("a result that nothing asked for")?;
                    // The first token of a prompt has none.
                    let context = window.first_scored - window.tokens.start;
                    let before = context + usize::from(bos.is_some()) - 1;
                    let scored = completion.prompt_logprobs.iter().skip(before);
                    nats -= scored.map(|token| f64::from(token.logprob)).sum::<f64>();
                    bar.inc(1);
                }
                Event::Failed { error, .. } => return Err(error.into()),
                Event::Token(_) => {}
            }
        }
    }
    bar.finish_and_clear();
    if !asked.is_empty() {
        bail!("{} windows did not come to an end", asked.len());
    }
    Ok(nats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_scored_once_with_its_context() {
        for (len, first) in (2..40).flat_map(|len| [(len, 0), (len, 1)]) {
            for window in 2..12 {
                for stride in 1..window {
                    let windows = windows(len, window, stride, first);
                    let scored: Vec<usize> = windows
                        .iter()
                        .flat_map(|window| window.first_scored..window.tokens.end)
                        .collect();
                    assert_eq!(scored, (first..len).collect::<Vec<_>>());
                    for at in &windows {
                        assert!(at.tokens.len() <= window);
                        let context = at.first_scored - at.tokens.start;
                        assert!(at.tokens.start == 0 || context >= window - stride);
                        assert!(context >= first);
                    }
                }
            }
        }
    }
}
