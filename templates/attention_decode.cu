// $(summary)$
//
// A warp owns one chunk of 64 positions of a sequence and head, reading only positions that exist. Of
// its KV blocks, only the one that the new token was written to depends on the previous kernel; the
// others are fetched before that has ended. The chunks of a block meet in shared memory; where a
// sequence needs several blocks, the last of them to arrive merges all chunks, in their order. Which
// block that is decides nothing but who does the work.
#include "kiln/attention.cuh"

using T = $(element)$;

constexpr uint32_t H = $(heads)$;
constexpr uint32_t D = $(head_dim)$;
constexpr float SCALE_LOG2 = $(scale)$f * LOG2E;
constexpr uint32_t CHUNKS = $(chunks)$;  // of a block: one a warp
constexpr uint64_t BLOCK_STRIDE = $(block_stride)$;
constexpr uint32_t BLOCK_VECTORS = D * BLOCK_TOKENS / 8;            // 16-byte vectors of a head's keys in a KV block
constexpr uint32_t PART_VECTORS = CHUNK_BLOCKS * BLOCK_VECTORS;  // of a chunk's keys

// A chunk's output, largest score and sum of one head.
struct ChunkPart {
    float out[D];
    float largest;
    float sum;
};

// Merges `count` parts, read by `load`, in order and writes component d of the attention's output.
template <typename Load>
KILN_DEVICE void finish(const ChunkPart* parts, uint32_t count, const Load& load, T* out, uint32_t d) {
    float value = 0.0f, largest = minus_infinity(), sum = 0.0f;
#pragma unroll 8
    for (uint32_t i = 0; i < count; i++) {
        const Merge merge(largest, load(&parts[i].largest));
        value = merge(value, load(&parts[i].out[d]));
        sum = merge(sum, load(&parts[i].sum));
        largest = merge.largest;
    }
    out[d].bits = static_cast<uint16_t>(pack<T>(value / sum, 0.0f));
}

KILN_KERNEL(CHUNKS * 32, 3)
$(entry)$($(parameters)$) {
    __shared__ ChunkPart own[CHUNKS];
    __shared__ bool last;
    start_next();
    const uint32_t head = blockIdx.x, index = blockIdx.y, group = blockIdx.z;
    const uint32_t lane = lane_index(), warp = warp_index(), chunk = group * CHUNKS + warp;
    const bool exists = index < load_fresh(&step.counts->sequences);
    const Sequence* const sequence = step.sequences + index;
    const uint32_t past_len = exists ? load_fresh(&sequence->past_len) : 0;
    const uint32_t first_row = exists ? load_fresh(&sequence->first_row) : 0;
    const uint32_t kv_len = exists ? past_len + 1 : 0;
    const uint32_t chunks = (kv_len + CHUNK - 1) / CHUNK, groups = (chunks + CHUNKS - 1) / CHUNKS;
    const uint32_t left = chunk < chunks ? kv_len - chunk * CHUNK : 0, present = left < CHUNK ? left : CHUNK;

    uint4* const keys = reinterpret_cast<uint4*>(dynamic_shared()) + warp * (2 * PART_VECTORS);
    uint4* const values = keys + PART_VECTORS;
    uint32_t table[CHUNK_BLOCKS];
#pragma unroll
    for (uint32_t b = 0; b < CHUNK_BLOCKS; b++) {
        const uint32_t entry = b * BLOCK_TOKENS < present ? load_fresh(&sequence->block_table) + chunk * CHUNK_BLOCKS + b : 0;
        table[b] = b * BLOCK_TOKENS < present ? load_fresh(step.lists + entry) : 0;
    }
    // A lane reads back only what it has copied itself.
    const auto copy_block = [&](uint32_t b) {
        const T* const from = kv + table[b] * BLOCK_STRIDE + head * (D * BLOCK_TOKENS);
        const uint4* const vectors = reinterpret_cast<const uint4*>(from) + lane;
#pragma unroll
        for (uint32_t s = 0; s < D / 16; s++) {
            copy_async(keys + b * BLOCK_VECTORS + s * 32 + lane, vectors + s * 32, true);
            copy_async(values + b * BLOCK_VECTORS + s * 32 + lane, vectors + H * BLOCK_VECTORS + s * 32, true);
        }
    };
    const uint32_t written = past_len / BLOCK_TOKENS - chunk * CHUNK_BLOCKS;  // by the previous kernel
#pragma unroll
    for (uint32_t b = 0; b < CHUNK_BLOCKS; b++) {
        if (b * BLOCK_TOKENS < present && b != written) copy_block(b);
    }
    copy_commit();

    wait_for_previous();
    if (group >= groups) {
        // Copies that are under way end before the block does.
        copy_wait<0>();
        return;
    }
    ChunkPart* const parts = workspace + (index * H + head) * (gridDim.z * CHUNKS);
    if (chunk < chunks) {
#pragma unroll
        for (uint32_t b = 0; b < CHUNK_BLOCKS; b++) {
            if (b * BLOCK_TOKENS < present && b == written) copy_block(b);
        }
        copy_commit();
        // Row 0 of the tile is the query, the others are zeros.
        Queries<D> q;
        load_queries<D>(q, 0, lane < 4 ? queries + first_row * static_cast<uint64_t>(3 * H * D) + head * D : nullptr);
        load_queries<D>(q, 1, nullptr);
        copy_wait<0>();
        Part<D> part;
        const uint32_t visible[2] = {present, 0};
        attend_chunk<T, D, false>(part, q, keys, values, present, visible, SCALE_LOG2);
        if (lane < 4) {
            ChunkPart& to = groups == 1 ? own[warp] : parts[chunk];
#pragma unroll
            for (uint32_t j = 0; j < D / 8; j++) {
                to.out[j * 8 + 2 * lane] = part.out[j][0];
                to.out[j * 8 + 2 * lane + 1] = part.out[j][1];
            }
            if (lane == 0) to.largest = part.largest[0], to.sum = part.sum[0];
        }
    }
    T* const row = out + first_row * static_cast<uint64_t>(H * D) + head * D;
    __syncthreads();
    if (groups == 1) {
        const auto load = [](const float* from) { return *from; };
        for (uint32_t d = threadIdx.x; d < D; d += CHUNKS * 32) finish(own, chunks, load, row, d);
        return;
    }
    if (threadIdx.x == 0) {
        uint32_t* const counter = counters + index * H + head;
        last = arrive(counter) == groups - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;
    const auto load = [](const float* from) { return load_fresh(from); };
    for (uint32_t d = threadIdx.x; d < D; d += CHUNKS * 32) finish(parts, chunks, load, row, d);
}
