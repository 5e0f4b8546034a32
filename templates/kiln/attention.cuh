// Attention over chunks of CHUNK positions.
//
// A warp takes 16 query rows and one chunk at a time, gives the chunk's own softmax with its maximum
// and sum, and chunks are merged in order. Decode spreads the chunks of a sequence over warps, prefill
// walks them in one; since both form the same parts and merge them alike, a row has the same bits in
// both. In this file lane 4g + c holds rows g and g + 8 of a tile.
#pragma once
#include "kiln/kv.cuh"

constexpr uint32_t CHUNK = 64;
constexpr uint32_t CHUNK_BLOCKS = CHUNK / BLOCK_TOKENS;
constexpr float LOG2E = 1.4426950408889634f;

KILN_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

KILN_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Two rows' softmax over some positions: their largest score (times log2 e), the sum of 2^(score -
// largest), and the values weighted by these.
template <uint32_t D>
struct Part {
    float largest[2];
    float sum[2];
    float out[D / 8][4];
};

// Scales of two parts that are merged: 2^(largest - largest of both).
struct Merge {
    float largest, old_scale, new_scale;

    KILN_DEVICE Merge(float old_largest, float new_largest) {
        largest = fmaxf(old_largest, new_largest);
        old_scale = exp2_fast(old_largest - largest);
        new_scale = exp2_fast(new_largest - largest);
    }

    // The merged value of two.
    KILN_DEVICE float operator()(float old_value, float new_value) const {
        return __fmaf_rn(new_value, new_scale, __fmul_rn(old_value, old_scale));
    }
};

// Queries of 16 rows as A operands.
template <uint32_t D>
struct Queries {
    uint32_t a[D / 16][4];
};

// One row of 16-bit queries (D), as the components 16s + 4c .. 16s + 4c + 3; zeros without a row.
template <uint32_t D>
KILN_DEVICE void load_queries(Queries<D>& queries, uint32_t half, const void* row) {
    const uint32_t c = lane_index() % 4;
    for (uint32_t s = 0; s < D / 16; s++) {
        uint2 q = {0, 0};
        if (row != nullptr) q = load_fresh(reinterpret_cast<const uint2*>(row) + s * 4 + c);
        queries.a[s][half] = q.x;
        queries.a[s][half + 2] = q.y;
    }
}

// Zeros of the two packed elements those that lie at `valid` or after, counted from `first`.
KILN_DEVICE uint32_t keep_first(uint32_t pair, uint32_t first, uint32_t valid) {
    if (first + 1 < valid) return pair;
    return first < valid ? pair & 0xffffu : 0u;
}

// Attends to one chunk. Its keys are at `keys` in shared memory, (CHUNK_BLOCKS, D/16, 256), its values
// likewise; only blocks that hold some of the first `present` positions are touched. Row g sees the
// chunk's first visible[0] positions, row g + 8 visible[1]. FULL promises that all positions are there
// and seen.
template <typename T, uint32_t D, bool FULL>
KILN_DEVICE void attend_chunk(Part<D>& part, const Queries<D>& queries, const uint4* keys, const uint4* values,
                              uint32_t present, const uint32_t (&visible)[2], float scale_log2) {
    const uint32_t lane = lane_index(), c = lane % 4;
    float scores[2 * CHUNK_BLOCKS][4] = {};
#pragma unroll
    for (uint32_t block = 0; block < CHUNK_BLOCKS; block++) {
        if (!FULL && block * BLOCK_TOKENS >= present) continue;
#pragma unroll
        for (uint32_t s = 0; s < D / 16; s++) {
            const uint4 k = keys[(block * (D / 16) + s) * 32 + lane];
            mma<T>(scores[2 * block], queries.a[s], k.x, k.y);
            mma<T>(scores[2 * block + 1], queries.a[s], k.z, k.w);
        }
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float largest = minus_infinity();
#pragma unroll
        for (uint32_t tile = 0; tile < 2 * CHUNK_BLOCKS; tile++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const uint32_t position = tile / 2 * BLOCK_TOKENS + key_position(tile % 2, 2 * c + i);
                float& score = scores[tile][2 * half + i];
                score = FULL || position < visible[half] ? __fmul_rn(score, scale_log2) : minus_infinity();
                largest = fmaxf(largest, score);
            }
        }
        largest = quad_max(largest);
        // A row that sees nothing of the chunk has probabilities of zero.
        const float base = largest == minus_infinity() ? 0.0f : largest;
        float sum = 0.0f;
#pragma unroll
        for (uint32_t tile = 0; tile < 2 * CHUNK_BLOCKS; tile++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                float& score = scores[tile][2 * half + i];
                score = exp2_fast(score - base);
                sum += score;
            }
        }
        part.largest[half] = largest;
        part.sum[half] = quad_sum(sum);
    }
#pragma unroll
    for (uint32_t j = 0; j < D / 8; j++) {
        for (uint32_t i = 0; i < 4; i++) part.out[j][i] = 0.0f;
    }
#pragma unroll
    for (uint32_t block = 0; block < CHUNK_BLOCKS; block++) {
        if (!FULL && block * BLOCK_TOKENS >= present) continue;
        const uint32_t valid = present - block * BLOCK_TOKENS;
        const float(&even)[4] = scores[2 * block];
        const float(&odd)[4] = scores[2 * block + 1];
        const uint32_t p[4] = {pack<T>(even[0], even[1]), pack<T>(even[2], even[3]), pack<T>(odd[0], odd[1]),
                               pack<T>(odd[2], odd[3])};
#pragma unroll
        for (uint32_t s = 0; s < D / 16; s++) {
            uint4 v = values[(block * (D / 16) + s) * 32 + lane];
            if (!FULL && valid < BLOCK_TOKENS) {
                // Positions that nobody wrote may hold anything, and 0 * NaN is NaN.
                v.x = keep_first(v.x, 4 * c, valid), v.y = keep_first(v.y, 4 * c + 2, valid);
                v.z = keep_first(v.z, 4 * c, valid), v.w = keep_first(v.w, 4 * c + 2, valid);
            }
            mma<T>(part.out[2 * s], p, v.x, v.y);
            mma<T>(part.out[2 * s + 1], p, v.z, v.w);
        }
    }
}
