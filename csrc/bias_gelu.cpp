// gelu(x + bias) and its gradients; formula and the approximation of the tail in dino_kernels/bias_gelu.py.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass

// A bfloat16 result needs no more than the shorter polynomials, whose errors are a tenth of its rounding.

// 2^y for -126 <= y <= 0 within 2 ulp, or 8e-5: 2^n * p(y - n), n = round(y).
template <DType D>
DINO_INLINE inline float exp2_negative(float y) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves n in the low mantissa bits
    float shifted = y + kRound, f = y - (shifted - kRound), p;
    if constexpr (D == DType::bf16) {
        p = 0.0551716164f;
        p = p * f + 0.242611632f;
        p = p * f + 0.693261027f;
        p = p * f + 0.999928057f;
    } else {
        p = 0x1.5bba14p-10f;
        p = p * f + 0x1.3cea88p-7f;
        p = p * f + 0x1.c6b752p-5f;
        p = p * f + 0x1.ebf9bcp-3f;
        p = p * f + 0x1.62e42ap-1f;
        p = p * f + 1.0f;
    }
    return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
}

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

DINO_MULTIVERSION
void forward_rows(const BiasGeluArgs& a, int64_t begin, int64_t end) {
    // Copies, which no store through another pointer can change.
    const void* x = a.x;
    const float* bias = a.bias;
    void* out = a.out;
    int64_t n = a.channels;
    with_dtype(a.dtype, [&](auto d) DINO_INLINE {
        for (int64_t row = begin; row < end; ++row) {
            int64_t offset = row * n;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                float y = value<d.value>(x, offset + j) + bias[j], magnitude = clamped_magnitude(y);
                put<d.value>(out, offset + j, (y < 0.0f ? 0.0f : y) - magnitude * upper_tail<d.value>(magnitude));
            }
        }
    });
}

// Rows [begin, end), whose sums of gradients go to `sums` [C].
DINO_MULTIVERSION
void backward_rows(const BiasGeluBackwardArgs& a, int64_t begin, int64_t end, float* sums) {
    std::fill(sums, sums + a.channels, 0.0f);
    const void *x = a.x, *grad_out = a.grad_out;
    const float* bias = a.bias;
    void *to = a.grad_x, *out = a.out;
    int64_t n = a.channels;
    auto rows = [&](auto d, auto again) DINO_INLINE {
        for (int64_t row = begin; row < end; ++row) {
            int64_t offset = row * n;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                float y = value<d.value>(x, offset + j) + bias[j], magnitude = clamped_magnitude(y);
                float density = exp2_negative<d.value>(-0.72134752f * magnitude * magnitude - 1.32574806f);
                float tail = upper_tail<d.value>(magnitude), slope = tail - magnitude * density;  // of gelu at -|y|
                float grad_x = value<d.value>(grad_out, offset + j) * (y < 0.0f ? slope : 1.0f - slope);
                sums[j] += grad_x;
                put<d.value>(to, offset + j, grad_x);
                if (again.value) put<d.value>(out, offset + j, (y < 0.0f ? 0.0f : y) - magnitude * tail);
            }
        }
    };
    with_dtype(a.dtype, [&](auto d) DINO_INLINE { out ? rows(d, std::true_type()) : rows(d, std::false_type()); });
}

}  // namespace

void bias_gelu(const BiasGeluArgs& a) {
    int64_t rows = std::max<int64_t>(1, kChunk / a.channels);  // a task
    parallel_for((a.tokens + rows - 1) / rows, a.threads,
                 [&](int64_t task) { forward_rows(a, task * rows, std::min(a.tokens, (task + 1) * rows)); });
}

void bias_gelu_backward(const BiasGeluBackwardArgs& a) {
    parallel_for(a.groups, a.threads, [&](int64_t group) {
        backward_rows(a, group * a.tokens / a.groups, (group + 1) * a.tokens / a.groups,
                      a.partial + group * a.channels);
    });
}

}  // namespace dino
