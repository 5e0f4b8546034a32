// $(summary)$
//
// Many rows: a block owns M_BLOCK x N_BLOCK outputs, and its warps a grid of WARP_M x WARP_N each.
// Tiles of rows and spans of weights come through rings of stages in shared memory, laid out as the lanes
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

using W = $(weights)$;

constexpr uint32_t K_TILES = W::SPANS * W::SPAN;
constexpr uint32_t N_TILES = (N + TILE_N - 1) / TILE_N;
constexpr uint32_t SPAN_STAGES = (STAGES + W::SPAN - 2) / W::SPAN + 1;  // spans that STAGES tiles may touch
constexpr uint32_t A_VECTORS = M_BLOCK / 8 * TILE_VECTORS;       // of a tile
constexpr uint32_t B_VECTORS = N_BLOCK / TILE_N * TILE_VECTORS;  // of a span
constexpr uint32_t A_COPIES = A_VECTORS / THREADS;               // of a thread
constexpr uint32_t B_COPIES = B_VECTORS / THREADS;
constexpr uint32_t WARPS_M = M_BLOCK / WARP_M;
static_assert(WARPS_M * (N_BLOCK / WARP_N) == WARPS, "the warps' grids cover the block");
static_assert(A_VECTORS % THREADS == 0 && B_VECTORS % THREADS == 0, "threads share the copies evenly");

/*% include "epilogue.cu" %*/

KILN_KERNEL(THREADS, $(blocks_per_sm)$)
$(entry)$($(parameters)$) {
    start_next();
    uint4* const row_stages = reinterpret_cast<uint4*>(dynamic_shared());
    uint4* const weight_stages = row_stages + STAGES * A_VECTORS;
    const uint32_t lane = lane_index(), warp = warp_index();
    const uint32_t first_row = blockIdx.x * M_BLOCK, first_n = blockIdx.y * N_BLOCK;

    // Weights do not depend on the previous kernel, rows do.
    const uint4* from_weights[B_COPIES];
    bool weights_exist[B_COPIES];
#pragma unroll
    for (uint32_t j = 0; j < B_COPIES; j++) {
        const uint32_t n_tile = first_n / TILE_N + (threadIdx.x + j * THREADS) / TILE_VECTORS;
        weights_exist[j] = n_tile < N_TILES;
        from_weights[j] = weight + (weights_exist[j] ? n_tile : 0) * static_cast<uint64_t>(W::STRIP) + lane;
    }
    // A span comes with its first tile.
    const auto copy_weights = [&](uint32_t tile) {
        if (tile % W::SPAN != 0) return;
        const uint32_t span = tile / W::SPAN;
        uint4* const to = weight_stages + span % SPAN_STAGES * B_VECTORS + threadIdx.x;
#pragma unroll
        for (uint32_t j = 0; j < B_COPIES; j++) {
            copy_async(to + j * THREADS, from_weights[j] + span * TILE_VECTORS, weights_exist[j]);
        }
    };
    for (uint32_t tile = 0; tile < STAGES - 1 && tile < K_TILES; tile++) copy_weights(tile);
    const uint32_t warp_row = warp % WARPS_M * WARP_M, warp_n = warp / WARPS_M * WARP_N;
    // The numbers of a span's groups, asked for a span ahead.
    W::Numbers next_numbers[WARP_N / TILE_N];
    const auto load_numbers = [&](uint32_t span) {
#pragma unroll
        for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
            const uint32_t n_tile = (first_n + warp_n) / TILE_N + j, last = N_TILES - 1;
            const uint4* const strip = weight + (n_tile < last ? n_tile : last) * static_cast<uint64_t>(W::STRIP);
            next_numbers[j] = W::numbers(strip, span);
        }
    };
    load_numbers(0);
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
        uint4* const to = row_stages + tile % STAGES * A_VECTORS + threadIdx.x;
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

    const Gather gather;
    float total[WARP_M / 16][WARP_N / TILE_N][4] = {};
#pragma unroll 1
    for (uint32_t segment = 0; segment < SEGMENTS; segment++) {
        float sum[WARP_M / 16][WARP_N / TILE_N][4] = {};
        const uint32_t end = segment_start(segment + 1, W::SPANS);
        for (uint32_t span = segment_start(segment, W::SPANS); span < end; span++) {
            uint4 vectors[WARP_N / TILE_N];
            W::Numbers numbers[WARP_N / TILE_N];
            W::Grid grid[WARP_N / TILE_N];
#pragma unroll
            for (uint32_t j = 0; j < WARP_N / TILE_N; j++) numbers[j] = next_numbers[j];
            if (span + 1 < W::SPANS) load_numbers(span + 1);
#pragma unroll
            for (uint32_t part = 0; part < W::SPAN; part++) {
                const uint32_t tile = span * W::SPAN + part;
                copy_wait<STAGES - 2>();
                __syncthreads();
                // The stage that all warps have left is filled while this one is multiplied.
                if (tile + STAGES - 1 < K_TILES) {
                    copy_weights(tile + STAGES - 1);
                    copy_rows(tile + STAGES - 1);
                }
                copy_commit();
                const uint4* const a = row_stages + tile % STAGES * A_VECTORS + warp_row / 8 * TILE_VECTORS + lane;
                const uint4* const b =
                    weight_stages + span % SPAN_STAGES * B_VECTORS + warp_n / TILE_N * TILE_VECTORS + lane;
                uint4 weights[WARP_N / TILE_N];
#pragma unroll
                for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
                    if (part == 0) vectors[j] = b[j * TILE_VECTORS];
                    if (W::begins_group(part)) grid[j] = W::grid(numbers[j], part);
                    weights[j] = W::operand(vectors[j], part, grid[j]);
                }
#pragma unroll
                for (uint32_t i = 0; i < WARP_M / 16; i++) {
                    const uint4 low = a[2 * i * TILE_VECTORS], high = a[(2 * i + 1) * TILE_VECTORS];
                    const uint32_t first[4] = {gather(low.x), gather(high.x), gather(low.y), gather(high.y)};
                    const uint32_t second[4] = {gather(low.z), gather(high.z), gather(low.w), gather(high.w)};
#pragma unroll
                    for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
                        mma<T>(sum[i][j], first, weights[j].x, weights[j].y);
                    }
#pragma unroll
                    for (uint32_t j = 0; j < WARP_N / TILE_N; j++) {
                        mma<T>(sum[i][j], second, weights[j].z, weights[j].w);
                    }
                }
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
        const W::Unit unit_x = W::unit(weight, n < N ? n : 0), unit_y = W::unit(weight, n + 1 < N ? n + 1 : 0);
#pragma unroll
        for (uint32_t i = 0; i < WARP_M / 16; i++) {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
                if (row >= rows) continue;
                float &x = total[i][j][2 * half], &y = total[i][j][2 * half + 1];
                x = epilogue.finish(row, n, unit_x(x)$(epilogue.bias_argument("x"))$);
                y = epilogue.finish(row, n + 1, unit_y(y)$(epilogue.bias_argument("y"))$);
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
