// gelu(x + bias) and its gradients; formula and the approximation of the tail in dino_kernels/ops/bias_gelu.py.
#include "cpu/bias_gelu.h"

#include <algorithm>

#include "common/parallel.h"
#include "cpu/gelu.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass

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
                put<d.value>(out, offset + j, gelu<d.value>(value<d.value>(x, offset + j) + bias[j]));
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
                float slope, y = gelu_with_slope<d.value>(value<d.value>(x, offset + j) + bias[j], slope);
                float grad_x = value<d.value>(grad_out, offset + j) * slope;
                sums[j] += grad_x;
                put<d.value>(to, offset + j, grad_x);
                if (again.value) put<d.value>(out, offset + j, y);
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
