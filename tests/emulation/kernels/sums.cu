// The sum of 256 numbers by a block, right and with its barrier missing.
#include "kiln/ptx.cuh"

template <bool Synchronised>
KILN_DEVICE void sum(const uint32_t* numbers, uint32_t* out) {
    wait_for_previous();
    __shared__ uint32_t partial[256];
    uint32_t thread = threadIdx.x;
    partial[thread] = numbers[blockIdx.x * 256 + thread];
    for (uint32_t half = 128; half > 0; half /= 2) {
        if (Synchronised) __syncthreads();
        if (thread < half) partial[thread] += partial[thread + half];
    }
    if (thread == 0) out[blockIdx.x] = partial[0];
}

KILN_KERNEL(256, 1) sum_with_barriers(const uint32_t* numbers, uint32_t* out) { sum<true>(numbers, out); }
KILN_KERNEL(256, 1) sum_without_barriers(const uint32_t* numbers, uint32_t* out) { sum<false>(numbers, out); }

// Each warp sums by shuffles, and the last block to arrive sums what the others left.
KILN_KERNEL(256, 1) sum_of_blocks(const uint32_t* numbers, uint32_t* partial, uint32_t* counter, uint32_t* out) {
    wait_for_previous();
    __shared__ uint32_t of_warps[8];
    __shared__ bool last;
    uint32_t value = numbers[blockIdx.x * 256 + threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t total = 0;
        for (uint32_t warp = 0; warp < 8; warp++) total += of_warps[warp];
        partial[blockIdx.x] = total;
        last = arrive(counter) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        uint32_t total = 0;
        for (uint32_t block = 0; block < gridDim.x; block++) total += partial[block];
        *out = total;
        *counter = 0;
    }
}
