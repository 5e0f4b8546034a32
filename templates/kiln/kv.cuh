// The paged KV cache: (blocks, L, 2, H, D/16, 256) elements, keys before values.
//
// Per block, layer and head, keys and values lie in tiles of 16 positions by 16 components. A tile is
// 512 bytes, the 16-byte vectors of the 32 lanes of a warp: lane 4g + c holds, for t = 0 and 1, four
// elements that are its share of a B operand of `mma.m16n8k16`:
//   keys:   components 4c .. 4c + 3 of position key_position(t, g), for scores = q * keys^T;
//   values: positions 4c .. 4c + 3 of component 8t + g, for out = probabilities * values.
// The order of positions within scores is chosen so that a lane holds the probabilities of exactly
// the positions whose values it multiplies.
#pragma once
#include "kiln/rows.cuh"

constexpr uint32_t KV_TILE = 256;  // elements

// Position within a block of column `g` of the scores' tile `t`.
KILN_DEVICE constexpr uint32_t key_position(uint32_t t, uint32_t g) { return g / 2 * 4 + t * 2 + g % 2; }

// Index of a key's component in its head's tiles.
KILN_DEVICE constexpr uint32_t key_index(uint32_t position, uint32_t component) {
    const uint32_t t = position % 4 / 2, g = position / 4 * 2 + position % 2;
    const uint32_t c = component % 16 / 4, i = component % 4;
    return component / 16 * KV_TILE + ((g * 4 + c) * 2 + t) * 4 + i;
}

// Index of a value's component in its head's tiles.
KILN_DEVICE constexpr uint32_t value_index(uint32_t position, uint32_t component) {
    const uint32_t t = component % 16 / 8, g = component % 8;
    const uint32_t c = position / 4, i = position % 4;
    return component / 16 * KV_TILE + ((g * 4 + c) * 2 + t) * 4 + i;
}
