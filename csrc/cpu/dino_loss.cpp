// The DINO loss, its gradient and the batch center; formula and notation in dino_kernels/ops/dino_loss.py.
// An image's rows are one task: its two teacher rows become probabilities in a scratch that
// stays in cache while all views of the image are read once from memory and their gradients written once.
#include "cpu/dino_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/math.h"
#include "common/memory.h"
#include "common/nontemporal.h"
#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kBlock = 1024;    // elements a block: a few blocks fit the first-level cache
constexpr int64_t kColumns = 4096;  // columns a task of the batch center

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
DINO_MULTIVERSION
void teacher_probabilities(const Row& row, const float* center, float* probs) {
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
DINO_MULTIVERSION
Stats student_stats(const Row& row, const float* q, float* exps, float* block_max) {
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

// grad = (pairs * softmax(row / temp) - q) * scale, in the dtype of the row
DINO_MULTIVERSION
void student_gradient(const Row& row, const float* q, const float* exps, const float* block_max, double lse,
                      double prob_scale, double q_scale, void* grad, int64_t grad_offset, bool nontemporal) {
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

DINO_MULTIVERSION
void mean_columns(const DinoLossArgs& a, int64_t begin, int64_t count) {
    float scratch[kColumns];
    float* mean = a.batch_center + begin;
    std::fill(mean, mean + count, 0.0f);
    for (int64_t row = 0; row < 2 * a.batch; ++row) {
        const float* t = load(a.teacher, a.teacher_dtype, row * a.teacher_stride + begin, count, scratch);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) mean[j] += t[j];
    }
    float rows = float(2 * a.batch);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) mean[j] /= rows;
}

int64_t gradient_bytes(const DinoLossArgs& a) { return a.views * a.batch * a.outputs * width_of(a.student_dtype); }

// Loss and gradient of views [begin, end) of image b; returns the sum over its pairs.
double image_views(const DinoLossArgs& a, int64_t b, int64_t begin, int64_t end) {
    FlushDenormals flush;
    // Kept by the thread: new memory would cost page faults for every image.
    thread_local std::vector<float> scratch;
    scratch.resize(3 * a.outputs + (a.outputs + kBlock - 1) / kBlock);
    float *q[2] = {scratch.data(), scratch.data() + a.outputs}, *exps = scratch.data() + 2 * a.outputs;
    float* block_max = exps + a.outputs;
    for (int u = 0; u < 2; ++u) {
        int64_t offset = (u * a.batch + b) * a.teacher_stride;
        teacher_probabilities({a.teacher, a.teacher_dtype, offset, a.outputs, 1 / a.teacher_temp},
                              a.center + u * a.center_stride, q[u]);
    }
    double inv_temp = 1.0 / a.student_temp, loss = 0;
    double scale = inv_temp / double((2 * a.views - 2) * a.batch);
    bool summed = false, nontemporal = gradient_bytes(a) > kCached;
    for (int64_t v = begin; v < end; ++v) {
        if (v >= 2 && !summed) {  // from here on both teacher views are targets
            for (int64_t k = 0; k < a.outputs; ++k) q[0][k] += q[1][k];
            summed = true;
        }
        int64_t pairs = v < 2 ? 1 : 2;
        const float* target = v == 0 ? q[1] : q[0];
        Row row{a.student, a.student_dtype, (v * a.batch + b) * a.student_stride, a.outputs, float(inv_temp)};
        Stats stats = student_stats(row, target, exps, block_max);
        loss += double(pairs) * stats.lse - stats.dot * inv_temp;
        student_gradient(row, target, exps, block_max, stats.lse, double(pairs) * scale, scale, a.grad,
                         (v * a.batch + b) * a.grad_stride, nontemporal);
    }
    finish_streaming();
    return loss;
}

}  // namespace

double dino_loss(const DinoLossArgs& a) {
    if (a.grad != a.student) use_huge_pages(a.grad, size_t(gradient_bytes(a)));
    parallel_for((a.outputs + kColumns - 1) / kColumns, a.threads, [&](int64_t task) {
        mean_columns(a, task * kColumns, std::min(kColumns, a.outputs - task * kColumns));
    });
    // With fewer images than threads, tasks share an image's views and recompute its softmax.
    int64_t groups = std::min(a.views, (a.threads + a.batch - 1) / a.batch);
    std::vector<double> losses(a.batch * groups);
    parallel_for(a.batch * groups, a.threads, [&](int64_t task) {
        int64_t b = task / groups, group = task % groups;
        losses[task] = image_views(a, b, group * a.views / groups, (group + 1) * a.views / groups);
    });
    double total = 0;  // in order of tasks, whatever thread ran them
    for (double loss : losses) total += loss;
    return total / double((2 * a.views - 2) * a.batch);
}

}  // namespace dino
