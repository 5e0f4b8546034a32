// $(summary)$
//
// A block owns 64 query rows of one sequence and head, a warp 16 of them. Keys and values come chunk by
// chunk through two stages of shared memory, up to the last position that a row of the block may see.
#include "kiln/attention.cuh"

using T = $(element)$;

constexpr uint32_t H = $(heads)$;
constexpr uint32_t D = $(head_dim)$;
constexpr float SCALE_LOG2 = $(scale)$f * LOG2E;
constexpr uint64_t BLOCK_STRIDE = $(block_stride)$;
constexpr uint32_t BLOCK_WARPS = TILE_QUERIES / 16;
constexpr uint32_t BLOCK_VECTORS = D * BLOCK_TOKENS / 8;  // 16-byte vectors of a head's keys in a KV block
constexpr uint32_t STAGE_VECTORS = 2 * CHUNK_BLOCKS * BLOCK_VECTORS;

KILN_KERNEL(BLOCK_WARPS * 32, 2)
$(entry)$($(parameters)$) {
    start_next();
    wait_for_previous();
    uint4* const stages = reinterpret_cast<uint4*>(dynamic_shared());
    if (blockIdx.y >= step.counts->tiles) return;
    const uint32_t head = blockIdx.x, lane = lane_index(), warp_row = warp_index() * 16;
    const Tile tile = step.tiles[blockIdx.y];
    const Sequence sequence = step.sequences[tile.sequence];
    const uint32_t end = tile.first_row + TILE_QUERIES < sequence.rows ? tile.first_row + TILE_QUERIES : sequence.rows;
    const uint32_t kv_len = sequence.past_len + end, chunks = (kv_len + CHUNK - 1) / CHUNK;
    const uint32_t* const table = step.lists + sequence.block_table;

    const auto copy_chunk = [&](uint32_t chunk) {
        uint4* const to = stages + chunk % 2 * STAGE_VECTORS;
        for (uint32_t i = threadIdx.x; i < STAGE_VECTORS; i += BLOCK_WARPS * 32) {
            const uint32_t which = i / (CHUNK_BLOCKS * BLOCK_VECTORS), block = i / BLOCK_VECTORS % CHUNK_BLOCKS;
            const bool exists = chunk * CHUNK + block * BLOCK_TOKENS < kv_len;
            const T* const from = kv + (exists ? table[chunk * CHUNK_BLOCKS + block] * BLOCK_STRIDE : 0) +
                                  (which * H + head) * (D * BLOCK_TOKENS);
            copy_async(to + i, reinterpret_cast<const uint4*>(from) + i % BLOCK_VECTORS, exists);
        }
    };

    // Lanes of rows that do not exist hold zeros and see nothing.
    Queries<D> q;
    uint32_t limit[2];  // positions that rows g and g + 8 see
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint32_t row = tile.first_row + warp_row + half * 8 + lane / 4;
        const T* const from = queries + (sequence.first_row + row) * static_cast<uint64_t>(3 * H * D) + head * D;
        load_queries<D>(q, half, row < end ? from : nullptr);
        limit[half] = row < end ? sequence.past_len + row + 1 : 0;
    }

    Part<D> total;
    for (uint32_t half = 0; half < 2; half++) total.largest[half] = minus_infinity(), total.sum[half] = 0.0f;
    for (uint32_t j = 0; j < D / 8; j++) {
        for (uint32_t e = 0; e < 4; e++) total.out[j][e] = 0.0f;
    }
    copy_chunk(0);
    copy_commit();
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
        if (chunk + 1 < chunks) copy_chunk(chunk + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const uint32_t first = chunk * CHUNK, present = kv_len - first < CHUNK ? kv_len - first : CHUNK;
        const uint4* const stage = stages + chunk % 2 * STAGE_VECTORS;
        const uint4* const keys = stage;
        const uint4* const values = stage + CHUNK_BLOCKS * BLOCK_VECTORS;
        const uint32_t visible[2] = {limit[0] > first ? limit[0] - first : 0, limit[1] > first ? limit[1] - first : 0};
        // Most chunks lie before all of the warp's rows. (Larger heads leave no registers for a second path.)
        const bool full = D <= 80 && first + CHUNK <= sequence.past_len + tile.first_row + warp_row + 1 &&
                          tile.first_row + warp_row + 16 <= end;
        Part<D> part;
        if (full) {
            attend_chunk<T, D, true>(part, q, keys, values, present, visible, SCALE_LOG2);
        } else {
            attend_chunk<T, D, false>(part, q, keys, values, present, visible, SCALE_LOG2);
        }
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const Merge merge(total.largest[half], part.largest[half]);
#pragma unroll
            for (uint32_t j = 0; j < D / 8; j++) {
                for (uint32_t e = 2 * half; e < 2 * half + 2; e++) total.out[j][e] = merge(total.out[j][e], part.out[j][e]);
            }
            total.sum[half] = merge(total.sum[half], part.sum[half]);
            total.largest[half] = merge.largest;
        }
        __syncthreads();
    }
    copy_wait<0>();

#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint32_t row = tile.first_row + warp_row + half * 8 + lane / 4;
        if (row >= end) continue;
        T* const to = out + (sequence.first_row + row) * static_cast<uint64_t>(H * D) + head * D;
#pragma unroll
        for (uint32_t j = 0; j < D / 8; j++) {
            const float x = total.out[j][2 * half] / total.sum[half], y = total.out[j][2 * half + 1] / total.sum[half];
            *reinterpret_cast<uint32_t*>(to + j * 8 + lane % 4 * 2) = pack<T>(x, y);
        }
    }
}
