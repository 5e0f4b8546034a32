// What it costs to go from one phase of a decode step to the next: a chain of kernels as a graph, with programmatic
// dependent launch and without, and one launch with barriers of the grid.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a phases.cu -o phases && ./phases
//
// A phase of work 1 or 2 reads a row of 768 numbers in every block, sums it once or twice, and writes its part of the
// next row; of work 0 does nothing.

#include <cstdint>

#include "measure.cuh"

constexpr int T = 256;
__device__ __forceinline__ float4 fresh(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float s = 0;
    for (int i = 0; i < T / 32; i++) s += scratch[i];
    return s;
}
// One phase: reads `width` floats, two reductions, each block writes 8 floats.
__device__ __forceinline__ void phase(const float* in, float* out, int width, int work, float* scratch) {
    if (work == 0) return;
    float4 v{};
    if (threadIdx.x * 4 < width) v = fresh(in + threadIdx.x * 4);
    float m = block_sum(v.x + v.y + v.z + v.w, scratch) / width;
    if (work > 1) {
        float a = v.x - m, b = v.y - m, c = v.z - m, d = v.w - m;
        m += block_sum(a * a + b * b + c * c + d * d, scratch + 8);
    }
    if (threadIdx.x < 8 && blockIdx.x * 8 + threadIdx.x < width) out[blockIdx.x * 8 + threadIdx.x] = m * 1e-3f;
}
__global__ void __launch_bounds__(T) link(const float* in, float* out, int width, int work, int wait) {
    __shared__ float scratch[16];
    if (wait) asm volatile("griddepcontrol.launch_dependents;");
    if (wait) asm volatile("griddepcontrol.wait;" ::: "memory");
    phase(in, out, width, work, scratch);
}
// All phases in one launch, a barrier of the grid between them. KIND 0: one counter; 1: a flag a block, read by
// everyone.
template <int KIND>
__global__ void __launch_bounds__(T)
    persistent(float* a, float* b, int width, int work, int phases, uint32_t* counter, uint32_t* flags, uint32_t base) {
    __shared__ float scratch[16];
    for (int i = 0; i < phases; i++) {
        phase(i & 1 ? b : a, i & 1 ? a : b, width, work, scratch);
        __syncthreads();
        if (KIND == 0) {
            if (threadIdx.x == 0) {
                asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
                const uint32_t want = base + (i + 1) * gridDim.x;
                uint32_t seen;
                do {
                    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
                } while (int32_t(seen - want) < 0);
            }
        } else {
            const uint32_t want = base + i + 1;
            if (threadIdx.x == 0)
                asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flags + blockIdx.x), "r"(want) : "memory");
            for (int j = threadIdx.x; j < gridDim.x; j += T) {
                uint32_t seen;
                do {
                    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + j) : "memory");
                } while (int32_t(seen - want) < 0);
            }
        }
        __syncthreads();
    }
}
constexpr int REPEATS = 20;

int main() {
    float *a, *b;
    uint32_t *counter, *flags;
    CHECK(cudaMalloc(&a, 65536));
    CHECK(cudaMalloc(&b, 65536));
    CHECK(cudaMalloc(&counter, 1024));
    CHECK(cudaMalloc(&flags, 4096));
    CHECK(cudaMemset(a, 0, 65536));
    CHECK(cudaMemset(b, 0, 65536));
    CHECK(cudaMemset(counter, 0, 1024));
    CHECK(cudaMemset(flags, 0, 4096));
    cudaStream_t st;
    CHECK(cudaStreamCreate(&st));
    const int phases = 200;
    for (int grid : {96, 132, 256})
        for (int work = 0; work < 3; work++) {
            for (int pdl = 0; pdl < 2; pdl++) {
                cudaGraph_t g;
                cudaGraphExec_t x;
                CHECK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
                for (int i = 0; i < phases; i++) {
                    cudaLaunchConfig_t c = {};
                    c.gridDim = grid;
                    c.blockDim = T;
                    c.stream = st;
                    cudaLaunchAttribute at[1];
                    at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
                    at[0].val.programmaticStreamSerializationAllowed = 1;
                    c.attrs = at;
                    c.numAttrs = pdl && i > 0;
                    CHECK(cudaLaunchKernelEx(&c, link, (const float*)(i & 1 ? b : a), i & 1 ? a : b, 768, work, pdl));
                }
                CHECK(cudaStreamEndCapture(st, &g));
                CHECK(cudaGraphInstantiate(&x, g, 0));
                const double us = median_us([&] { cudaGraphLaunch(x, st); }, REPEATS, st);
                printf("chain grid %d work %d %s: %.2f us a phase\n", grid, work, pdl ? "pdl" : "plain", us / phases);
            }
            uint32_t base = 0, fbase = 0;
            CHECK(cudaMemset(counter, 0, 4));
            CHECK(cudaMemset(flags, 0, 4096));
            const double u0 = median_us(
                [&] {
                    persistent<0><<<grid, T, 0, st>>>(a, b, 768, work, phases, counter, flags, base);
                    base += phases * grid;
                },
                REPEATS, st);
            const double u1 = median_us(
                [&] {
                    persistent<1><<<grid, T, 0, st>>>(a, b, 768, work, phases, counter, flags, fbase);
                    fbase += phases;
                },
                REPEATS, st);
            CHECK(cudaDeviceSynchronize());
            printf("persistent grid %d work %d: counter %.2f us, flags %.2f us a phase\n", grid, work, u0 / phases,
                   u1 / phases);
        }
}
