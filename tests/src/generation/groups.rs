//! Diverse beam search: beams in groups, each kept from the tokens that those before it take.
//!
//! Vijayakumar et al., "Diverse Beam Search" (2016), as releases 4 of transformers have it
//! (`_group_beam_search`, `BeamSearchScorer`, `BeamHypotheses`); release 5 has none. The end of a
//! group's search is judged a little differently from [`super::beam_search`]: by the best candidate,
//! though it may be an end itself, and group by group.

use super::{
    Beam, EarlyStopping, Model, Parameters, Sequence, best_length, candidates, length_normalised,
    sort_best_first,
};

struct Group {
    running: Vec<Beam>,
    /// Best first; scores are normalised.
    finished: Vec<Beam>,
    is_done: bool,
}

pub(super) fn group_beam_search(
    model: &mut Model<'_>,
    prompt: &[u32],
    parameters: &Parameters,
) -> Vec<Sequence> {
    let size = parameters.num_beams / parameters.num_beam_groups;
    let ends = parameters.ends();
    let start = || Group {
        running: Beam::start(size),
        finished: Vec::new(),
        is_done: false,
    };
    let mut groups: Vec<Group> = (0..parameters.num_beam_groups).map(|_| start()).collect();
    for length in 1..=parameters.max_new_tokens {
        // Those of earlier groups in this step. A group that is done takes none.
        let mut taken = Vec::new();
        for group in groups.iter_mut().filter(|group| !group.is_done) {
            let mut candidates = candidates(model, prompt, &group.running, &taken, parameters);
            candidates.truncate(size * (1 + ends.len()).max(2));
            for candidate in &candidates[..size] {
                if ends.contains(&candidate.token) {
                    group.finish(candidate.extend(&group.running), parameters);
                }
            }
            group.running = candidates
                .iter()
                .filter(|candidate| !ends.contains(&candidate.token))
                .take(size)
                .map(|candidate| candidate.extend(&group.running))
                .collect();
            taken.extend(group.running.iter().filter_map(|beam| beam.ids.last()));
            group.is_done = group.finished.len() == size
                && match parameters.early_stopping {
                    EarlyStopping::Yes => true,
                    EarlyStopping::No | EarlyStopping::Never => {
                        let best = length_normalised(
                            candidates[0].score,
                            best_length(length, parameters),
                            parameters.length_penalty,
                        );
                        group.finished[size - 1].score >= best
                    }
                };
        }
        if groups.iter().all(|group| group.is_done) {
            break;
        }
    }
    let mut finished = Vec::new();
    for mut group in groups {
        if !group.is_done {
            for beam in std::mem::take(&mut group.running) {
                group.finish(beam, parameters);
            }
        }
        finished.append(&mut group.finished);
    }
    sort_best_first(&mut finished, |beam| beam.score);
    finished.truncate(parameters.num_return_sequences);
    finished
        .into_iter()
        .map(|Beam { ids, score }| Sequence {
            ids,
            score: Some(score),
        })
        .collect()
}

impl Group {
    /// Takes a beam among the finished ones, of which the best stay, as many as there are beams.
    fn finish(&mut self, beam: Beam, parameters: &Parameters) {
        let size = parameters.num_beams / parameters.num_beam_groups;
        let score = length_normalised(beam.score, beam.ids.len(), parameters.length_penalty);
        self.finished.push(Beam { score, ..beam });
        sort_best_first(&mut self.finished, |beam| beam.score);
        self.finished.truncate(size);
    }
}
