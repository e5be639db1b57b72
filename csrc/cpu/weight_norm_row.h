// What is done with one row of a weight-normed layer; formulas in dino_kernels/ops/weight_norm.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace dino {
namespace {

DINO_INLINE inline float dot(const float* x, const float* y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
    return sum;
}

// out [n] = g v / |v|
DINO_INLINE inline void normalize_row(const float* v, float g, int64_t n, float* out) {
    float scale = g / std::sqrt(dot(v, v, n));
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = v[j] * scale;
}

// The gradient of v is scale * (grad_w - pull * v), that of g is `along`.
struct RowGradient {
    float scale, pull, along;
};

DINO_INLINE inline RowGradient row_gradient(const float* grad_w, const float* v, float g, int64_t n) {
    float inverse = 1 / std::sqrt(dot(v, v, n)), along = dot(grad_w, v, n) * inverse;
    return {g * inverse, along * inverse, along};
}

}  // namespace
}  // namespace dino
