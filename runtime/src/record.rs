//! What the engine notes of its steps, while it is asked to.
//!
//! The host's track has a span for each call of [`Engine::step`](crate::Engine::step), named by the
//! executable whose step it took in, and inside it the parts that it went through: those of the engine,
//! of the scheduler and of the device's `submit`. The device's track has a span for each step, and inside
//! it its kernels, where the device tells their times.

use crate::device::{StepOutput, SubmitPart};
use crate::scheduler::Plan;
use kiln_bundle::trace::{Label, Trace, Track};
use kiln_bundle::{Executable, KernelSpec, Manifest};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// The track of what the host does.
pub const HOST_TRACK: &str = "host";
/// The track of what the device runs.
pub const DEVICE_TRACK: &str = "device";
/// The span, after a call of [`Engine::step`](crate::Engine::step), of handing its events on, for callers
/// to [`note`](crate::Engine::note).
pub const STREAM: &str = "stream";

/// A part of [`Engine::step`](crate::Engine::step).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepPart {
    /// Choosing sequences and executable, filling the step.
    Schedule,
    /// Inside of that: finding, giving out and taking back KV blocks, and noting what they hold.
    BlockTables,
    /// Handing the step to the device; on the CPU, running it.
    Submit,
    /// Inside of that: what it takes of the host to have kernels run. On a GPU the calls of the driver,
    /// on the CPU the walk over the kernels, around them.
    Launch,
    /// Choosing tokens, or the continuations of a search, where it is the host that does it apart from the
    /// device's kernels: inside of [`StepPart::Submit`] or [`StepPart::Take`].
    Sampling,
    /// Waiting for the oldest step.
    Collect,
    /// Handing its tokens to their requests.
    Take,
    /// Inside of that: making text of a token.
    Detokenise,
}

impl StepPart {
    /// All of them.
    pub const ALL: [StepPart; 8] = [
        StepPart::Schedule,
        StepPart::BlockTables,
        StepPart::Submit,
        StepPart::Launch,
        StepPart::Sampling,
        StepPart::Collect,
        StepPart::Take,
        StepPart::Detokenise,
    ];

    /// The name of its spans.
    pub const fn name(self) -> &'static str {
        match self {
            StepPart::Schedule => "schedule",
            StepPart::BlockTables => "block tables",
            StepPart::Submit => "submit",
            StepPart::Launch => "launch",
            StepPart::Sampling => "sampling",
            StepPart::Collect => "collect",
            StepPart::Take => "take",
            StepPart::Detokenise => "detokenise",
        }
    }
}

/// Records, or does nothing.
#[derive(Default)]
pub(crate) struct Recorder(Option<Box<Recording>>);

struct Recording {
    trace: Trace,
    host: Track,
    device: Track,
    /// In the order of [`StepPart::ALL`].
    parts: [Arc<Label>; StepPart::ALL.len()],
    executables: Vec<Labels>,
}

/// An executable's, and one for each of its kernels.
struct Labels {
    name: String,
    kernels: Vec<Arc<Label>>,
}

impl Recorder {
    pub(crate) fn start(
        &mut self,
        mut trace: Trace,
        executables: &[Executable],
        target: &str,
        manifest: &Manifest,
    ) {
        let target = manifest.targets.iter().find(|other| other.name == target);
        let labels = |executable: &Executable| {
            let programs = target.map_or(&[][..], |target| &target.programs);
            let program = programs.get(executable.program as usize);
            let kernels = program.map_or(&[][..], |program| &program.kernels);
            let label = |kernel| {
                let label = Label::new(kernel_name(kernel));
                Arc::new(label.with("executable", executable.name.as_str()))
            };
            Labels {
                name: executable.name.clone(),
                kernels: kernels.iter().map(label).collect(),
            }
        };
        self.0 = Some(Box::new(Recording {
            host: trace.track(HOST_TRACK),
            device: trace.track(DEVICE_TRACK),
            trace,
            parts: StepPart::ALL.map(|part| Arc::new(Label::new(part.name()))),
            executables: executables.iter().map(labels).collect(),
        }));
    }

    pub(crate) fn finish(&mut self) -> Option<Trace> {
        self.0.take().map(|recording| recording.trace)
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// When something begins that is to be recorded.
    pub(crate) fn now(&self) -> Option<Instant> {
        self.is_on().then(Instant::now)
    }

    /// A part is over.
    pub(crate) fn part(&mut self, part: StepPart, began: Option<Instant>) {
        if let (Some(recording), Some(began)) = (&mut self.0, began) {
            let label = recording.parts[part as usize].clone();
            recording.add(recording.host, label, began);
        }
    }

    /// What a device did within `submit`.
    pub(crate) fn submitted(&mut self, parts: &[SubmitPart]) {
        let Some(recording) = &mut self.0 else { return };
        for SubmitPart { part, ran } in parts {
            let label = recording.parts[*part as usize].clone();
            let length = ran.end - ran.start;
            recording
                .trace
                .add(recording.host, label, ran.start, length);
        }
    }

    /// Something of the caller's is over.
    pub(crate) fn note(&mut self, name: &'static str, began: Instant) {
        if let Some(recording) = &mut self.0 {
            recording.add(recording.host, Arc::new(Label::new(name)), began);
        }
    }

    /// The device is done with a step. Returns what the call that took it in is called.
    pub(crate) fn step(
        &mut self,
        plan: &Plan,
        executable: usize,
        output: &StepOutput,
        ran: Range<Instant>,
    ) -> Option<Arc<Label>> {
        let recording = self.0.as_deref_mut()?;
        let labels = recording.executables.get(executable)?;
        let sequences = plan.sequences.iter();
        let label = Label::new(labels.name.clone())
            .with("phase", plan.phase.name())
            .with("sequences", plan.sequences.len())
            .with("tokens", sequences.clone().map(|s| s.len).sum::<usize>())
            .with(
                "kv_len",
                sequences.map(|s| s.start + s.len).max().unwrap_or(0),
            );
        let label = Arc::new(label);
        let mut add = |label: &Arc<Label>, start, length| {
            let trace = &mut recording.trace;
            trace.add(recording.device, label.clone(), start, length);
        };
        for (kernel, time) in labels.kernels.iter().zip(&output.kernel_times) {
            add(kernel, ran.start + time.start, time.length);
        }
        add(&label, ran.start, ran.end - ran.start);
        Some(label)
    }

    /// The call that took in a step is over.
    pub(crate) fn call(&mut self, label: Option<Arc<Label>>, began: Option<Instant>) {
        if let (Some(recording), Some(label), Some(began)) = (&mut self.0, label, began) {
            recording.add(recording.host, label, began);
        }
    }
}

impl Recording {
    /// Adds what began then and ends now.
    fn add(&mut self, track: Track, label: Arc<Label>, began: Instant) {
        self.trace.add(track, label, began, began.elapsed());
    }
}

/// A kernel among those of its program.
fn kernel_name(kernel: &KernelSpec) -> String {
    let kind = kernel.name();
    match kernel {
        KernelSpec::Linear(linear) => format!("{kind} {}", linear.weight),
        KernelSpec::Qkv { layer, .. } | KernelSpec::Attention { layer, .. } => {
            format!("{kind} {layer}")
        }
        KernelSpec::Embed { .. } | KernelSpec::Sample { .. } => kind.to_owned(),
    }
}
