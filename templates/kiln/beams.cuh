// A beam's best continuations by one token.
#pragma once
#include "kiln/sampling.cuh"

constexpr uint32_t MAX_CONTINUATIONS = 256;

struct BeamScratch {
    Continuation found[MAX_CONTINUATIONS];
};

// Scores of a beam with one more token, ranked by their bits: the largest first, and -inf last.
struct BeamScores {
    static constexpr uint32_t NONE = 0xffffffffu;

    const float* scores;  // of the tokens (V)
    uint32_t vocab_size;
    float so_far;

    KILN_DEVICE uint32_t size() const { return vocab_size; }

    KILN_DEVICE float score(uint32_t token) const { return scores[token] + so_far; }

    KILN_DEVICE uint32_t rank(uint32_t token) const { return rank_of(score(token)); }

    KILN_DEVICE static uint32_t rank_of(float score) {
        const uint32_t bits = __float_as_uint(score);
        return bits >> 31 ? bits : ~bits & 0x7fffffffu;
    }
};

// Makes log-probabilities (V) of a row whose largest logit is `largest`.
KILN_DEVICE void log_probabilities(SampleScratch& scratch, const Row& row, float largest, float* out) {
    const Scores scores{row, largest, 1.0f};
    uint64_t own = 0, total;
    for (uint32_t token = threadIdx.x; token < row.size; token += SAMPLE_THREADS) own += share_units(scores.rank(token));
    sum_before(scratch, own, total);
    const float log_total = logf(static_cast<float>(total) / UNITS);
    // In this order: the largest may be so large that the sum is lost beside it.
    for (uint32_t token = threadIdx.x; token < row.size; token += SAMPLE_THREADS) {
        out[token] = row.scores[token] - largest - log_total;
    }
}

// Leaves the `count` best, best first and of equals the lower token; where the row has fewer, all of
// them. The whole block calls it, and has written the scores: ranks are read behind a barrier.
KILN_DEVICE void best_continuations(SampleScratch& scratch, BeamScratch& beam, const BeamScores& scores, uint32_t count,
                                    Continuation* out) {
    const uint32_t wanted = count < scores.vocab_size ? count : scores.vocab_size;
    const auto one = [](uint32_t) -> uint64_t { return 1; };
    uint64_t before;
    const uint32_t last = select_rank(scratch, scores, one, wanted, before);

    // All that rank above the last one, and as many of those that rank as it as there is room for.
    const uint32_t range = (scores.vocab_size + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    const uint32_t begin = threadIdx.x * range < scores.vocab_size ? threadIdx.x * range : scores.vocab_size;
    const uint32_t end = begin + range < scores.vocab_size ? begin + range : scores.vocab_size;
    uint64_t own_above = 0, own_equal = 0, total;
    for (uint32_t token = begin; token < end; token++) {
        const uint32_t rank = scores.rank(token);
        own_above += rank < last;
        own_equal += rank == last;
    }
    uint64_t above = sum_before(scratch, own_above, total), equal = before + sum_before(scratch, own_equal, total);
    for (uint32_t token = begin; token < end; token++) {
        const uint32_t rank = scores.rank(token);
        if (rank > last || (rank == last && equal >= wanted)) continue;
        beam.found[rank < last ? above++ : equal++] = {token, scores.score(token)};
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < wanted; i += SAMPLE_THREADS) {
        const Continuation own = beam.found[i];
        const uint32_t rank = BeamScores::rank_of(own.score);
        uint32_t place = 0;
        for (uint32_t j = 0; j < wanted; j++) {
            const Continuation other = beam.found[j];
            const uint32_t rank_of_other = BeamScores::rank_of(other.score);
            place += rank_of_other < rank || (rank_of_other == rank && other.token < own.token);
        }
        out[place] = own;
    }
}
