// `mma.m16n8k16`: the whole warp's product at once.
#include "fibers.hpp"
#include "numbers.hpp"

namespace emulation {

// A row of sums. As a vector of the compiler's, since left to itself it makes poor ones.
typedef float Row __attribute__((vector_size(32)));

// Who holds what (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of lane = 4 * group + pair, register
// r of a has row group + 8 * (r % 2) and columns 2 * pair + 8 * (r / 2) and the next; register r of b
// has column group and rows 2 * pair + 8 * r and the next; sums 2 * r and 2 * r + 1 have row
// group + 8 * r and columns 2 * pair and the next.
template <float unpack(uint16_t)>
static void complete_mma(void* const* operands, uint32_t lanes) {
    if (lanes != ~0u) fail("mma without all lanes of the warp: 0x%08x", lanes);
    // Elements first, numbers later: all at once, in vectors.
    uint16_t a_bits[16 * 16], b_bits[16 * 8];
    float a[16 * 16];
    alignas(32) float b[16 * 8], sum[16][8];
    for (uint32_t lane = 0; lane < 32; lane++) {
        const Mma& operand = *static_cast<const Mma*>(operands[lane]);
        uint32_t group = lane / 4, pair = lane % 4;
        for (uint32_t r = 0; r < 4; r++)
            memcpy(&a_bits[(group + 8 * (r % 2)) * 16 + 2 * pair + 8 * (r / 2)], &operand.a[r], 4);
        for (uint32_t r = 0; r < 2; r++) {
            b_bits[(2 * pair + 8 * r) * 8 + group] = static_cast<uint16_t>(operand.b[r]);
            b_bits[(2 * pair + 8 * r + 1) * 8 + group] = static_cast<uint16_t>(operand.b[r] >> 16);
            memcpy(&sum[group + 8 * r][2 * pair], &operand.sum[2 * r], 8);
        }
    }
    for (uint32_t i = 0; i < 16 * 16; i++) a[i] = unpack(a_bits[i]);
    for (uint32_t i = 0; i < 16 * 8; i++) b[i] = unpack(b_bits[i]);
    // Every element is one chain in the order of k, wherever in the tile it lies.
    const Row* b_rows = reinterpret_cast<const Row*>(b);
    for (uint32_t row = 0; row < 16; row++) {
        Row& total = *reinterpret_cast<Row*>(sum[row]);
        for (uint32_t k = 0; k < 16; k++) total += a[row * 16 + k] * b_rows[k];
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        float* to = static_cast<const Mma*>(operands[lane])->sum;
        for (uint32_t r = 0; r < 2; r++) memcpy(&to[2 * r], &sum[lane / 4 + 8 * r][2 * (lane % 4)], 8);
    }
}

void complete_mma_f16(void* const* operands, uint32_t lanes) { complete_mma<f32_from_f16>(operands, lanes); }
void complete_mma_bf16(void* const* operands, uint32_t lanes) { complete_mma<f32_from_bf16>(operands, lanes); }

}  // namespace emulation
