// Residual sum and layer norm in one pass, and their gradients; formulas in dino_kernels/ops/add_layer_norm.py.
// A row stays in the first-level cache between the sweeps over it.
#include "cpu/add_layer_norm.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task of the forward pass

// Walks rows in order: at(row) is the index of the row in a tensor that may hold only some rows, or -1.
struct Walk {
    RowsOf rows;
    int64_t next;

    int64_t at(int64_t row) {
        if (rows.count >= 0 && (next == rows.count || rows.indices[next] != row)) return -1;
        return next++;
    }
};

DINO_INLINE inline Walk walk_from(int64_t begin, const RowsOf& rows) {
    const int32_t* indices = rows.indices;
    return {rows, rows.count < 0 ? begin : std::lower_bound(indices, indices + rows.count, begin) - indices};
}

// A row of x, to which row `added` of the branch is added and which is normalized to row `made`; -1: is not.
template <DType X, DType B>
DINO_INLINE inline void forward_row(const AddLayerNormArgs& a, int64_t row, int64_t added, int64_t made) {
    int64_t n = a.channels, offset = row * n, branch_offset = added * n, normed_offset = made * n;
    // Copies, which no store through another pointer can change.
    const float *weight = a.weight, *bias = a.bias;
    const void *x = a.x, *branch = a.branch;
    void *sums = a.total, *normed = a.normed;
    float scale = a.scale && added >= 0 ? a.scale[added] : 1.0f, sum = 0;
    auto put_total = [&](auto adds) DINO_INLINE {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
            float total = value<X>(x, offset + j);
            if (adds.value) total += scale * value<B>(branch, branch_offset + j);
            put<X>(sums, offset + j, total);
            sum += rounded<X>(total);
        }
    };
    if (added >= 0)
        put_total(std::true_type());
    else
        put_total(std::false_type());
    if (made < 0) return;
    float mean = sum / float(n), squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; ++j) {
        float centered = value<X>(sums, offset + j) - mean;
        squares += centered * centered;
    }
    float rstd = 1.0f / std::sqrt(squares / float(n) + a.eps);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
        put<B>(normed, normed_offset + j, (value<X>(sums, offset + j) - mean) * rstd * weight[j] + bias[j]);
    a.mean[made] = mean;
    a.rstd[made] = rstd;
}

DINO_MULTIVERSION
void forward_rows(const AddLayerNormArgs& a, int64_t begin, int64_t end) {
    Walk added = walk_from(begin, a.branch_rows), made = walk_from(begin, a.normed_rows);
    with_dtype(a.x_dtype, [&](auto x) DINO_INLINE {
        with_dtype(a.branch_dtype, [&](auto branch) DINO_INLINE {
            for (int64_t row = begin; row < end; ++row)
                forward_row<x.value, branch.value>(a, row, added.at(row), made.at(row));
        });
    });
}

// The gradients of a row of x and of row `added` of the branch, as in the forward.
template <DType X, DType B>
DINO_INLINE inline void backward_row(const AddLayerNormBackwardArgs& a, int64_t row, int64_t added, int64_t made,
                                     float* grad_weight, float* grad_bias) {
    int64_t n = a.channels, offset = row * n, branch_offset = added * n, normed_offset = made * n;
    const float* weight = a.weight;
    const void *grad_normed = a.grad_normed, *total = a.total, *grad_total = a.grad_total;
    void *grad_x = a.grad_x, *grad_branch = a.grad_branch;
    float mean = 0, rstd = 0, mean_g = 0, mean_gx = 0;
    if (made >= 0) {
        mean = a.mean[made];
        rstd = a.rstd[made];
#pragma omp simd reduction(+ : mean_g, mean_gx)
        for (int64_t j = 0; j < n; ++j) {
            float grad = value<B>(grad_normed, normed_offset + j), normal = (value<X>(total, offset + j) - mean) * rstd;
            mean_g += grad * weight[j];
            mean_gx += grad * weight[j] * normal;
            grad_weight[j] += grad * normal;
            grad_bias[j] += grad;
        }
        mean_g /= float(n);
        mean_gx /= float(n);
    }
    float scale = a.scale && added >= 0 ? a.scale[added] : 1.0f;
    auto finish = [&](auto norm, auto residual, auto branch) DINO_INLINE {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            float out = 0;
            if (norm.value) {
                float grad = value<B>(grad_normed, normed_offset + j);
                float normal = (value<X>(total, offset + j) - mean) * rstd;
                out = (grad * weight[j] - mean_g - normal * mean_gx) * rstd;
            }
            if (residual.value) out += value<X>(grad_total, offset + j);
            put<X>(grad_x, offset + j, out);
            if (branch.value) put<B>(grad_branch, branch_offset + j, scale * out);
        }
    };
    auto choose = [](bool yes, auto then) DINO_INLINE {
        if (yes)
            then(std::true_type());
        else
            then(std::false_type());
    };
    choose(made >= 0, [&](auto norm) DINO_INLINE {
        choose(grad_total, [&](auto residual) DINO_INLINE {
            choose(grad_branch && added >= 0, [&](auto branch) DINO_INLINE { finish(norm, residual, branch); });
        });
    });
}

// Rows [begin, end), whose sums of the gradients of weight and bias go to grad_weight and grad_bias [C].
DINO_MULTIVERSION
void backward_rows(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* grad_weight,
                   float* grad_bias) {
    std::fill(grad_weight, grad_weight + a.channels, 0.0f);
    std::fill(grad_bias, grad_bias + a.channels, 0.0f);
    Walk added = walk_from(begin, a.branch_rows), made = walk_from(begin, a.normed_rows);
    with_dtype(a.x_dtype, [&](auto x) DINO_INLINE {
        with_dtype(a.branch_dtype, [&](auto branch) DINO_INLINE {
            for (int64_t row = begin; row < end; ++row)
                backward_row<x.value, branch.value>(a, row, added.at(row), made.at(row), grad_weight, grad_bias);
        });
    });
}

void check(const char* name, const RowsOf& rows, int64_t tokens) {
    for (int64_t i = 0, least = 0; i < rows.count; ++i) {
        int64_t index = rows.indices[i];
        if (index < least || index >= tokens)
            throw std::invalid_argument(std::string(name) + " must rise from at least 0 to below the " +
                                        std::to_string(tokens) + " tokens of x, got " + std::to_string(index) +
                                        " at place " + std::to_string(i));
        least = index + 1;
    }
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& a) {
    check("rows", a.branch_rows, a.tokens);
    check("normed_rows", a.normed_rows, a.tokens);
    int64_t rows = std::max<int64_t>(1, kChunk / a.channels);  // a task
    parallel_for((a.tokens + rows - 1) / rows, a.threads,
                 [&](int64_t task) { forward_rows(a, task * rows, std::min(a.tokens, (task + 1) * rows)); });
}

void add_layer_norm_backward(const AddLayerNormBackwardArgs& a) {
    parallel_for(a.groups, a.threads, [&](int64_t group) {
        float* sums = a.partial + 2 * group * a.channels;
        backward_rows(a, group * a.tokens / a.groups, (group + 1) * a.tokens / a.groups, sums, sums + a.channels);
    });
    for (const float *sums = a.partial, *end = sums + 2 * a.groups * a.channels; sums < end; sums += 2 * a.channels)
        for (int64_t j = 0; j < a.channels; ++j) {
            a.grad_weight[j] += sums[j];
            a.grad_bias[j] += sums[a.channels + j];
        }
}

}  // namespace dino
