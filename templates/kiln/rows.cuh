// Rows of activations: their moments, and layer normalisation.
#pragma once
#include "kiln/step.cuh"

// Every kernel that works on rows has blocks of this size, so that sums over a row are formed in one
// order wherever they are needed.
constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / 32;

KILN_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }
KILN_DEVICE uint32_t warp_index() { return threadIdx.x / 32; }

KILN_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

KILN_DEVICE float warp_sum(float x) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// Sums of each row by warp: of its elements, and of their squared distances from the mean.
template <uint32_t ROWS>
struct RowSums {
    float elements[ROWS][WARPS];
    float squares[ROWS][WARPS];
};

template <uint32_t WIDTH>
KILN_DEVICE float row_mean(const float (&by_warp)[WARPS]) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < WARPS; w++) sum += by_warp[w];
    return sum / WIDTH;
}

// Fills `sums` for the first `count` rows; `row(r)` is where row r (WIDTH) starts. The whole block
// calls it, and may read `sums` afterwards.
template <uint32_t WIDTH, uint32_t ROWS, typename Row>
KILN_DEVICE void sum_rows(RowSums<ROWS>& sums, const Row& row, uint32_t count) {
    static_assert(WIDTH % 4 == 0, "rows are read by four");
    for (uint32_t r = 0; r < count; r++) {
        float sum = 0.0f;
        for (uint32_t i = threadIdx.x * 4; i < WIDTH; i += THREADS * 4) {
            const float4 x = load_fresh(reinterpret_cast<const float4*>(row(r) + i));
            sum += (x.x + x.y) + (x.z + x.w);
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) sums.elements[r][warp_index()] = sum;
    }
    __syncthreads();
    for (uint32_t r = 0; r < count; r++) {
        const float mean = row_mean<WIDTH>(sums.elements[r]);
        float sum = 0.0f;
        for (uint32_t i = threadIdx.x * 4; i < WIDTH; i += THREADS * 4) {
            const float4 x = load_fresh(reinterpret_cast<const float4*>(row(r) + i));
            const float a = x.x - mean, b = x.y - mean, c = x.z - mean, d = x.w - mean;
            sum += __fmaf_rn(a, a, __fmul_rn(b, b)) + __fmaf_rn(c, c, __fmul_rn(d, d));
        }
        sum = warp_sum(sum);
        if (lane_index() == 0) sums.squares[r][warp_index()] = sum;
    }
    __syncthreads();
}

// A row's moments.
struct Moments {
    float mean;
    float inverse_deviation;
};

template <uint32_t WIDTH, uint32_t ROWS>
KILN_DEVICE Moments row_moments(const RowSums<ROWS>& sums, uint32_t r, float eps) {
    return {row_mean<WIDTH>(sums.elements[r]), rsqrtf(row_mean<WIDTH>(sums.squares[r]) + eps)};
}

// (x - mean) / deviation * weight + bias. The roundings are spelled out: kernels that disagreed on a
// fused multiply-add would give one row different bits.
KILN_DEVICE float normalise(float x, const Moments& m, float weight, float bias) {
    return __fmaf_rn(__fmul_rn(x - m.mean, m.inverse_deviation), weight, bias);
}
