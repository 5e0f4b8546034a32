//! Beam search: which sequences a search goes on with, and which it has found.
//!
//! The rules are those of `_beam_search` in transformers 5 (`generation/utils.py`), for one prompt.
//! With several groups of beams they are those of `_group_beam_search` in releases 4, the last to have
//! it (Vijayakumar et al., "Diverse Beam Search", 2016), which judge the end of a search a little
//! differently: by the best continuation, though it may be an end itself, and group by group. (There, a
//! group that is done goes on taking the padding token, which costs later groups that token; here it
//! takes none.)
//!
//! Nothing here knows of a device: a step gets each beam's best continuations, and says which beams
//! come next.

use crate::sampling::{Continuation, Taken, TokenLogprob};
use crate::scheduler::NextBranch;

/// How to search.
///
/// ```
/// use kiln_runtime::{BeamParams, EarlyStopping, Prompt, Request};
///
/// let mut request = Request::new(Prompt::Ids(vec![2]));
/// request.beams = Some(BeamParams {
///     length_penalty: 0.6,
///     early_stopping: EarlyStopping::Never,
///     ..BeamParams::new(4)
/// });
/// assert!(request.check().is_ok());
///
/// // Groups that keep away from each other's tokens.
/// request.beams = Some(BeamParams {
///     num_beam_groups: 2,
///     diversity_penalty: 0.5,
///     ..BeamParams::new(4)
/// });
/// assert!(request.check().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamParams {
    /// Sequences that are followed at a time, at least 2.
    pub num_beams: u32,
    /// Exponent of the length that divides a sequence's score.
    pub length_penalty: f32,
    /// When the search ends.
    pub early_stopping: EarlyStopping,
    /// Groups into which the beams are split, evenly.
    pub num_beam_groups: u32,
    /// What a token costs a beam for each beam of an earlier group that takes it in the same step.
    pub diversity_penalty: f32,
}

impl BeamParams {
    /// A search by one group of beams with everything else left at its default.
    pub const fn new(num_beams: u32) -> BeamParams {
        BeamParams {
            num_beams,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::No,
            num_beam_groups: 1,
            diversity_penalty: 0.0,
        }
    }
}

/// When a search ends, but for the maximal length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// As soon as as many sequences are finished as there are beams.
    Yes,
    /// When the best running one would not be among them if it ended here.
    #[default]
    No,
    /// When it cannot come among them.
    Never,
}

/// Score of a beam that is there to fill a place.
const UNFILLED: f32 = -1.0e9;

/// A search under way.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    params: BeamParams,
    ends: Vec<u32>,
    max_new_tokens: usize,
    groups: Vec<Group>,
}

/// A sequence of generated tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Hypothesis {
    pub(crate) ids: Vec<u32>,
    /// The sum of its tokens' scores; over a power of its length once it is finished.
    pub(crate) score: f32,
    /// Of its tokens, where asked for.
    pub(crate) logprobs: Vec<TokenLogprob>,
}

#[derive(Clone, Debug)]
struct Group {
    running: Vec<Hypothesis>,
    /// At most as many as beams, best first.
    finished: Vec<Hypothesis>,
    is_done: bool,
}

/// A step's rows.
pub(crate) trait BeamRows {
    /// The best continuations of a branch, best first.
    fn continuations(&mut self, branch: usize, taken: &Taken<'_>) -> Vec<Continuation>;

    /// The log-probability of a token after a branch, where asked for.
    fn logprob(&mut self, branch: usize, id: u32) -> Option<TokenLogprob>;
}

/// A beam of a group and one more token.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Index in the group.
    beam: usize,
    /// Index in the step.
    branch: usize,
    id: u32,
    score: f32,
    rank: f32,
}

impl Search {
    /// A search that is to begin. `ends` are the tokens that end a sequence, each once.
    pub(crate) fn new(params: BeamParams, ends: &[u32], max_new_tokens: usize) -> Search {
        let group = Group {
            running: vec![Hypothesis::default()],
            finished: Vec::new(),
            is_done: false,
        };
        Search {
            params,
            ends: ends.to_vec(),
            max_new_tokens,
            groups: vec![group; params.num_beam_groups.max(1) as usize],
        }
    }

    /// Continuations of each beam that a step is to choose from: enough that every beam goes on should
    /// the others be ends, whichever ends they are.
    pub(crate) fn continuations(&self) -> u32 {
        let wanted = self.group_size() * (1 + self.ends.len()).max(2);
        u32::try_from(wanted).unwrap_or(u32::MAX)
    }

    /// Whether the search has come to its end.
    pub(crate) fn is_over(&self) -> bool {
        self.groups.iter().all(|group| group.is_done)
    }

    /// Takes one step. Returns the branches of the next, or none where the search is over.
    pub(crate) fn advance(&mut self, rows: &mut dyn BeamRows) -> Option<Vec<NextBranch>> {
        let length = 1 + self.generated();
        let mut taken = Vec::new();
        let mut next = Vec::new();
        // All groups begin with one branch.
        let mut first_branch = 0;
        for index in 0..self.groups.len() {
            if self.groups[index].is_done {
                continue;
            }
            let candidates = self.candidates(index, first_branch, length == 1, &taken, rows);
            if length > 1 {
                first_branch += self.groups[index].running.len();
            }
            let chosen = match self.groups.len() {
                1 => self.choose(length, candidates, rows),
                _ => self.choose_in_group(index, length, candidates, rows),
            };
            let group = &mut self.groups[index];
            let extended = |candidate: &Candidate| group.extended(candidate, rows);
            group.running = chosen.iter().map(extended).collect();
            group.is_done |= group.running.is_empty();
            taken.extend(chosen.iter().map(|candidate| candidate.id));
            if !group.is_done {
                next.extend(chosen.iter().map(|candidate| NextBranch {
                    parent: candidate.branch,
                    id: candidate.id,
                    score: candidate.score,
                }));
            }
        }
        if length == self.max_new_tokens {
            self.finish_running(length);
            next.clear();
        }
        (!next.is_empty()).then_some(next)
    }

    /// The `count` best sequences, best first, with their scores. Of a search that was broken off these
    /// are the finished ones, or where there are none those that were running.
    pub(crate) fn into_best(mut self, count: usize) -> Vec<Hypothesis> {
        let length = self.generated();
        if length > 0 && self.groups.iter().all(|group| group.finished.is_empty()) {
            self.finish_running(length);
        }
        let finished = self.groups.into_iter().flat_map(|group| group.finished);
        let mut best: Vec<Hypothesis> = finished.collect();
        best.sort_by(|a, b| b.score.total_cmp(&a.score));
        best.truncate(count);
        best
    }

    /// Tokens of every running sequence.
    fn generated(&self) -> usize {
        let mut running = self.groups.iter().filter(|group| !group.is_done);
        let first = running.find_map(|group| group.running.first());
        first.map_or(0, |hypothesis| hypothesis.ids.len())
    }

    /// Beams of a group.
    fn group_size(&self) -> usize {
        self.params.num_beams as usize / self.groups.len().max(1)
    }

    /// Continuations of all beams of a group, best first; those of beams that only fill a place too.
    fn candidates(
        &self,
        index: usize,
        first_branch: usize,
        is_first: bool,
        taken: &[u32],
        rows: &mut dyn BeamRows,
    ) -> Vec<Candidate> {
        let taken = Taken {
            ids: taken,
            penalty: self.params.diversity_penalty,
        };
        let size = self.group_size();
        let running = self.groups[index].running.len();
        let mut candidates = Vec::new();
        for (beam, branch) in (0..running).zip(first_branch..) {
            let continuations = rows.continuations(branch, &taken);
            let candidate = |c: &Continuation| Candidate {
                beam,
                branch,
                id: c.id,
                score: c.score,
                rank: c.rank,
            };
            candidates.extend(continuations.iter().map(candidate));
        }
        if is_first {
            // The other beams repeat the first. Their continuations are chosen where it has too few.
            let filling = |candidate: &Candidate| Candidate {
                score: candidate.score + UNFILLED,
                rank: candidate.rank + UNFILLED,
                ..*candidate
            };
            let mut filling: Vec<Candidate> = candidates.iter().map(filling).collect();
            filling.sort_by(|a, b| b.rank.total_cmp(&a.rank).then(a.id.cmp(&b.id)));
            for _ in 1..size {
                candidates.extend_from_slice(&filling);
            }
        }
        // Equals stay in the order of their beams, and in a beam of their ids.
        candidates.sort_by(|a, b| b.rank.total_cmp(&a.rank));
        candidates.truncate(self.continuations() as usize);
        candidates
    }

    /// What the beams of a search without groups go on with.
    fn choose(
        &mut self,
        length: usize,
        mut candidates: Vec<Candidate>,
        rows: &mut dyn BeamRows,
    ) -> Vec<Candidate> {
        let num_beams = self.group_size();
        let stops = |candidate: &Candidate| {
            length == self.max_new_tokens || self.ends.contains(&candidate.id)
        };
        // Only the first num_beams may finish; the others stand by for those that do.
        let finishing: Vec<Candidate> = candidates
            .iter()
            .take(num_beams)
            .copied()
            .filter(stops)
            .collect();
        let all_stop = candidates.iter().all(stops);
        // What stops is pushed to the end, not out.
        for candidate in &mut candidates {
            if stops(candidate) {
                candidate.score += UNFILLED;
            }
        }
        for candidate in &finishing {
            self.finish(0, candidate, length, rows);
        }
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        candidates.truncate(num_beams);

        let best_running = candidates
            .first()
            .map_or(f32::NEG_INFINITY, |best| best.score);
        let best_possible = self.normalised(best_running, self.best_length(length));
        let group = &mut self.groups[0];
        let is_full = group.finished.len() == num_beams;
        let worst = group
            .finished
            .last()
            .map_or(f32::NEG_INFINITY, |worst| worst.score);
        let stops_early = self.params.early_stopping == EarlyStopping::Yes;
        group.is_done = all_stop || is_full && (stops_early || best_possible <= worst);
        candidates
    }

    /// What the beams of one of several groups go on with.
    fn choose_in_group(
        &mut self,
        index: usize,
        length: usize,
        candidates: Vec<Candidate>,
        rows: &mut dyn BeamRows,
    ) -> Vec<Candidate> {
        let size = self.group_size();
        let (ended, mut going_on): (Vec<Candidate>, Vec<Candidate>) = {
            let ends = |candidate: &Candidate| self.ends.contains(&candidate.id);
            let ended = candidates.iter().take(size).copied().filter(ends).collect();
            let going_on = candidates.iter().copied().filter(|c| !ends(c)).collect();
            (ended, going_on)
        };
        for candidate in &ended {
            self.finish(index, candidate, length, rows);
        }
        going_on.truncate(size);
        let best = candidates
            .first()
            .map_or(f32::NEG_INFINITY, |best| best.score);
        let best_possible = self.normalised(best, self.best_length(length));
        let group = &mut self.groups[index];
        group.is_done = group.finished.len() == size
            && (self.params.early_stopping == EarlyStopping::Yes
                || group.finished[size - 1].score >= best_possible);
        going_on
    }

    /// Takes a candidate among the finished of a group.
    fn finish(
        &mut self,
        index: usize,
        candidate: &Candidate,
        length: usize,
        rows: &mut dyn BeamRows,
    ) {
        let mut hypothesis = self.groups[index].extended(candidate, rows);
        hypothesis.score = self.normalised(candidate.score, length);
        let size = self.group_size();
        self.groups[index].finish(hypothesis, size);
    }

    /// Takes what runs among the finished, where a search has not come to its end by itself.
    fn finish_running(&mut self, length: usize) {
        let size = self.group_size();
        for index in 0..self.groups.len() {
            if self.groups[index].is_done {
                continue;
            }
            for mut hypothesis in std::mem::take(&mut self.groups[index].running) {
                hypothesis.score = self.normalised(hypothesis.score, length);
                self.groups[index].finish(hypothesis, size);
            }
            self.groups[index].is_done = true;
        }
    }

    /// The length at which a running beam is given its best chance: as it is, or, to search on as long
    /// as a longer one could win, the greatest where length is rewarded.
    fn best_length(&self, length: usize) -> usize {
        let looks_ahead =
            self.params.early_stopping == EarlyStopping::Never && self.params.length_penalty > 0.0;
        match looks_ahead {
            true => self.max_new_tokens,
            false => length,
        }
    }

    fn normalised(&self, score: f32, length: usize) -> f32 {
        score / (length as f64).powf(f64::from(self.params.length_penalty)) as f32
    }
}

impl Group {
    fn extended(&self, candidate: &Candidate, rows: &mut dyn BeamRows) -> Hypothesis {
        let Hypothesis { ids, logprobs, .. } = &self.running[candidate.beam];
        let logprob = rows.logprob(candidate.branch, candidate.id);
        Hypothesis {
            ids: ids.iter().copied().chain([candidate.id]).collect(),
            score: candidate.score,
            logprobs: logprobs.iter().cloned().chain(logprob).collect(),
        }
    }

    /// Keeps the best, as many as there are beams; of equals those that came first.
    fn finish(&mut self, hypothesis: Hypothesis, size: usize) {
        let place = self
            .finished
            .partition_point(|other| other.score.total_cmp(&hypothesis.score).is_ge());
        self.finished.insert(place, hypothesis);
        self.finished.truncate(size);
    }
}
