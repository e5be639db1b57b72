// Rows of norm g, and the gradients of both; formulas in dino_kernels/ops/weight_norm.py.
#include "cpu/weight_norm.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/weight_norm_row.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements a task

DINO_MULTIVERSION
void forward_rows(const WeightNormArgs& a, int64_t begin, int64_t end, float* scratch) {
    int64_t n = a.channels;
    for (int64_t row = begin; row < end; ++row) {
        normalize_row(a.v + row * n, a.g[row], n, scratch);
        store(a.w, a.dtype, row * n, n, scratch);
    }
}

DINO_MULTIVERSION
void backward_rows(const WeightNormBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
    int64_t n = a.channels;
    for (int64_t row = begin; row < end; ++row) {
        const float *v = a.v + row * n, *grad_w = load(a.grad_w, a.dtype, row * n, n, scratch);
        float* grad_v = a.grad_v + row * n;
        RowGradient of = row_gradient(grad_w, v, a.g[row], n);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) grad_v[j] += of.scale * (grad_w[j] - of.pull * v[j]);
        if (a.grad_g) a.grad_g[row] += of.along;
    }
}

template <class Args>
void by_chunks(const Args& a, void (*rows_of)(const Args&, int64_t, int64_t, float*)) {
    int64_t rows = std::max<int64_t>(1, kChunk / a.channels);  // a task
    parallel_for((a.rows + rows - 1) / rows, a.threads, [&](int64_t task) {
        std::vector<float> scratch(a.channels);
        rows_of(a, task * rows, std::min(a.rows, (task + 1) * rows), scratch.data());
    });
}

}  // namespace

void weight_norm(const WeightNormArgs& a) { by_chunks(a, forward_rows); }
void weight_norm_backward(const WeightNormBackwardArgs& a) { by_chunks(a, backward_rows); }

}  // namespace dino
