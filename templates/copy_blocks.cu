// Copies blocks of the KV cache, all layers of each.
//
// Blocks along y each make a copy; those along x share it. The copies of a launch are made at once: none
// of them touches what another one writes.
#include "kiln/rows.cuh"

constexpr uint32_t VECTORS = $(vectors)$;  // of 16 bytes in a block of the cache
constexpr uint32_t DEPTH = $(depth)$;  // vectors that a thread has under way

// `BlockCopies` of kiln-bundle.
struct Copies {
    uint2 pairs[$(copies)$];  // a block to read, and one to write
};

KILN_KERNEL(THREADS, 2)
$(entry)$(const Copies copies, uint4* kv) {
    start_next();
    wait_for_previous();
    const uint2 copy = copies.pairs[blockIdx.y];
    const uint4* const from = kv + copy.x * static_cast<uint64_t>(VECTORS);
    uint4* const to = kv + copy.y * static_cast<uint64_t>(VECTORS);
    const uint32_t first = blockIdx.x * (THREADS * DEPTH) + threadIdx.x;
    uint4 v[DEPTH];
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        const uint32_t i = first + d * THREADS;
        if (i < VECTORS) v[d] = load_fresh(from + i);
    }
#pragma unroll
    for (uint32_t d = 0; d < DEPTH; d++) {
        const uint32_t i = first + d * THREADS;
        if (i < VECTORS) to[i] = v[d];
    }
}
