// What a step brings: the value of a kernel's `step` parameter, filled by the runtime
// (`StepPointers` of kiln-bundle). The lists lie in device memory, so that a recorded graph serves
// every step.
#pragma once
#include "kiln/ptx.cuh"

constexpr uint32_t BLOCK_TOKENS = 16;
constexpr uint32_t LAST_SAMPLED = 1u << 31;
constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr uint32_t TILE_QUERIES = 64;

struct Counts {
    uint32_t tokens;
    uint32_t sequences;
    uint32_t logit_rows;
    uint32_t tiles;
    uint32_t draws;
};

struct Sequence {
    uint32_t first_row;
    uint32_t rows;
    uint32_t past_len;
    uint32_t block_table;
};

struct Tile {
    uint32_t sequence;
    uint32_t first_row;
};

struct Draw {
    uint32_t row;
    uint32_t slot;
    uint32_t index;
    uint32_t top_k;
    float temperature;
    float top_p;
    float min_p;
    uint32_t seed_low;
    uint32_t seed_high;
    uint32_t processed;
    uint32_t forced;
    uint32_t history;
    uint32_t history_len;
    uint32_t prompt_len;
    uint32_t given;
    uint32_t given_from;
    uint32_t biases;
    uint32_t biases_len;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    uint32_t no_repeat_ngram_size;
    uint32_t words;
    uint32_t words_len;
    uint32_t suppressed;
    uint32_t suppressed_len;
    uint32_t ends;
    uint32_t ends_len;
    float ending_share;
    float beam_score;
    uint32_t continuations;
    uint32_t continuations_len;
};

struct TokenRule {
    uint32_t token;
    float bias;
    uint32_t before;
    uint32_t before_len;
};

struct Continuation {
    uint32_t token;
    float score;
};

struct Step {
    const Counts* counts;
    const uint32_t* token_ids;
    const uint32_t* positions;
    const uint32_t* kv_slots;
    const uint32_t* logit_rows;
    const Sequence* sequences;
    const Tile* tiles;
    const Draw* draws;
    const uint32_t* lists;
    uint32_t* last_sampled;
    uint32_t* chosen;
    Continuation* continuations;
    uint32_t* histories;
    uint32_t* token_counts;
};
