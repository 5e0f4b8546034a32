// Products of activations (M, K) and packed weights (N, K).
//
// Weights lie in tiles of 8 outputs by 32 inputs, 512 bytes each, in the order in which the lanes of
// a warp hold them as B operands of two `mma.m16n8k16` (`packing` of kiln-bundle). Lane 4g + c holds
// inputs 8c .. 8c + 7 of output g; of activations, the same inputs of rows g and g + 8.
//
// K is cut into SEGMENTS parts. A part is summed from zero, in the order of k, and the parts are then
// added in order. Every kernel does so, whatever its shape of tiles, so that an output has the same
// bits in every bucket, in decode and in prefill.
#pragma once
#include "kiln/rows.cuh"

constexpr uint32_t TILE_N = 8;
constexpr uint32_t TILE_K = 32;
constexpr uint32_t TILE_VECTORS = 32;  // 16-byte vectors of a tile
constexpr uint32_t SEGMENTS = WARPS;

// First tile of inputs of a segment, of `tiles` in all.
KILN_DEVICE constexpr uint32_t segment_start(uint32_t segment, uint32_t tiles) { return segment * tiles / SEGMENTS; }

// sum (16 x 8) += activations (16 x 32) * weights (8 x 32); `low` holds row g, `high` row g + 8.
template <typename T>
KILN_DEVICE void multiply(float (&sum)[4], const uint4& low, const uint4& high, const uint4& weight) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    mma<T>(sum, first, weight.x, weight.y);
    mma<T>(sum, second, weight.z, weight.w);
}

template <typename T>
KILN_DEVICE uint4 pack8(const float (&x)[8]) {
    return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

KILN_DEVICE void load8(float (&x)[8], const float* from) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

template <typename T>
KILN_DEVICE void unpack8(float (&x)[8], const uint4& from) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
    for (uint32_t i = 0; i < 4; i++) {
        x[2 * i] = unpack<T>(static_cast<uint16_t>(words[i]));
        x[2 * i + 1] = unpack<T>(static_cast<uint16_t>(words[i] >> 16));
    }
}

// max(x, 0), and not a number where x is none.
KILN_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), through 1 + tanh(u) = 2 / (1 + e^-2u).
KILN_DEVICE float gelu_new(float x) {
    constexpr float MINUS_2_LOG2E = -2.885390082f;
    const float u = 0.7978845608f * __fmaf_rn(0.044715f * x * x, x, x);
    return x / (1.0f + exp2_fast(MINUS_2_LOG2E * u));
}

// A logit and its token. What is no finite number beats all, under a token that does not exist.
struct Candidate {
    float logit;
    uint32_t token;
};

KILN_DEVICE Candidate candidate(float logit, uint32_t token) {
    const bool finite = (__float_as_uint(logit) & 0x7f800000u) != 0x7f800000u;
    return finite ? Candidate{logit, token} : Candidate{__uint_as_float(0x7f800000u), NO_TOKEN};
}

// The larger; of equals the lower token, but one that is none before all.
KILN_DEVICE Candidate better(const Candidate& a, const Candidate& b) {
    if (a.logit != b.logit) return a.logit > b.logit ? a : b;
    if (a.token == NO_TOKEN || b.token == NO_TOKEN) return a.token == NO_TOKEN ? a : b;
    return a.token < b.token ? a : b;
}
