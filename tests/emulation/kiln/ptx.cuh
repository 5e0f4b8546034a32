// The host's definition of what templates/kiln/ptx.cuh has for the device: same names, same
// contracts. It stands in front of that file on the include path.
#pragma once
#include "../cuda.hpp"

#define KILN_DEVICE inline
#define KILN_KERNEL(threads, blocks_per_sm) extern "C" void

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

KILN_DEVICE uint8_t* dynamic_shared() { return emulation::dynamic_shared_memory; }

template <typename T>
KILN_DEVICE uint32_t pack(float low, float high);

template <>
KILN_DEVICE uint32_t pack<f16>(float low, float high) {
    return emulation::f16_from(low) | static_cast<uint32_t>(emulation::f16_from(high)) << 16;
}

template <>
KILN_DEVICE uint32_t pack<bf16>(float low, float high) {
    return emulation::bf16_from(low) | static_cast<uint32_t>(emulation::bf16_from(high)) << 16;
}

template <typename T>
KILN_DEVICE float unpack(uint16_t bits);

template <>
KILN_DEVICE float unpack<f16>(uint16_t bits) {
    return emulation::f32_from_f16(bits);
}

template <>
KILN_DEVICE float unpack<bf16>(uint16_t bits) {
    return emulation::f32_from_bf16(bits);
}

template <typename T>
KILN_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c);

template <>
KILN_DEVICE uint32_t multiply_add<f16>(uint32_t a, uint32_t b, uint32_t c) {
    return emulation::fused<emulation::f32_from_f16, emulation::f16_from>(a, b, c);
}

template <>
KILN_DEVICE uint32_t multiply_add<bf16>(uint32_t a, uint32_t b, uint32_t c) {
    return emulation::fused<emulation::f32_from_bf16, emulation::bf16_from>(a, b, c);
}

namespace emulation {
template <unsigned BYTES = 16>
void check_alignment(const void* address, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % BYTES != 0) fail("%s of an address that is no multiple of %u", what, BYTES);
}
}  // namespace emulation

KILN_DEVICE uint4 load_weight(const uint4* address) {
    emulation::check_alignment(address, "load_weight");
    return *address;
}

KILN_DEVICE float load_ahead(const float* address) { return *address; }

KILN_DEVICE uint32_t load_ahead(const uint32_t* address) { return *address; }

KILN_DEVICE uint16_t load_ahead(const uint16_t* address) { return *address; }

KILN_DEVICE uint32_t load_fresh(const uint32_t* address) { return *address; }

KILN_DEVICE float load_fresh(const float* address) { return *address; }

KILN_DEVICE uint2 load_fresh(const uint2* address) {
    emulation::check_alignment<8>(address, "load_fresh");
    return *address;
}

KILN_DEVICE uint4 load_fresh(const uint4* address) {
    emulation::check_alignment(address, "load_fresh");
    return *address;
}

KILN_DEVICE float4 load_fresh(const float4* address) {
    emulation::check_alignment(address, "load_fresh");
    return *address;
}

KILN_DEVICE void copy_async(void* shared, const void* global, bool exists) {
    emulation::check_alignment(shared, "copy_async");
    if (exists) {
        emulation::check_alignment(global, "copy_async");
        // The copy itself may come later, and where no sanitizer looks.
        const volatile uint8_t* bytes = static_cast<const volatile uint8_t*>(global);
        (void)bytes[0];
        (void)bytes[15];
    }
    emulation::start_copy(shared, global, exists);
}

KILN_DEVICE void copy_commit() { emulation::commit_copies(); }

template <int Pending>
KILN_DEVICE void copy_wait() {
    emulation::wait_for_copies(Pending);
}

template <typename T>
KILN_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
KILN_DEVICE void mma<f16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::Mma operand = {sum, a, {b0, b1}};
    emulation::collective(emulation::complete_mma_f16, ~0u, &operand, "mma<f16>", __FILE__, __LINE__);
}

template <>
KILN_DEVICE void mma<bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::Mma operand = {sum, a, {b0, b1}};
    emulation::collective(emulation::complete_mma_bf16, ~0u, &operand, "mma<bf16>", __FILE__, __LINE__);
}

struct Gather {
    KILN_DEVICE uint32_t operator()(uint32_t word) const { return word; }
};

KILN_DEVICE uint32_t warp_add(uint32_t x) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Subnormal numbers are zeros, as for `ex2.approx.ftz`.
KILN_DEVICE float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

KILN_DEVICE void wait_for_previous(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::wait_for_previous(file, line);
}

KILN_DEVICE void start_next() {}

KILN_DEVICE uint32_t arrive(uint32_t* counter) { return atomicAdd(counter, 1u); }
