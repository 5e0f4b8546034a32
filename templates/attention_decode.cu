// $(summary)$
//
// A warp owns one chunk of 64 positions of a sequence and head, reading only positions that exist. The
// chunks of a block meet in shared memory; where a sequence needs several blocks, the last of them to
// arrive merges all chunks, in their order. Which block that is decides nothing but who does the work.
#include "kiln/attention.cuh"

using T = $(element)$;

constexpr uint32_t H = $(heads)$;
constexpr uint32_t D = $(head_dim)$;
constexpr float SCALE_LOG2 = $(scale)$f * LOG2E;
constexpr uint32_t CHUNKS = $(chunks)$;  // of a block: one a warp
constexpr uint64_t BLOCK_STRIDE = $(block_stride)$;

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
    for (uint32_t i = 0; i < count; i++) {
        const Merge merge(largest, load(&parts[i].largest));
        value = merge(value, load(&parts[i].out[d]));
        sum = merge(sum, load(&parts[i].sum));
        largest = merge.largest;
    }
    out[d].bits = static_cast<uint16_t>(pack<T>(value / sum, 0.0f));
}

KILN_KERNEL(CHUNKS * 32, 4)
$(entry)$($(parameters)$) {
    __shared__ ChunkPart own[CHUNKS];
    __shared__ bool last;
    start_next();
    wait_for_previous();
    const uint32_t head = blockIdx.x, index = blockIdx.y, group = blockIdx.z;
    if (index >= step.counts->sequences) return;
    const Sequence sequence = step.sequences[index];
    const uint32_t kv_len = sequence.past_len + 1;
    const uint32_t chunks = (kv_len + CHUNK - 1) / CHUNK, groups = (chunks + CHUNKS - 1) / CHUNKS;
    if (group >= groups) return;

    const uint32_t lane = lane_index(), warp = warp_index(), chunk = group * CHUNKS + warp;
    ChunkPart* const parts = workspace + (index * H + head) * (gridDim.z * CHUNKS);
    if (chunk < chunks) {
        const uint32_t present = kv_len - chunk * CHUNK < CHUNK ? kv_len - chunk * CHUNK : CHUNK;
        const uint32_t* const table = step.lists + sequence.block_table + chunk * CHUNK_BLOCKS;
        const T* const first = kv + head * (D * BLOCK_TOKENS);
        const auto keys = [&](uint32_t block) {
            return reinterpret_cast<const uint4*>(first + table[block] * BLOCK_STRIDE);
        };
        const auto values = [&](uint32_t block) {
            return reinterpret_cast<const uint4*>(first + table[block] * BLOCK_STRIDE + H * D * BLOCK_TOKENS);
        };
        const auto load = [](const uint4* from) { return load_shared_by_blocks(from); };
        // Row 0 of the tile is the query, the others are zeros.
        Queries<D> q;
        load_queries<D>(q, 0, lane < 4 ? queries + sequence.first_row * static_cast<uint64_t>(3 * H * D) + head * D : nullptr);
        load_queries<D>(q, 1, nullptr);
        Part<D> part;
        const uint32_t visible[2] = {present, 0};
        attend_chunk<T, D>(part, q, keys, values, load, present, visible, SCALE_LOG2);
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
    T* const row = out + sequence.first_row * static_cast<uint64_t>(H * D) + head * D;
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
    const auto load = [](const float* from) { return load_shared_by_blocks(from); };
    for (uint32_t d = threadIdx.x; d < D; d += CHUNKS * 32) finish(parts, chunks, load, row, d);
}
