// The cross-entropy of one student row against its target with its gradient, and the mean of the teacher's rows: what
// dino_loss and patch_loss share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/nontemporal.h"
#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kBlock = 1024;    // elements a block: a few blocks fit the first-level cache
constexpr int64_t kColumns = 4096;  // most columns a task of the mean row

struct Row {
    const void* data;
    DType dtype;
    int64_t offset, outputs;
    float inv_temp;
};

struct Stats {
    double lse = 0, dot = 0;  // logsumexp(row / temp); <q, raw row>
};

// probs = softmax((row - center) / temp)
DINO_MULTIVERSION inline void teacher_probabilities(const Row& row, const float* center, float* probs) {
    float scratch[kBlock];
    float max = -std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < row.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, row.outputs - k);
        const float* t = load(row.data, row.dtype, row.offset + k, n, scratch);
#pragma omp simd reduction(max : max)
        for (int64_t j = 0; j < n; ++j) {
            float x = (t[j] - center[k + j]) * row.inv_temp;
            probs[k + j] = x;
            max = x > max ? x : max;
        }
    }
    double total = 0;
    for (int64_t k = 0; k < row.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, row.outputs - k);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
            float e = exp_negative(probs[k + j] - max);
            probs[k + j] = e;
            sum += e;
        }
        total += sum;
    }
    float scale = float(1 / total);
#pragma omp simd
    for (int64_t k = 0; k < row.outputs; ++k) probs[k] *= scale;
}

// Leaves exp(row / temp - block_max[block]) in exps, so that the gradient needs no second exponential.
DINO_MULTIVERSION inline Stats student_stats(const Row& row, const float* q, float* exps, float* block_max) {
    float scratch[kBlock];
    float max = -std::numeric_limits<float>::infinity();
    double total = 0, total_dot = 0;
    for (int64_t k = 0; k < row.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, row.outputs - k);
        const float* s = load(row.data, row.dtype, row.offset + k, n, scratch);
        // Prefetches the next block; the hardware prefetcher stops at page ends.
        int64_t width = width_of(row.dtype);
        const char* next = static_cast<const char*>(row.data) + (row.offset + k + n) * width;
        for (int64_t i = 0; i < std::min(kBlock, row.outputs - k - n) * width; i += 64) __builtin_prefetch(next + i);
        float highest = max, sum = 0, dot = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < n; ++j) {
            float x = s[j] * row.inv_temp;
            highest = x > highest ? x : highest;
        }
        if (highest > max) total *= std::exp(double(max) - double(highest));
        block_max[k / kBlock] = max = highest;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t j = 0; j < n; ++j) {
            float e = exp_negative(s[j] * row.inv_temp - max);
            exps[k + j] = e;
            sum += e;
            dot += q[k + j] * s[j];
        }
        total += sum;
        total_dot += dot;
    }
    return {max + std::log(total), total_dot};
}

// grad = prob_scale * softmax(row / temp) - q_scale * q, in the dtype of the row
DINO_MULTIVERSION inline void student_gradient(const Row& row, const float* q, const float* exps,
                                               const float* block_max, double lse, double prob_scale, double q_scale,
                                               void* grad, int64_t grad_offset, bool nontemporal) {
    alignas(64) float out[kBlock];
    alignas(64) uint16_t out16[kBlock];
    int64_t width = width_of(row.dtype);
    char* g = static_cast<char*>(grad) + grad_offset * width;
    float minus_q = -float(q_scale);
    for (int64_t k = 0; k < row.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, row.outputs - k);
        float factor = float(prob_scale * std::exp(double(block_max[k / kBlock]) - lse));
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = factor * exps[k + j] + minus_q * q[k + j];
        if (row.dtype == DType::bf16)
            for (int64_t j = 0; j < n; ++j) out16[j] = float_to_bf16(out[j]);
        else if (row.dtype == DType::f16)
            for (int64_t j = 0; j < n; ++j) out16[j] = float_to_half(out[j]);
        stream_store(g + k * width, row.dtype == DType::f32 ? static_cast<void*>(out) : out16, n * width, nontemporal);
    }
}

struct Matrix {
    const void* data;
    DType dtype;
    int64_t stride, rows, outputs;
};

DINO_MULTIVERSION inline void mean_columns(const Matrix& x, const float* weights, int64_t begin, int64_t count,
                                           float* mean) {
    float scratch[kColumns];
    std::fill_n(mean, count, 0.0f);
    int64_t counted = 0;
    for (int64_t row = 0; row < x.rows; ++row) {
        if (weights && weights[row] == 0) continue;
        ++counted;
        const float* t = load(x.data, x.dtype, row * x.stride + begin, count, scratch);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) mean[j] += t[j];
    }
    float rows = float(std::max<int64_t>(counted, 1));
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) mean[j] /= rows;
}

// mean [outputs] of the rows whose weight is not zero, or of all without weights; zeros if there are none
inline void mean_row(const Matrix& x, const float* weights, float* mean, int threads) {
    int64_t share = (x.outputs + threads - 1) / threads, columns = std::clamp<int64_t>(share, 512, kColumns);
    parallel_for((x.outputs + columns - 1) / columns, threads, [&](int64_t task) {
        int64_t begin = task * columns;
        mean_columns(x, weights, begin, std::min(columns, x.outputs - begin), mean + begin);
    });
}

}  // namespace
}  // namespace dino
