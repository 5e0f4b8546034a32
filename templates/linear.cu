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

using W = $(weights)$;

constexpr uint32_t FILLED = W::SPANS * W::SPAN * TILE_K;  // inputs with those behind the last
constexpr uint32_t N_TILES = (N + TILE_N - 1) / TILE_N;
constexpr uint32_t M_TILES = (ROWS + 15) / 16;
constexpr uint32_t UNDER_WAY = DEPTH * W::SPAN;  // tiles of inputs
// Of them, those whose rows are asked for together, as far as registers go.
constexpr uint32_t MOST_AT_ONCE = W::SPAN == 1 && M_TILES == 1 ? 8 : 4 / M_TILES;
constexpr uint32_t AT_ONCE = UNDER_WAY < MOST_AT_ONCE ? UNDER_WAY : MOST_AT_ONCE;
constexpr uint32_t PAIRS = TILES * TILE_N / 2;  // of outputs of a row in a block

/*% include "epilogue.cu" %*/

KILN_KERNEL(THREADS, 2)
$(entry)$($(parameters)$) {
    alignas(16) __shared__ float sums[WARPS][ROWS][TILES * TILE_N];
/*%- if input.norm.is_some() %*/
    __shared__ RowSums<ROWS> input_sums;
/*%- endif %*/
/*%- if epilogue.residual_norm().is_some() %*/
    __shared__ RowSums<ROWS> residual_sums;
/*%- endif %*/
    start_next();

    const uint32_t lane = lane_index(), warp = warp_index(), g = lane / 4, c = lane % 4;
    const uint32_t first_tile = blockIdx.x * TILES;
    const Segment<W::SPANS> segment(warp);

    // A tile past the last one repeats it; its outputs are dropped.
    const uint4* strips[TILES];
#pragma unroll
    for (uint32_t t = 0; t < TILES; t++) {
        const uint32_t tile = first_tile + t < N_TILES ? first_tile + t : N_TILES - 1;
        strips[t] = weight + tile * static_cast<uint64_t>(W::STRIP);
    }
    uint4 w[DEPTH][TILES];
    W::Numbers numbers[DEPTH][TILES];
    const auto load_span = [&](uint32_t d, uint32_t span) {
#pragma unroll
        for (uint32_t t = 0; t < TILES; t++) {
            w[d][t] = load_weight(strips[t] + (segment.begin + span) * TILE_VECTORS + lane);
            numbers[d][t] = W::numbers(strips[t], segment.begin + span);
        }
    };
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (d >= segment.length) break;
        load_span(d, d);
    }
    // A thread finishes one pair of columns.
    const uint32_t column = threadIdx.x % PAIRS * 2, n = first_tile * TILE_N + column;
/*%- if epilogue.bias %*/
    const float bias_x = n < N ? load_ahead(bias + n) : 0.0f, bias_y = n + 1 < N ? load_ahead(bias + n + 1) : 0.0f;
/*%- endif %*/
    const W::Unit unit_x = W::unit(weight, n < N ? n : 0), unit_y = W::unit(weight, n + 1 < N ? n + 1 : 0);
    const uint32_t rows = load_fresh(&step.counts->$(input.count())$);

    wait_for_previous();
    const auto input_row = [&](uint32_t row) { return input + $(input.row("row"))$ * static_cast<uint64_t>(K); };
/*%- if let Some(added) = epilogue.residual %*/
/*%- if added.norm.is_some() %*/
    const auto residual_row = [&](uint32_t row) { return residual + $(added.row("step.logit_rows", "row"))$ * static_cast<uint64_t>(N); };
    sum_rows<N, ROWS>(residual_sums, residual_row, rows);
/*%- endif %*/
/*%- endif %*/
/*%- if input.is_f32() %*/

    T* const staged = reinterpret_cast<T*>(dynamic_shared());
/*%- if let Some(norm) = input.norm %*/
    const auto scale = [&](uint32_t k) { return $(norm.weight4("norm_weight"))$; };
    const auto shift = [&](uint32_t k) { return $(norm.bias4("norm_bias"))$; };
    stage_normalised<T, K, FILLED, ROWS>(staged, input_sums, input_row, rows, $(norm.eps)$f, scale, shift);
/*%- else %*/
    stage_rows<T, K, FILLED, ROWS>(staged, input_row, rows);
/*%- endif %*/
    __syncthreads();

    // The lane's inputs of a row in a tile of the segment; zeros where there is no row.
    const auto inputs = [&](uint32_t row, uint32_t tile) -> uint4 {
        if (row >= ROWS || row >= rows) return {0, 0, 0, 0};
        const uint32_t k_tile = segment.begin * W::SPAN + tile;
        return *reinterpret_cast<const uint4*>(staged + (k_tile * ROWS + row) * TILE_K + c * 8);
    };
/*%- else %*/

    // The lane's inputs of a row in a tile of the segment; zeros where there is no row.
    const auto inputs = [&](uint32_t row, uint32_t tile) -> uint4 {
        const uint32_t k = (segment.begin * W::SPAN + tile) * TILE_K + c * 8;
        if (row >= ROWS || row >= rows$(self.k_guard())$) return {0, 0, 0, 0};
        return load_fresh(reinterpret_cast<const uint4*>(input_row(row) + k));
    };
/*%- endif %*/

    float sum[M_TILES][TILES][4] = {};
    W::Grid grid[TILES];
#pragma unroll 1
    for (uint32_t first = 0; first < segment.length; first += DEPTH) {
#pragma unroll
        for (uint32_t from = 0; from < UNDER_WAY; from += AT_ONCE) {
            uint4 low[AT_ONCE][M_TILES], high[AT_ONCE][M_TILES];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                if (from + i >= UNDER_WAY || first + (from + i) / W::SPAN >= segment.length) break;
#pragma unroll
                for (uint32_t m = 0; m < M_TILES; m++) {
                    if (m * 16 >= rows) break;
                    low[i][m] = inputs(m * 16 + g, first * W::SPAN + from + i);
                    high[i][m] = inputs(m * 16 + g + 8, first * W::SPAN + from + i);
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                const uint32_t d = (from + i) / W::SPAN, tile = (from + i) % W::SPAN;
                if (from + i >= UNDER_WAY || first + d >= segment.length) break;
#pragma unroll
                for (uint32_t t = 0; t < TILES; t++) {
                    if (W::begins_group(tile)) grid[t] = W::grid(numbers[d][t], tile);
                    const uint4 operand = W::operand(w[d][t], tile, grid[t]);
#pragma unroll
                    for (uint32_t m = 0; m < M_TILES; m++) {
                        if (m * 16 >= rows) break;
                        multiply<T>(sum[m][t], low[i][m], high[i][m], operand);
                    }
                }
            }
        }
#pragma unroll
        for (uint32_t d = 0; d < DEPTH; d++) {
            if (first + d + DEPTH >= segment.length) break;
            load_span(d, first + d + DEPTH);
        }
    }

#pragma unroll
    for (uint32_t m = 0; m < M_TILES; m++) {
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t row = m * 16 + half * 8 + g;
            if (row >= ROWS || row >= rows) continue;
#pragma unroll
            for (uint32_t t = 0; t < TILES; t++) {
                float* const to = &sums[warp][row][t * TILE_N + 2 * c];
                *reinterpret_cast<float2*>(to) = {sum[m][t][2 * half], sum[m][t][2 * half + 1]};
            }
        }
    }
    __syncthreads();

    const Epilogue epilogue{$(self.epilogue_values())$};
    constexpr uint32_t ROW_STRIDE = THREADS / PAIRS;  // rows that the block finishes at a time
    const uint32_t first_row = threadIdx.x / PAIRS;
/*%- if epilogue.best() %*/
    // Whole warps stay in the loop: their lanes search together.
    for (uint32_t first = 0; first < rows; first += ROW_STRIDE) {
        const uint32_t row = first + first_row;
        float x = 0.0f, y = 0.0f;
        if (row < rows) {
            for (uint32_t s = 0; s < SEGMENTS; s++) x += sums[s][row][column], y += sums[s][row][column + 1];
            x = epilogue.finish(row, n, unit_x(x)$(epilogue.bias_argument("x"))$);
            y = epilogue.finish(row, n + 1, unit_y(y)$(epilogue.bias_argument("y"))$);
            epilogue.store(row, n, x, y);
        }
        Candidate best{minus_infinity(), NO_TOKEN - 1};
        if (row < rows && n < N) best = candidate(x, n);
        if (row < rows && n + 1 < N) best = better(best, candidate(y, n + 1));
        for (uint32_t distance = PAIRS / 2; distance > 0; distance /= 2) {
            const Candidate other{__shfl_xor_sync(0xffffffffu, best.logit, distance),
                                  __shfl_xor_sync(0xffffffffu, best.token, distance)};
            best = better(best, other);
        }
        if (row < rows && column == 0) best_of_block[row * gridDim.x + blockIdx.x] = best;
    }
/*%- else %*/
    if (first_row >= ROW_STRIDE) return;
    for (uint32_t row = first_row; row < rows; row += ROW_STRIDE) {
        float x = 0.0f, y = 0.0f;
        for (uint32_t s = 0; s < SEGMENTS; s++) x += sums[s][row][column], y += sums[s][row][column + 1];
        x = epilogue.finish(row, n, unit_x(x)$(epilogue.bias_argument("x"))$);
        y = epilogue.finish(row, n + 1, unit_y(y)$(epilogue.bias_argument("y"))$);
        epilogue.store(row, n, x, y);
    }
/*%- endif %*/
}
