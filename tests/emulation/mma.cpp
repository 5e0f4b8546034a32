// `mma.m16n8k16`: the whole warp's product at once.
#include "fibers.hpp"
#include "numbers.hpp"

namespace emulation {

// Who holds what (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of lane = 4 * group + pair, register
// r of a has row group + 8 * (r % 2) and columns 2 * pair + 8 * (r / 2) and the next; register r of b
// has column group and rows 2 * pair + 8 * r and the next; sums 2 * r and 2 * r + 1 have row
// group + 8 * r and columns 2 * pair and the next.
template <float unpack(uint16_t)>
static void complete_mma(void* const* operands, uint32_t lanes) {
    if (lanes != ~0u) fail("mma without all lanes of the warp: 0x%08x", lanes);
    float a[16][16], b[16][8], sum[16][8];
    for (uint32_t lane = 0; lane < 32; lane++) {
        const Mma& operand = *static_cast<const Mma*>(operands[lane]);
        uint32_t group = lane / 4, pair = lane % 4;
        for (uint32_t r = 0; r < 4; r++) {
            float* to = &a[group + 8 * (r % 2)][2 * pair + 8 * (r / 2)];
            to[0] = unpack(static_cast<uint16_t>(operand.a[r]));
            to[1] = unpack(static_cast<uint16_t>(operand.a[r] >> 16));
        }
        for (uint32_t r = 0; r < 2; r++) {
            b[2 * pair + 8 * r][group] = unpack(static_cast<uint16_t>(operand.b[r]));
            b[2 * pair + 8 * r + 1][group] = unpack(static_cast<uint16_t>(operand.b[r] >> 16));
            sum[group + 8 * r][2 * pair] = operand.sum[2 * r];
            sum[group + 8 * r][2 * pair + 1] = operand.sum[2 * r + 1];
        }
    }
    // Every element is one chain in the order of k, wherever in the tile it lies.
    for (uint32_t row = 0; row < 16; row++)
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
    for (uint32_t lane = 0; lane < 32; lane++) {
        float* to = static_cast<const Mma*>(operands[lane])->sum;
        uint32_t group = lane / 4, pair = lane % 4;
        for (uint32_t r = 0; r < 2; r++) {
            to[2 * r] = sum[group + 8 * r][2 * pair];
            to[2 * r + 1] = sum[group + 8 * r][2 * pair + 1];
        }
    }
}

void complete_mma_f16(void* const* operands, uint32_t lanes) { complete_mma<f32_from_f16>(operands, lanes); }
void complete_mma_bf16(void* const* operands, uint32_t lanes) { complete_mma<f32_from_bf16>(operands, lanes); }

}  // namespace emulation
