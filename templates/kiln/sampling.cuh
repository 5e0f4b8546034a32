// Choosing a token from a row of logits: temperature, top-k, top-p, min-p, and a draw that follows from
// the request's seed. The semantics and their order are those of transformers' `generate()`.
#pragma once
#include "kiln/linear.cuh"

constexpr uint32_t SAMPLE_THREADS = 512;
constexpr uint32_t SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr uint32_t BINS = 256;

struct SampleScratch {
    uint64_t bins[BINS];
    uint64_t by_warp[SAMPLE_WARPS];
    Candidate best[SAMPLE_WARPS];
    uint64_t before;  // measure of all that ranks above the selected key
    uint32_t bin;
    uint32_t token;
};

// A draw in shared memory: its fields would take half of the registers.
struct DrawWords {
    Draw draw;

    // The whole block calls it.
    KILN_DEVICE const Draw& fetch(const Draw* from) {
        const uint32_t i = threadIdx.x;
        if (i < sizeof(Draw) / sizeof(uint32_t)) {
            reinterpret_cast<uint32_t*>(&draw)[i] = reinterpret_cast<const uint32_t*>(from)[i];
        }
        __syncthreads();
        return draw;
    }
};

// A row of scores: logits, or what processors made of them. A score of -inf cannot be chosen.
struct Row {
    const float* scores;
    uint32_t size;
};

// This thread's best of a row of logits, of which all are to be finite numbers.
KILN_DEVICE Candidate best_of_logits(const Row& row) {
    Candidate best{minus_infinity(), NO_TOKEN};
    for (uint32_t token = threadIdx.x; token < row.size; token += SAMPLE_THREADS) {
        best = better(best, candidate(row.scores[token], token));
    }
    return best;
}

// This thread's best of a row that processors have changed; none where nothing can be chosen.
KILN_DEVICE Candidate best_of_scores(const Row& row) {
    Candidate best{minus_infinity(), NO_TOKEN};
    for (uint32_t token = threadIdx.x; token < row.size; token += SAMPLE_THREADS) {
        const float score = row.scores[token];
        if (score > minus_infinity()) best = better(best, Candidate{score, token});
    }
    return best;
}

// The best of all threads' candidates, for every thread.
KILN_DEVICE Candidate block_best(SampleScratch& scratch, Candidate best) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        const Candidate other{__shfl_xor_sync(0xffffffffu, best.logit, distance),
                              __shfl_xor_sync(0xffffffffu, best.token, distance)};
        best = better(best, other);
    }
    if (lane_index() == 0) scratch.best[warp_index()] = best;
    __syncthreads();
    best = scratch.best[0];
    for (uint32_t w = 1; w < SAMPLE_WARPS; w++) best = better(best, scratch.best[w]);
    return best;
}

// Sum of `x` over the threads before this one; `total` becomes that over all. The whole block calls it.
KILN_DEVICE uint64_t sum_before(SampleScratch& scratch, uint64_t x, uint64_t& total) {
    uint64_t sum = x;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane_index() >= distance) sum += other;
    }
    __syncthreads();
    if (lane_index() == 31) scratch.by_warp[warp_index()] = sum;
    __syncthreads();
    uint64_t before = sum - x;
    total = 0;
    for (uint32_t w = 0; w < SAMPLE_WARPS; w++) {
        if (w < warp_index()) before += scratch.by_warp[w];
        total += scratch.by_warp[w];
    }
    return before;
}

// Tempered scores less the largest are at most zero: the bits of their magnitude rank them, likeliest
// first. What has no chance at all ranks as NO_RANK.
constexpr uint32_t NO_RANK = 0x7f800000u;

// Probabilities as shares of the likeliest's, in units of 2^-40.
constexpr float UNITS = 1099511627776.0f;

struct Scores {
    static constexpr uint32_t NONE = NO_RANK;

    Row row;
    float largest;
    float temperature;

    KILN_DEVICE uint32_t size() const { return row.size; }

    KILN_DEVICE uint32_t rank(uint32_t token) const {
        return __float_as_uint(fabsf((row.scores[token] - largest) / temperature));
    }
};

KILN_DEVICE float share(uint32_t rank) { return rank == NO_RANK ? 0.0f : expf(-__uint_as_float(rank)); }

KILN_DEVICE uint64_t share_units(uint32_t rank) { return static_cast<uint64_t>(share(rank) * UNITS); }

// Adds x, at most 2^40, to a bin; whole warps take part. Atomic additions of 64 bits to shared memory are
// loops of compare-and-swap, and most tokens of a row fall into few bins, so the lanes of one bin are
// summed first.
KILN_DEVICE void add_to_bin(uint64_t* bins, uint32_t bin, uint64_t x) {
    uint32_t left = __ballot_sync(0xffffffffu, x != 0);
    while (left != 0) {
        const uint32_t leader = __ffs(left) - 1;
        const uint32_t bin_of_leader = __shfl_sync(0xffffffffu, bin, leader);
        const bool mine = x != 0 && bin == bin_of_leader;
        left &= ~__ballot_sync(0xffffffffu, mine);
        const uint32_t low = warp_add(mine ? static_cast<uint32_t>(x) & 0xfffffu : 0u);
        const uint32_t high = warp_add(mine ? static_cast<uint32_t>(x >> 20) : 0u);
        if (lane_index() == leader) atomicAdd(&bins[bin], low + (static_cast<uint64_t>(high) << 20));
    }
}

// The first rank at which the measures of all tokens up to it reach `wanted`; NONE where they never
// do. `before` becomes the measure of the tokens that rank above it. Eight bits of the rank are decided
// in each of four passes.
template <typename Ranked, typename Measure>
KILN_DEVICE uint32_t select_rank(SampleScratch& scratch, const Ranked& scores, const Measure& measure, uint64_t wanted,
                                 uint64_t& before) {
    uint32_t prefix = 0;
    before = 0;
    for (uint32_t shift = 32; shift > 0;) {
        shift -= 8;
        for (uint32_t i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) scratch.bins[i] = 0;
        if (threadIdx.x == 0) scratch.bin = BINS;
        __syncthreads();
        for (uint32_t first = 0; first < scores.size(); first += SAMPLE_THREADS) {
            const uint32_t token = first + threadIdx.x;
            const uint32_t rank = token < scores.size() ? scores.rank(token) : Ranked::NONE;
            const bool inside = rank < Ranked::NONE && (shift == 24 || rank >> (shift + 8) == prefix);
            add_to_bin(scratch.bins, rank >> shift & 0xff, inside ? measure(rank) : 0);
        }
        __syncthreads();
        const uint64_t own = threadIdx.x < BINS ? scratch.bins[threadIdx.x] : 0;
        uint64_t total;
        const uint64_t above = before + sum_before(scratch, own, total);
        if (threadIdx.x < BINS && above < wanted && above + own >= wanted) {
            scratch.bin = threadIdx.x;
            scratch.before = above;
        }
        __syncthreads();
        if (scratch.bin == BINS) return Ranked::NONE;
        prefix = prefix << 8 | scratch.bin;
        before = scratch.before;
        __syncthreads();
    }
    return prefix;
}

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The first two
// words of the block that follows from a seed and an index.
KILN_DEVICE uint64_t philox(uint32_t index, uint32_t key0, uint32_t key1) {
    uint32_t c0 = index, c1 = 0, c2 = 0, c3 = 0;
    for (uint32_t round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ key0, c1 = low1;
        c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return static_cast<uint64_t>(c1) << 32 | c0;
}

// Draws a token of a row whose largest score is `largest`.
KILN_DEVICE uint32_t sample_row(SampleScratch& scratch, const Row& row, const Draw& draw, float largest) {
    const Scores scores{row, largest, draw.temperature};
    // Kept are the tokens that rank above `last`, and of those that rank as it, the `equals` last ones.
    uint32_t last = NO_RANK - 1;
    uint64_t equals = ~0ull, before;
    if (draw.top_k > 0) {
        const auto one = [](uint32_t) -> uint64_t { return 1; };
        const uint32_t rank = select_rank(scratch, scores, one, draw.top_k, before);
        if (rank < last) last = rank;
    }
    if (draw.top_p < 1.0f) {
        const auto kept_share = [=](uint32_t rank) -> uint64_t { return rank <= last ? share_units(rank) : 0; };
        uint64_t own = 0, total;
        for (uint32_t token = threadIdx.x; token < row.size; token += SAMPLE_THREADS) own += kept_share(scores.rank(token));
        sum_before(scratch, own, total);
        uint64_t wanted = static_cast<uint64_t>(static_cast<double>(draw.top_p) * static_cast<double>(total));
        if (wanted == 0) wanted = 1;
        const uint32_t rank = select_rank(scratch, scores, kept_share, wanted, before);
        if (rank < NO_RANK) {
            last = rank;
            const uint64_t one = share_units(rank);
            equals = (wanted - before + one - 1) / one;
        }
    }

    // The draw goes by rising token: each thread owns a range.
    const uint32_t range = (row.size + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    const uint32_t begin = threadIdx.x * range < row.size ? threadIdx.x * range : row.size;
    const uint32_t end = begin + range < row.size ? begin + range : row.size;
    uint64_t own_equals = 0, all_equals;
    for (uint32_t token = begin; token < end; token++) own_equals += scores.rank(token) == last;
    const uint64_t equals_before = sum_before(scratch, own_equals, all_equals);
    const uint64_t dropped = all_equals > equals ? all_equals - equals : 0;
    uint64_t seen = equals_before;
    const auto kept = [&](uint32_t token) -> uint64_t {
        const uint32_t rank = scores.rank(token);
        if (rank > last || share(rank) < draw.min_p) return 0;
        if (rank == last && seen++ < dropped) return 0;
        return share_units(rank);
    };
    uint64_t own = 0, total;
    for (uint32_t token = begin; token < end; token++) own += kept(token);
    const uint64_t own_before = sum_before(scratch, own, total);
    // 53 random bits, as a share of the total.
    const uint64_t target = __umul64hi(philox(draw.index, draw.seed_low, draw.seed_high) & ~0x7ffull, total);
    if (own_before <= target && target < own_before + own) {
        uint64_t left = target - own_before;
        seen = equals_before;
        for (uint32_t token = begin; token < end; token++) {
            const uint64_t units = kept(token);
            if (left < units) {
                scratch.token = token;
                break;
            }
            left -= units;
        }
    }
    __syncthreads();
    return scratch.token;
}
