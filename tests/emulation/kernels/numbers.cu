// Conversions, one number a thread.
#include "kiln/ptx.cuh"

// The f16 and the bf16 with the bits of each thread's index.
KILN_KERNEL(256, 1) unpack_all(float* f16s, float* bf16s) {
    wait_for_previous();
    uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x;
    f16s[bits] = unpack<f16>(static_cast<uint16_t>(bits));
    bf16s[bits] = unpack<bf16>(static_cast<uint16_t>(bits));
}

// `numbers` (2 * threads) in pairs.
KILN_KERNEL(256, 1) pack_pairs(const float* numbers, uint32_t* f16s, uint32_t* bf16s) {
    wait_for_previous();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    f16s[i] = pack<f16>(numbers[2 * i], numbers[2 * i + 1]);
    bf16s[i] = pack<bf16>(numbers[2 * i], numbers[2 * i + 1]);
}

// a * b + c of pairs of elements.
KILN_KERNEL(256, 1) fuse_pairs(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* f16s, uint32_t* bf16s) {
    wait_for_previous();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    f16s[i] = multiply_add<f16>(a[i], b[i], c[i]);
    bf16s[i] = multiply_add<bf16>(a[i], b[i], c[i]);
}
