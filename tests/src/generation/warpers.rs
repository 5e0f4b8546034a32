//! What cuts a row of scores before a token is drawn from its softmax.

use super::{Parameters, argmax, log_softmax, softmax};

/// Divides by the temperature, then cuts, in transformers' order; each cut sees what the one before
/// left. What goes becomes -inf. The best token always stays.
pub fn warp(row: &mut [f32], parameters: &Parameters) {
    for score in &mut *row {
        *score /= parameters.temperature;
    }
    if parameters.top_k > 0 {
        cut_top_k(row, parameters.top_k);
    }
    if parameters.top_p < 1.0 {
        cut_top_p(row, parameters.top_p);
    }
    if parameters.min_p > 0.0 {
        cut_min_p(row, parameters.min_p);
    }
    if parameters.typical_p < 1.0 {
        cut_typical(row, parameters.typical_p);
    }
    if parameters.epsilon_cutoff > 0.0 {
        cut_improbable(row, parameters.epsilon_cutoff);
    }
    if parameters.eta_cutoff > 0.0 {
        let epsilon = parameters.eta_cutoff;
        let eta = epsilon.min(epsilon.sqrt() * (-entropy(row)).exp());
        cut_improbable(row, eta);
    }
}

fn keep(row: &mut [f32], stays: impl Fn(usize) -> bool) {
    for (index, score) in row.iter_mut().enumerate() {
        if !stays(index) {
            *score = f32::NEG_INFINITY;
        }
    }
}

fn cut_top_k(row: &mut [f32], k: usize) {
    let mut sorted = row.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let worst = sorted[k.min(row.len()) - 1];
    let scores = row.to_vec();
    keep(row, |index| scores[index] >= worst);
}

/// From the least probable up, a token goes as long as those up to it sum to at most 1 - p.
fn cut_top_p(row: &mut [f32], p: f32) {
    let probabilities = softmax(row);
    let mut rising: Vec<usize> = (0..row.len()).collect();
    rising.sort_by(|&a, &b| row[a].total_cmp(&row[b]));
    rising.pop();
    let mut sum = 0.0;
    for index in rising {
        sum += probabilities[index];
        if sum <= 1.0 - p {
            row[index] = f32::NEG_INFINITY;
        }
    }
}

fn cut_min_p(row: &mut [f32], min_p: f32) {
    let best = argmax(row) as usize;
    let probabilities = softmax(row);
    let least = min_p * probabilities[best];
    keep(row, |index| index == best || probabilities[index] >= least);
}

/// By how far a token's information, -ln p, is from the entropy: the nearest stay, until they have the
/// mass, and equals of the last.
fn cut_typical(row: &mut [f32], mass: f32) {
    let log_probabilities = log_softmax(row);
    let entropy = entropy(row);
    let distances: Vec<f32> = log_probabilities
        .iter()
        .map(|log_p| (-log_p - entropy).abs())
        .collect();
    let mut nearest: Vec<usize> = (0..row.len()).collect();
    nearest.sort_by(|&a, &b| distances[a].total_cmp(&distances[b]));
    let mut sum = 0.0;
    let crosses = nearest.iter().position(|&index| {
        sum += log_probabilities[index].exp();
        sum >= mass
    });
    let last = crosses.unwrap_or(row.len() - 1);
    let farthest = distances[nearest[last]];
    keep(row, |index| {
        index == nearest[0] || distances[index] <= farthest
    });
}

/// Tokens less probable than `least` go, but for the best and its equals.
fn cut_improbable(row: &mut [f32], least: f32) {
    let best = row[argmax(row) as usize];
    let probabilities = softmax(row);
    let scores = row.to_vec();
    keep(row, |index| {
        probabilities[index] >= least || scores[index] >= best
    });
}

fn entropy(row: &[f32]) -> f32 {
    let information = |log_p: f32| {
        if log_p == f32::NEG_INFINITY {
            0.0
        } else {
            -log_p * log_p.exp()
        }
    };
    log_softmax(row).into_iter().map(information).sum()
}
