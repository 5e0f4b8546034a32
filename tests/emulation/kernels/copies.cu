// Copies to shared memory, and what shared memory holds before anything is written.
#include "kiln/ptx.cuh"

// Two groups; the first is waited for, the second only where `Waits`.
template <bool Waits>
KILN_DEVICE void copy(const uint4* in, uint4* out) {
    wait_for_previous();
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared());
    uint32_t thread = threadIdx.x;
    copy_async(staged + thread, in + thread, thread != 7);
    copy_commit();
    copy_async(staged + 32 + thread, in + 32 + thread, true);
    copy_commit();
    copy_wait<1>();
    out[thread] = staged[thread];
    if (Waits) copy_wait<0>();
    out[32 + thread] = staged[32 + thread];
}

KILN_KERNEL(32, 1) copy_and_wait(const uint4* in, uint4* out) { copy<true>(in, out); }
KILN_KERNEL(32, 1) copy_without_wait(const uint4* in, uint4* out) { copy<false>(in, out); }

// A copy into what the neighbour still reads: only an early copy shows it.
KILN_KERNEL(32, 1) copy_too_early(const uint4* in, uint4* out) {
    wait_for_previous();
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared());
    uint32_t thread = threadIdx.x;
    staged[thread] = make_uint4(thread, 0, 0, 0);
    __syncthreads();
    copy_async(staged + thread, in + thread, true);
    copy_commit();
    out[thread] = staged[(thread + 1) % 32];
    __syncthreads();
    copy_wait<0>();
}

// Shared memory as a block finds it, then other numbers for the next block to find.
KILN_KERNEL(32, 1) shared_before(uint32_t* out) {
    wait_for_previous();
    __shared__ uint32_t fixed[32];
    uint32_t* dynamic = reinterpret_cast<uint32_t*>(dynamic_shared());
    uint32_t thread = threadIdx.x;
    out[blockIdx.x * 64 + thread] = fixed[thread];
    out[blockIdx.x * 64 + 32 + thread] = dynamic[thread];
    fixed[thread] = dynamic[thread] = thread;
}
