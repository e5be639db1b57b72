// Element types of tensors, and their values as float. No torch header anywhere in csrc: pointers, sizes, strides.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"

namespace dino {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int64_t width_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }  // bytes

// --- 16-bit floats -----------------------------------------------------------------------------------
// Bit arithmetic instead of F16C / AVX512-BF16 intrinsics: plain loops over it vectorise on every target.

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float bf16_to_float(uint16_t h) { return bits_as<float>(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float f) {
    uint32_t u = bits_as<uint32_t>(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

inline float half_to_float(uint16_t h) {
    // Shift exponent and mantissa into place; the product re-biases them and is exact for subnormals.
    float magnitude = bits_as<float>(uint32_t(h & 0x7fffu) << 13) * 0x1p112f;
    uint32_t u = bits_as<uint32_t>(magnitude);
    u = (h & 0x7c00u) == 0x7c00u ? u | 0x7f800000u : u;  // infinity and NaN
    return bits_as<float>(u | (uint32_t(h & 0x8000u) << 16));
}

inline uint16_t float_to_half(float f) {
    uint32_t u = bits_as<uint32_t>(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    // Subnormal halves: adding 0.5 aligns the mantissa so that the FPU does the rounding.
    uint32_t small = bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - 0x3f000000u;
    uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
    uint32_t most = 0x7c00u + (uint32_t(u > 0x7f800000u) << 9);  // infinity, or NaN for NaN
    normal = normal < most ? normal : most;
    uint32_t h = u < 0x38800000u ? small : normal;
    return uint16_t(sign | h);
}

// One value of a tensor as float, and the inverse, for loops compiled for their dtypes: see with_dtype.
template <DType D>
DINO_INLINE inline float value(const void* x, int64_t i) {
    if constexpr (D == DType::f32) return static_cast<const float*>(x)[i];
    uint16_t bits = static_cast<const uint16_t*>(x)[i];
    return D == DType::bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

template <DType D>
DINO_INLINE inline void put(void* x, int64_t i, float f) {
    if constexpr (D == DType::f32)
        static_cast<float*>(x)[i] = f;
    else
        static_cast<uint16_t*>(x)[i] = D == DType::bf16 ? float_to_bf16(f) : float_to_half(f);
}

// The value that `put` then stands for.
template <DType D>
DINO_INLINE inline float rounded(float f) {
    if constexpr (D == DType::f32) return f;
    return D == DType::bf16 ? bf16_to_float(float_to_bf16(f)) : half_to_float(float_to_half(f));
}

// body(integral constant of the dtype)
template <class Body>
DINO_INLINE inline void with_dtype(DType dtype, const Body& body) {
    if (dtype == DType::f32)
        body(std::integral_constant<DType, DType::f32>());
    else if (dtype == DType::bf16)
        body(std::integral_constant<DType, DType::bf16>());
    else
        body(std::integral_constant<DType, DType::f16>());
}

// `count` values from `offset` on, as float: float32 is returned in place, others go through `scratch`.
DINO_INLINE inline const float* load(const void* data, DType dtype, int64_t offset, int64_t count, float* scratch) {
    if (dtype == DType::f32) return static_cast<const float*>(data) + offset;
    const uint16_t* x = static_cast<const uint16_t*>(data) + offset;
    if (dtype == DType::bf16)
        for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(x[i]);
    else
        for (int64_t i = 0; i < count; ++i) scratch[i] = half_to_float(x[i]);
    return scratch;
}

// The inverse of load: `count` floats to `offset`, rounded to the dtype.
DINO_INLINE inline void store(void* data, DType dtype, int64_t offset, int64_t count, const float* from) {
    if (dtype == DType::f32) {
        std::memcpy(static_cast<float*>(data) + offset, from, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    if (dtype == DType::bf16)
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(from[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
}

}  // namespace dino
