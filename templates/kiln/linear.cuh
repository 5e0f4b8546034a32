// Products of activations (M, K) and packed weights (N, K).
//
// Of a tile of weights, 8 outputs by 32 inputs, lane 4g + c holds inputs 8c .. 8c + 7 of output g
// (`weights.cuh`); of activations, the same inputs of rows g and g + 8.
//
// K is cut into SEGMENTS parts. A part is summed from zero, in the order of k, and the parts are then
// added in order. Every kernel does so, whatever its shape of tiles, so that an output has the same
// bits in every bucket, in decode and in prefill.
#pragma once
#include "kiln/weights.cuh"

constexpr uint32_t SEGMENTS = WARPS;

// First span of inputs of a segment, of `spans` in all.
KILN_DEVICE constexpr uint32_t segment_start(uint32_t segment, uint32_t spans) { return segment * spans / SEGMENTS; }

// The spans of inputs of a segment. Where segments are equal their length is known to the compiler.
template <uint32_t SPANS>
struct Segment {
    uint32_t begin;
    uint32_t length;

    KILN_DEVICE explicit Segment(uint32_t segment) {
        if constexpr (SPANS % SEGMENTS == 0) {
            length = SPANS / SEGMENTS;
            begin = segment * length;
        } else {
            begin = segment_start(segment, SPANS);
            length = segment_start(segment + 1, SPANS) - begin;
        }
    }
};

// sum (16 x 8) += activations (16 x 32) * weights (8 x 32); `low` holds row g, `high` row g + 8.
template <typename T>
KILN_DEVICE void multiply(float (&sum)[4], const uint4& low, const uint4& high, const uint4& weight) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    mma<T>(sum, first, weight.x, weight.y);
    mma<T>(sum, second, weight.z, weight.w);
}

// Where inputs k .. k + 3 of a row stand among staged rows, in elements: [K_TILES][ROWS][TILE_K].
template <uint32_t ROWS>
KILN_DEVICE constexpr uint32_t staged_index(uint32_t row, uint32_t k) {
    return (k / TILE_K * ROWS + row) * TILE_K + k % TILE_K;
}

// Normalises the first `count` rows of f32 and leaves them in shared memory as operands; `row(r)` is
// where row r (WIDTH) starts, `scale(k)` and `shift(k)` are the norm's parameters for inputs k .. k + 3.
// Zeros fill rows up to FILLED elements. Several rows are under way at a time; each is summed in the
// order of `sum_rows`. The whole block calls it, and a barrier must follow.
template <typename T, uint32_t WIDTH, uint32_t FILLED, uint32_t ROWS, typename Row, typename Scale, typename Shift>
KILN_DEVICE void stage_normalised(T* staged, RowSums<ROWS>& sums, const Row& row, uint32_t count, float eps,
                                  const Scale& scale, const Shift& shift) {
    constexpr uint32_t STRIDE = THREADS * 4;
    constexpr uint32_t PARTS = (FILLED + STRIDE - 1) / STRIDE;
    constexpr uint32_t MOST = PARTS <= 2 ? 4 : PARTS <= 4 ? 2 : 1;
    constexpr uint32_t GROUP = ROWS < MOST ? ROWS : MOST;
    for (uint32_t first = 0; first < count; first += GROUP) {
        float4 x[GROUP][PARTS];
#pragma unroll
        for (uint32_t r = 0; r < GROUP; r++) {
#pragma unroll
            for (uint32_t p = 0; p < PARTS; p++) {
                const uint32_t k = threadIdx.x * 4 + p * STRIDE;
                x[r][p] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (first + r < count && k < WIDTH) x[r][p] = load_fresh(reinterpret_cast<const float4*>(row(first + r) + k));
            }
        }
        float sum[GROUP];
#pragma unroll
        for (uint32_t r = 0; r < GROUP; r++) {
            sum[r] = 0.0f;
#pragma unroll
            for (uint32_t p = 0; p < PARTS; p++) {
                if (threadIdx.x * 4 + p * STRIDE < WIDTH) sum[r] += (x[r][p].x + x[r][p].y) + (x[r][p].z + x[r][p].w);
            }
            sum[r] = warp_sum(sum[r]);
            if (lane_index() == 0 && first + r < count) sums.elements[first + r][warp_index()] = sum[r];
        }
        __syncthreads();
#pragma unroll
        for (uint32_t r = 0; r < GROUP; r++) {
            if (first + r >= count) break;
            const float mean = row_mean<WIDTH>(sums.elements[first + r]);
            sum[r] = 0.0f;
#pragma unroll
            for (uint32_t p = 0; p < PARTS; p++) {
                const float a = x[r][p].x - mean, b = x[r][p].y - mean, c = x[r][p].z - mean, d = x[r][p].w - mean;
                if (threadIdx.x * 4 + p * STRIDE < WIDTH) {
                    sum[r] += __fmaf_rn(a, a, __fmul_rn(b, b)) + __fmaf_rn(c, c, __fmul_rn(d, d));
                }
            }
            sum[r] = warp_sum(sum[r]);
            if (lane_index() == 0) sums.squares[first + r][warp_index()] = sum[r];
        }
        __syncthreads();
#pragma unroll
        for (uint32_t p = 0; p < PARTS; p++) {
            const uint32_t k = threadIdx.x * 4 + p * STRIDE;
            if (k >= FILLED) continue;
            const float4 s = k < WIDTH ? scale(k) : float4{0.0f, 0.0f, 0.0f, 0.0f};
            const float4 t = k < WIDTH ? shift(k) : float4{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (uint32_t r = 0; r < GROUP; r++) {
                if (first + r >= count) break;
                const Moments m = row_moments<WIDTH>(sums, first + r, eps);
                *reinterpret_cast<uint2*>(staged + staged_index<ROWS>(first + r, k)) = {
                    pack<T>(normalise(x[r][p].x, m, s.x, t.x), normalise(x[r][p].y, m, s.y, t.y)),
                    pack<T>(normalise(x[r][p].z, m, s.z, t.z), normalise(x[r][p].w, m, s.w, t.w))};
            }
        }
    }
}

// Leaves the first `count` rows of f32 in shared memory as operands, as they are, with zeros behind them.
template <typename T, uint32_t WIDTH, uint32_t FILLED, uint32_t ROWS, typename Row>
KILN_DEVICE void stage_rows(T* staged, const Row& row, uint32_t count) {
    for (uint32_t r = 0; r < count; r++) {
        for (uint32_t k = threadIdx.x * 4; k < FILLED; k += THREADS * 4) {
            float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
            if (k < WIDTH) x = load_fresh(reinterpret_cast<const float4*>(row(r) + k));
            *reinterpret_cast<uint2*>(staged + staged_index<ROWS>(r, k)) = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
        }
    }
}

template <typename T>
KILN_DEVICE uint4 pack8(const float (&x)[8]) {
    return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}

KILN_DEVICE void load8(float (&x)[8], const float* from) {
    const float4 low = load_fresh(reinterpret_cast<const float4*>(from));
    const float4 high = load_fresh(reinterpret_cast<const float4*>(from) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
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
