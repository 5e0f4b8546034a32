//! `kiln verify`: are the files what was compiled, and does this device compute what it should?

use super::{DeviceArgs, Loaded, load};
use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use kiln_bundle::{Bundle, SelfTest};
use kiln_runtime::{Completion, Engine, Event, Prompt, Request};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `kiln verify`.
#[derive(clap::Args)]
pub(super) struct VerifyArgs {
    /// Directory of the compiled bundle
    bundle: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let bundle = Bundle::open(&args.bundle)?;
    let files = bundle.manifest().files.len();
    if let Err(error) = verify_hashes(&bundle) {
        writeln!(out, "hashes     FAIL")?;
        return Err(error);
    }
    writeln!(out, "hashes     PASS  {files} files")?;

    let Loaded { mut engine, .. } = load(&args.bundle, &args.device)?;
    let test = &bundle.manifest().self_test;
    let logits = last_logits(
        &mut engine,
        test,
        bundle.manifest().model.vocab_size as usize,
    )?;
    let deviation = deviation(test, &logits);
    // A comparison with NaN is false.
    let pass = deviation <= test.tolerance;
    writeln!(
        out,
        "self-test  {}  {}: largest deviation {deviation:.2e} of the largest logit, tolerance {:.2e}",
        if pass { "PASS" } else { "FAIL" },
        engine.facts().name,
        test.tolerance,
    )?;
    Ok(if pass {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn verify_hashes(bundle: &Bundle) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("hashing {bar:40} {bytes}/{total_bytes} {eta}")?;
    let bar = ProgressBar::new(0).with_style(style);
    let result = bundle.verify_hashes(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(result?)
}

/// The row of logits after the self-test's prompt.
fn last_logits(
    engine: &mut Engine,
    test: &SelfTest,
    vocab_size: usize,
) -> anyhow::Result<Vec<f32>> {
    let mut request = Request::new(Prompt::Ids(test.token_ids.clone()));
    request.max_new_tokens = Some(0);
    request.outputs.logits = true;
    let mut choices = complete(engine, request)?.choices;
    let mut logits = choices.pop().map_or_else(Vec::new, |choice| choice.logits);
    Ok(logits.split_off(logits.len().saturating_sub(vocab_size)))
}

/// Runs one request to its end.
fn complete(engine: &mut Engine, request: Request) -> anyhow::Result<Completion> {
    engine.submit(request)?;
    while !engine.is_idle() {
        for event in engine.step()? {
            match event {
                Event::Finished(completion) => return Ok(*completion),
                Event::Failed { error, .. } => return Err(error.into()),
                Event::Token(_) => {}
            }
        }
    }
    bail!("the self-test did not come to an end")
}

/// The largest difference from the expected logits, as a share of the largest of these.
fn deviation(test: &SelfTest, logits: &[f32]) -> f32 {
    let largest = test
        .top_logits
        .iter()
        .map(|(_, expected)| expected.abs())
        .fold(0.0, f32::max);
    let differences = test.top_logits.iter().map(|&(id, expected)| {
        logits
            .get(id as usize)
            .map_or(f32::NAN, |found| (found - expected).abs())
    });
    let worst = |a: f32, b: f32| {
        if a.is_nan() || b.is_nan() {
            f32::NAN
        } else {
            a.max(b)
        }
    };
    differences.fold(0.0, worst) / largest.max(f32::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_relative_and_sees_everything() {
        let test = SelfTest {
            token_ids: vec![1],
            top_logits: vec![(2, 4.0), (0, -1.0)],
            tolerance: 0.1,
        };
        assert_eq!(deviation(&test, &[-1.0, 9.0, 4.0]), 0.0);
        assert_eq!(deviation(&test, &[-1.0, 9.0, 2.0]), 0.5);
        assert!(deviation(&test, &[-1.0, 9.0]).is_nan());
        assert!(deviation(&test, &[f32::NAN, 9.0, 4.0]).is_nan());
    }
}
