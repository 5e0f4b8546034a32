// wgmma beside mma.sync: whether sums have the same bits, and how fast a product is.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a products.cu -o products && ./products
//
// Sums are formed as kiln's kernels form them: K in eight segments, each from zero, then added in order. Tiles of
// 128 x 128 outputs by 64 inputs come by bulk copies of 1 KB; clusters of blocks share them.

#include <cstring>

#include "async.cuh"
#include "measure.cuh"

typedef uint16_t half;
__device__ __forceinline__ half f2h(float x) {
    half o;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(o) : "f"(x));
    return o;
}

__device__ __forceinline__ void mma(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Reference: a warp per 16x8 outputs; K in segments of `seg`; order of k inside a block of 16 permuted if perm.
__global__ void reference(const half* a, const half* w, float* out, int M, int N, int K, int seg, int perm) {
    int lane = threadIdx.x, g = lane / 4, c = lane % 4;
    int row = blockIdx.x * 16, n = blockIdx.y * 8;
    float total[4] = {};
    for (int s = 0; s < K; s += seg) {
        float sum[4] = {};
        for (int k = s; k < s + seg; k += 16) {
            int k0 = perm ? 4 * c : 2 * c, k1 = perm ? 4 * c + 2 : 2 * c + 8;
            auto ld = [&](const half* p) { return *reinterpret_cast<const uint32_t*>(p); };
            uint32_t A[4] = {ld(a + size_t(row + g) * K + k + k0), ld(a + size_t(row + g + 8) * K + k + k0),
                             ld(a + size_t(row + g) * K + k + k1), ld(a + size_t(row + g + 8) * K + k + k1)};
            mma(sum, A, ld(w + size_t(n + g) * K + k + k0), ld(w + size_t(n + g) * K + k + k1));
        }
        for (int i = 0; i < 4; i++) total[i] += sum[i];
    }
    out[size_t(row + g) * N + n + 2 * c] = total[0];
    out[size_t(row + g) * N + n + 2 * c + 1] = total[1];
    out[size_t(row + g + 8) * N + n + 2 * c] = total[2];
    out[size_t(row + g + 8) * N + n + 2 * c + 1] = total[3];
}

// Packs rows (N, K) by 8: swizzled ? [N/8][K/64][8][8 ^ row][8] : [N/8][K/8][8][8].
__global__ void pack(const half* w, half* p, int N, int K, int swizzled) {
    size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
    if (i >= size_t(N) * K) return;
    int n = i / K, k = i % K, r = n % 8;
    size_t at = swizzled ? ((size_t(n / 8) * (K / 64) + k / 64) * 8 + r) * 64 + ((k % 64 / 8) ^ r) * 8 + k % 8
                         : ((size_t(n / 8) * (K / 8) + k / 8) * 8 + r) * 8 + k % 8;
    p[at] = w[i];
}

__device__ __forceinline__ void bar_arrive(uint64_t* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(b)) : "memory");
}

template <int SWIZZLE>
__device__ __forceinline__ uint64_t desc(const void* p) {
    const uint64_t at = (smem(p) & 0x3ffff) >> 4;
    return SWIZZLE ? at | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62
                   : at | uint64_t(128 >> 4) << 16 | uint64_t(1024 >> 4) << 32;
}
__device__ __forceinline__ void bulk_multi(void* to, const void* from, uint32_t bytes, uint64_t* b, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(smem(to)),
        "l"(from), "r"(bytes), "r"(smem(b)), "h"(mask)
        : "memory");
}
__device__ __forceinline__ void bar_arrive_at(uint64_t* b, uint32_t cta) {
    asm volatile(
        "{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, %1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, "
        "[r];\n}" ::"r"(smem(b)),
        "r"(cta)
        : "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void bar_wait_cluster(uint64_t* b, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\nL: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra "
        "L;\nD:\n}" ::"r"(smem(b)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void wg(float (&d)[64], uint64_t a, uint64_t b, int keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
        "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
        "%57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(keep));
}

constexpr int BM = 128, BN = 128, BK = 64;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2;

// Cluster of CM x CN blocks: those of a row share tiles of a, those of a column tiles of p. LOADS 0: none after the
// first stages.
template <int STAGES, int TILE, int SWIZZLE, int CM, int CN, int LOADS>
__device__ __forceinline__ void gemm_body(const half* __restrict__ a, const half* __restrict__ p,
                                          float* __restrict__ out, int M, int N, int K, int seg) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t* const as = shared;
    uint8_t* const bs = shared + STAGES * A_BYTES;
    __shared__ uint64_t full[STAGES], empty[STAGES];
    const int group = threadIdx.x / 128, tid = threadIdx.x % 128;
    const uint32_t rank = CM * CN > 1 ? cluster_rank() : 0;
    const int ci = rank % CM, cj = rank / CM;  // block x runs first
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) bar_init(&full[i], 1), bar_init(&empty[i], 2 * (CM + CN - 1));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (CM * CN > 1)
        cluster_sync();
    else
        __syncthreads();
    const int row0 = blockIdx.x * BM, n0 = blockIdx.y * BN, steps = K / BK;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (tid < 32) {
            uint16_t row_mask = 0, column_mask = 0;
            for (int j = 0; j < CN; j++) row_mask |= 1 << (ci + j * CM);
            for (int j = 0; j < CM; j++) column_mask |= 1 << (j + cj * CM);
            for (int s = 0; s < steps; s++) {
                const int st = s % STAGES;
                const uint32_t round = s / STAGES;
                if (s >= STAGES) bar_wait_cluster(&empty[st], (round - 1) & 1);
                if (LOADS == 0 && s >= STAGES) {
                    if (tid == 0) bar_arrive(&full[st]);
                    continue;
                }
                if (tid == 0) bar_expect(&full[st], A_BYTES + B_BYTES);
                __syncwarp();
                // Lanes 0 .. 15 copy strips of a, which the CN blocks of a row share; the others those of p, which the
                // CM blocks of a column do. A block copies its part for all of them.
                const int i = tid % 16;
                const auto copy_strip = [&](uint8_t* stage, const half* strips, int sharers, int own, uint16_t mask) {
                    if (i / (16 / sharers) != own) return;
                    uint8_t* to = stage + i * (BK * 16);
                    const half* from = strips + (size_t(i) * (K / 8) + s * (BK / 8)) * 64;
                    if (sharers == 1)
                        bulk(to, from, BK * 16, &full[st]);
                    else
                        bulk_multi(to, from, BK * 16, &full[st], mask);
                };
                if (tid < 16)
                    copy_strip(as + st * A_BYTES, a + size_t(row0) * K, CN, cj, row_mask);
                else
                    copy_strip(bs + st * B_BYTES, p + size_t(n0) * K, CM, ci, column_mask);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        float total[64], sum[64];
#pragma unroll
        for (int i = 0; i < 64; i++) total[i] = 0;
        constexpr int PER = BK / TILE;
        constexpr int KSTEP = SWIZZLE ? 32 : 256;  // bytes of 16 inputs
        const auto release = [&](int st) {
            if (CM * CN == 1) {
                if (tid == 0) bar_arrive(&empty[st]);
                return;
            }
            // to every block that writes here: those of the row and of the column
            if (tid < CM + CN - 1) {
                const int other = tid < CN ? ci + tid * CM : ((tid - CN) + ((tid - CN) >= ci)) + cj * CM;
                bar_arrive_at(&empty[st], other);
            }
        };
        const int per_segment = seg / TILE;
        int tile = 0;
#pragma unroll 1
        for (int done = 0; done < K; done += seg) {
#pragma unroll 1
            for (int t = 0; t < per_segment; t++, tile++) {
                const int s = tile / PER, st = s % STAGES, part = tile % PER;
                if (part == 0) bar_wait(&full[st], (s / STAGES) & 1);
                const uint8_t* A = as + st * A_BYTES + (group - 1) * 64 * BK * 2 + part * (TILE / 16 * KSTEP);
                const uint8_t* B = bs + st * B_BYTES + part * (TILE / 16 * KSTEP);
                const uint64_t da = desc<SWIZZLE>(A), db = desc<SWIZZLE>(B);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < TILE / 16; k++)
                    wg(sum, da + k * (KSTEP / 16), db + k * (KSTEP / 16), k > 0 || t > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (t > 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (t > 0 && part == 0) release((s - 1) % STAGES);
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (tile % PER == 0) release((tile / PER - 1) % STAGES);
#pragma unroll
            for (int i = 0; i < 64; i++) total[i] += sum[i];
        }
        const int g = tid % 32 / 4, c = tid % 4, row = row0 + (group - 1) * 64 + tid / 32 * 16 + g;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            *reinterpret_cast<float2*>(out + size_t(row) * N + n0 + j * 8 + 2 * c) = {total[4 * j], total[4 * j + 1]};
            *reinterpret_cast<float2*>(out + size_t(row + 8) * N + n0 + j * 8 + 2 * c) = {total[4 * j + 2],
                                                                                          total[4 * j + 3]};
        }
    }
    if (CM * CN > 1) cluster_sync();
}
#define ARGS \
    const half *__restrict__ a, const half *__restrict__ p, float *__restrict__ out, int M, int N, int K, int seg
template <int STAGES, int TILE, int SWIZZLE, int LOADS>
__global__ void __launch_bounds__(384, 1) g11(ARGS) {
    gemm_body<STAGES, TILE, SWIZZLE, 1, 1, LOADS>(a, p, out, M, N, K, seg);
}
template <int STAGES, int TILE, int SWIZZLE>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) g21(ARGS) {
    gemm_body<STAGES, TILE, SWIZZLE, 2, 1, 1>(a, p, out, M, N, K, seg);
}
template <int STAGES, int TILE, int SWIZZLE>
__global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384, 1) g12(ARGS) {
    gemm_body<STAGES, TILE, SWIZZLE, 1, 2, 1>(a, p, out, M, N, K, seg);
}
template <int STAGES, int TILE, int SWIZZLE>
__global__ void __cluster_dims__(2, 2, 1) __launch_bounds__(384, 1) g22(ARGS) {
    gemm_body<STAGES, TILE, SWIZZLE, 2, 2, 1>(a, p, out, M, N, K, seg);
}
__global__ void fill(half* x, size_t n, uint32_t seed, float scale) {
    size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
    if (i >= n) return;
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed;
    z ^= z >> 30;
    z *= 0xBF58476D1CE4E5B9ull;
    z ^= z >> 27;
    z *= 0x94D049BB133111EBull;
    z ^= z >> 31;
    float u = float(z & 0xffffff) / 0x1000000 + float(z >> 24 & 0xffffff) / 0x1000000 +
              float(z >> 40 & 0xffffff) / 0x1000000 - 1.5f;
    x[i] = f2h(u * scale);
}
constexpr int REPEATS = 10;

int main() {
    const int shapes[][3] = {{2048, 6144, 2048}, {2048, 8192, 2048}, {2048, 2048, 8192}, {2048, 2048, 2048},
                             {2048, 768, 3072},  {2048, 3072, 768},  {512, 8192, 2048}};
    for (auto& sh : shapes) {
        int M = sh[0], N = sh[1], K = sh[2], seg = K / 8;
        half *a, *w, *p[2], *q[2];
        float *o1, *o2;
        CHECK(cudaMalloc(&a, size_t(M) * K * 2));
        CHECK(cudaMalloc(&w, size_t(N) * K * 2));
        CHECK(cudaMalloc(&o1, size_t(M) * N * 4));
        CHECK(cudaMalloc(&o2, size_t(M) * N * 4));
        fill<<<(size_t(M) * K + 255) / 256, 256>>>(a, size_t(M) * K, 1, 1.0f);
        fill<<<(size_t(N) * K + 255) / 256, 256>>>(w, size_t(N) * K, 77, 0.05f);
        for (int z = 0; z < 2; z++) {
            CHECK(cudaMalloc(&p[z], size_t(N) * K * 2));
            CHECK(cudaMalloc(&q[z], size_t(M) * K * 2));
            pack<<<(size_t(N) * K + 255) / 256, 256>>>(w, p[z], N, K, z);
            pack<<<(size_t(M) * K + 255) / 256, 256>>>(a, q[z], M, K, z);
        }
        CHECK(cudaDeviceSynchronize());
        std::vector<float> h1(size_t(M) * N), h2(h1.size());
        const auto mma_sums = [&](std::vector<float>& to, int perm) {
            reference<<<dim3(M / 16, N / 8), 32>>>(a, w, o1, M, N, K, seg, perm);
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaMemcpy(to.data(), o1, to.size() * 4, cudaMemcpyDeviceToHost));
        };
        const auto differ_from_first = [&] {
            size_t differ = 0;
            for (size_t i = 0; i < h1.size(); i++) differ += memcmp(&h1[i], &h2[i], 4) != 0;
            return differ;
        };
        mma_sums(h1, 0);
        mma_sums(h2, 1);
        printf("%dx%dx%d mma.sync, another order within 16 inputs: %zu differ\n", M, N, K, differ_from_first());
        auto run = [&](const char* name, auto kernel, int stages, int z) {
            int sm = stages * (A_BYTES + B_BYTES);
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sm));
            CHECK(cudaMemset(o2, 0xff, h2.size() * 4));
            kernel<<<dim3(M / BM, N / BN), 384, sm>>>(q[z], p[z], o2, M, N, K, seg);
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaMemcpy(h2.data(), o2, h2.size() * 4, cudaMemcpyDeviceToHost));
            const size_t differ = differ_from_first();
            const double us =
                median_us([&] { kernel<<<dim3(M / BM, N / BN), 384, sm>>>(q[z], p[z], o2, M, N, K, seg); }, REPEATS);
            const double us1 =
                median_us([&] { kernel<<<dim3(M / BM, N / BN), 384, sm>>>(q[z], p[z], o2, M, N, K, K); }, REPEATS);
            printf("%dx%dx%d %s: %zu differ; %.1f us %.0f TFLOP/s; one segment %.0f\n", M, N, K, name, differ, us,
                   2.0 * M * N * K / us / 1e6, 2.0 * M * N * K / us1 / 1e6);
        };
        run("plain 6x32", g11<6, 32, 0, 1>, 6, 0);
        run("swizzled 6x32", g11<6, 32, 1, 1>, 6, 1);
        run("swizzled no loads", g11<6, 32, 1, 0>, 6, 1);
        run("plain no loads", g11<6, 32, 0, 0>, 6, 0);
        run("2x1 6x32", g21<6, 32, 1>, 6, 1);
        run("1x2 6x32", g12<6, 32, 1>, 6, 1);
        run("2x2 6x32", g22<6, 32, 1>, 6, 1);
        if (seg % 64 == 0) {
            run("swizzled 6x64", g11<6, 64, 1, 1>, 6, 1);
            run("2x1 6x64", g21<6, 64, 1>, 6, 1);
        }
        for (int z = 0; z < 2; z++) cudaFree(p[z]), cudaFree(q[z]);
        cudaFree(a);
        cudaFree(w);
        cudaFree(o1);
        cudaFree(o2);
    }
}
