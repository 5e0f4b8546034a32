// f16 and bf16 from and to f32, as `cvt.rn` rounds them: to nearest, ties to even.
#pragma once
#include <stdint.h>
#include <string.h>

namespace emulation {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The device has one NaN of 16 bits, without a sign.
constexpr uint16_t NAN_16 = 0x7fff;

inline uint16_t f16_from(float x) {
    uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) return NAN_16;
    // Half way from the largest f16 to the next power of two, and all above it.
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    // Subnormal f16 are multiples of 2^-24, the last place of numbers from one half on.
    if (magnitude < 0x38800000)
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

inline float f32_from_f16(uint16_t bits) {
    uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    uint32_t exponent = magnitude & 0x7c00u << 13;
    magnitude += 112u << 23;
    // Infinity and NaN.
    if (exponent == 0x7c00u << 13) magnitude += 112u << 23;
    // Zero and subnormals: as a normal number with a leading one that is taken off again.
    float normalised = float_of(magnitude + (1u << 23)) - float_of(113u << 23);
    if (exponent == 0) magnitude = bits_of(normalised);
    return float_of(magnitude | static_cast<uint32_t>(bits & 0x8000) << 16);
}

inline uint16_t bf16_from(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return NAN_16;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f32_from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// The f32 next to x that has an odd last place, or x where f32 has it: to round it again to fewer places
// is to round x.
inline float odd(double x) {
    float near = static_cast<float>(x);
    if (near == x || near != near || bits_of(near) & 1) return near;
    bool inwards = (near < 0 ? -static_cast<double>(near) : near) > (x < 0 ? -x : x);
    return float_of(bits_of(near) + (inwards ? -1 : 1));
}

// a * b + c of two elements each. Products are exact in f64; what the sum loses is below all of 16 bits.
template <float unpack(uint16_t), uint16_t round(float)>
inline uint32_t fused(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (uint32_t half = 0; half < 32; half += 16) {
        auto number = [&](uint32_t x) { return static_cast<double>(unpack(static_cast<uint16_t>(x >> half))); };
        out |= static_cast<uint32_t>(round(odd(number(a) * number(b) + number(c)))) << half;
    }
    return out;
}

}  // namespace emulation
