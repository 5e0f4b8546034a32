// The instructions that CUDA C++ has no words for. Nothing else in these headers contains
// assembly: a host that emulates a device replaces this one file.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;

#define KILN_DEVICE __device__ __forceinline__
#define KILN_KERNEL(threads, blocks_per_sm) extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)

// 16-bit element types: bits alone, converted to and from f32.
struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

// Dynamic shared memory of the block, 16-byte aligned.
KILN_DEVICE uint8_t* dynamic_shared() {
    extern __shared__ uint4 kiln_dynamic_shared[];
    return reinterpret_cast<uint8_t*>(kiln_dynamic_shared);
}

// Two elements from two numbers, rounded to nearest even; `low` comes first in memory.
template <typename T>
KILN_DEVICE uint32_t pack(float low, float high);

template <>
KILN_DEVICE uint32_t pack<f16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

template <>
KILN_DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// The element with these bits.
template <typename T>
KILN_DEVICE float unpack(uint16_t bits);

template <>
KILN_DEVICE float unpack<f16>(uint16_t bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

template <>
KILN_DEVICE float unpack<bf16>(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// a * b + c of two elements each, rounded once; subnormal numbers are numbers like others.
template <typename T>
KILN_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c);

template <>
KILN_DEVICE uint32_t multiply_add<f16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

template <>
KILN_DEVICE uint32_t multiply_add<bf16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// A weight: read once a step, so it is kept out of L1 and leaves L2 first. (The modifier
// `.L2::evict_first` exists for loads of 32 bytes alone; the policy is a constant after compilation.)
// Not `.nc`: the compiler takes that for leave to move the load behind `wait_for_previous`.
KILN_DEVICE uint4 load_weight(const uint4* address) {
    uint64_t evict_first;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address), "l"(evict_first));
    return v;
}

// A parameter that is loaded ahead of `wait_for_previous`, and stays there.
KILN_DEVICE float load_ahead(const float* address) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(address));
    return v;
}

KILN_DEVICE uint32_t load_ahead(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

KILN_DEVICE uint16_t load_ahead(const uint16_t* address) {
    uint16_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}

// What an earlier kernel, or an earlier block of this one, wrote, and what the step brings: read from
// L2, never from a line that L1 kept.
KILN_DEVICE uint32_t load_fresh(const uint32_t* address) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

KILN_DEVICE float load_fresh(const float* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}

KILN_DEVICE uint2 load_fresh(const uint2* address) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
    return v;
}

KILN_DEVICE uint4 load_fresh(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

KILN_DEVICE float4 load_fresh(const float4* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Starts a copy of 16 bytes to shared memory; zeros where `exists` is false.
KILN_DEVICE void copy_async(void* shared, const void* global, bool exists) {
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(exists ? 16 : 0)
                 : "memory");
}

// Ends a group of copies.
KILN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
KILN_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// sum (16 x 8) += a (16 x 16, row-major) * b (16 x 8, column-major), over the lanes of a warp.
template <typename T>
KILN_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
KILN_DEVICE void mma<f16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
KILN_DEVICE void mma<bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Gives words back as new values. An operand of several `mma` whose words lie apart in registers is
// otherwise put together again for each of them.
struct Gather {
    uint32_t selector;

    KILN_DEVICE Gather() { asm volatile("mov.b32 %0, 0x3210;" : "=r"(selector)); }

    KILN_DEVICE uint32_t operator()(uint32_t word) const { return __byte_perm(word, 0, selector); }
};

// Sum over the lanes of a warp, all of which take part.
KILN_DEVICE uint32_t warp_add(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }

// 2^x, to two units in the last place.
KILN_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Programmatic dependent launch (sm_90 and up; elsewhere a kernel starts when the one before it has
// ended). Every thread that reads or writes what other kernels touch calls `wait_for_previous`
// first, and every block calls it, whether it has work or not: a kernel that ended without waiting
// would let the next one overtake the previous.
KILN_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its blocks, up to their own `wait_for_previous`.
KILN_DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Counts an arrival at `counter` and returns how many came before. What the calling thread wrote
// before it can be read by whoever counts after it.
KILN_DEVICE uint32_t arrive(uint32_t* counter) {
    __threadfence();
    uint32_t before = atomicAdd(counter, 1);
    __threadfence();
    return before;
}
