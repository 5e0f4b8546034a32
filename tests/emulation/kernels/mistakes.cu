// Kernels with a mistake each that the emulation must find.
#include "kiln/ptx.cuh"

KILN_KERNEL(64, 1) divergent_barriers(uint32_t* out) {
    wait_for_previous();
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        out[threadIdx.x] = 1;
        __syncthreads();
    }
}

// The second warp waits for itself while the first waits for the block.
KILN_KERNEL(64, 1) barrier_against_shuffle(uint32_t* out) {
    wait_for_previous();
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffff, threadIdx.x, 1);
    }
    __syncthreads();
}

KILN_KERNEL(32, 1) different_shuffles(uint32_t* out) {
    wait_for_previous();
    uint32_t lane = threadIdx.x;
    out[lane] = lane < 16 ? __shfl_xor_sync(0xffffffff, lane, 1) : __ballot_sync(0xffffffff, 1);
}

KILN_KERNEL(32, 1) shuffle_outside_its_mask(uint32_t* out) {
    wait_for_previous();
    out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, threadIdx.x, 1);
}

KILN_KERNEL(32, 1) never_waits(uint32_t* out) {
    if (blockIdx.x == 0) wait_for_previous();
    out[threadIdx.x] = 0;
}

KILN_KERNEL(32, 1) misaligned_weight(const uint8_t* weights, uint32_t* out) {
    wait_for_previous();
    out[threadIdx.x] = load_weight(reinterpret_cast<const uint4*>(weights + 8)).x;
}

KILN_KERNEL(32, 1) false_assumption(uint32_t* out) {
    wait_for_previous();
    __builtin_assume(threadIdx.x < 31);
    out[threadIdx.x] = 0;
}

KILN_KERNEL(32, 1) copy_out_of_shared(const uint4* in, uint4* out) {
    wait_for_previous();
    copy_async(out + threadIdx.x, in + threadIdx.x, true);
}

// The place is a parameter, so that the compiler does not see the mistake.
KILN_KERNEL(32, 1) read_at(const uint32_t* in, uint64_t place, uint32_t* out) {
    wait_for_previous();
    out[threadIdx.x] = in[place + threadIdx.x];
}

KILN_KERNEL(32, 1) write_at(uint32_t* out, uint64_t place) {
    wait_for_previous();
    out[place + threadIdx.x] = 1;
}

KILN_KERNEL(32, 1) copy_at(const uint4* in, uint64_t place, uint4* out) {
    wait_for_previous();
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared());
    copy_async(staged + threadIdx.x, in + place + threadIdx.x, true);
    copy_commit();
    copy_wait<0>();
    out[threadIdx.x] = staged[threadIdx.x];
}

KILN_KERNEL(32, 1) read_shared_at(uint64_t place, uint32_t* out) {
    wait_for_previous();
    out[threadIdx.x] = reinterpret_cast<uint32_t*>(dynamic_shared())[place + threadIdx.x];
}

KILN_KERNEL(32, 1) read_static_at(uint64_t place, uint32_t* out) {
    wait_for_previous();
    __shared__ uint32_t numbers[32];
    numbers[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = numbers[place + threadIdx.x];
}

KILN_KERNEL(32, 1) shift_by(uint32_t bits, uint32_t* out) {
    wait_for_previous();
    out[threadIdx.x] = threadIdx.x << bits;
}

// Half of the threads do not wait.
KILN_KERNEL(32, 1) read_before_wait(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x < 16) wait_for_previous();
    out[threadIdx.x] = in[threadIdx.x];
}
