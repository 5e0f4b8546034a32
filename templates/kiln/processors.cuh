// What changes a row of scores before a token is chosen from it: the processors of the runtime's
// `sampling/processors.rs`, in their order and with their roundings.
#pragma once
#include "kiln/sampling.cuh"

// Set in a count of a token that the prompt has.
constexpr uint32_t IN_PROMPT = 1u << 31;

// The tokens of a sequence, as its slot keeps them.
struct History {
    uint32_t* tokens;  // in their order
    uint32_t* counts;  // (V): how often each was generated, and IN_PROMPT
    uint32_t len;
    uint32_t prompt_len;

    // Makes it that of `given`, which may be its own tokens. The block calls it, and may read it behind
    // the next barrier.
    KILN_DEVICE void set(const uint32_t* given, uint32_t vocab_size) const {
        for (uint32_t token = threadIdx.x; token < vocab_size; token += SAMPLE_THREADS) counts[token] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < len; i += SAMPLE_THREADS) {
            const uint32_t token = load_fresh(given + i);
            tokens[i] = token;
            if (token >= vocab_size) continue;
            if (i < prompt_len) {
                atomicOr(&counts[token], IN_PROMPT);
            } else {
                atomicAdd(&counts[token], 1u);
            }
        }
    }

    // One thread calls it.
    KILN_DEVICE void append(uint32_t token) const {
        tokens[len] = token;
        counts[token] = load_fresh(counts + token) + 1;
    }

    // Whether it ends in these.
    KILN_DEVICE bool ends_with(const uint32_t* ids, uint32_t count) const {
        if (count > len) return false;
        for (uint32_t i = 0; i < count; i++) {
            if (load_fresh(tokens + len - count + i) != ids[i]) return false;
        }
        return true;
    }

    // Whether the `count` tokens from `first` on are its last.
    KILN_DEVICE bool repeats(uint32_t first, uint32_t count) const {
        for (uint32_t i = 0; i < count; i++) {
            if (load_fresh(tokens + first + i) != load_fresh(tokens + len - count + i)) return false;
        }
        return true;
    }
};

// A sum that overflows stays the largest number there is, so that a row has a likeliest token.
KILN_DEVICE float capped(float score) { return fminf(score, 3.402823466e38f); }

// Applies everything that changes the scores of a draw but a forced token. The whole block calls it; the
// scores are written before, and may be read afterwards.
KILN_DEVICE void process(float* scores, uint32_t vocab_size, const Draw& draw, const uint32_t* lists,
                         const History& history) {
    const auto rules = [&](uint32_t start) { return reinterpret_cast<const TokenRule*>(lists + start); };
    const auto applies = [&](const TokenRule& rule) { return history.ends_with(lists + rule.before, rule.before_len); };
    __syncthreads();

    // Those of one token are neighbours, and one thread's: sums are formed in the order of the list.
    const TokenRule* const biases = rules(draw.biases);
    for (uint32_t i = threadIdx.x; i < draw.biases_len; i += SAMPLE_THREADS) {
        const uint32_t token = biases[i].token;
        if (i > 0 && biases[i - 1].token == token) continue;
        float score = scores[token];
        for (uint32_t j = i; j < draw.biases_len && biases[j].token == token; j++) {
            if (applies(biases[j])) score = capped(score + biases[j].bias);
        }
        scores[token] = score;
    }
    __syncthreads();

    const bool by_count = draw.presence_penalty != 0.0f || draw.frequency_penalty != 0.0f;
    if (draw.repetition_penalty != 1.0f || by_count) {
        for (uint32_t token = threadIdx.x; token < vocab_size; token += SAMPLE_THREADS) {
            const uint32_t count = load_fresh(history.counts + token), generated = count & ~IN_PROMPT;
            if (count == 0) continue;
            float score = scores[token];
            if (draw.repetition_penalty != 1.0f) {
                score = capped(score < 0.0f ? score * draw.repetition_penalty : score / draw.repetition_penalty);
            }
            if (by_count && generated > 0) {
                const float by_frequency = __fmul_rn(static_cast<float>(generated), draw.frequency_penalty);
                score = capped(__fsub_rn(__fsub_rn(score, draw.presence_penalty), by_frequency));
            }
            scores[token] = score;
        }
        __syncthreads();
    }

    const uint32_t size = draw.no_repeat_ngram_size;
    if (size > 0) {
        for (uint32_t i = threadIdx.x; i + size <= history.len; i += SAMPLE_THREADS) {
            const uint32_t token = load_fresh(history.tokens + i + size - 1);
            if (token < vocab_size && history.repeats(i, size - 1)) scores[token] = minus_infinity();
        }
    }
    const TokenRule* const words = rules(draw.words);
    for (uint32_t i = threadIdx.x; i < draw.words_len; i += SAMPLE_THREADS) {
        if (applies(words[i])) scores[words[i].token] = minus_infinity();
    }
    for (uint32_t i = threadIdx.x; i < draw.suppressed_len; i += SAMPLE_THREADS) {
        scores[lists[draw.suppressed + i]] = minus_infinity();
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < draw.ends_len; i++) {
            const uint32_t token = lists[draw.ends + i];
            const float score = scores[token];
            if (score > minus_infinity()) scores[token] = capped(__fadd_rn(score, __fmul_rn(fabsf(score), draw.ending_share)));
        }
    }
    __syncthreads();
}
