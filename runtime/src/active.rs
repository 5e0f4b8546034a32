//! A request that is not done: what it has so far.

use crate::beams::{Hypothesis, Search};
use crate::completion::{Choice, Completion, FinishReason, RequestId, Timing};
use crate::request::{Pooling, Request};
use crate::sampling::TokenLogprob;
use crate::scheduler::{Pick, Planned};
use crate::tokenizer::{TextDelta, TextStream, Tokenizer, TokenizerError};
use std::ops::Range;
use std::time::Instant;

/// See the module.
pub(crate) struct Active {
    pub(crate) request: Request,
    pub(crate) prompt_ids: Vec<u32>,
    max_new_tokens: usize,
    /// The tokens that end a sequence.
    ends: Vec<u32>,
    pub(crate) run: Run,
    /// Known with its first step.
    pub(crate) cached_tokens: Option<usize>,
    prompt_logprobs: Vec<TokenLogprob>,
    rows: ObservedRows,
    scores: Vec<f32>,
    pub(crate) started: Option<Instant>,
    first_token: Option<Instant>,
}

/// How a request generates.
pub(crate) enum Run {
    /// Each sequence by itself.
    Samples(Vec<Sample>),
    /// By a search over beams.
    Beams(Search),
}

/// A sequence of a request.
pub(crate) struct Sample {
    ids: Vec<u32>,
    text: String,
    stream: TextStream,
    logprobs: Vec<TokenLogprob>,
    /// Set when its last token is known; it may still be waiting for rows.
    finish_reason: Option<FinishReason>,
    /// Whether it is out of the scheduler.
    is_closed: bool,
}

/// Rows of the only sequence of a request: of one that has several, none can be asked for.
#[derive(Default)]
struct ObservedRows {
    logits: Vec<f32>,
    /// By layer of those asked for.
    hidden_states: Vec<Vec<f32>>,
    embedding: Vec<f32>,
    /// Positions whose rows are here.
    positions: usize,
}

/// What a step computed for one of its sequences.
pub(crate) struct StepRows<'a> {
    /// Values in a row of logits.
    pub(crate) vocab_size: usize,
    /// (R, V) of the whole step, where observed.
    pub(crate) logits: &'a [f32],
    /// The sequence's.
    pub(crate) logit_rows: Range<usize>,
    /// Values in a hidden state.
    pub(crate) hidden_size: usize,
    /// (L+1, T, C) of the whole step, where observed.
    pub(crate) hidden_states: &'a [f32],
    /// T.
    pub(crate) tokens: usize,
    /// The sequence's, of T.
    pub(crate) token_rows: Range<usize>,
}

impl<'a> StepRows<'a> {
    /// A row of logits (V), where observed.
    pub(crate) fn logits(&self, row: usize) -> Option<&'a [f32]> {
        self.logits
            .get(row * self.vocab_size..(row + 1) * self.vocab_size)
    }

    /// The row that a token is chosen from.
    pub(crate) fn last_logits(&self) -> Option<&'a [f32]> {
        self.logit_rows
            .clone()
            .next_back()
            .and_then(|row| self.logits(row))
    }

    /// Rows of a layer's hidden states.
    fn hidden(&self, layer: usize, rows: Range<usize>) -> &'a [f32] {
        let (start, end) = (
            (layer * self.tokens + rows.start) * self.hidden_size,
            (layer * self.tokens + rows.end) * self.hidden_size,
        );
        self.hidden_states.get(start..end).unwrap_or_default()
    }
}

impl Sample {
    pub(crate) fn new(request: &Request, max_new_tokens: usize) -> Sample {
        Sample {
            ids: Vec::new(),
            text: String::new(),
            stream: TextStream::new(request.stop.clone()),
            logprobs: Vec::new(),
            finish_reason: (max_new_tokens == 0).then_some(FinishReason::Length),
            is_closed: false,
        }
    }

    fn logprob(&self) -> f32 {
        let sum: f64 = self
            .logprobs
            .iter()
            .map(|token| f64::from(token.logprob))
            .sum();
        // An empty sum is -0.
        sum as f32 + 0.0
    }

    /// What several are ranked by. One without a token, as a cancelled request may have, comes last.
    fn mean_logprob(&self) -> f32 {
        match self.ids.len() {
            0 => f32::NEG_INFINITY,
            tokens => self.logprob() / tokens as f32,
        }
    }
}

impl Active {
    pub(crate) fn new(
        request: Request,
        prompt_ids: Vec<u32>,
        max_new_tokens: usize,
        ends: Vec<u32>,
        layers: usize,
    ) -> Active {
        let run = match request.beams {
            Some(params) => Run::Beams(Search::new(params, &ends, max_new_tokens)),
            None => {
                let samples = 0..request.choices.generated;
                Run::Samples(
                    samples
                        .map(|_| Sample::new(&request, max_new_tokens))
                        .collect(),
                )
            }
        };
        Active {
            prompt_ids,
            max_new_tokens,
            ends,
            run,
            cached_tokens: None,
            prompt_logprobs: Vec::new(),
            rows: ObservedRows {
                hidden_states: vec![Vec::new(); request.outputs.hidden_states.of(layers).len()],
                ..ObservedRows::default()
            },
            scores: Vec::new(),
            started: None,
            first_token: None,
            request,
        }
    }

    /// Sequences that the request takes.
    pub(crate) fn sequences(&self) -> u32 {
        match self.run {
            Run::Samples(_) => self.request.choices.generated,
            Run::Beams(_) => 1,
        }
    }

    /// What its rows of logits are for.
    pub(crate) fn pick(&self) -> Pick {
        let (Run::Beams(search), Some(params)) = (&self.run, &self.request.beams) else {
            return Pick::Token;
        };
        let beams = params.num_beams as usize;
        let count = search.continuations();
        // As many as make sure that a beam can go on, whichever of them are ends.
        let least_kept = 1 + self.ends.len().max(1) as u32;
        Pick::Beams {
            beams,
            count,
            least_kept,
            // What a group takes changes the scores of the next one.
            by_engine: params.num_beam_groups > 1,
        }
    }

    /// Whether the last token of a sequence is known.
    pub(crate) fn is_over(&self, index: u32) -> bool {
        match &self.run {
            Run::Samples(samples) => {
                let sample = samples.get(index as usize);
                sample.is_some_and(|sample| sample.finish_reason.is_some())
            }
            Run::Beams(search) => search.is_over(),
        }
    }

    /// Notes that a sequence is out of the scheduler. Returns whether all are.
    pub(crate) fn close(&mut self, index: u32) -> bool {
        match &mut self.run {
            Run::Samples(samples) => {
                if let Some(sample) = samples.get_mut(index as usize) {
                    sample.is_closed = true;
                }
                samples.iter().all(|sample| sample.is_closed)
            }
            Run::Beams(_) => true,
        }
    }

    /// Keeps the rows of a step that are asked for.
    pub(crate) fn observe(&mut self, planned: &Planned, rows: &StepRows<'_>, layers: usize) {
        let Some(fresh) = self.fresh_positions(planned) else {
            return;
        };
        let outputs = &self.request.outputs;
        if outputs.logits {
            let first = rows.logit_rows.start;
            let range = first + fresh.start..first + fresh.end;
            let range = range.start * rows.vocab_size..range.end * rows.vocab_size;
            let fresh = rows.logits.get(range).unwrap_or_default();
            self.rows.logits.extend_from_slice(fresh);
        }
        let first = rows.token_rows.start;
        let range = first + fresh.start..first + fresh.end;
        let wanted = outputs.hidden_states.of(layers);
        for (kept, layer) in self.rows.hidden_states.iter_mut().zip(wanted) {
            kept.extend_from_slice(rows.hidden(layer, range.clone()));
        }
        if let Some(embedding) = &outputs.embedding {
            let layer = embedding.layer.map_or(layers, |layer| layer as usize);
            let hidden = rows
                .hidden(layer, range)
                .chunks_exact(rows.hidden_size.max(1));
            let prompt_len = self.prompt_ids.len();
            let pooled = &mut self.rows.embedding;
            pooled.resize(rows.hidden_size, 0.0);
            for (row, position) in hidden.zip(planned.start + fresh.start..prompt_len) {
                let weight = match embedding.pooling {
                    Pooling::Mean => 1.0 / prompt_len as f32,
                    Pooling::Last => f32::from(u8::from(position + 1 == prompt_len)),
                };
                for (sum, value) in pooled.iter_mut().zip(row) {
                    *sum += weight * value;
                }
            }
        }
        self.rows.positions += fresh.len();
    }

    /// Notes the log-probabilities of the prompt's tokens in a step. Returns whether all are numbers.
    pub(crate) fn score_prompt(&mut self, planned: &Planned, rows: &StepRows<'_>) -> bool {
        let Some(top) = self
            .request
            .logprobs
            .filter(|_| self.request.scores_prompt())
        else {
            return true;
        };
        let mut is_finite = true;
        // The row after position p is that of the token at p + 1. A preempted sequence is fed again:
        // each position counts once.
        let start = planned.start + planned.len - rows.logit_rows.len();
        for (row, position) in rows.logit_rows.clone().zip(start + 1..) {
            let next = self.prompt_ids.get(position);
            if position == self.prompt_logprobs.len() + 1
                && let (Some(&id), Some(row)) = (next, rows.logits(row))
            {
                let token = TokenLogprob::new(row, id, top as usize);
                is_finite &= token.logprob.is_finite();
                self.prompt_logprobs.push(token);
            }
        }
        is_finite
    }

    /// Notes what a token is chosen by: a row of scores (V).
    pub(crate) fn keep_scores(&mut self, scores: &[f32]) {
        self.scores.extend_from_slice(scores);
    }

    /// Notes that a token is known.
    pub(crate) fn has_token(&mut self) {
        self.first_token.get_or_insert_with(Instant::now);
    }

    /// The sample of this index; a search over beams has none.
    fn sample(&mut self, index: u32) -> Option<&mut Sample> {
        match &mut self.run {
            Run::Samples(samples) => samples.get_mut(index as usize),
            Run::Beams(_) => None,
        }
    }

    /// Takes a token of a sequence, and the row (V) that it was chosen from, where observed.
    pub(crate) fn take_token(&mut self, index: u32, token: u32, row: Option<&[f32]>) {
        self.has_token();
        let top = self.request.top_logprobs();
        let is_end = self.ends.contains(&token);
        let max_new_tokens = self.max_new_tokens;
        let Some(sample) = self.sample(index) else {
            return;
        };
        if let (Some(top), Some(row)) = (top, row) {
            sample
                .logprobs
                .push(TokenLogprob::new(row, token, top as usize));
        }
        sample.ids.push(token);
        if is_end {
            sample.finish_reason = Some(FinishReason::Stop);
        } else if sample.ids.len() >= max_new_tokens {
            sample.finish_reason = Some(FinishReason::Length);
        }
    }

    /// Makes text of the token just taken, where there is a tokenizer: a stop string may end the sequence.
    /// Returns what is certain now.
    pub(crate) fn take_text(
        &mut self,
        index: u32,
        token: u32,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<String, TokenizerError> {
        let (Some(sample), Some(tokenizer)) = (self.sample(index), tokenizer) else {
            return Ok(String::new());
        };
        let TextDelta {
            mut text,
            mut stopped,
        } = sample.stream.push(tokenizer, token)?;
        if sample.finish_reason.is_some() && !stopped {
            let rest = sample.stream.finish(tokenizer)?;
            text += &rest.text;
            stopped = rest.stopped;
        }
        if stopped {
            sample.finish_reason = Some(FinishReason::Stop);
        }
        sample.text += &text;
        Ok(text)
    }

    /// Whether rows of a sequence are still to come that the request asks for.
    pub(crate) fn lacks_rows(&self, index: u32) -> bool {
        let lacks_observed = self.request.observe().is_any() && self.rows.positions < self.len();
        let lacks_prompt = index == 0
            && self.request.scores_prompt()
            && self.prompt_logprobs.len() + 1 < self.prompt_ids.len();
        lacks_observed || lacks_prompt
    }

    /// Tokens of the prompt and of the only sequence.
    fn len(&self) -> usize {
        let generated = match &self.run {
            Run::Samples(samples) => samples.first().map_or(0, |sample| sample.ids.len()),
            Run::Beams(_) => 0,
        };
        self.prompt_ids.len() + generated
    }

    /// Which of the tokens that a step fed have positions not observed before: a part of
    /// `0..planned.len`. A preempted sequence is fed again, and one step too many may have been
    /// submitted before the last token was known.
    fn fresh_positions(&self, planned: &Planned) -> Option<Range<usize>> {
        if !self.request.observe().is_any() {
            return None;
        }
        let start = self.rows.positions.checked_sub(planned.start)?;
        let end = planned.len.min(self.len().saturating_sub(planned.start));
        (start < end).then_some(start..end)
    }

    /// The result; what is not over by now is cancelled.
    pub(crate) fn into_completion(
        self,
        request: RequestId,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Completion, TokenizerError> {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        let wants_logprobs = self.request.logprobs.is_some();
        let returned = self.request.choices.returned as usize;
        let mut choices = match self.run {
            Run::Samples(mut samples) => {
                if samples.len() > returned {
                    // Stable: of equals the earlier stays ahead.
                    samples.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
                    samples.truncate(returned);
                }
                let choice = |sample| sampled(sample, wants_logprobs, tokenizer);
                samples
                    .into_iter()
                    .map(choice)
                    .collect::<Result<Vec<_>, _>>()?
            }
            Run::Beams(search) => {
                let ends = self.ends;
                let length = self.max_new_tokens;
                let reason = |hypothesis: &Hypothesis| match hypothesis.ids.last() {
                    Some(id) if ends.contains(id) => FinishReason::Stop,
                    _ if hypothesis.ids.len() == length => FinishReason::Length,
                    _ => FinishReason::Cancelled,
                };
                let choice = |hypothesis| {
                    let reason = reason(&hypothesis);
                    found(hypothesis, reason, wants_logprobs, tokenizer)
                };
                let best = search.into_best(returned).into_iter();
                best.map(choice).collect::<Result<Vec<_>, _>>()?
            }
        };
        if let Some(first) = choices.first_mut() {
            first.logits = self.rows.logits;
            first.hidden_states = self.rows.hidden_states.concat();
            first.scores = self.scores;
        }
        Ok(Completion {
            request,
            prompt_ids: self.prompt_ids,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            prompt_logprobs: self.prompt_logprobs,
            embedding: self.rows.embedding,
            choices,
            timing: Timing {
                prefill: first_token - started,
                decode: now - first_token,
            },
        })
    }
}

fn sampled(
    mut sample: Sample,
    wants_logprobs: bool,
    tokenizer: Option<&Tokenizer>,
) -> Result<Choice, TokenizerError> {
    if let Some(tokenizer) = tokenizer.filter(|_| sample.finish_reason.is_none()) {
        sample.text += &sample.stream.finish(tokenizer)?.text;
    }
    // Those that several were ranked by are known too.
    let is_scored = wants_logprobs || !sample.logprobs.is_empty();
    Ok(Choice {
        score: is_scored.then(|| sample.logprob()),
        ids: sample.ids,
        text: sample.text,
        finish_reason: sample.finish_reason.unwrap_or(FinishReason::Cancelled),
        logprobs: wants_logprobs.then_some(sample.logprobs),
        logits: Vec::new(),
        scores: Vec::new(),
        hidden_states: Vec::new(),
    })
}

fn found(
    hypothesis: Hypothesis,
    finish_reason: FinishReason,
    wants_logprobs: bool,
    tokenizer: Option<&Tokenizer>,
) -> Result<Choice, TokenizerError> {
    let text = tokenizer
        .map(|tokenizer| tokenizer.decode(&hypothesis.ids))
        .transpose()?;
    Ok(Choice {
        score: Some(hypothesis.score),
        ids: hypothesis.ids,
        text: text.unwrap_or_default(),
        finish_reason,
        logprobs: wants_logprobs.then_some(hypothesis.logprobs),
        logits: Vec::new(),
        scores: Vec::new(),
        hidden_states: Vec::new(),
    })
}
