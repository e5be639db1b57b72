// gelu by the approximation of the normal distribution's tail in dino_kernels/ops/bias_gelu.py.
#pragma once

#include <cmath>

#include "common/math.h"

namespace dino {
namespace {

// A bfloat16 result needs no more than the shorter polynomials, whose errors are a tenth of its rounding.

// Q(a), the upper tail of the normal distribution, for 0 <= a <= 8; for bfloat16 within 4e-4 of it up to 4, 2e-3
// beyond.
template <DType D>
DINO_INLINE inline float upper_tail(float a) {
    float p;
    if constexpr (D == DType::bf16) {
        p = 2.17487704e-05f;
        p = p * a - 0.000609281124f;
        p = p * a + 0.00731369574f;
        p = p * a - 0.0518570133f;
        p = p * a - 0.460105062f;
        p = p * a - 1.15081095f;
    } else {
        p = 9.62331868e-08f;
        p = p * a - 2.69186603e-06f;
        p = p * a + 2.86689447e-05f;
        p = p * a - 0.000119625671f;
        p = p * a - 0.000318522827f;
        p = p * a + 0.00731778331f;
        p = p * a - 0.0526791997f;
        p = p * a - 0.459147513f;
        p = p * a - 1.15111184f;
    }
    return exp2_negative<D>(p * a - 1.0f);
}

DINO_INLINE inline float clamped_magnitude(float x) {
    float a = std::fabs(x);
    return a > 8.0f ? 8.0f : a;
}

template <DType D>
DINO_INLINE inline float gelu(float y) {
    float magnitude = clamped_magnitude(y);
    return (y < 0.0f ? 0.0f : y) - magnitude * upper_tail<D>(magnitude);
}

// gelu and its slope
template <DType D>
DINO_INLINE inline float gelu_with_slope(float y, float& slope) {
    float magnitude = clamped_magnitude(y), tail = upper_tail<D>(magnitude);
    float density = exp2_negative<D>(-0.72134752f * magnitude * magnitude - 1.32574806f);
    float lower = tail - magnitude * density;  // the slope at -|y|
    slope = y < 0.0f ? lower : 1.0f - lower;
    return (y < 0.0f ? 0.0f : y) - magnitude * tail;
}

}  // namespace
}  // namespace dino
