// The bandwidth of device memory, as kernels can have it: prints {"read":GB/s,"copy":GB/s}, medians.
//
//     nvcc -O3 -arch=native bandwidth.cu -o bandwidth && ./bandwidth
//
// read: every byte of 4 GiB is loaded once, in 16-byte vectors, each thread with UNROLL loads in
// flight; the best of some grid sizes. copy: cudaMemcpy from device to device, bytes read and bytes
// written together.

#include <cstdint>

#include "../../benches/gpu/measure.cuh"

constexpr size_t BYTES = size_t(4) << 30;
constexpr int THREADS = 512, UNROLL = 8, REPEATS = 9;

// Each block reads slices of THREADS * UNROLL vectors, a grid apart.
__global__ void __launch_bounds__(THREADS) read_all(const uint4* __restrict__ data, size_t vectors, uint32_t* sink) {
    constexpr size_t SLICE = size_t(THREADS) * UNROLL;
    uint32_t sum = 0;
    for (size_t at = blockIdx.x * SLICE + threadIdx.x; at < vectors; at += gridDim.x * SLICE) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) loaded[i] = __ldcs(data + at + size_t(i) * THREADS);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) sum ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
    }
    // Never so for the zeros that lie there: nothing is written, and no load can be left out.
    if (sum == 0x9e3779b9u) *sink = sum;
}

int main() {
    int processors;
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    uint4 *data, *other;
    uint32_t* sink;
    CHECK(cudaMalloc(&data, BYTES));
    CHECK(cudaMalloc(&other, BYTES));
    CHECK(cudaMalloc(&sink, sizeof *sink));
    CHECK(cudaMemset(data, 0, BYTES));

    double read = 0;
    for (int blocks : {2, 4, 8, 16}) {
        double us = median_us([&] { read_all<<<processors * blocks, THREADS>>>(data, BYTES / sizeof *data, sink); }, REPEATS);
        CHECK(cudaGetLastError());
        read = std::max(read, BYTES / us / 1e3);
    }
    double us = median_us([&] { CHECK(cudaMemcpyAsync(other, data, BYTES, cudaMemcpyDeviceToDevice)); }, REPEATS);
    double copy = 2 * BYTES / us / 1e3;
    std::printf("{\"read\":%.1f,\"copy\":%.1f}\n", read, copy);
}
