// Synchronisation alone, `rounds` times.
#include "kiln/ptx.cuh"

KILN_KERNEL(256, 1) only_barriers(uint32_t rounds) {
    wait_for_previous();
    for (uint32_t i = 0; i < rounds; i++) __syncthreads();
}

KILN_KERNEL(256, 1) only_shuffles(uint32_t rounds, uint32_t* out) {
    wait_for_previous();
    uint32_t value = threadIdx.x;
    for (uint32_t i = 0; i < rounds; i++) value += __shfl_xor_sync(0xffffffff, value, 1);
    out[threadIdx.x] = value;
}

KILN_KERNEL(256, 1) only_products(uint32_t rounds, float* out) {
    wait_for_previous();
    uint32_t a[4] = {0, 0, 0, 0};
    float sum[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < rounds; i++) mma<f16>(sum, a, i, i);
    out[threadIdx.x] = sum[0];
}

KILN_KERNEL(256, 1) nothing() { wait_for_previous(); }
