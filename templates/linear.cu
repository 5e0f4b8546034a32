// $(summary)$
//
// Few rows, many weights: a block owns TILES tiles of outputs, its warps share K by segments, and the
// segments' sums meet in shared memory. Every weight is read once, in vectors of 16 bytes, and the
// first of them before the previous kernel has ended.
#include "kiln/linear.cuh"
/*%- if epilogue.is_qkv() %*/
#include "kiln/kv.cuh"
/*%- endif %*/

using T = $(element)$;

constexpr uint32_t K = $(k)$;
constexpr uint32_t N = $(n)$;
constexpr uint32_t ROWS = $(rows)$;   // most rows of a step
constexpr uint32_t TILES = $(tiles)$;  // tiles of outputs a block
constexpr uint32_t DEPTH = $(depth)$;  // vectors of each tile that a lane has under way

constexpr uint32_t K_TILES = (K + TILE_K - 1) / TILE_K;
constexpr uint32_t N_TILES = (N + TILE_N - 1) / TILE_N;
constexpr uint32_t M_TILES = (ROWS + 15) / 16;

/*% include "epilogue.cu" %*/

KILN_KERNEL(THREADS, 2)
$(entry)$($(parameters)$) {
    __shared__ float sums[WARPS][ROWS][TILES * TILE_N];
/*%- if input.norm.is_some() %*/
    __shared__ RowSums<ROWS> input_sums;
/*%- endif %*/
/*%- if epilogue.residual_norm().is_some() %*/
    __shared__ RowSums<ROWS> residual_sums;
/*%- endif %*/
    start_next();

    const uint32_t lane = lane_index(), warp = warp_index(), g = lane / 4, c = lane % 4;
    const uint32_t first_tile = blockIdx.x * TILES;
    const uint32_t k_begin = segment_start(warp, K_TILES), k_end = segment_start(warp + 1, K_TILES);

    // A tile past the last one repeats it; its outputs are dropped.
    const uint4* tiles[TILES];
    for (uint32_t t = 0; t < TILES; t++) {
        const uint32_t tile = first_tile + t < N_TILES ? first_tile + t : N_TILES - 1;
        tiles[t] = weight + tile * static_cast<uint64_t>(K_TILES * TILE_VECTORS) + lane;
    }
    uint4 w[DEPTH][TILES];
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (k_begin + d >= k_end) break;
        for (uint32_t t = 0; t < TILES; t++) w[d][t] = load_weight(tiles[t] + (k_begin + d) * TILE_VECTORS);
    }

    wait_for_previous();
    const uint32_t rows = step.counts->$(input.count())$;
    const auto input_row = [&](uint32_t row) { return input + $(input.row("row"))$ * static_cast<uint64_t>(K); };
/*%- if let Some(norm) = input.norm %*/
    sum_rows<K, ROWS>(input_sums, input_row, rows);
/*%- endif %*/
/*%- if epilogue.residual_norm().is_some() %*/
    sum_rows<N, ROWS>(residual_sums, [&](uint32_t row) { return residual + row * static_cast<uint64_t>(N); }, rows);
/*%- endif %*/

    // Inputs k .. k + 7 of a row; zeros where there is no row.
    const auto inputs = [&](uint32_t row, uint32_t k) -> uint4 {
/*%- if k % 32 == 0 %*/
        if (row >= rows) return {0, 0, 0, 0};
/*%- else %*/
        if (row >= rows || k >= K) return {0, 0, 0, 0};
/*%- endif %*/
/*%- if input.is_f32() %*/
        float x[8];
        load8(x, input_row(row) + k);
/*%- if let Some(norm) = input.norm %*/
        const Moments moments = row_moments<K>(input_sums, row, $(norm.eps)$f);
/*%- if norm.weight %*/
        float scale[8];
        load8(scale, norm_weight + k);
/*%- endif %*/
/*%- if norm.bias %*/
        float shift[8];
        load8(shift, norm_bias + k);
/*%- endif %*/
        for (uint32_t i = 0; i < 8; i++) x[i] = normalise(x[i], moments, $(norm.weight("scale[i]"))$, $(norm.bias("shift[i]"))$);
/*%- endif %*/
        return pack8<T>(x);
/*%- else %*/
        return *reinterpret_cast<const uint4*>(input_row(row) + k);
/*%- endif %*/
    };

    float sum[M_TILES][TILES][4] = {};
    for (uint32_t first = k_begin; first < k_end; first += DEPTH) {
#pragma unroll
        for (uint32_t d = 0; d < DEPTH; d++) {
            const uint32_t tile = first + d;
            if (tile >= k_end) break;
#pragma unroll
            for (uint32_t m = 0; m < M_TILES; m++) {
                if (m * 16 >= rows) break;
                const uint4 low = inputs(m * 16 + g, tile * TILE_K + c * 8);
                const uint4 high = inputs(m * 16 + g + 8, tile * TILE_K + c * 8);
#pragma unroll
                for (uint32_t t = 0; t < TILES; t++) multiply<T>(sum[m][t], low, high, w[d][t]);
            }
            if (tile + DEPTH < k_end) {
#pragma unroll
                for (uint32_t t = 0; t < TILES; t++) w[d][t] = load_weight(tiles[t] + (tile + DEPTH) * TILE_VECTORS);
            }
        }
    }

#pragma unroll
    for (uint32_t m = 0; m < M_TILES; m++) {
#pragma unroll
        for (uint32_t t = 0; t < TILES; t++) {
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t row = m * 16 + half * 8 + g;
                if (row >= rows) continue;
                float* to = &sums[warp][row][t * TILE_N + 2 * c];
                *reinterpret_cast<float2*>(to) = {sum[m][t][2 * half], sum[m][t][2 * half + 1]};
            }
        }
    }
    __syncthreads();

    const Epilogue epilogue{$(self.epilogue_values())$};
    constexpr uint32_t PAIRS = TILES * TILE_N / 2;
    for (uint32_t i = threadIdx.x; i < $(self.pair_bound())$; i += THREADS) {
        const uint32_t row = i / PAIRS, column = i % PAIRS * 2;
        float x = 0.0f, y = 0.0f;
/*%- if epilogue.best() %*/
        // The whole warp takes part in the search below, with rows or without.
        if (row < rows) {
            for (uint32_t s = 0; s < SEGMENTS; s++) x += sums[s][row][column], y += sums[s][row][column + 1];
        }
        const uint32_t n = first_tile * TILE_N + column;
        Candidate best{minus_infinity(), NO_TOKEN - 1};
        if (row < rows && n < N) best = candidate(epilogue.finish(row, n, x), n);
        if (row < rows && n + 1 < N) best = better(best, candidate(epilogue.finish(row, n + 1, y), n + 1));
        for (uint32_t distance = PAIRS / 2; distance > 0; distance /= 2) {
            const Candidate other{__shfl_xor_sync(0xffffffffu, best.logit, distance),
                                  __shfl_xor_sync(0xffffffffu, best.token, distance)};
            best = better(best, other);
        }
        if (row < rows) {
            epilogue(row, n, x, y);
            if (column == 0) best_of_block[row * gridDim.x + blockIdx.x] = best;
        }
/*%- else %*/
        for (uint32_t s = 0; s < SEGMENTS; s++) x += sums[s][row][column], y += sums[s][row][column + 1];
        epilogue(row, first_tile * TILE_N + column, x, y);
/*%- endif %*/
    }
}
