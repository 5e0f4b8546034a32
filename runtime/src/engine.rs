//! Requests in, tokens and text out.
//!
//! [`Engine::step`] is the loop's body: plan steps and submit them until the device has as many in
//! flight as it takes, then collect the oldest. What a token means for its request (does it end it,
//! what text does it add) is decided here; what runs when, in the scheduler.

use crate::device::{
    self, Device, DeviceError, DeviceFacts, LoadOptions, Observe, Step, StepId, StepOutput,
};
use crate::request::{Request, RequestError, Room};
use crate::sampling::{Logprobs, Rules, Suppression, TokenLogprob};
use crate::scheduler::{NewSequence, Plan, Planned, Scheduler, SequenceId};
use crate::tokenizer::{TextDelta, TextStream, Tokenizer, TokenizerError};
use kiln_bundle::{Bundle, Executable, Manifest, ModelInfo, Phase};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names a request of an engine; later ones are larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What happened to a request.
#[derive(Debug)]
pub enum Event {
    /// It has a new token.
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

/// A new token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// Of this request.
    pub request: RequestId,
    /// The token.
    pub id: u32,
    /// Text that is certain now: the token's, or that of earlier ones, or none.
    pub text: String,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// [`Engine::cancel`].
    Cancelled,
}

impl FinishReason {
    /// As results spell it.
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// A request's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The request.
    pub request: RequestId,
    /// Its prompt.
    pub prompt_ids: Vec<u32>,
    /// New tokens, the one that ended it included.
    pub ids: Vec<u32>,
    /// Their text, without special tokens and up to a stop string; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Of its tokens, where asked for.
    pub logprobs: Option<Logprobs>,
    /// (P + new tokens, V), where observed.
    pub logits: Vec<f32>,
    /// (L+1, P + new tokens, C), where observed.
    pub hidden_states: Vec<f32>,
    /// How long it took.
    pub timing: Timing,
}

/// How long a request took, from its first step on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Until its first token.
    pub prefill: Duration,
    /// From then to its end.
    pub decode: Duration,
}

/// Steps done since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Prefill steps.
    pub prefill: PhaseStats,
    /// Decode steps.
    pub decode: PhaseStats,
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
    /// The model computes nonsense: damaged weights, or values too large for their type.
    #[error(
        "the logits after position {position} hold a value that is no finite number: the weights \
         are damaged or overflow"
    )]
    NotFinite {
        /// Position of the last token fed.
        position: usize,
    },
}

/// Runs requests on a device.
pub struct Engine {
    device: Box<dyn Device>,
    model: ModelInfo,
    max_seq_len: usize,
    tokenizer: Option<Tokenizer>,
    scheduler: Scheduler,
    active: HashMap<SequenceId, Active>,
    in_flight: VecDeque<InFlight>,
    step: Step,
    next_id: u64,
    seeds: RandomState,
    stats: Stats,
    last_collected: Option<Instant>,
}

struct InFlight {
    id: StepId,
    plan: Plan,
    submitted: Instant,
}

/// A request that is not done.
struct Active {
    request: Request,
    prompt_ids: Vec<u32>,
    max_new_tokens: usize,
    ids: Vec<u32>,
    text: String,
    stream: TextStream,
    /// Set when its last token is known; it may still be waiting for rows to observe.
    finish_reason: Option<FinishReason>,
    logprobs: Option<Logprobs>,
    logits: Vec<f32>,
    /// By layer.
    hidden_states: Vec<Vec<f32>>,
    /// Positions whose rows are here.
    observed: usize,
    started: Option<Instant>,
    first_token: Option<Instant>,
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
        let scheduler = Scheduler::new(device.executables(), limits, facts.slots, facts.kv_blocks);
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
            next_id: 0,
            seeds: RandomState::new(),
            stats: Stats::default(),
            last_collected: None,
        })
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
        self.stats
    }

    /// Queues a request.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, RequestError> {
        let (prompt_ids, max_new_tokens) = request.resolve(&Room {
            model: &self.model,
            max_seq_len: self.max_seq_len,
            cache_tokens: self.scheduler.cache_tokens(),
            tokenizer: self.tokenizer.as_ref(),
        })?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let seed = request
            .sampling
            .seed
            .unwrap_or_else(|| self.seeds.hash_one(id.0));
        let ends = request.ends(&self.model);
        let prompt_len = prompt_ids.len();
        let min_new_tokens = request.min_new_tokens(prompt_len);
        let processors = &request.processors;
        self.scheduler.add(
            SequenceId(id.0),
            NewSequence {
                prompt_ids: prompt_ids.clone(),
                max_new_tokens: max_new_tokens as usize,
                params: request.sampling.with_seed(seed),
                suppression: Suppression::new(processors, prompt_len, &ends, min_new_tokens),
                rules: Arc::new(Rules {
                    processors: processors.clone(),
                    prompt_len,
                    max_new_tokens,
                    ends,
                }),
                observe: request.observe,
                see_draws: request.logprobs.is_some(),
                see_prompt: request.scores_prompt(),
            },
        );
        let active = Active {
            prompt_ids,
            max_new_tokens: max_new_tokens as usize,
            ids: Vec::new(),
            text: String::new(),
            stream: TextStream::new(request.stop.clone()),
            finish_reason: (max_new_tokens == 0).then_some(FinishReason::Length),
            logprobs: request.logprobs.map(|_| Logprobs::default()),
            logits: Vec::new(),
            hidden_states: vec![Vec::new(); self.model.layers as usize + 1],
            observed: 0,
            started: None,
            first_token: None,
            request,
        };
        self.active.insert(SequenceId(id.0), active);
        Ok(id)
    }

    /// Whether every request is done.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    /// Ends a request. Returns what it has so far; none when it is done or unknown.
    pub fn cancel(&mut self, request: RequestId) -> Option<Completion> {
        let id = SequenceId(request.0);
        self.scheduler.remove(id);
        let mut active = self.active.remove(&id)?;
        if let Some(tokenizer) = &self.tokenizer {
            active.text += &active.stream.finish(tokenizer).unwrap_or_default().text;
        }
        Some(active.into_completion(request, FinishReason::Cancelled))
    }

    /// Keeps the device busy and takes in its oldest step. Returns what that changed, which may be
    /// nothing; does nothing when the engine is idle.
    ///
    /// # Errors
    /// [`EngineError::Device`] and [`EngineError::Tokenizer`]; the engine is of no use after it.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        while self.in_flight.len() <= self.device.pipeline_depth() {
            let Some(plan) = self.scheduler.plan(&mut self.step) else {
                break;
            };
            let submitted = Instant::now();
            for planned in &plan.sequences {
                if let Some(active) = self.active.get_mut(&planned.id) {
                    active.started.get_or_insert(submitted);
                }
            }
            let id = self.device.submit(&self.step)?;
            self.in_flight.push_back(InFlight {
                id,
                plan,
                submitted,
            });
        }
        let mut events = Vec::new();
        let Some(InFlight {
            id,
            plan,
            submitted,
        }) = self.in_flight.pop_front()
        else {
            return Ok(events);
        };
        let output = self.device.collect(id)?;
        self.count(&plan, submitted);
        self.observe(&plan, &output);
        self.score(&plan, &output);
        for (id, token) in self.scheduler.collect(&plan, &output.tokens) {
            match token {
                Some(token) => self.take_token(id, token, &mut events)?,
                None => self.fail(id, &mut events),
            }
        }
        self.finish(&plan, &mut events);
        Ok(events)
    }

    fn count(&mut self, plan: &Plan, submitted: Instant) {
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
    }

    /// Hands the step's rows to the requests that observe.
    fn observe(&mut self, plan: &Plan, output: &StepOutput) {
        let tokens: usize = plan.sequences.iter().map(|planned| planned.len).sum();
        let (vocab_size, hidden_size) = (
            self.model.vocab_size as usize,
            self.model.hidden_size as usize,
        );
        let (mut first_token, mut first_row) = (0, 0);
        for planned in &plan.sequences {
            let rows = planned.logit_rows.count(planned.len);
            if let Some(active) = self.active.get_mut(&planned.id)
                && let Some(fresh) = active.fresh_positions(planned)
            {
                let Observe {
                    logits,
                    hidden_states,
                } = active.request.observe;
                if logits {
                    let range = first_row + fresh.start..first_row + fresh.end;
                    let rows = output
                        .logits
                        .get(range.start * vocab_size..range.end * vocab_size);
                    active.logits.extend_from_slice(rows.unwrap_or_default());
                }
                if hidden_states {
                    let layers = output
                        .hidden_states
                        .chunks_exact((tokens * hidden_size).max(1));
                    for (kept, layer) in active.hidden_states.iter_mut().zip(layers) {
                        let range = first_token + fresh.start..first_token + fresh.end;
                        kept.extend_from_slice(
                            &layer[range.start * hidden_size..range.end * hidden_size],
                        );
                    }
                }
                active.observed += fresh.len();
            }
            first_token += planned.len;
            first_row += rows;
        }
    }

    /// Notes the log-probabilities of a step's tokens: those chosen, and those of prompts.
    fn score(&mut self, plan: &Plan, output: &StepOutput) {
        let vocab_size = self.model.vocab_size as usize;
        let row = |index: usize| {
            output
                .logits
                .get(index * vocab_size..(index + 1) * vocab_size)
        };
        let (mut end, mut tokens) = (0, output.tokens.iter());
        for planned in &plan.sequences {
            let rows = planned.logit_rows.count(planned.len);
            let first = end;
            end += rows;
            let chosen = match planned.draws {
                true => tokens.next().copied().flatten(),
                false => None,
            };
            let Some(active) = self.active.get_mut(&planned.id) else {
                continue;
            };
            let (Some(logprobs), Some(top)) = (&mut active.logprobs, active.request.logprobs)
            else {
                continue;
            };
            let top = top as usize;
            if active.request.scores_prompt() {
                // The row after position p is that of the token at p + 1. A preempted sequence is fed
                // again: each position counts once.
                let start = planned.start + planned.len - rows;
                for (index, position) in (first..end).zip(start + 1..) {
                    let next = active.prompt_ids.get(position);
                    if position == logprobs.prompt.len() + 1
                        && let (Some(&id), Some(row)) = (next, row(index))
                    {
                        logprobs.prompt.push(TokenLogprob::new(row, id, top));
                    }
                }
            }
            // A token that comes after the last is dropped.
            if active.finish_reason.is_none()
                && let Some(id) = chosen
                && let Some(row) = end.checked_sub(1).and_then(row)
            {
                logprobs.generated.push(TokenLogprob::new(row, id, top));
            }
        }
    }

    fn take_token(
        &mut self,
        id: SequenceId,
        token: u32,
        events: &mut Vec<Event>,
    ) -> Result<(), EngineError> {
        let Some(active) = self.active.get_mut(&id) else {
            return Ok(());
        };
        active.ids.push(token);
        active.first_token.get_or_insert_with(Instant::now);
        let request = &active.request;
        let ends = request.stop_token_ids.contains(&token)
            || !request.ignore_eos && self.model.eos_token_ids.contains(&token);
        if ends {
            active.finish_reason = Some(FinishReason::Stop);
        } else if active.ids.len() >= active.max_new_tokens {
            active.finish_reason = Some(FinishReason::Length);
        }
        let mut text = String::new();
        if let Some(tokenizer) = &self.tokenizer {
            let TextDelta {
                text: fresh,
                mut stopped,
            } = active.stream.push(tokenizer, token)?;
            text = fresh;
            if active.finish_reason.is_some() && !stopped {
                let rest = active.stream.finish(tokenizer)?;
                text += &rest.text;
                stopped = rest.stopped;
            }
            if stopped {
                active.finish_reason = Some(FinishReason::Stop);
            }
        }
        active.text += &text;
        if active.finish_reason.is_some() {
            self.scheduler.stop(id);
        }
        events.push(Event::Token(TokenEvent {
            request: RequestId(id.0),
            id: token,
            text,
        }));
        Ok(())
    }

    fn fail(&mut self, id: SequenceId, events: &mut Vec<Event>) {
        self.scheduler.remove(id);
        let Some(active) = self.active.remove(&id) else {
            return;
        };
        let position = active.prompt_ids.len() + active.ids.len() - 1;
        let error = EngineError::NotFinite { position };
        events.push(Event::Failed {
            request: RequestId(id.0),
            error,
        });
    }

    /// Ends the requests of a step that have all they need.
    fn finish(&mut self, plan: &Plan, events: &mut Vec<Event>) {
        for planned in &plan.sequences {
            let Some(active) = self.active.get(&planned.id) else {
                continue;
            };
            let Some(reason) = active.finish_reason else {
                continue;
            };
            if active.request.observe != Observe::default() && active.observed < active.len() {
                continue;
            }
            if active.lacks_prompt_logprobs() {
                continue;
            }
            self.scheduler.remove(planned.id);
            if let Some(active) = self.active.remove(&planned.id) {
                let completion = active.into_completion(RequestId(planned.id.0), reason);
                events.push(Event::Finished(Box::new(completion)));
            }
        }
    }
}

impl Completion {
    /// The log-probability of all generated tokens, where log-probabilities were asked for.
    pub fn score(&self) -> Option<f32> {
        self.logprobs.as_ref().map(Logprobs::score)
    }
}

impl Active {
    /// Tokens of prompt and generation.
    fn len(&self) -> usize {
        self.prompt_ids.len() + self.ids.len()
    }

    fn lacks_prompt_logprobs(&self) -> bool {
        let wanted = self.request.scores_prompt();
        let logprobs = self.logprobs.as_ref().filter(|_| wanted);
        logprobs.is_some_and(|logprobs| logprobs.prompt.len() + 1 < self.prompt_ids.len())
    }

    /// Which of the tokens that a step fed have positions not observed before: a part of
    /// `0..planned.len`. A preempted sequence is fed again, and one step too many may have been
    /// submitted before the last token was known.
    fn fresh_positions(&self, planned: &Planned) -> Option<std::ops::Range<usize>> {
        if self.request.observe == Observe::default() {
            return None;
        }
        let start = self.observed.checked_sub(planned.start)?;
        let end = planned.len.min(self.len().saturating_sub(planned.start));
        (start < end).then_some(start..end)
    }

    fn into_completion(self, request: RequestId, finish_reason: FinishReason) -> Completion {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Completion {
            request,
            prompt_ids: self.prompt_ids,
            ids: self.ids,
            text: self.text,
            finish_reason,
            logprobs: self.logprobs,
            logits: self.logits,
            hidden_states: self.hidden_states.concat(),
            timing: Timing {
                prefill: first_token - started,
                decode: now - first_token,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::blocks_for;
    use crate::request::Prompt;
    use crate::sampling::{Draw, Processors, Sampler, SamplingParams};
    use crate::testing::{EOS, FakeDevice, HIDDEN, LAYERS, VOCAB, manifest};
    use crate::tokenizer::tests::byte_tokenizer;

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
            request.observe = Observe {
                logits: i % 5 == 1,
                hidden_states: i % 5 < 2,
            };
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
        let Some(top) = request.logprobs else {
            assert_eq!(completion.logprobs, None);
            return;
        };
        let all = [completion.prompt_ids.as_slice(), &completion.ids].concat();
        let expect = |positions: std::ops::Range<usize>| -> Vec<TokenLogprob> {
            positions
                .map(|p| TokenLogprob::new(&FakeDevice::logits(&all[..p]), all[p], top as usize))
                .collect()
        };
        let prompt_len = completion.prompt_ids.len();
        let logprobs = completion.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.generated, expect(prompt_len..all.len()));
        let prompt = if request.echo { 1..prompt_len } else { 0..0 };
        assert_eq!(logprobs.prompt, expect(prompt));
    }

    fn check_rows(request: &Request, completion: &Completion) {
        let all = [completion.prompt_ids.as_slice(), &completion.ids].concat();
        if request.observe.logits {
            let expect: Vec<f32> = (1..=all.len())
                .flat_map(|len| FakeDevice::logits(&all[..len]))
                .collect();
            assert_eq!(completion.logits.len(), expect.len());
            assert!(completion.logits == expect);
        }
        if request.observe.hidden_states {
            let positions = all.len();
            let width = HIDDEN as usize;
            assert_eq!(
                completion.hidden_states.len(),
                (LAYERS as usize + 1) * positions * width
            );
            for (row, values) in completion.hidden_states.chunks_exact(width).enumerate() {
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
                        completion.ids,
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
                assert_eq!(cancelled.finish_reason, FinishReason::Cancelled);
                assert!(expected_ids(&all[1]).starts_with(&cancelled.ids));
            }
        }
        done.extend(run(&mut engine));
        assert_eq!(done.len(), all.len() - 1);
        for completion in &done {
            assert_eq!(
                completion.ids,
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
        assert_eq!(
            (completion.ids, completion.text),
            (ids.clone(), text.clone())
        );
        assert_eq!(completion.finish_reason, FinishReason::Length);
        assert_eq!(text, byte_tokenizer().decode(&ids).unwrap());
    }

    #[test]
    fn stops_at_tokens_and_strings() {
        for depth in [0, 1] {
            let mut request = Request::new(Prompt::Ids(vec![5, 6, 7]));
            request.max_new_tokens = Some(40);
            request.ignore_eos = true;
            request.observe.logits = true;
            let free = expected_ids(&request);
            let submit = |request: &Request| {
                let mut engine = engine(2, 40, depth);
                engine.submit(request.clone()).unwrap();
                let completion = run(&mut engine).remove(0);
                check_rows(request, &completion);
                completion
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
        request.observe = Observe {
            logits: true,
            hidden_states: true,
        };
        engine.submit(request.clone()).unwrap();
        let completion = run(&mut engine).remove(0);
        assert!(completion.ids.is_empty() && completion.text.is_empty());
        assert_eq!(completion.finish_reason, FinishReason::Length);
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
                assert!(completion.ids.is_empty());
                check_logprobs(&request, &completion);
            }
        }
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
                        Event::Finished(completion) => finished.push(completion.ids),
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
}
