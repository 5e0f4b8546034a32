// What CUDA C++ has beyond C++, for the host: keywords, vector types, the built-in variables and
// functions that kernels use. Names and contracts are CUDA's.
//
// No standard headers but the smallest: every kernel is compiled with this file, and <cmath> alone
// would take longer than a kernel.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "fibers.hpp"
#include "numbers.hpp"

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __constant__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict
// On the device a promise to the compiler; here it is checked.
#define __builtin_assume(condition) \
    ((condition) ? (void)0 : emulation::fail("%s:%d: an assumption does not hold: %s", __FILE__, __LINE__, #condition))

// Built-in variables.

static constexpr const emulation::Index& threadIdx = emulation::thread_index;
static constexpr const emulation::Index& blockIdx = emulation::block_index;
static constexpr const emulation::Index& blockDim = emulation::block_size;
static constexpr const emulation::Index& gridDim = emulation::grid_size;
constexpr int warpSize = 32;

// Vector types.

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
using uint3 = emulation::Index;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint3 make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Barriers. Callers' places are for errors, and tell barriers apart.

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::barrier(file, line);
}

namespace emulation {
inline void complete_nothing(void* const*, uint32_t) {}
}  // namespace emulation

inline void __syncwarp(uint32_t mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::collective(emulation::complete_nothing, mask, nullptr, "__syncwarp", file, line);
}

// A thread runs alone between synchronisation points, so its writes are in order.
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles.

namespace emulation {

inline uint32_t lane() { return thread_index.x % 32; }

template <typename T>
struct Shuffle {
    T value;
    T result;
    uint32_t source;
};

template <typename T>
void complete_shuffle(void* const* operands, uint32_t lanes) {
    for (uint32_t lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1)) continue;
        Shuffle<T>& to = *static_cast<Shuffle<T>*>(operands[lane]);
        if (lanes >> to.source & 1) {
            to.result = static_cast<const Shuffle<T>*>(operands[to.source])->value;
        } else {
            // CUDA leaves open what comes of a lane that takes no part: a NaN, as far as T has one.
            __builtin_memset(&to.result, 0xff, sizeof(T));
        }
    }
}

template <typename T>
T shuffle(uint32_t mask, T value, uint32_t source, const char* what, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    Shuffle<T> operand = {value, value, source};
    collective(complete_shuffle<T>, mask, &operand, what, file, line);
    return operand.result;
}

}  // namespace emulation

#define KILN_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, KILN_AT) {
    uint32_t first = emulation::lane() & ~(width - 1u);
    return emulation::shuffle(mask, value, first + (source & (width - 1u)), "__shfl_sync", file, line);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int width = 32, KILN_AT) {
    uint32_t lane = emulation::lane(), in_group = lane & (width - 1u);
    return emulation::shuffle(mask, value, in_group < delta ? lane : lane - delta, "__shfl_up_sync", file, line);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = 32, KILN_AT) {
    uint32_t lane = emulation::lane(), in_group = lane & (width - 1u);
    bool inside = delta < width - in_group;
    return emulation::shuffle(mask, value, inside ? lane + delta : lane, "__shfl_down_sync", file, line);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, KILN_AT) {
    uint32_t lane = emulation::lane(), source = lane ^ static_cast<uint32_t>(lanes);
    bool inside = source < (lane & ~(width - 1u)) + width;
    return emulation::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync", file, line);
}

// Votes.

namespace emulation {

struct Vote {
    bool value;
    uint32_t voters;
    uint32_t ballot;
};

inline void complete_vote(void* const* operands, uint32_t lanes) {
    uint32_t ballot = 0;
    for (uint32_t lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1) ballot |= static_cast<uint32_t>(static_cast<Vote*>(operands[lane])->value) << lane;
    for (uint32_t lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1)) continue;
        static_cast<Vote*>(operands[lane])->voters = lanes;
        static_cast<Vote*>(operands[lane])->ballot = ballot;
    }
}

inline Vote vote(uint32_t mask, bool value, const char* what, const char* file, int line) {
    Vote vote = {value, 0, 0};
    collective(complete_vote, mask, &vote, what, file, line);
    return vote;
}

}  // namespace emulation

inline uint32_t __ballot_sync(uint32_t mask, int predicate, KILN_AT) {
    return emulation::vote(mask, predicate != 0, "__ballot_sync", file, line).ballot;
}

inline int __any_sync(uint32_t mask, int predicate, KILN_AT) {
    return emulation::vote(mask, predicate != 0, "__any_sync", file, line).ballot != 0;
}

inline int __all_sync(uint32_t mask, int predicate, KILN_AT) {
    emulation::Vote vote = emulation::vote(mask, predicate != 0, "__all_sync", file, line);
    return vote.ballot == vote.voters;
}

#undef KILN_AT

// Atomics, on integers alone: a sum of floats must not depend on an order.

#define KILN_ATOMIC(name, result)                            \
    inline uint32_t name(uint32_t* address, uint32_t value) { \
        uint32_t before = *address;                          \
        *address = result;                                   \
        return before;                                       \
    }                                                        \
    inline int name(int* address, int value) {               \
        int before = *address;                               \
        *address = result;                                   \
        return before;                                       \
    }                                                        \
    inline unsigned long long name(unsigned long long* address, unsigned long long value) { \
        unsigned long long before = *address;                \
        *address = result;                                   \
        return before;                                       \
    }                                                        \
    inline uint64_t name(uint64_t* address, uint64_t value) { \
        uint64_t before = *address;                          \
        *address = result;                                   \
        return before;                                       \
    }
KILN_ATOMIC(atomicAdd, before + value)
KILN_ATOMIC(atomicMax, before < value ? value : before)
KILN_ATOMIC(atomicMin, value < before ? value : before)
KILN_ATOMIC(atomicExch, value)
KILN_ATOMIC(atomicAnd, before & value)
KILN_ATOMIC(atomicOr, before | value)
#undef KILN_ATOMIC

namespace emulation {
// Keeps a parameter from taking part in the choice of T.
template <typename T>
struct Same {
    using Type = T;
};
}  // namespace emulation

template <typename T>
T atomicCAS(T* address, typename emulation::Same<T>::Type expected, typename emulation::Same<T>::Type value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "an atomic is of 4 or 8 bytes");
    T before = *address;
    if (before == expected) *address = value;
    return before;
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}

// Numbers. Sums and products are rounded one by one: the sources are compiled without contraction.

extern "C" {
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float powf(float, float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float sqrtf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fabsf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float truncf(float) noexcept;
float rintf(float) noexcept;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t out = 0;
    for (uint32_t i = 0; i < 4; i++) out |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

inline uint32_t __float_as_uint(float x) { return emulation::bits_of(x); }
inline int __float_as_int(float x) { return static_cast<int>(emulation::bits_of(x)); }
inline float __uint_as_float(uint32_t bits) { return emulation::float_of(bits); }
inline float __int_as_float(int bits) { return emulation::float_of(static_cast<uint32_t>(bits)); }

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

#define KILN_MIN_MAX(type)                                                          \
    constexpr type min(type a, type b) { return b < a ? b : a; }                    \
    constexpr type max(type a, type b) { return a < b ? b : a; }
KILN_MIN_MAX(int)
KILN_MIN_MAX(unsigned)
KILN_MIN_MAX(long)
KILN_MIN_MAX(unsigned long)
KILN_MIN_MAX(long long)
KILN_MIN_MAX(unsigned long long)
#undef KILN_MIN_MAX
constexpr unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
constexpr unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
constexpr unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
constexpr unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
// A NaN loses, as fminf and fmaxf have it.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
