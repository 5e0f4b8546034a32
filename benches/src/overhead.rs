//! Where the host's time goes in a decode step.
//!
//! The engine records what runs when; a step's spans are summed by part. Runs that record take turns with
//! runs that do not, so that what recording costs is known too. Figures are means over the middle half of
//! the steps by length: outliers do not move them, and unlike medians those of the parts sum to the
//! step's.

use crate::table::measure::arbitrary_id;
use anyhow::ensure;
use kiln_bundle::trace::{Arg, Span, Trace};
use kiln_bundle::{Limits, Manifest, Phase};
use kiln_runtime::{DEVICE_TRACK, Engine, Event, HOST_TRACK, Prompt, Request, STREAM, StepPart};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Runs of each kind.
const RUNS: u32 = 5;

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// B.
    pub batch: u32,
    /// Tokens of each prompt.
    pub prompt_len: u32,
    /// Tokens generated from each, two at least.
    pub gen_len: u32,
}

/// Of the decode steps of the whole batch, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overhead {
    /// Such as `opt-125m`.
    pub model: String,
    /// As it names itself.
    pub device: String,
    /// What was run.
    #[serde(flatten)]
    pub workload: Workload,
    /// Steps recorded, half of which count.
    pub steps: usize,
    /// They sum to `step_us`.
    pub parts: Vec<PartTime>,
    /// From one call of the engine to the next.
    pub step_us: f64,
    /// The same, while nothing is recorded.
    pub unrecorded_step_us: f64,
}

/// A part of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartTime {
    /// In a word.
    pub name: &'static str,
    /// What it does.
    #[serde(skip)]
    pub what: &'static str,
    /// Time that it takes.
    pub us: f64,
    /// Of the step.
    pub share: f64,
}

/// Measures on an engine that is idle; `manifest` is that of its bundle.
///
/// # Errors
/// A workload that the bundle has no room for, or a failure of the device.
pub fn measure(
    engine: &mut Engine,
    manifest: &Manifest,
    workload: Workload,
) -> anyhow::Result<Overhead> {
    let Workload {
        batch,
        prompt_len,
        gen_len,
    } = workload;
    let Limits {
        max_batch,
        max_seq_len,
        ..
    } = manifest.limits;
    ensure!(
        batch <= max_batch,
        "--batch is {batch}; this bundle runs {max_batch} at a time"
    );
    let positions = u64::from(prompt_len) + u64::from(gen_len);
    ensure!(
        positions <= max_seq_len.into(),
        "--prompt-len {prompt_len} and --gen-len {gen_len} are {positions} positions; a sequence of this \
         bundle has {max_seq_len} at most"
    );
    run(engine, workload, 0)?;
    let (mut bare, mut recorded) = (Vec::new(), Vec::new());
    for pair in 0..RUNS {
        bare.extend(run(engine, workload, 1 + 2 * pair)?);
        engine.record(Trace::new(), manifest);
        run(engine, workload, 2 + 2 * pair)?;
        if let Some(trace) = engine.take_trace() {
            recorded.extend(steps(trace, workload.batch));
        }
    }
    ensure!(
        !recorded.is_empty() && !bare.is_empty(),
        "no decode step had all {} sequences: the KV cache has no room for them at once",
        workload.batch
    );
    let steps = recorded.len();
    let recorded = middle_half(recorded, |step| step.length);
    let bare = middle_half(bare, |&length| length);
    Ok(Overhead {
        model: manifest.model.name.clone(),
        device: engine.facts().name.clone(),
        workload,
        steps,
        parts: parts(&recorded),
        step_us: mean_us(&recorded, |step| step.length),
        unrecorded_step_us: mean_us(&bare, |&length| length),
    })
}

/// Prompts of arbitrary tokens, run to their full length: those of other runs are different, so that none
/// is found in the cache. Returns the time of each decode step of the whole batch.
fn run(engine: &mut Engine, workload: Workload, run: u32) -> anyhow::Result<Vec<Duration>> {
    for sequence in 0..workload.batch {
        let salt = (sequence + 1009 * run) as usize;
        let ids = (0..workload.prompt_len as usize).map(|position| arbitrary_id(salt, position));
        let mut request = Request::new(Prompt::Ids(ids.collect()));
        request.max_new_tokens = Some(workload.gen_len);
        request.ignore_eos = true;
        engine.submit(request)?;
    }
    let mut lengths = Vec::new();
    let mut text = String::new();
    while !engine.is_idle() {
        let before = engine.stats().decode;
        let began = Instant::now();
        let events = engine.step()?;
        let streaming = Instant::now();
        for event in events {
            match event {
                Event::Token(token) => text += &token.text,
                Event::Finished(_) => {}
                Event::Failed { error, .. } => return Err(error.into()),
            }
        }
        engine.note(STREAM, streaming);
        let length = began.elapsed();
        let after = engine.stats().decode;
        if after.steps > before.steps && after.tokens - before.tokens == u64::from(workload.batch) {
            lengths.push(length);
        }
    }
    Ok(lengths)
}

/// Times of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Step {
    /// Of its parts, in the order of [`StepPart::ALL`], what is inside of them included.
    host: [Duration; StepPart::ALL.len()],
    /// Of the device's kernels but the one that chooses tokens.
    kernels: Duration,
    /// Of that one.
    draws: Duration,
    stream: Duration,
    /// From the call of the engine to the end of its events.
    length: Duration,
}

/// The decode steps of `batch` sequences. The spans of a step's parts were added before its own, what
/// became of its events after it.
fn steps(mut trace: Trace, batch: u32) -> Vec<Step> {
    let (host, device) = (trace.track(HOST_TRACK), trace.track(DEVICE_TRACK));
    let mut steps = Vec::new();
    let mut step = Step::default();
    let mut call: Option<&Span> = None;
    for span in trace.spans() {
        let (name, length) = (span.label.name.as_ref(), span.length);
        let is_step = span.label.arg("phase").is_some();
        if span.track == device {
            match name {
                _ if is_step => {}
                "sample" => step.draws += length,
                _ => step.kernels += length,
            }
        } else if span.track == host && is_step {
            call = Some(span);
        } else if name == STREAM {
            let whole = |call: &&Span| is_decode(call, batch);
            if let Some(call) = call.take().filter(whole) {
                step.stream = length;
                step.length = span.end().saturating_sub(call.start);
                steps.push(step);
            }
            step = Step::default();
        } else if let Some(part) = StepPart::ALL.iter().position(|part| part.name() == name) {
            step.host[part] += length;
        }
    }
    steps
}

fn is_decode(call: &Span, batch: u32) -> bool {
    let is = |name, value: Arg| call.label.arg(name) == Some(&value);
    is("phase", Phase::Decode.name().into()) && is("sequences", (batch as usize).into())
}

impl Step {
    /// What a part takes, without these inside of it.
    fn without(&self, part: StepPart, inside: &[Duration]) -> Duration {
        let inside: Duration = inside.iter().sum();
        self.of(part).saturating_sub(inside)
    }

    fn of(&self, part: StepPart) -> Duration {
        self.host[part as usize]
    }

    /// On the host and on the device.
    fn sampling(&self) -> Duration {
        self.of(StepPart::Sampling) + self.draws
    }
}

/// What parts are called, what they do, and what they take of a step.
type PartOf = (&'static str, &'static str, fn(&Step) -> Duration);

const PARTS: [PartOf; 11] = [
    (
        StepPart::Schedule.name(),
        "choosing sequences and executable, filling the step",
        |step| step.without(StepPart::Schedule, &[step.of(StepPart::BlockTables)]),
    ),
    (
        StepPart::BlockTables.name(),
        "giving out KV blocks, noting what they hold",
        |step| step.of(StepPart::BlockTables),
    ),
    (
        StepPart::Submit.name(),
        "checking the step, lists of the batch",
        |step| {
            let inside = [step.of(StepPart::Launch), step.sampling()];
            step.without(StepPart::Submit, &inside)
        },
    ),
    (
        StepPart::Launch.name(),
        "having kernels run: on a CPU finding weights and buffers, on a GPU calls of the driver",
        |step| step.without(StepPart::Launch, &[step.kernels]),
    ),
    ("kernels", "of the model", |step| step.kernels),
    (StepPart::Sampling.name(), "choosing tokens", Step::sampling),
    (
        StepPart::Collect.name(),
        "waiting for the device; its kernels, where it does not tell their times",
        |step| step.of(StepPart::Collect),
    ),
    (
        StepPart::Take.name(),
        "handing tokens to their requests",
        |step| step.without(StepPart::Take, &[step.of(StepPart::Detokenise)]),
    ),
    (
        StepPart::Detokenise.name(),
        "making text of tokens",
        |step| step.of(StepPart::Detokenise),
    ),
    (STREAM, "handing text on, here into memory", |step| {
        step.stream
    }),
    ("rest", "between the parts, recording among it", |step| {
        let calls = [
            StepPart::Schedule,
            StepPart::Submit,
            StepPart::Collect,
            StepPart::Take,
        ];
        let known = calls.map(|part| step.of(part)).iter().sum::<Duration>();
        step.length.saturating_sub(known + step.stream)
    }),
];

/// The parts that there are: a device that draws in its kernels has no sampling on the host.
fn parts(steps: &[Step]) -> Vec<PartTime> {
    let step_us = mean_us(steps, |step| step.length);
    let part = |(name, what, of)| {
        let us = mean_us(steps, of);
        let share = us / step_us;
        (us > 0.0).then_some(PartTime {
            name,
            what,
            us,
            share,
        })
    };
    PARTS.into_iter().filter_map(part).collect()
}

/// Without the shortest and the longest quarter.
fn middle_half<T>(mut items: Vec<T>, length: impl Fn(&T) -> Duration) -> Vec<T> {
    items.sort_by_key(length);
    let quarter = items.len() / 4;
    items.truncate(items.len() - quarter);
    items.split_off(quarter)
}

fn mean_us<T>(items: &[T], of: impl Fn(&T) -> Duration) -> f64 {
    let sum: Duration = items.iter().map(of).sum();
    sum.as_secs_f64() * 1e6 / items.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_bundle::trace::Label;

    /// Calls of the engine that last 100 us and an event that takes 5 us more.
    fn trace(calls: &[(Phase, usize)]) -> Trace {
        let mut trace = Trace::new();
        let (host, device) = (trace.track(HOST_TRACK), trace.track(DEVICE_TRACK));
        let mut start = Instant::now();
        for (phase, sequences) in calls {
            let mut add = |track, label: Label, from: u64, length: u64| {
                let from = start + Duration::from_micros(from);
                trace.add(track, label, from, Duration::from_micros(length));
            };
            let part = |part: StepPart| Label::new(part.name());
            let step = Label::new("decode-b2-kv256")
                .with("phase", phase.name())
                .with("sequences", *sequences);
            add(host, part(StepPart::BlockTables), 1, 2);
            add(host, part(StepPart::BlockTables), 6, 1);
            add(host, part(StepPart::Schedule), 0, 10);
            add(host, part(StepPart::Launch), 13, 45);
            add(host, part(StepPart::Sampling), 63, 2);
            add(host, part(StepPart::Submit), 12, 60);
            add(host, part(StepPart::Collect), 73, 2);
            add(device, Label::new("linear w"), 14, 40);
            add(device, Label::new("sample"), 59, 4);
            add(device, step.clone(), 12, 63);
            add(host, part(StepPart::Detokenise), 80, 4);
            add(host, part(StepPart::Detokenise), 85, 3);
            add(host, part(StepPart::Take), 76, 20);
            add(host, step, 0, 100);
            add(host, Label::new(STREAM), 101, 5);
            start += Duration::from_millis(1);
        }
        trace
    }

    #[test]
    fn a_step_is_the_sum_of_its_parts() {
        let steps = steps(trace(&[(Phase::Decode, 2); 3]), 2);
        assert_eq!(steps.len(), 3);
        let parts = parts(&steps);
        let found: Vec<(&str, f64)> = parts
            .iter()
            .map(|part| (part.name, (part.us * 1e3).round() / 1e3))
            .collect();
        let expected = [
            ("schedule", 7.0),
            ("block tables", 3.0),
            ("submit", 9.0),
            ("launch", 5.0),
            ("kernels", 40.0),
            ("sampling", 6.0),
            ("collect", 2.0),
            ("take", 13.0),
            ("detokenise", 7.0),
            ("stream", 5.0),
            ("rest", 9.0),
        ];
        assert_eq!(found, expected);
        let shares: f64 = parts.iter().map(|part| part.share).sum();
        assert!((shares - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_a_device_does_not_do_is_no_part() {
        let parts = parts(&[Step {
            length: Duration::from_micros(10),
            ..Step::default()
        }]);
        let names: Vec<&str> = parts.iter().map(|part| part.name).collect();
        assert_eq!(names, ["rest"]);
    }

    #[test]
    fn only_decode_steps_of_the_whole_batch_count() {
        let calls = [
            (Phase::Prefill, 2),
            (Phase::Decode, 1),
            (Phase::Decode, 2),
            (Phase::Decode, 3),
        ];
        let steps = steps(trace(&calls), 2);
        assert_eq!(steps.len(), 1);
        // Nothing of the steps before it is counted.
        assert_eq!(steps[0].kernels, Duration::from_micros(40));
    }

    #[test]
    fn outliers_do_not_count() {
        let lengths = [9000, 3, 4, 0, 6, 5, 1, 7].map(Duration::from_micros);
        let middle = middle_half(lengths.to_vec(), |&length| length);
        assert_eq!(mean_us(&middle, |&length| length), 4.5);
        let one = middle_half(vec![Duration::from_micros(2)], |&length| length);
        assert_eq!(mean_us(&one, |&length| length), 2.0);
    }
}
