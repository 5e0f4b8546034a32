// What lanes of a warp tell each other. `out` is (20, threads).
#include "kiln/ptx.cuh"

KILN_KERNEL(64, 1) lanes(uint32_t* out) {
    wait_for_previous();
    uint32_t thread = threadIdx.x, lane = thread % 32, value = 100 + thread;
    uint32_t row = 0;
    auto put = [&](uint32_t found) { out[row++ * blockDim.x + thread] = found; };
    put(__shfl_sync(0xffffffff, value, 5));
    put(__shfl_sync(0xffffffff, value, lane + 1));
    put(__shfl_sync(0xffffffff, value, 3, 8));
    put(__shfl_up_sync(0xffffffff, value, 3));
    put(__shfl_up_sync(0xffffffff, value, 3, 8));
    put(__shfl_down_sync(0xffffffff, value, 3));
    put(__shfl_down_sync(0xffffffff, value, 3, 8));
    put(__shfl_xor_sync(0xffffffff, value, 16));
    put(__shfl_xor_sync(0xffffffff, value, 5));
    put(__float_as_uint(__shfl_xor_sync(0xffffffff, __uint_as_float(value), 1)));
    put(static_cast<uint32_t>(__shfl_xor_sync(0xffffffff, uint64_t{value} << 32, 1) >> 32));
    put(__ballot_sync(0xffffffff, thread % 3 == 0));
    put(__any_sync(0xffffffff, thread == 40));
    put(__all_sync(0xffffffff, thread < 32));
    // Halves of a warp on their own.
    put(lane < 16 ? __shfl_xor_sync(0x0000ffff, value, 1) : __ballot_sync(0xffff0000, lane % 2));
    // Lanes that have ended are not waited for.
    if (lane >= 24) return;
    put(__shfl_xor_sync(0xffffffff, value, 8));
    put(__ballot_sync(0x00ffffff, 1));
}
