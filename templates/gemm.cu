// $(summary)$
//
// Many rows: a block owns M_BLOCK x N_BLOCK outputs, and its warps a grid of WARP_M x WARP_N each.
// Tiles of rows and weights come through a ring of STAGES stages in shared memory, laid out as the lanes
// hold them, so that an operand is one conflict-free read of 16 bytes a lane.
#include "kiln/linear.cuh"
/*%- if epilogue.is_qkv() %*/
#include "kiln/kv.cuh"
/*%- endif %*/

using T = $(element)$;

constexpr uint32_t K = $(k)$;
constexpr uint32_t N = $(n)$;
constexpr uint32_t M_BLOCK = $(m_block)$;
constexpr uint32_t N_BLOCK = $(n_block)$;
constexpr uint32_t WARP_M = $(warp_m)$;
constexpr uint32_t WARP_N = $(warp_n)$;
constexpr uint32_t STAGES = $(stages)$;

constexpr uint32_t K_TILES = (K + TILE_K - 1) / TILE_K;
constexpr uint32_t N_TILES = (N + TILE_N - 1) / TILE_N;
constexpr uint32_t A_VECTORS = M_BLOCK / 8 * TILE_VECTORS;       // of a stage
constexpr uint32_t B_VECTORS = N_BLOCK / TILE_N * TILE_VECTORS;  // of a stage
constexpr uint32_t A_COPIES = A_VECTORS / THREADS;               // of a thread
constexpr uint32_t B_COPIES = B_VECTORS / THREADS;
constexpr uint32_t STAGE = A_VECTORS + B_VECTORS;
constexpr uint32_t WARPS_M = M_BLOCK / WARP_M;
static_assert(WARPS_M * (N_BLOCK / WARP_N) == WARPS, "the warps' grids cover the block");
static_assert(A_VECTORS % THREADS == 0 && B_VECTORS % THREADS == 0, "threads share the copies evenly");

/*% include "epilogue.cu" %*/

KILN_KERNEL(THREADS, $(blocks_per_sm)$)
$(entry)$($(parameters)$) {
    start_next();
    uint4* const stages = reinterpret_cast<uint4*>(dynamic_shared());
    uint4* const own = stages + threadIdx.x;
    const uint32_t lane = lane_index(), warp = warp_index();
    const uint32_t first_row = blockIdx.x * M_BLOCK, first_n = blockIdx.y * N_BLOCK;

    // Weights do not depend on the previous kernel, rows do.
    const uint4* from_weights[B_COPIES];
    bool weights_exist[B_COPIES];
#pragma unroll
    for (uint32_t j = 0; j < B_COPIES; j++) {
        const uint32_t n_tile = first_n / TILE_N + (threadIdx.x + j * THREADS) / TILE_VECTORS;
        weights_exist[j] = n_tile < N_TILES;
        from_weights[j] = weight + (weights_exist[j] ? n_tile : 0) * static_cast<uint64_t>(K_TILES * TILE_VECTORS) + lane;
    }
    const auto copy_weights = [&](uint32_t tile) {
        uint4* const to = own + tile % STAGES * STAGE + A_VECTORS;
#pragma unroll
        for (uint32_t j = 0; j < B_COPIES; j++) {
            copy_async(to + j * THREADS, from_weights[j] + tile * TILE_VECTORS, weights_exist[j]);
        }
    };
    for (uint32_t tile = 0; tile < STAGES - 1 && tile < K_TILES; tile++) copy_weights(tile);
    const uint32_t rows = load_fresh(&step.counts->$(input.count())$);

    wait_for_previous();
    if (first_row >= rows) {
        // Copies that are under way end before the block does.
        copy_commit();
        copy_wait<0>();
        return;
    }
    const T* from_rows[A_COPIES];
    bool rows_exist[A_COPIES];
#pragma unroll
    for (uint32_t j = 0; j < A_COPIES; j++) {
        const uint32_t wanted = first_row + (threadIdx.x + j * THREADS) / 4, row = wanted < rows ? wanted : 0;
        rows_exist[j] = wanted < rows;
        from_rows[j] = input + $(input.row("row"))$ * static_cast<uint64_t>(K) + threadIdx.x % 4 * 8;
    }
    const auto copy_rows = [&](uint32_t tile) {
        uint4* const to = own + tile % STAGES * STAGE;
#pragma unroll
        for (uint32_t j = 0; j < A_COPIES; j++) {
            const uint32_t k = tile * TILE_K + threadIdx.x % 4 * 8;
            const bool exists = rows_exist[j]$(self.k_guard())$;
            copy_async(to + j * THREADS, exists ? from_rows[j] + (k - threadIdx.x % 4 * 8) : input, exists);
        }
    };
    for (uint32_t tile = 0; tile < STAGES - 1; tile++) {
        if (tile < K_TILES) copy_rows(tile);
        copy_commit();
    }

    const uint32_t warp_row = warp % WARPS_M * WARP_M, warp_n = warp / WARPS_M * WARP_N;
    const Gather gather;
    float total[WARP_M / 16][WARP_N / TILE_N][4] = {};
#pragma unroll 1
    for (uint32_t segment = 0; segment < SEGMENTS; segment++) {
        float sum[WARP_M / 16][WARP_N / TILE_N][4] = {};
        const uint32_t end = segment_start(segment + 1, K_TILES);
        for (uint32_t tile = segment_start(segment, K_TILES); tile < end; tile++) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            // The stage that all warps have left is filled while this one is multiplied.
            if (tile + STAGES - 1 < K_TILES) {
                copy_weights(tile + STAGES - 1);
                copy_rows(tile + STAGES - 1);
            }
            copy_commit();
            const uint4* const a = stages + tile % STAGES * STAGE + warp_row / 8 * TILE_VECTORS + lane;
            const uint4* const b = stages + tile % STAGES * STAGE + A_VECTORS + warp_n / TILE_N * TILE_VECTORS + lane;
            uint4 weights[WARP_N / TILE_N];
#pragma unroll
            for (uint32_t j = 0; j < WARP_N / TILE_N; j++) weights[j] = b[j * TILE_VECTORS];
#pragma unroll
            for (uint32_t i = 0; i < WARP_M / 16; i++) {
                const uint4 low = a[2 * i * TILE_VECTORS], high = a[(2 * i + 1) * TILE_VECTORS];
                const uint32_t first[4] = {gather(low.x), gather(high.x), gather(low.y), gather(high.y)};
                const uint32_t second[4] = {gather(low.z), gather(high.z), gather(low.w), gather(high.w)};
#pragma unroll
                for (uint32_t j = 0; j < WARP_N / TILE_N; j++) mma<T>(sum[i][j], first, weights[j].x, weights[j].y);
#pragma unroll
                for (uint32_t j = 0; j < WARP_N / TILE_N; j++) mma<T>(sum[i][j], second, weights[j].z, weights[j].w);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < WARP_M / 16; i++) {
#pragma unroll
            for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
                for (uint32_t e = 0; e < 4; e++) total[i][j][e] += sum[i][j][e];
            }
        }
    }
    copy_wait<0>();

    // All outputs are finished before the first is stored, so that no load waits behind a store.
    const Epilogue epilogue{$(self.epilogue_values())$};
#pragma unroll
    for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
        const uint32_t n = first_n + warp_n + j * TILE_N + lane % 4 * 2;
/*%- if epilogue.bias %*/
        const float bias_x = n < N ? bias[n] : 0.0f, bias_y = n + 1 < N ? bias[n + 1] : 0.0f;
/*%- endif %*/
#pragma unroll
        for (uint32_t i = 0; i < WARP_M / 16; i++) {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
                if (row >= rows) continue;
                float &x = total[i][j][2 * half], &y = total[i][j][2 * half + 1];
                x = epilogue.finish(row, n, x$(epilogue.bias_argument("x"))$);
                y = epilogue.finish(row, n + 1, y$(epilogue.bias_argument("y"))$);
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < WARP_M / 16; i++) {
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
                const uint32_t n = first_n + warp_n + j * TILE_N + lane % 4 * 2;
                epilogue.store(row, n, total[i][j][2 * half], total[i][j][2 * half + 1]);
            }
        }
    }
}
