// Residual sum and layer norm in one pass, and their gradients; formulas in dino_kernels/add_layer_norm.py.
// A row stays in the first-level cache between the sweeps over it.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass

template <DType X, DType B>
DINO_INLINE inline void forward_row(const AddLayerNormArgs& a, int64_t row) {
    int64_t n = a.channels, offset = row * n;
    // Copies, which no store through another pointer can change.
    const float *weight = a.weight, *bias = a.bias;
    const void *x = a.x, *branch = a.branch;
    void *sums = a.total, *normed = a.normed;
    float scale = a.scale ? a.scale[row] : 1.0f, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
        float total = value<X>(x, offset + j) + scale * value<B>(branch, offset + j);
        put<X>(sums, offset + j, total);
        sum += rounded<X>(total);
    }
    float mean = sum / float(n), squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; ++j) {
        float centered = value<X>(sums, offset + j) - mean;
        squares += centered * centered;
    }
    float rstd = 1.0f / std::sqrt(squares / float(n) + a.eps);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
        put<B>(normed, offset + j, (value<X>(sums, offset + j) - mean) * rstd * weight[j] + bias[j]);
    a.mean[row] = mean;
    a.rstd[row] = rstd;
}

DINO_MULTIVERSION
void forward_rows(const AddLayerNormArgs& a, int64_t begin, int64_t end) {
    with_dtype(a.x_dtype, [&](auto x) DINO_INLINE {
        with_dtype(a.branch_dtype, [&](auto branch) DINO_INLINE {
            for (int64_t row = begin; row < end; ++row) forward_row<x.value, branch.value>(a, row);
        });
    });
}

template <DType X, DType B>
DINO_INLINE inline void backward_row(const AddLayerNormBackwardArgs& a, int64_t row, float* grad_weight,
                                     float* grad_bias) {
    int64_t n = a.channels, offset = row * n;
    const float* weight = a.weight;
    const void *grad_normed = a.grad_normed, *total = a.total, *grad_total = a.grad_total;
    void *grad_x = a.grad_x, *grad_branch = a.grad_branch;
    float mean = a.mean[row], rstd = a.rstd[row], mean_g = 0, mean_gx = 0;
#pragma omp simd reduction(+ : mean_g, mean_gx)
    for (int64_t j = 0; j < n; ++j) {
        float grad = value<B>(grad_normed, offset + j), normal = (value<X>(total, offset + j) - mean) * rstd;
        mean_g += grad * weight[j];
        mean_gx += grad * weight[j] * normal;
        grad_weight[j] += grad * normal;
        grad_bias[j] += grad;
    }
    mean_g /= float(n);
    mean_gx /= float(n);
    float scale = a.scale ? a.scale[row] : 1.0f;
    auto finish = [&](auto residual, auto branch) DINO_INLINE {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            float grad = value<B>(grad_normed, offset + j), normal = (value<X>(total, offset + j) - mean) * rstd;
            float out = (grad * weight[j] - mean_g - normal * mean_gx) * rstd;
            if (residual.value) out += value<X>(grad_total, offset + j);
            put<X>(grad_x, offset + j, out);
            if (branch.value) put<B>(grad_branch, offset + j, scale * out);
        }
    };
    if (grad_total && grad_branch)
        finish(std::true_type(), std::true_type());
    else if (grad_total)
        finish(std::true_type(), std::false_type());
    else if (grad_branch)
        finish(std::false_type(), std::true_type());
    else
        finish(std::false_type(), std::false_type());
}

// Rows [begin, end), whose sums of the gradients of weight and bias go to grad_weight and grad_bias [C].
DINO_MULTIVERSION
void backward_rows(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* grad_weight,
                   float* grad_bias) {
    std::fill(grad_weight, grad_weight + a.channels, 0.0f);
    std::fill(grad_bias, grad_bias + a.channels, 0.0f);
    with_dtype(a.x_dtype, [&](auto x) DINO_INLINE {
        with_dtype(a.branch_dtype, [&](auto branch) DINO_INLINE {
            for (int64_t row = begin; row < end; ++row)
                backward_row<x.value, branch.value>(a, row, grad_weight, grad_bias);
        });
    });
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& a) {
    int64_t rows = std::max<int64_t>(1, kChunk / a.channels);  // a task
    parallel_for((a.tokens + rows - 1) / rows, a.threads,
                 [&](int64_t task) { forward_rows(a, task * rows, std::min(a.tokens, (task + 1) * rows)); });
}

void add_layer_norm_backward(const AddLayerNormBackwardArgs& a) {
    parallel_for(a.groups, a.threads, [&](int64_t group) {
        float* sums = a.partial + 2 * group * a.channels;
        backward_rows(a, group * a.tokens / a.groups, (group + 1) * a.tokens / a.groups, sums, sums + a.channels);
    });
}

}  // namespace dino
