// What copies from L2 to shared memory cost: bulk copies of several sizes, and cp.async.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a copies.cu -o copies && ./copies
//
// Stages of 32 KB, six of them under way in a block. "own data": 256 KB for each block; "strips" and "blocks": the
// tiles of a matrix product of 16 x 8 blocks, which share them, as strips of 8 rows (1 KB of a strip a stage) or as 16
// KB in a row.

#include "async.cuh"
#include "measure.cuh"

// In copies of `piece` bytes.
__global__ void __launch_bounds__(32, 1) loads(const uint8_t* data, uint32_t piece, int steps, int pattern) {
    extern __shared__ __align__(1024) uint8_t ring[];
    __shared__ uint64_t full[6];
    if (threadIdx.x == 0)
        for (int i = 0; i < 6; i++) bar_init(&full[i], 1);
    __syncwarp();
    const int lane = threadIdx.x;
    const uint32_t copies = 32768 / piece;
    for (int s = 0; s < steps + 6; s++) {
        const int st = s % 6;
        if (s >= 6) bar_wait(&full[st], (s / 6 - 1) & 1);
        if (s >= steps) continue;
        if (lane == 0) bar_expect(&full[st], 32768);
        __syncwarp();
        for (uint32_t i = lane; i < copies; i += 32) {
            const uint32_t at = i * piece;
            size_t from;
            if (pattern == 0)
                from = (size_t(blockIdx.x) * 8 + s % 8) * 32768 + at;  // 256 KB of its own
            else if (pattern == 1) {                                   // strips of 8 rows, K = 2048
                const int tile = at < 16384 ? blockIdx.x % 16 : 16 + blockIdx.x / 16;
                const uint32_t rest = at % 16384, strip = rest / 1024;
                from = (size_t(tile) * 16 + strip) * 32768 + (s % 32) * 1024 + rest % 1024;
            } else {  // blocks of 16 KB
                const int tile = at < 16384 ? blockIdx.x % 16 : 16 + blockIdx.x / 16;
                from = (size_t(tile) * 32 + s % 32) * 16384 + at % 16384;
            }
            bulk(ring + st * 32768 + at, data + from, piece, &full[st]);
        }
    }
}
// By cp.async of 256 threads, 16 bytes each; a warp copies 512 bytes in a row.
__global__ void __launch_bounds__(256, 1) loads_async(const uint8_t* data, int steps, int pattern) {
    extern __shared__ __align__(1024) uint8_t ring[];
    for (int s = 0; s < steps; s++) {
        const int st = s % 6;
        for (int j = 0; j < 8; j++) {
            const uint32_t at = (threadIdx.x + j * 256) * 16;
            const int tile = at < 16384 ? blockIdx.x % 16 : 16 + blockIdx.x / 16;
            const size_t from = pattern == 0 ? (size_t(blockIdx.x) * 8 + s % 8) * 32768 + at
                                             : (size_t(tile) * 32 + s % 32) * 16384 + at % 16384;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem(ring + st * 32768 + at)),
                         "l"(data + from)
                         : "memory");
        }
        asm volatile("cp.async.commit_group;\ncp.async.wait_group 4;" ::: "memory");
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

constexpr int REPEATS = 20;

int main() {
    uint8_t* data;
    CHECK(cudaMalloc(&data, 64 << 20));
    CHECK(cudaMemset(data, 1, 64 << 20));
    CHECK(cudaFuncSetAttribute(loads, cudaFuncAttributeMaxDynamicSharedMemorySize, 196608));
    CHECK(cudaFuncSetAttribute(loads_async, cudaFuncAttributeMaxDynamicSharedMemorySize, 196608));
    for (int blocks : {132, 66})
        for (int pattern = 0; pattern < 3; pattern++) {
            for (uint32_t piece : {512u, 1024u, 2048u, 4096u, 16384u}) {
                if (pattern == 1 && piece > 1024) continue;
                const int steps = 256;
                const double us =
                    median_us([&] { loads<<<blocks, 32, 196608>>>(data, piece, steps, pattern); }, REPEATS);
                CHECK(cudaDeviceSynchronize());
                printf("loads %d blocks, %s, pieces of %u: %.2f us a stage, %.0f GB/s\n", blocks,
                       pattern == 0   ? "own data"
                       : pattern == 1 ? "strips"
                                      : "blocks",
                       piece, us / steps, blocks * steps * 32768.0 / us / 1e3);
            }
            const double us = median_us([&] { loads_async<<<blocks, 256, 196608>>>(data, 256, pattern); }, REPEATS);
            printf("loads %d blocks, cp.async pattern %d: %.2f us a stage, %.0f GB/s\n", blocks, pattern, us / 256,
                   blocks * 256 * 32768.0 / us / 1e3);
        }
}
