//! Requests in, tokens and text out.
//!
//! [`Engine::step`] is the loop's body: plan steps and submit them until the device has as many in
//! flight as it takes, then collect the oldest. What a token means for its request (does it end it,
//! what text does it add, which beams come next) is decided here; what runs when, in the scheduler.

use crate::active::{Active, Run, StepRows};
use crate::beams::BeamRows;
use crate::choices::derive_seed;
use crate::completion::{Completion, RequestId, TokenEvent};
use crate::device::{
    self, Device, DeviceError, DeviceFacts, LoadOptions, Step, StepId, StepOutput,
};
use crate::record::{Recorder, StepPart};
use crate::request::{Request, RequestError, Room};
use crate::sampling::{Continuation, Rules, Sampler, Suppression, Taken, TokenLogprob};
use crate::scheduler::{NewSequence, Pick, Plan, Planned, Scheduler, SequenceId};
use crate::tokenizer::{Tokenizer, TokenizerError};
use kiln_bundle::trace::Trace;
use kiln_bundle::{Bundle, Executable, Manifest, ModelInfo, Phase};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What happened to a request.
#[derive(Debug)]
pub enum Event {
    /// It has a new token. A search over beams has none before its end.
    Token(TokenEvent),
    /// It is done.
    Finished(Box<Completion>),
    /// It cannot go on.
    Failed {
        /// The request.
        request: RequestId,
        /// Why.
        error: EngineError,
    },
}

/// Steps done since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Prefill steps.
    pub prefill: PhaseStats,
    /// Decode steps.
    pub decode: PhaseStats,
    /// Most blocks of the KV cache that were held at a time.
    pub most_kv_blocks: usize,
}

/// Steps of one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseStats {
    /// How many.
    pub steps: u64,
    /// New tokens fed.
    pub tokens: u64,
    /// Positions in the caches of the sequences fed, these tokens included.
    pub kv_positions: u64,
    /// Time that they took.
    pub time: Duration,
}

/// Why an engine cannot be made or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The bundle's tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The device has no executables for full sequences, which a sound manifest excludes.
    #[error("the bundle's executables do not cover sequences of {max_seq_len} positions")]
    Incomplete {
        /// Positions of a full sequence.
        max_seq_len: u32,
    },
    /// The model computes nonsense: damaged weights, or values too large for their type. Or the request
    /// leaves no token to choose.
    #[error(
        "no token can be chosen after position {position}: the logits hold a value that is no finite \
         number, since the weights are damaged or overflow, or the request suppresses every token"
    )]
    NotFinite {
        /// Position of the last token fed.
        position: usize,
    },
}

/// Runs requests on a device.
///
/// ```
/// # use kiln_bundle::Bundle;
/// # use kiln_runtime::{Engine, Event, LoadOptions, Prompt, Request};
/// # use std::path::Path;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let bundle = Bundle::open(Path::new("examples/tiny.kiln"))?;
/// let mut engine = Engine::load(&bundle, &LoadOptions::default())?;
/// for id in 10..16 {
///     let mut request = Request::new(Prompt::Ids(vec![2, id]));
///     request.max_new_tokens = Some(4);
///     request.ignore_eos = true;
///     engine.submit(request)?;
/// }
/// while !engine.is_idle() {
///     engine.step()?;
/// }
/// // Steps are shared: alone, each of the six requests takes four.
/// let stats = engine.stats();
/// assert!(stats.prefill.steps + stats.decode.steps < 12);
///
/// // What is wrong with a request is told at once.
/// let error = engine.submit(Request::new(Prompt::Ids(vec![2, 9999]))).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "prompt_ids[1]: token id 9999 is out of range; the vocabulary has ids 0 to 299"
/// );
/// # Ok(())
/// # }
/// ```
pub struct Engine {
    device: Box<dyn Device>,
    model: ModelInfo,
    max_seq_len: usize,
    tokenizer: Option<Tokenizer>,
    scheduler: Scheduler,
    active: HashMap<RequestId, Active>,
    in_flight: VecDeque<InFlight>,
    step: Step,
    /// For what is chosen from rows that the host sees.
    sampler: Sampler,
    next_id: u64,
    seeds: RandomState,
    stats: Stats,
    last_collected: Option<Instant>,
    recorder: Recorder,
}

struct InFlight {
    id: StepId,
    executable: usize,
    plan: Plan,
    submitted: Instant,
}

impl Engine {
    /// Loads a bundle onto a device.
    ///
    /// # Errors
    /// Any of [`EngineError`] but [`EngineError::NotFinite`].
    pub fn load(bundle: &Bundle, options: &LoadOptions<'_>) -> Result<Engine, EngineError> {
        let path = bundle.tokenizer_path();
        std::thread::scope(|scope| {
            // On the CPU, whose weights are mapped, parsing the tokenizer takes longer than all the
            // rest.
            let tokenizer = path
                .as_deref()
                .map(|path| scope.spawn(move || Tokenizer::from_file(path)));
            let device = device::load(bundle, options)?;
            let tokenizer = match tokenizer.map(|thread| thread.join()) {
                None => None,
                Some(Ok(loaded)) => Some(loaded?),
                Some(Err(panic)) => std::panic::resume_unwind(panic),
            };
            Engine::new(device, bundle.manifest(), tokenizer)
        })
    }

    /// An engine on a loaded device.
    ///
    /// # Errors
    /// [`EngineError::Incomplete`].
    pub fn new(
        device: Box<dyn Device>,
        manifest: &Manifest,
        tokenizer: Option<Tokenizer>,
    ) -> Result<Engine, EngineError> {
        let limits = &manifest.limits;
        let facts = device.facts();
        let scheduler = Scheduler::new(
            device.executables(),
            limits,
            facts.slots,
            facts.kv_blocks,
            device.keeps_histories(),
        );
        let max_seq_len = limits.max_seq_len;
        Ok(Engine {
            scheduler: scheduler.ok_or(EngineError::Incomplete { max_seq_len })?,
            device,
            model: manifest.model.clone(),
            max_seq_len: max_seq_len as usize,
            tokenizer,
            active: HashMap::new(),
            in_flight: VecDeque::new(),
            step: Step::default(),
            sampler: Sampler::default(),
            next_id: 0,
            seeds: RandomState::new(),
            stats: Stats::default(),
            last_collected: None,
            recorder: Recorder::default(),
        })
    }

    /// Records what runs when, into a trace, until [`Engine::take_trace`]. `manifest` is that of the
    /// engine's bundle. Without it nothing is recorded, and no step does more for it than look.
    pub fn record(&mut self, trace: Trace, manifest: &Manifest) {
        let target = &self.device.facts().target;
        let executables = self.device.executables();
        self.recorder.start(trace, executables, target, manifest);
    }

    /// Adds to the trace, where there is one, what the caller did from `began` on: a span between
    /// steps.
    pub fn note(&mut self, name: &'static str, began: Instant) {
        self.recorder.note(name, began);
    }

    /// Ends the recording.
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.recorder.finish()
    }

    /// What the device offers.
    pub fn facts(&self) -> &DeviceFacts {
        self.device.facts()
    }

    /// What the device runs.
    pub fn executables(&self) -> &[Executable] {
        self.device.executables()
    }

    /// How fast the device's memory is, in GB/s; none where it cannot be measured.
    pub fn read_bandwidth(&mut self) -> Option<f64> {
        self.device.read_bandwidth()
    }

    /// The bundle's tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Steps done so far.
    pub fn stats(&self) -> Stats {
        Stats {
            most_kv_blocks: self.scheduler.most_blocks_used(),
            ..self.stats
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, RequestError> {
        let (prompt_ids, max_new_tokens) = request.resolve(&Room {
            model: &self.model,
            max_seq_len: self.max_seq_len,
            kv_blocks: self.scheduler.cache_blocks(),
            slots: self.scheduler.slots(),
            tokenizer: self.tokenizer.as_ref(),
        })?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let seed = request.sampling.seed;
        let seed = seed.unwrap_or_else(|| self.seeds.hash_one(id.0));
        let ends = request.ends(&self.model);
        let prompt_len = prompt_ids.len();
        let min_new_tokens = request.min_new_tokens(prompt_len);
        let processors = &request.processors;
        let rules = Rules {
            processors: processors.clone(),
            prompt_len,
            max_new_tokens,
            ends: ends.clone(),
        };
        let suppression = Suppression::new(processors, prompt_len, &ends, min_new_tokens);
        let layers = self.model.layers as usize;
        let new_tokens = max_new_tokens as usize;
        let active = Active::new(request, prompt_ids, new_tokens, ends, layers);
        let request = &active.request;
        let first = NewSequence {
            prompt_ids: active.prompt_ids.clone(),
            max_new_tokens: new_tokens,
            params: request.sampling.with_seed(seed),
            suppression,
            rules: Arc::new(rules),
            pick: active.pick(),
            after: None,
            observe: request.observe(),
            see_draws: request.top_logprobs().is_some() || request.outputs.scores,
            see_prompt: request.scores_prompt(),
        };
        let sequence = |index| SequenceId { request: id, index };
        for index in 0..active.sequences() {
            let other = NewSequence {
                params: request.sampling.with_seed(derive_seed(seed, index)),
                after: (index > 0).then_some(sequence(0)),
                see_prompt: first.see_prompt && index == 0,
                ..first.clone()
            };
            self.scheduler.add(sequence(index), other);
        }
        self.active.insert(id, active);
        Ok(id)
    }

    /// Whether every request is done.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    /// Ends a request. Returns what it has so far; none when it is done or unknown.
    pub fn cancel(&mut self, request: RequestId) -> Option<Completion> {
        let active = self.remove(request)?;
        active
            .into_completion(request, self.tokenizer.as_ref())
            .ok()
    }

    /// Takes a request and its sequences out.
    fn remove(&mut self, request: RequestId) -> Option<Active> {
        let active = self.active.remove(&request)?;
        for index in 0..active.sequences() {
            self.scheduler.remove(SequenceId { request, index });
        }
        Some(active)
    }

    /// Keeps the device busy and takes in its oldest step. Returns what that changed, which may be
    /// nothing; does nothing when the engine is idle.
    ///
    /// # Errors
    /// [`EngineError::Device`] and [`EngineError::Tokenizer`]; the engine is of no use after it.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let began = self.recorder.now();
        while self.in_flight.len() <= self.device.pipeline_depth() {
            let scheduling = self.recorder.now();
            let plan = self.scheduler.plan(&mut self.step, &mut self.recorder);
            self.recorder.part(StepPart::Schedule, scheduling);
            let Some(plan) = plan else {
                break;
            };
            self.step.observe.times = self.recorder.is_on();
            let submitted = Instant::now();
            for planned in &plan.sequences {
                if let Some(active) = self.active.get_mut(&planned.id.request) {
                    active.started.get_or_insert(submitted);
                    active.cached_tokens.get_or_insert(planned.start);
                }
            }
            let id = self.device.submit(&self.step)?;
            self.recorder.submitted(self.device.submit_parts());
            self.recorder.part(StepPart::Submit, Some(submitted));
            self.in_flight.push_back(InFlight {
                id,
                executable: self.step.executable,
                plan,
                submitted,
            });
        }
        let mut events = Vec::new();
        let Some(InFlight {
            id,
            executable,
            plan,
            submitted,
        }) = self.in_flight.pop_front()
        else {
            return Ok(events);
        };
        let collecting = self.recorder.now();
        let output = self.device.collect(id)?;
        self.recorder.part(StepPart::Collect, collecting);
        let ran = self.count(&plan, submitted);
        let label = self.recorder.step(&plan, executable, &output, ran);
        let taking = self.recorder.now();
        self.take(&plan, &output, &mut events)?;
        self.finish(&plan, &mut events)?;
        self.recorder.part(StepPart::Take, taking);
        self.recorder.call(label, began);
        Ok(events)
    }

    /// Returns when the device ran the step.
    fn count(&mut self, plan: &Plan, submitted: Instant) -> Range<Instant> {
        let now = Instant::now();
        let stats = match plan.phase {
            Phase::Prefill => &mut self.stats.prefill,
            Phase::Decode => &mut self.stats.decode,
        };
        stats.steps += 1;
        for planned in &plan.sequences {
            stats.tokens += planned.len as u64;
            stats.kv_positions += (planned.start + planned.len) as u64;
        }
        // A step behind another one has waited for it.
        let started = self
            .last_collected
            .map_or(submitted, |last| last.max(submitted));
        stats.time += now - started;
        self.last_collected = Some(now);
        started..now
    }

    /// Hands a step's rows, tokens and continuations to its requests.
    fn take(
        &mut self,
        plan: &Plan,
        output: &StepOutput,
        events: &mut Vec<Event>,
    ) -> Result<(), EngineError> {
        let mut parts = Parts::new(plan, output, &self.model);
        let layers = self.model.layers as usize;
        for sequence in plan.sequences.chunk_by(|a, b| a.id == b.id) {
            let parts = parts.take(sequence);
            let Some((first, part)) = sequence.first().zip(parts.first()) else {
                continue;
            };
            let Some(active) = self.active.get_mut(&first.id.request) else {
                continue;
            };
            active.observe(first, &part.rows, layers);
            let is_finite = active.score_prompt(first, &part.rows);
            match first.picks {
                _ if !is_finite => self.fail(first.id.request, part.position, events),
                None => {}
                Some(Pick::Token) => self.take_token(first.id, part, events)?,
                Some(_) => self.take_beams(first.id, &parts, events),
            }
        }
        Ok(())
    }

    fn take_token(
        &mut self,
        id: SequenceId,
        part: &Part<'_>,
        events: &mut Vec<Event>,
    ) -> Result<(), EngineError> {
        let request = id.request;
        let Some(active) = self.active.get_mut(&request) else {
            return Ok(());
        };
        let row = part.rows.last_logits();
        if active.request.outputs.scores
            && !active.is_over(id.index)
            && let (Some(row), Some(draw)) = (row, self.scheduler.draw(id, 0))
        {
            active.keep_scores(self.sampler.scores(row, &draw));
        }
        if !self.scheduler.take(id, part.token) {
            return Ok(());
        }
        let Some(token) = part.token else {
            self.fail(request, part.position, events);
            return Ok(());
        };
        active.take_token(id.index, token, row);
        let detokenising = self.recorder.now();
        let text = active.take_text(id.index, token, self.tokenizer.as_ref())?;
        self.recorder.part(StepPart::Detokenise, detokenising);
        if active.is_over(id.index) {
            self.scheduler.stop(id);
        }
        events.push(Event::Token(TokenEvent {
            request,
            choice: id.index,
            id: token,
            text,
        }));
        Ok(())
    }

    fn take_beams(&mut self, id: SequenceId, parts: &[Part<'_>], events: &mut Vec<Event>) {
        let request = id.request;
        let Some(active) = self.active.get_mut(&request) else {
            return;
        };
        active.has_token();
        let mut rows = HostRows {
            id,
            parts,
            scheduler: &self.scheduler,
            sampler: &mut self.sampler,
            top: active.request.logprobs,
            failed_at: None,
        };
        let Run::Beams(search) = &mut active.run else {
            return;
        };
        let choosing = self.recorder.now();
        let next = search.advance(&mut rows);
        let failed_at = rows.failed_at;
        self.recorder.part(StepPart::Sampling, choosing);
        if let Some(position) = failed_at {
            self.fail(request, position, events);
        } else if let Some(next) = next {
            self.scheduler.branch(id, &next);
        } else {
            self.scheduler.remove(id);
        }
    }

    fn fail(&mut self, request: RequestId, position: usize, events: &mut Vec<Event>) {
        if self.remove(request).is_some() {
            let error = EngineError::NotFinite { position };
            events.push(Event::Failed { request, error });
        }
    }

    /// Ends the requests of a step that have all they need.
    fn finish(&mut self, plan: &Plan, events: &mut Vec<Event>) -> Result<(), EngineError> {
        for planned in &plan.sequences {
            let request = planned.id.request;
            let Some(active) = self.active.get_mut(&request) else {
                continue;
            };
            if !active.is_over(planned.id.index) || active.lacks_rows(planned.id.index) {
                continue;
            }
            self.scheduler.remove(planned.id);
            if active.close(planned.id.index)
                && let Some(active) = self.remove(request)
            {
                let completion = active.into_completion(request, self.tokenizer.as_ref())?;
                events.push(Event::Finished(Box::new(completion)));
            }
        }
        Ok(())
    }
}

/// A step's output, cut into the parts of its branches.
struct Parts<'a> {
    output: &'a StepOutput,
    vocab_size: usize,
    hidden_size: usize,
    /// T.
    tokens: usize,
    next_token_row: usize,
    next_logit_row: usize,
    next_token: usize,
    next_continuations: usize,
}

/// What a step computed for a branch.
struct Part<'a> {
    rows: StepRows<'a>,
    /// Position of its last token.
    position: usize,
    token: Option<u32>,
    continuations: &'a [Continuation],
}

impl<'a> Parts<'a> {
    fn new(plan: &Plan, output: &'a StepOutput, model: &ModelInfo) -> Parts<'a> {
        Parts {
            output,
            vocab_size: model.vocab_size as usize,
            hidden_size: model.hidden_size as usize,
            tokens: plan.sequences.iter().map(|planned| planned.len).sum(),
            next_token_row: 0,
            next_logit_row: 0,
            next_token: 0,
            next_continuations: 0,
        }
    }

    /// Those of the next branches.
    fn take(&mut self, branches: &[Planned]) -> Vec<Part<'a>> {
        branches.iter().map(|planned| self.next(planned)).collect()
    }

    fn next(&mut self, planned: &Planned) -> Part<'a> {
        let token_rows = self.next_token_row..self.next_token_row + planned.len;
        let logit_rows = planned.logit_rows.count(planned.len);
        let logit_rows = self.next_logit_row..self.next_logit_row + logit_rows;
        self.next_token_row = token_rows.end;
        self.next_logit_row = logit_rows.end;
        let mut part = Part {
            rows: StepRows {
                vocab_size: self.vocab_size,
                logits: &self.output.logits,
                logit_rows,
                hidden_size: self.hidden_size,
                hidden_states: &self.output.hidden_states,
                tokens: self.tokens,
                token_rows,
            },
            position: (planned.start + planned.len).saturating_sub(1),
            token: None,
            continuations: &[],
        };
        match planned.picks {
            Some(Pick::Token) => {
                part.token = self.output.tokens.get(self.next_token).copied().flatten();
                self.next_token += 1;
            }
            Some(Pick::Beams {
                by_engine: false, ..
            }) => {
                let all = &self.output.continuations;
                part.continuations = all.get(self.next_continuations).map_or(&[], Vec::as_slice);
                self.next_continuations += 1;
            }
            Some(Pick::Beams { .. }) | None => {}
        }
        part
    }
}

/// The rows of a search's branches, from which the device has chosen continuations or the host does.
struct HostRows<'a> {
    id: SequenceId,
    parts: &'a [Part<'a>],
    scheduler: &'a Scheduler,
    sampler: &'a mut Sampler,
    /// Likeliest tokens noted with each; none where no log-probabilities are.
    top: Option<u32>,
    /// Position after which a row held no numbers.
    failed_at: Option<usize>,
}

impl BeamRows for HostRows<'_> {
    fn continuations(&mut self, branch: usize, taken: &Taken<'_>) -> Vec<Continuation> {
        let Some(part) = self.parts.get(branch) else {
            return Vec::new();
        };
        let mut continuations = part.continuations.to_vec();
        if let Some(draw) = self.scheduler.draw(self.id, branch)
            && let (true, Some(beam), Some(row)) =
                (continuations.is_empty(), draw.beam, part.rows.last_logits())
        {
            continuations = self.sampler.continuations(row, &draw, &beam, taken);
        }
        if continuations.is_empty() {
            self.failed_at = Some(part.position);
        }
        continuations
    }

    fn logprob(&mut self, branch: usize, id: u32) -> Option<TokenLogprob> {
        let row = self.parts.get(branch)?.rows.last_logits()?;
        Some(TokenLogprob::new(row, id, self.top? as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beams::{BeamParams, EarlyStopping};
    use crate::choices::Choices;
    use crate::completion::{Choice, FinishReason};
    use crate::kv::blocks_for;
    use crate::record::{DEVICE_TRACK, HOST_TRACK};
    use crate::request::{Embedding, Layers, Pooling, Prompt};
    use crate::sampling::{Draw, Processors, SamplingParams};
    use crate::testing::{EOS, FakeDevice, HIDDEN, LAYERS, VOCAB, manifest};
    use crate::tokenizer::tests::byte_tokenizer;
    use kiln_bundle::trace::{Arg, Span};

    const MAX_SEQ_LEN: u32 = 96;

    fn engine(max_batch: u32, kv_blocks: usize, depth: usize) -> Engine {
        let manifest = manifest(20, max_batch, MAX_SEQ_LEN);
        let device = FakeDevice::new(&manifest, kv_blocks as u32, depth);
        Engine::new(Box::new(device), &manifest, Some(byte_tokenizer())).unwrap()
    }

    fn run(engine: &mut Engine) -> Vec<Completion> {
        let mut done = Vec::new();
        for _ in 0..10_000 {
            if engine.is_idle() {
                done.sort_by_key(|completion: &Completion| completion.request);
                return done;
            }
            for event in engine.step().unwrap() {
                match event {
                    Event::Finished(completion) => done.push(*completion),
                    Event::Failed { error, .. } => panic!("{error}"),
                    Event::Token(_) => {}
                }
            }
        }
        panic!("the engine does not come to an end");
    }

    fn only(completion: &Completion) -> &Choice {
        assert_eq!(completion.choices.len(), 1);
        &completion.choices[0]
    }

    /// Requests of many lengths, some greedy and some not.
    fn requests() -> Vec<Request> {
        let lengths = [1, 40, 7, 21, 3, 60, 16, 17, 33, 2];
        let request = |(i, &len): (usize, &u32)| {
            let i = i as u32;
            let mut request =
                Request::new(Prompt::Ids((0..len).map(|t| (t * 7 + i) % VOCAB).collect()));
            request.max_new_tokens = Some([30, 5, 33, 1][i as usize % 4]);
            request.ignore_eos = i.is_multiple_of(2);
            if i % 3 == 1 {
                request.sampling = SamplingParams {
                    temperature: 0.9,
                    top_k: 50,
                    top_p: 0.9,
                    min_p: 0.01,
                    seed: Some(7),
                    ..SamplingParams::GREEDY
                };
            }
            request.logprobs = [None, Some(0), Some(3)][i as usize % 3];
            request.echo = i % 2 == 1;
            request.outputs.logits = i % 5 == 1;
            if i % 5 < 2 {
                request.outputs.hidden_states = Layers::All;
            }
            match i % 4 {
                1 => request.processors.repetition_penalty = 1.5,
                2 => {
                    request.processors = Processors {
                        no_repeat_ngram_size: 1,
                        presence_penalty: 0.5,
                        suppress_tokens: (100..200).collect(),
                        begin_suppress_tokens: (0..100).collect(),
                        ..Processors::NONE
                    };
                    request.min_length = 30;
                }
                3 => request.processors.forced_eos_token_id = Some(77),
                _ => {}
            }
            request
        };
        lengths.iter().enumerate().map(request).collect()
    }

    /// What must come of a request, by the model alone.
    fn expected_ids(request: &Request) -> Vec<u32> {
        let Prompt::Ids(mut history) = request.prompt.clone() else {
            unreachable!()
        };
        let prompt_len = history.len();
        let rules = Arc::new(Rules {
            processors: request.processors.clone(),
            prompt_len,
            max_new_tokens: request.max_new_tokens.unwrap(),
            ends: if request.ignore_eos {
                vec![]
            } else {
                vec![EOS]
            },
        });
        for index in 0..rules.max_new_tokens {
            let params = request
                .sampling
                .with_seed(request.sampling.seed.unwrap_or(0));
            let mut suppressed = request.processors.suppress_tokens.clone();
            if index == 0 {
                suppressed.extend(&request.processors.begin_suppress_tokens);
            }
            if !request.ignore_eos && (history.len() as u32) < request.min_length {
                suppressed.push(EOS);
            }
            let draw = Draw {
                params,
                index,
                suppressed_ids: &suppressed,
                rules: Some(&rules),
                history: &history,
                beam: None,
            };
            let token = Sampler::default()
                .sample(&FakeDevice::logits(&history), &draw)
                .unwrap();
            history.push(token);
            if token == EOS && !request.ignore_eos {
                break;
            }
        }
        history.split_off(prompt_len)
    }

    /// The log-probabilities that a request must report, by the model alone.
    fn check_logprobs(request: &Request, completion: &Completion) {
        let choice = only(completion);
        let Some(top) = request.logprobs else {
            assert_eq!(choice.logprobs, None);
            return;
        };
        let all = [completion.prompt_ids.as_slice(), &choice.ids].concat();
        let expect = |positions: std::ops::Range<usize>| -> Vec<TokenLogprob> {
            positions
                .map(|p| TokenLogprob::new(&FakeDevice::logits(&all[..p]), all[p], top as usize))
                .collect()
        };
        let prompt_len = completion.prompt_ids.len();
        let generated = choice.logprobs.as_ref().unwrap();
        assert_eq!(*generated, expect(prompt_len..all.len()));
        let sum: f32 = generated.iter().map(|token| token.logprob).sum();
        assert!((choice.score.unwrap() - sum).abs() < 1e-3);
        let prompt = if request.echo { 1..prompt_len } else { 0..0 };
        assert_eq!(completion.prompt_logprobs, expect(prompt));
    }

    fn check_rows(request: &Request, completion: &Completion) {
        let choice = only(completion);
        let all = [completion.prompt_ids.as_slice(), &choice.ids].concat();
        if request.outputs.logits {
            let expect: Vec<f32> = (1..=all.len())
                .flat_map(|len| FakeDevice::logits(&all[..len]))
                .collect();
            assert_eq!(choice.logits.len(), expect.len());
            assert!(choice.logits == expect);
        }
        if request.outputs.hidden_states == Layers::All {
            let positions = all.len();
            let width = HIDDEN as usize;
            assert_eq!(
                choice.hidden_states.len(),
                (LAYERS as usize + 1) * positions * width
            );
            for (row, values) in choice.hidden_states.chunks_exact(width).enumerate() {
                let (layer, position) = (row / positions, row % positions);
                assert_eq!(values, [(layer * 1000 + position) as f32; HIDDEN as usize]);
            }
        }
    }

    #[test]
    fn every_batch_memory_and_depth_gives_the_same() {
        let full = blocks_for(MAX_SEQ_LEN as usize);
        for (max_batch, kv_blocks) in [(1, full), (4, 4 * full), (8, full), (8, full + 3), (3, 64)]
        {
            for depth in [0, 1, 2] {
                let mut engine = engine(max_batch, kv_blocks, depth);
                for request in requests() {
                    engine.submit(request).unwrap();
                }
                let done = run(&mut engine);
                assert_eq!(done.len(), requests().len());
                for (request, completion) in requests().iter().zip(&done) {
                    assert_eq!(
                        only(completion).ids,
                        expected_ids(request),
                        "{max_batch} {kv_blocks} {depth}"
                    );
                    check_rows(request, completion);
                    check_logprobs(request, completion);
                }
                assert_eq!(engine.scheduler.free(), (kv_blocks, max_batch as usize));
            }
        }
    }

    #[test]
    fn requests_may_come_and_go_at_any_time() {
        let mut engine = engine(4, 40, 1);
        let all = requests();
        let mut done = Vec::new();
        for (index, request) in all.iter().enumerate() {
            engine.submit(request.clone()).unwrap();
            for event in engine.step().unwrap() {
                if let Event::Finished(completion) = event {
                    done.push(*completion);
                }
            }
            if index == 4 {
                let cancelled = engine.cancel(RequestId(1)).unwrap();
                let cancelled = only(&cancelled);
                assert_eq!(cancelled.finish_reason, FinishReason::Cancelled);
                assert!(expected_ids(&all[1]).starts_with(&cancelled.ids));
            }
        }
        done.extend(run(&mut engine));
        assert_eq!(done.len(), all.len() - 1);
        for completion in &done {
            assert_eq!(
                only(completion).ids,
                expected_ids(&all[completion.request.0 as usize])
            );
        }
        assert!(engine.cancel(RequestId(2)).is_none());
    }

    #[test]
    fn events_add_up_to_the_completion() {
        let mut engine = engine(4, 40, 1);
        engine.submit(requests().swap_remove(2)).unwrap();
        let (mut ids, mut text, mut completion) = (Vec::new(), String::new(), None);
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                match event {
                    Event::Token(token) => {
                        ids.push(token.id);
                        text += &token.text;
                    }
                    Event::Finished(done) => completion = Some(done),
                    Event::Failed { error, .. } => panic!("{error}"),
                }
            }
        }
        let completion = completion.unwrap();
        let choice = only(&completion);
        assert_eq!((&choice.ids, &choice.text), (&ids, &text));
        assert_eq!(choice.finish_reason, FinishReason::Length);
        assert_eq!(text, byte_tokenizer().decode(&ids).unwrap());
    }

    #[test]
    fn a_recorded_run_is_the_same_and_its_spans_nest() {
        for depth in [0, 1] {
            let mut engine = engine(4, 40, depth);
            engine.record(Trace::new(), &manifest(20, 4, MAX_SEQ_LEN));
            let all = requests();
            for request in &all {
                engine.submit(request.clone()).unwrap();
            }
            for (completion, request) in run(&mut engine).iter().zip(&all) {
                assert_eq!(only(completion).ids, expected_ids(request));
            }
            let stats = engine.stats();
            let mut trace = engine.take_trace().unwrap();
            assert!(engine.take_trace().is_none());
            for name in [HOST_TRACK, DEVICE_TRACK] {
                let track = trace.track(name);
                let steps = trace.spans().iter();
                let steps =
                    steps.filter(|span| span.track == track && span.label.arg("phase").is_some());
                let steps: Vec<&Span> = steps.collect();
                let expected = stats.prefill.steps + stats.decode.steps;
                assert_eq!(steps.len() as u64, expected);
                for pair in steps.windows(2) {
                    assert!(pair[0].end() <= pair[1].start, "{pair:?}");
                }
                let prefill = Some(&Arg::from(Phase::Prefill.name()));
                let prefills = steps.iter().filter(|s| s.label.arg("phase") == prefill);
                assert_eq!(prefills.count() as u64, stats.prefill.steps);
            }
            let of = |part: StepPart| {
                let spans = trace.spans().iter();
                let spans = spans.filter(move |span| span.label.name == part.name());
                spans.collect::<Vec<&Span>>()
            };
            let inside = [
                (StepPart::BlockTables, StepPart::Schedule),
                (StepPart::Launch, StepPart::Submit),
                (StepPart::Detokenise, StepPart::Take),
            ];
            for (inner, outer) in inside {
                let outers = of(outer);
                assert!(!outers.is_empty() && !of(inner).is_empty(), "{inner:?}");
                let holds = |outer: &&&Span, inner: &Span| {
                    outer.start <= inner.start && inner.end() <= outer.end()
                };
                for span in of(inner) {
                    assert!(outers.iter().any(|o| holds(&o, span)), "{span:?}");
                }
            }
            let steps = (stats.prefill.steps + stats.decode.steps) as usize;
            for part in [StepPart::Submit, StepPart::Launch, StepPart::Collect] {
                assert_eq!(of(part).len(), steps, "{part:?}");
            }
        }
    }

    #[test]
    fn a_step_that_is_not_recorded_asks_for_no_times() {
        let mut engine = engine(4, 40, 0);
        engine
            .submit(Request::new(Prompt::Ids(vec![1, 2])))
            .unwrap();
        engine.step().unwrap();
        assert_eq!(engine.device.submit_parts(), []);
        engine.record(Trace::new(), &manifest(20, 4, MAX_SEQ_LEN));
        engine.step().unwrap();
        assert_eq!(engine.device.submit_parts().len(), 1);
    }

    #[test]
    fn the_choice_of_a_search_is_recorded() {
        let mut engine = engine(4, 40, 0);
        engine.record(Trace::new(), &manifest(20, 4, MAX_SEQ_LEN));
        let mut request = Request::new(Prompt::Ids(vec![1, 2]));
        request.max_new_tokens = Some(3);
        request.beams = Some(BeamParams::new(2));
        engine.submit(request).unwrap();
        run(&mut engine);
        let trace = engine.take_trace().unwrap();
        let sampling = StepPart::Sampling.name();
        let mut spans = trace.spans().iter();
        assert!(spans.any(|span| span.label.name == sampling));
    }

    #[test]
    fn stops_at_tokens_and_strings() {
        for depth in [0, 1] {
            let mut request = Request::new(Prompt::Ids(vec![5, 6, 7]));
            request.max_new_tokens = Some(40);
            request.ignore_eos = true;
            request.outputs.logits = true;
            let free = expected_ids(&request);
            let submit = |request: &Request| {
                let mut engine = engine(2, 40, depth);
                engine.submit(request.clone()).unwrap();
                let completion = run(&mut engine).remove(0);
                check_rows(request, &completion);
                completion.choices.into_iter().next().unwrap()
            };

            let mut by_id = request.clone();
            by_id.stop_token_ids = vec![free[9]];
            let end = free.iter().position(|&id| id == free[9]).unwrap();
            let completion = submit(&by_id);
            assert_eq!(completion.ids, free[..=end]);
            assert_eq!(completion.finish_reason, FinishReason::Stop);

            // Held back until one token more has come.
            by_id.min_new_tokens = end as u32 + 2;
            assert!(submit(&by_id).ids.len() > end + 1);

            let text = submit(&request).text;
            let stop = text.chars().skip(4).take(2).collect::<String>();
            let mut by_string = request.clone();
            by_string.stop = vec![stop.clone()];
            let completion = submit(&by_string);
            assert_eq!(completion.text, text[..text.find(&stop).unwrap()]);
            assert_eq!(completion.finish_reason, FinishReason::Stop);
            assert!(completion.ids.len() < 40 && free.starts_with(&completion.ids));
        }
    }

    #[test]
    fn a_prompt_can_be_scored_without_generating() {
        let mut engine = engine(2, 40, 1);
        let mut request = Request::new(Prompt::Ids(vec![9; 45]));
        request.max_new_tokens = Some(0);
        request.outputs.logits = true;
        request.outputs.hidden_states = Layers::All;
        engine.submit(request.clone()).unwrap();
        let completion = run(&mut engine).remove(0);
        let choice = only(&completion);
        assert!(choice.ids.is_empty() && choice.text.is_empty());
        assert_eq!(choice.finish_reason, FinishReason::Length);
        check_rows(&request, &completion);
    }

    #[test]
    fn the_logprobs_of_a_prompt_need_no_generation() {
        for depth in [0, 1] {
            for len in [1, 2, 45] {
                let mut engine = engine(2, 40, depth);
                let mut request = Request::new(Prompt::Ids((0..len).collect()));
                request.max_new_tokens = Some(0);
                request.logprobs = Some(2);
                request.echo = true;
                engine.submit(request.clone()).unwrap();
                let completion = run(&mut engine).remove(0);
                assert!(only(&completion).ids.is_empty());
                check_logprobs(&request, &completion);
            }
        }
    }

    #[test]
    fn samples_without_room_for_a_token_are_refused() {
        let mut engine = engine(4, 60, 1);
        let scored = Request {
            logprobs: Some(0),
            echo: true,
            ..Request::new(Prompt::Ids(vec![1; MAX_SEQ_LEN as usize]))
        };
        let mut samples = scored.clone();
        samples.sampling.temperature = 1.0;
        samples.choices = Choices {
            returned: 1,
            generated: 3,
        };
        let error = engine.submit(samples.clone()).unwrap_err().to_string();
        assert!(error.contains("the prompt has 96 tokens"), "{error}");
        samples.max_new_tokens = Some(0);
        let error = engine.submit(samples).unwrap_err().to_string();
        assert_eq!(
            error,
            "best_of is 3; it must be 1 where max_new_tokens is 0"
        );
        engine.submit(scored).unwrap();
        assert_eq!(run(&mut engine)[0].prompt_logprobs.len(), 95);
    }

    #[test]
    fn a_search_without_room_for_a_token_is_refused() {
        let mut engine = engine(4, 60, 1);
        let request = Request {
            beams: Some(BeamParams::new(2)),
            logprobs: Some(0),
            echo: true,
            ..Request::new(Prompt::Ids(vec![1; MAX_SEQ_LEN as usize]))
        };
        let error = engine.submit(request).unwrap_err().to_string();
        assert!(error.contains("the prompt has 96 tokens"), "{error}");
    }

    #[test]
    fn a_row_that_is_no_number_fails_its_request_alone() {
        for depth in [0, 1] {
            let manifest = manifest(20, 4, MAX_SEQ_LEN);
            let mut device = FakeDevice::new(&manifest, 40, depth);
            device.poison = Some(299);
            let mut engine = Engine::new(Box::new(device), &manifest, None).unwrap();
            let poisoned = engine
                .submit(Request::new(Prompt::Ids(vec![1, 299])))
                .unwrap();
            let mut healthy = Request::new(Prompt::Ids(vec![1, 2]));
            healthy.max_new_tokens = Some(2);
            engine.submit(healthy.clone()).unwrap();
            let (mut failed, mut finished) = (Vec::new(), Vec::new());
            while !engine.is_idle() {
                for event in engine.step().unwrap() {
                    match event {
                        Event::Failed { request, error } => {
                            failed.push((request, error.to_string()))
                        }
                        Event::Finished(completion) => finished.push(only(&completion).ids.clone()),
                        Event::Token(_) => {}
                    }
                }
            }
            assert_eq!(failed.len(), 1);
            assert_eq!(failed[0].0, poisoned);
            assert!(failed[0].1.contains("after position 1"), "{}", failed[0].1);
            assert_eq!(finished, [expected_ids(&healthy)]);
        }
    }

    fn alone(request: &Request) -> Completion {
        let mut engine = engine(8, 400, 0);
        engine.submit(request.clone()).unwrap();
        run(&mut engine).remove(0)
    }

    /// Requests with beams, several samples and one greedy sequence.
    fn mixed() -> Vec<Request> {
        let prompt =
            |len: u32, salt: u32| Prompt::Ids((0..len).map(|t| (t * 5 + salt) % VOCAB).collect());
        let sampling = SamplingParams {
            temperature: 1.0,
            seed: Some(11),
            ..SamplingParams::GREEDY
        };
        let beams = |params: BeamParams, len, salt| Request {
            beams: Some(params),
            max_new_tokens: Some(20),
            choices: Choices {
                returned: 2,
                generated: 2,
            },
            ..Request::new(prompt(len, salt))
        };
        let mut penalised = beams(BeamParams::new(3), 33, 2);
        penalised.processors.repetition_penalty = 1.3;
        penalised.logprobs = Some(1);
        penalised.echo = true;
        let mut sampled_beams = beams(BeamParams::new(2), 16, 3);
        sampled_beams.sampling = sampling;
        let groups = BeamParams {
            num_beam_groups: 2,
            diversity_penalty: 0.7,
            early_stopping: EarlyStopping::Never,
            ..BeamParams::new(4)
        };
        let samples = Request {
            sampling,
            choices: Choices {
                returned: 3,
                generated: 5,
            },
            logprobs: Some(0),
            max_new_tokens: Some(30),
            ..Request::new(prompt(40, 4))
        };
        let mut greedy = Request::new(prompt(21, 5));
        greedy.max_new_tokens = Some(25);
        vec![
            beams(BeamParams::new(4), 1, 1),
            penalised,
            sampled_beams,
            greedy,
            beams(groups, 45, 6),
            samples,
        ]
    }

    #[test]
    fn beams_and_samples_give_the_same_in_any_company() {
        let choices = |request: &Request| alone(request).choices;
        let expected: Vec<Vec<Choice>> = mixed().iter().map(choices).collect();
        for (request, expected) in mixed().iter().zip(&expected) {
            assert_eq!(expected.len(), request.choices.returned as usize);
            assert!(expected.iter().all(|choice| !choice.ids.is_empty()));
        }
        // Four beams of 65 positions take 14 blocks where they share two.
        for (max_batch, kv_blocks) in [(4, 400), (8, 400), (8, 14), (4, 15), (8, 20), (6, 33)] {
            for depth in [0, 1, 2] {
                let mut engine = engine(max_batch, kv_blocks, depth);
                for request in mixed() {
                    engine.submit(request).unwrap();
                }
                let done = run(&mut engine);
                let found: Vec<_> = done.into_iter().map(|done| done.choices).collect();
                assert_eq!(found, expected, "{max_batch} {kv_blocks} {depth}");
                assert_eq!(engine.scheduler.free(), (kv_blocks, max_batch as usize));
            }
        }
    }

    #[test]
    fn samples_are_those_of_their_seeds() {
        let mut request = mixed().pop().unwrap();
        request.choices = Choices {
            returned: 4,
            generated: 4,
        };
        let together = alone(&request);
        for (index, choice) in (0..).zip(&together.choices) {
            let mut one = request.clone();
            one.choices = Choices::ONE;
            one.sampling.seed = request.sampling.seed.map(|seed| derive_seed(seed, index));
            assert_eq!(only(&alone(&one)).ids, choice.ids);
        }
        // The best of more come by their mean log-probability.
        request.choices = Choices {
            returned: 2,
            generated: 4,
        };
        let mean = |choice: &Choice| choice.score.unwrap() / choice.ids.len() as f32;
        let mut ranked: Vec<&Choice> = together.choices.iter().collect();
        ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        let best = alone(&request);
        let ids = |choices: &[&Choice]| choices.iter().map(|c| c.ids.clone()).collect::<Vec<_>>();
        assert_eq!(
            ids(&best.choices.iter().collect::<Vec<_>>()),
            ids(&ranked[..2])
        );
    }

    #[test]
    fn a_prompt_is_held_once() {
        // 80 positions in 5 blocks and 15 more in a sixth. Beams go on from the prompt's row; samples are
        // fed its last token, each in a copy of its block.
        let mut several = Request::new(Prompt::Ids((0..80).collect()));
        several.max_new_tokens = Some(15);
        several.ignore_eos = true;
        let mut beams = several.clone();
        beams.beams = Some(BeamParams::new(8));
        several.sampling.temperature = 1.0;
        several.choices = Choices {
            returned: 8,
            generated: 8,
        };
        for (request, blocks) in [(beams, 5 + 8), (several, 4 + 8 * 2)] {
            let mut engine = engine(8, 400, 1);
            engine.submit(request).unwrap();
            run(&mut engine);
            let stats = engine.stats();
            assert_eq!(stats.most_kv_blocks, blocks);
            // The prompt is computed once.
            assert!(stats.prefill.tokens == 80 && stats.decode.tokens <= 8 * 15);
        }
    }

    #[test]
    fn what_the_cache_holds_is_not_computed_again() {
        let mut engine = engine(4, 40, 1);
        let mut first = Request::new(Prompt::Ids((0..37).collect()));
        first.max_new_tokens = Some(20);
        first.ignore_eos = true;
        engine.submit(first.clone()).unwrap();
        let done = run(&mut engine).remove(0);
        assert_eq!(done.cached_tokens, 0);
        // A conversation goes on.
        let mut history = done.prompt_ids.clone();
        history.extend(&only(&done).ids);
        history.extend([5, 6, 7]);
        let before = engine.stats();
        let mut next = Request::new(Prompt::Ids(history));
        next.max_new_tokens = Some(4);
        engine.submit(next.clone()).unwrap();
        let found = run(&mut engine).remove(0);
        // All but the last generated token, which was never fed, and what is new.
        assert_eq!(found.cached_tokens, 37 + 19);
        assert_eq!(engine.stats().prefill.tokens - before.prefill.tokens, 4);
        assert_eq!(only(&found).ids, expected_ids(&next));
        // What is to be seen of every position is computed.
        next.outputs.logits = true;
        engine.submit(next.clone()).unwrap();
        let seen = run(&mut engine).remove(0);
        assert_eq!(seen.cached_tokens, 0);
        check_rows(&next, &seen);
    }

    #[test]
    fn layers_and_embeddings_are_chosen() {
        let mut request = Request::new(Prompt::Ids((0..30).collect()));
        request.max_new_tokens = Some(0);
        request.outputs.hidden_states = Layers::Of(vec![2, 0]);
        let layer_of = |pooling, layer| {
            let mut request = request.clone();
            request.outputs.embedding = Some(Embedding { pooling, layer });
            alone(&request)
        };
        let last = layer_of(Pooling::Last, None);
        // The fake's hidden states are 1000 * layer + position.
        assert_eq!(
            last.embedding,
            [(1000 * LAYERS + 29) as f32; HIDDEN as usize]
        );
        let rows: Vec<f32> = [2000, 0]
            .iter()
            .flat_map(|&l| (0..30).map(move |p| (l + p) as f32))
            .collect();
        let found: Vec<f32> = only(&last)
            .hidden_states
            .iter()
            .step_by(HIDDEN as usize)
            .copied()
            .collect();
        assert_eq!(found, rows);
        let mean = layer_of(Pooling::Mean, Some(1)).embedding;
        assert!(
            mean.iter().all(|value| (value - 1014.5).abs() < 1e-2),
            "{mean:?}"
        );
    }

    #[test]
    fn scores_are_what_tokens_are_chosen_by() {
        let mut request = Request::new(Prompt::Ids(vec![4, 5]));
        request.max_new_tokens = Some(6);
        request.ignore_eos = true;
        request.outputs.scores = true;
        request.processors.suppress_tokens = vec![7];
        for temperature in [0.0, 0.5] {
            request.sampling.temperature = temperature;
            request.sampling.top_k = 3;
            request.sampling.seed = Some(1);
            let found = alone(&request);
            let choice = only(&found);
            let rows: Vec<&[f32]> = choice.scores.chunks_exact(VOCAB as usize).collect();
            assert_eq!(rows.len(), choice.ids.len());
            let mut history = found.prompt_ids.clone();
            for (row, &id) in rows.iter().zip(&choice.ids) {
                let logits = FakeDevice::logits(&history);
                assert_eq!(row[7], f32::NEG_INFINITY);
                let scale = if temperature == 0.0 { 1.0 } else { temperature };
                assert!((row[id as usize] - logits[id as usize] / scale).abs() < 1e-4);
                let finite = row.iter().filter(|score| score.is_finite()).count();
                assert!(if temperature == 0.0 {
                    finite == 299
                } else {
                    finite < 10
                });
                history.push(id);
            }
        }
    }

    #[test]
    fn a_search_can_be_cancelled() {
        let mut engine = engine(8, 400, 0);
        let request = mixed().remove(1);
        let id = engine.submit(request).unwrap();
        for _ in 0..10 {
            engine.step().unwrap();
        }
        let found = engine.cancel(id).unwrap();
        assert_eq!(found.choices.len(), 2);
        assert!(engine.is_idle());
        assert_eq!(engine.scheduler.free(), (400, 8));
    }

    #[test]
    fn of_cancelled_samples_those_with_tokens_are_returned() {
        let mut engine = engine(8, 400, 0);
        let mut request = mixed().pop().unwrap();
        request.choices.returned = 1;
        let id = engine.submit(request).unwrap();
        // The prompt's two chunks: the first sample has a token, the others have yet to begin.
        for _ in 0..2 {
            engine.step().unwrap();
        }
        let found = engine.cancel(id).unwrap();
        assert_eq!(only(&found).ids.len(), 1);
        assert_eq!(only(&found).finish_reason, FinishReason::Cancelled);
    }

    #[test]
    fn beams_that_do_not_fit_are_refused() {
        let mut engine = engine(4, 10, 0);
        let mut fails = |beams, len, expect: &str| {
            let mut request = Request::new(Prompt::Ids(vec![1; len]));
            request.beams = Some(BeamParams::new(beams));
            request.max_new_tokens = Some(20);
            let error = engine.submit(request).unwrap_err().to_string();
            assert!(error.contains(expect), "{error:?} lacks {expect:?}");
        };
        fails(
            5,
            3,
            "num_beams is 5; it must be at most 4, the largest batch",
        );
        // Three blocks are shared, and four beams take two or three more each.
        fails(4, 60, "80 positions take 11 blocks");
    }

    /// A small generator: xorshift, so that a seed names a run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u32) -> u32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            ((self.0 >> 11) % u64::from(n)) as u32
        }

        fn flip(&mut self) -> bool {
            self.below(2) == 0
        }

        /// A request of any kind, whose prompt begins like one of `texts`.
        fn request(&mut self, texts: &[Vec<u32>], max_batch: u32) -> Request {
            let text = &texts[self.below(texts.len() as u32) as usize];
            let kept = 1 + self.below(text.len().min(66) as u32) as usize;
            let mut ids = text[..kept].to_vec();
            ids.extend((0..self.below(4)).map(|_| self.below(VOCAB)));
            let mut request = Request::new(Prompt::Ids(ids));
            request.max_new_tokens = Some(1 + self.below(14));
            request.ignore_eos = self.flip();
            request.logprobs = self.flip().then_some(1);
            request.echo = self.flip();
            match self.below(5) {
                0 => {
                    let mut beams = BeamParams::new(2 + self.below(max_batch - 1));
                    if beams.num_beams == 4 && self.flip() {
                        beams.num_beam_groups = 2;
                        beams.diversity_penalty = 0.5;
                    } else if self.flip() {
                        request.sampling.temperature = 1.0;
                        request.sampling.seed = Some(u64::from(self.below(100)));
                    }
                    request.beams = Some(beams);
                    request.choices.returned = 2;
                    request.choices.generated = 2;
                }
                1 => {
                    request.sampling.temperature = 1.0;
                    request.sampling.seed = Some(u64::from(self.below(100)));
                    request.choices.generated = 2 + self.below(4);
                    request.choices.returned = 1 + self.below(request.choices.generated);
                }
                2 => {
                    request.outputs.logits = self.flip();
                    request.outputs.scores = self.flip();
                    request.outputs.hidden_states = Layers::All;
                }
                3 => request.processors.repetition_penalty = 1.2,
                _ => request.stop_token_ids = (0..60 * self.below(2)).collect(),
            }
            request
        }
    }

    /// Any requests that begin alike, come at any time and are cancelled at any time, over few blocks.
    #[test]
    fn whatever_runs_together_gives_what_it_gives_alone() {
        for seed in 1..=60u64 {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let max_batch = [2, 4, 6, 8][random.below(4) as usize];
            let kv_blocks = [14, 16, 18, 24, 40][random.below(5) as usize];
            let mut engine = engine(max_batch, kv_blocks, random.below(3) as usize);
            let mut texts = vec![(0..70).collect(), (0..70).map(|t| t * 3 % 50).collect()];
            let (mut asked, mut done) = (HashMap::new(), Vec::new());
            for _ in 0..20 {
                let request = random.request(&texts, max_batch);
                let Ok(id) = engine.submit(request.clone()) else {
                    continue;
                };
                asked.insert(id, request);
                for _ in 0..random.below(12) {
                    for event in engine.step().unwrap() {
                        match event {
                            Event::Finished(completion) => done.push(*completion),
                            Event::Failed { error, .. } => panic!("{error}"),
                            Event::Token(_) => {}
                        }
                    }
                }
                texts.extend(done.last().map(|completion: &Completion| {
                    [completion.prompt_ids.as_slice(), &completion.choices[0].ids].concat()
                }));
                let other = RequestId(u64::from(random.below(20)));
                if random.below(6) == 0 && engine.cancel(other).is_some() {
                    asked.remove(&other);
                }
            }
            done.extend(run(&mut engine));
            assert_eq!(done.len(), asked.len());
            for completion in &done {
                let alone = alone(&asked[&completion.request]);
                assert_eq!(completion.choices, alone.choices, "seed {seed}");
                assert_eq!(
                    completion.prompt_logprobs, alone.prompt_logprobs,
                    "seed {seed}"
                );
            }
            assert_eq!(engine.scheduler.free(), (kv_blocks, max_batch as usize));
        }
    }
}
