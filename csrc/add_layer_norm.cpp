// Residual sum and layer norm in one pass, and their gradients; formulas in dino_kernels/add_layer_norm.py.
// A row stays in the first-level cache between the sweeps over it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass

DINO_MULTIVERSION
void forward_rows(const AddLayerNormArgs& a, int64_t begin, int64_t end) {
    int64_t n = a.channels;
    std::vector<float> scratch(3 * n);
    float *sums = scratch.data(), *out = sums + 2 * n;
    for (int64_t row = begin; row < end; ++row) {
        int64_t offset = row * n;
        const float* x = load(a.x, a.x_dtype, offset, n, sums);
        const float* branch = load(a.branch, a.branch_dtype, offset, n, sums + n);
        float scale = a.scale ? a.scale[row] : 1.0f;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = x[j] + scale * branch[j];
        store(a.total, a.x_dtype, offset, n, out);
        const float* total = load(a.total, a.x_dtype, offset, n, sums);  // as rounded
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += total[j];
        float mean = sum / float(n), squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < n; ++j) squares += (total[j] - mean) * (total[j] - mean);
        float rstd = 1.0f / std::sqrt(squares / float(n) + a.eps);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = (total[j] - mean) * rstd * a.weight[j] + a.bias[j];
        store(a.normed, a.branch_dtype, offset, n, out);
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

// Rows [begin, end), whose sums of the gradients of weight and bias go to grad_weight and grad_bias [C].
DINO_MULTIVERSION
void backward_rows(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* grad_weight,
                   float* grad_bias) {
    int64_t n = a.channels;
    const float* weight = a.weight;
    std::vector<float> scratch(4 * n);
    float *buffer = scratch.data(), *out = buffer + 3 * n;
    std::fill(grad_weight, grad_weight + n, 0.0f);
    std::fill(grad_bias, grad_bias + n, 0.0f);
    for (int64_t row = begin; row < end; ++row) {
        int64_t offset = row * n;
        const float* total = load(a.total, a.x_dtype, offset, n, buffer);
        const float* grad = load(a.grad_normed, a.branch_dtype, offset, n, buffer + n);
        float mean = a.mean[row], rstd = a.rstd[row], mean_g = 0, mean_gx = 0;
#pragma omp simd reduction(+ : mean_g, mean_gx)
        for (int64_t j = 0; j < n; ++j) {
            float normal = (total[j] - mean) * rstd;
            out[j] = grad[j] * weight[j];
            mean_g += out[j];
            mean_gx += out[j] * normal;
            grad_weight[j] += grad[j] * normal;
            grad_bias[j] += grad[j];
        }
        mean_g /= float(n);
        mean_gx /= float(n);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = (out[j] - mean_g - (total[j] - mean) * rstd * mean_gx) * rstd;
        if (a.grad_total) {
            const float* grad_total = load(a.grad_total, a.x_dtype, offset, n, buffer + 2 * n);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] += grad_total[j];
        }
        store(a.grad_x, a.x_dtype, offset, n, out);
        if (!a.grad_branch) continue;
        if (a.scale) {
            float scale = a.scale[row];
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] *= scale;
        }
        store(a.grad_branch, a.branch_dtype, offset, n, out);
    }
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
