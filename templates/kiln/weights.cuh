// Weight matrices (N, K) as they are stored (`packing` of kiln-bundle), and operands of them.
//
// A strip is TILE_N outputs by all inputs, cut into spans: what the vectors of 16 bytes of a warp's
// lanes hold of it, which is one tile of 16-bit numbers, two of int8 or four of int4. Of each tile,
// lane 4g + c holds inputs 8c .. 8c + 7 of output g, its share of the B operands of two `mma.m16n8k16`.
//
// Integers become operands in registers. A code in the low bits of f16 or bf16 is that many times the
// smallest subnormal number, exactly, so that one multiply-add makes two weights, rounded once to T.
// With the masks that is nine instructions for eight codes of four bits, and eight of eight bits.
//
// Scales and minima are in units of their output, which its sum is multiplied by in f32: so they and
// the weights fit T, whatever their size. In int8 with a scale for each output the scale is the unit,
// and operands are the codes, which T holds exactly.
//
// The other way, to multiply the f32 sum of each group by its scale, would spare the rounding to T, which
// weights that are stored in T have as well. It takes a third set of accumulators, for which the kernel for
// many rows has no registers, and sums of the inputs of each group for the minima.
#pragma once
#include "kiln/rows.cuh"

constexpr uint32_t TILE_N = 8;
constexpr uint32_t TILE_K = 32;
constexpr uint32_t TILE_VECTORS = 32;  // 16-byte vectors of a warp's lanes

template <typename T>
KILN_DEVICE void unpack8(float (&x)[8], const uint4& from) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
    for (uint32_t i = 0; i < 4; i++) {
        x[2 * i] = unpack<T>(static_cast<uint16_t>(words[i]));
        x[2 * i + 1] = unpack<T>(static_cast<uint16_t>(words[i] >> 16));
    }
}

// Numbers of type T.
template <typename T, uint32_t K>
struct Floats {
    static constexpr uint32_t SPAN = 1;  // tiles
    static constexpr uint32_t SPANS = (K + TILE_K - 1) / TILE_K;
    static constexpr uint32_t STRIP = SPANS * TILE_VECTORS;  // vectors

    // What a lane loads of the groups of a span.
    struct Numbers {};
    // What makes weights of the codes of a group.
    struct Grid {};
    // What the sums of an output are multiplied by.
    struct Unit {
        KILN_DEVICE float operator()(float sum) const { return sum; }
    };

    KILN_DEVICE static Numbers numbers(const uint4*, uint32_t) { return {}; }
    // Whether a tile of a span needs another grid than the one before it.
    KILN_DEVICE static constexpr bool begins_group(uint32_t) { return false; }
    KILN_DEVICE static Grid grid(const Numbers&, uint32_t) { return {}; }
    // The operand of a tile of a span.
    KILN_DEVICE static uint4 operand(const uint4& vector, uint32_t, const Grid&) { return vector; }
    KILN_DEVICE static Unit unit(const uint4*, uint32_t) { return {}; }

    // Weights k .. k + 7 of output n.
    KILN_DEVICE static void row8(float (&x)[8], const uint4* weight, uint32_t n, uint32_t k) {
        const uint64_t tile = n / TILE_N * static_cast<uint64_t>(SPANS) + k / TILE_K;
        unpack8<T>(x, weight[tile * TILE_VECTORS + n % TILE_N * 4 + k % TILE_K / 8]);
    }
};

// Operands are `code * LEAST * scale + minimum * LEAST * LIFT` with the scale raised by LIFT, where LEAST
// is the number whose only bit is the lowest. Sums are DROP = 1 / (LEAST * LIFT) times too small.
template <typename T>
struct Codes;

template <>
struct Codes<f16> {
    static constexpr float LIFT = 0x1p15f;
    static constexpr float DROP = 0x1p9f;
};

template <>
struct Codes<bf16> {
    static constexpr float LIFT = 0x1p127f;
    static constexpr float DROP = 0x1p6f;
};

// Integers of 8 bits, whose codes are 128 too large, or of 4; GROUP inputs have a scale (and of 4 bits
// a minimum), or all of an output where GROUP is 0.
template <typename T, uint32_t K, uint32_t BITS, uint32_t GROUP>
struct Integers {
    static_assert(BITS == 8 || (BITS == 4 && GROUP > 0), "int8, int8:gN or int4:gN");
    static_assert(GROUP % TILE_K == 0, "a tile is of one group");
    static constexpr uint32_t SPAN = 16 / BITS;  // tiles
    static constexpr uint32_t SPANS = (K + SPAN * TILE_K - 1) / (SPAN * TILE_K);
    static constexpr uint32_t GROUP_TILES = GROUP > 0 ? GROUP / TILE_K : SPANS * SPAN;
    static constexpr uint32_t GROUPS = GROUP > 0 ? (SPANS * SPAN + GROUP_TILES - 1) / GROUP_TILES : 0;
    static constexpr uint32_t NUMBERS_BYTES = BITS == 4 ? 4 : 2;  // of an output in a group
    static constexpr uint32_t UNITS = SPANS * TILE_VECTORS * 16 + GROUPS * TILE_N * NUMBERS_BYTES;  // bytes before
    static constexpr uint32_t STRIP = (UNITS + TILE_N * 4 + 127) / 128 * 8;  // vectors
    static constexpr bool ONE_GROUP_A_SPAN = GROUP_TILES % SPAN == 0;

    struct Numbers {
        uint32_t bits;  // bf16 scale, and behind it the minimum
    };
    struct Grid {
        uint32_t scale, minimum;  // twice
        uint32_t scale_16;        // for codes that lie four bits up
    };
    struct Unit {
        float unit;
        KILN_DEVICE float operator()(float sum) const { return __fmul_rn(sum, unit); }
    };

    KILN_DEVICE static uint32_t load_numbers(const uint4* strip, uint32_t group, uint32_t output) {
        const uint4* const groups = strip + SPANS * TILE_VECTORS;
        const uint32_t at = group * TILE_N + output;
        if constexpr (BITS == 4) return load_ahead(reinterpret_cast<const uint32_t*>(groups) + at);
        else return load_ahead(reinterpret_cast<const uint16_t*>(groups) + at);
    }

    // Lanes 4g + c hold the numbers of output g, for the groups of the span's tiles 0, 1, .. in turn.
    KILN_DEVICE static Numbers numbers(const uint4* strip, uint32_t span) {
        if constexpr (GROUP == 0) return {0};
        const uint32_t tile = span * SPAN + (ONE_GROUP_A_SPAN ? 0 : lane_index() % SPAN);
        return {load_numbers(strip, tile / GROUP_TILES, lane_index() / 4)};
    }

    KILN_DEVICE static constexpr bool begins_group(uint32_t tile) {
        return tile == 0 || !(ONE_GROUP_A_SPAN || (SPAN % GROUP_TILES == 0 && tile % GROUP_TILES != 0));
    }

    // All lanes of a warp call it.
    KILN_DEVICE static Grid grid(const Numbers& numbers, uint32_t tile) {
        constexpr float LIFT = Codes<T>::LIFT, DROP = Codes<T>::DROP;
        float scale = LIFT, minimum = -128.0f / DROP;
        if constexpr (GROUP > 0) {
            uint32_t bits = numbers.bits;
            if constexpr (!ONE_GROUP_A_SPAN) bits = __shfl_sync(0xffffffffu, bits, lane_index() / 4 * 4 + tile);
            const float relative = __uint_as_float(bits << 16);
            scale = relative * LIFT;
            minimum = BITS == 4 ? __uint_as_float(bits & 0xffff0000u) * (1.0f / DROP) : relative * (-128.0f / DROP);
        }
        return {pack<T>(scale, scale), pack<T>(minimum, minimum), pack<T>(scale * 0.0625f, scale * 0.0625f)};
    }

    KILN_DEVICE static uint4 operand(const uint4& vector, uint32_t tile, const Grid& grid) {
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
        if constexpr (BITS == 8) {
            const uint32_t low = words[2 * tile], high = words[2 * tile + 1];
            return {multiply_add<T>(__byte_perm(low, 0, 0x4240), grid.scale, grid.minimum),
                    multiply_add<T>(__byte_perm(low, 0, 0x4341), grid.scale, grid.minimum),
                    multiply_add<T>(__byte_perm(high, 0, 0x4240), grid.scale, grid.minimum),
                    multiply_add<T>(__byte_perm(high, 0, 0x4341), grid.scale, grid.minimum)};
        } else {
            const uint32_t low = words[tile], high = low >> 8;
            return {multiply_add<T>(low & 0x000f000fu, grid.scale, grid.minimum),
                    multiply_add<T>(low & 0x00f000f0u, grid.scale_16, grid.minimum),
                    multiply_add<T>(high & 0x000f000fu, grid.scale, grid.minimum),
                    multiply_add<T>(high & 0x00f000f0u, grid.scale_16, grid.minimum)};
        }
    }

    KILN_DEVICE static float load_unit(const uint4* strip, uint32_t output) {
        return load_ahead(reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(strip) + UNITS) + output);
    }

    // Of an output that exists.
    KILN_DEVICE static Unit unit(const uint4* weight, uint32_t n) {
        return {load_unit(weight + n / TILE_N * static_cast<uint64_t>(STRIP), n % TILE_N) * Codes<T>::DROP};
    }

    KILN_DEVICE static void row8(float (&x)[8], const uint4* weight, uint32_t n, uint32_t k) {
        const uint4* const strip = weight + n / TILE_N * static_cast<uint64_t>(STRIP);
        const uint32_t tile = k / TILE_K, output = n % TILE_N;
        const uint4 vector = strip[tile / SPAN * TILE_VECTORS + output * 4 + k % TILE_K / 8];
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
        float scale = 1.0f, minimum = BITS == 8 ? -128.0f : 0.0f;
        if constexpr (GROUP > 0) {
            const uint32_t bits = load_numbers(strip, tile / GROUP_TILES, output);
            scale = __uint_as_float(bits << 16);
            minimum = BITS == 4 ? __uint_as_float(bits & 0xffff0000u) : scale * -128.0f;
        }
        const float unit = load_unit(strip, output);
        for (uint32_t i = 0; i < 8; i++) {
            // Inputs 2j and 2j + 1 are in the halves of a word, j codes up.
            const uint32_t word = BITS == 8 ? words[tile % SPAN * 2 + i / 4] : words[tile % SPAN];
            const uint32_t up = BITS == 8 ? i / 2 % 2 * 8 : i / 2 * 4;
            const uint32_t code = word >> (up + i % 2 * 16) & ((1u << BITS) - 1);
            x[i] = unit * __fmaf_rn(scale, static_cast<float>(code), minimum);
        }
    }
};
