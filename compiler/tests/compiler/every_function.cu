// Calls every function of kiln/ptx.cuh, for either element type. One warp a block.
#include "kiln/ptx.cuh"
#include "kiln/step.cuh"

template <typename T>
KILN_DEVICE void everything(const uint4* weights, const uint4* x, const float* partials, float* out, uint32_t* counter) {
    uint4* copied = reinterpret_cast<uint4*>(dynamic_shared());
    __shared__ float sums[32];
    uint32_t lane = threadIdx.x;
    uint4 w = load_weight(weights + lane);
    float ahead = load_ahead(partials + lane);
    const uint32_t numbers = load_ahead(reinterpret_cast<const uint32_t*>(weights) + lane);
    const uint32_t number = load_ahead(reinterpret_cast<const uint16_t*>(weights) + lane);
    start_next();
    wait_for_previous();
    copy_async(copied + lane, x + lane, lane < 16);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    uint4 b = copied[31 - lane];
    uint4 c = load_fresh(x + lane);
    float sum[4] = {0, 0, 0, 0};
    const float4 d = load_fresh(reinterpret_cast<const float4*>(partials) + lane);
    const uint2 e = load_fresh(reinterpret_cast<const uint2*>(x) + lane);
    const Gather gather;
    const uint32_t a[4] = {gather(w.x), gather(w.y), gather(w.z), gather(w.w) + load_fresh(counter) + e.x + e.y};
    mma<T>(sum, a, b.x ^ c.x ^ c.z, b.y ^ c.y ^ c.w);
    sums[lane] = exp2_fast(sum[0]) + load_fresh(partials + lane);
    __syncthreads();
    uint32_t two = pack<T>(sums[31 - lane], sum[1]);
    two = multiply_add<T>(two, numbers, number);
    float low = unpack<T>(static_cast<uint16_t>(two));
    float high = unpack<T>(static_cast<uint16_t>(two >> 16));
    out[lane] = low + high + sum[2] * sum[3] + ahead + d.x + d.y + d.z + d.w + warp_add(two);
    if (lane == 0 && arrive(counter) == gridDim.x - 1) *counter = 0;
}

KILN_KERNEL(32, 2)
everything_f16(Step step, const uint4* weights, const uint4* x, const float* partials, float* out, uint32_t* counter) {
    if (step.counts->tokens > BLOCK_TOKENS) everything<f16>(weights, x, partials, out, counter);
}

KILN_KERNEL(32, 2)
everything_bf16(Step step, const uint4* weights, const uint4* x, const float* partials, float* out, uint32_t* counter) {
    if (step.counts->tokens > BLOCK_TOKENS) everything<bf16>(weights, x, partials, out, counter);
}
