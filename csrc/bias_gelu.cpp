// gelu(x + bias) and its gradients; formula and the approximation of the tail in dino_kernels/bias_gelu.py.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass
constexpr int64_t kBlock = 1024;     // elements widened at a time from 16 bits

// 2^y for -126 <= y <= 0 within 2 ulp: 2^n * p(y - n), n = round(y).
__attribute__((always_inline)) inline float exp2_negative(float y) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves n in the low mantissa bits
    float shifted = y + kRound, f = y - (shifted - kRound);
    float p = 0x1.5bba14p-10f;
    p = p * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
}

// Q(a), the upper tail of the normal distribution, for 0 <= a <= 8.
__attribute__((always_inline)) inline float upper_tail(float a) {
    float p = 9.62331868e-08f;
    p = p * a - 2.69186603e-06f;
    p = p * a + 2.86689447e-05f;
    p = p * a - 0.000119625671f;
    p = p * a - 0.000318522827f;
    p = p * a + 0.00731778331f;
    p = p * a - 0.0526791997f;
    p = p * a - 0.459147513f;
    p = p * a - 1.15111184f;
    return exp2_negative(p * a - 1.0f);
}

__attribute__((always_inline)) inline float clamped_magnitude(float x) {
    float a = std::fabs(x);
    return a > 8.0f ? 8.0f : a;
}

DINO_MULTIVERSION
void forward_rows(const BiasGeluArgs& a, int64_t begin, int64_t end) {
    float scratch[kBlock], out[kBlock];
    for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < a.channels; c += kBlock) {
            int64_t n = std::min(kBlock, a.channels - c), offset = row * a.channels + c;
            const float *x = load(a.x, a.dtype, offset, n, scratch), *bias = a.bias + c;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                float y = x[j] + bias[j], magnitude = clamped_magnitude(y);
                out[j] = (y < 0.0f ? 0.0f : y) - magnitude * upper_tail(magnitude);
            }
            store(a.out, a.dtype, offset, n, out);
        }
}

// Rows [begin, end), whose sums of gradients go to `sums` [C].
DINO_MULTIVERSION
void backward_rows(const BiasGeluBackwardArgs& a, int64_t begin, int64_t end, float* sums) {
    float x_scratch[kBlock], grad_scratch[kBlock], grad_x[kBlock], out[kBlock];
    std::fill(sums, sums + a.channels, 0.0f);
    for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < a.channels; c += kBlock) {
            int64_t n = std::min(kBlock, a.channels - c), offset = row * a.channels + c;
            const float* x = load(a.x, a.dtype, offset, n, x_scratch);
            const float* grad = load(a.grad_out, a.dtype, offset, n, grad_scratch);
            const float* bias = a.bias + c;
            float* sum = sums + c;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                float y = x[j] + bias[j], magnitude = clamped_magnitude(y);
                float density = exp2_negative(-0.72134752f * magnitude * magnitude - 1.32574806f);
                float tail = upper_tail(magnitude), slope = tail - magnitude * density;  // of gelu at -|y|
                grad_x[j] = grad[j] * (y < 0.0f ? slope : 1.0f - slope);
                sum[j] += grad_x[j];
                out[j] = (y < 0.0f ? 0.0f : y) - magnitude * tail;
            }
            store(a.grad_x, a.dtype, offset, n, grad_x);
            if (a.out) store(a.out, a.dtype, offset, n, out);
        }
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
