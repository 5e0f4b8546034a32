// `mma` on its fragments: a warp's registers come from memory and go there as they are.
#include "kiln/ptx.cuh"

// a (lanes, 4), b (lanes, 2), sum (lanes, 4)
template <typename T>
KILN_DEVICE void product(const uint32_t* a, const uint32_t* b, float* sum) {
    wait_for_previous();
    uint32_t lane = threadIdx.x;
    uint32_t fragment[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
    float total[4] = {sum[4 * lane], sum[4 * lane + 1], sum[4 * lane + 2], sum[4 * lane + 3]};
    mma<T>(total, fragment, b[2 * lane], b[2 * lane + 1]);
    for (uint32_t i = 0; i < 4; i++) sum[4 * lane + i] = total[i];
}

KILN_KERNEL(32, 1) product_f16(const uint32_t* a, const uint32_t* b, float* sum) { product<f16>(a, b, sum); }
KILN_KERNEL(32, 1) product_bf16(const uint32_t* a, const uint32_t* b, float* sum) { product<bf16>(a, b, sum); }

// One lane stays away.
KILN_KERNEL(32, 1) product_of_31(const uint32_t* a, const uint32_t* b, float* sum) {
    if (threadIdx.x < 31) product<f16>(a, b, sum);
}
