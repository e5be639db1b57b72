// Clip, AdamW, EMA and 16-bit copies over flat buffers: a pass for the norms of the gradient, a pass for the rest. It
// waits for memory, so that to clear the gradient it has just read takes no time.
// Formula in dino_kernels/ops/adamw_ema.py.
#include "cpu/adamw_ema.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/nontemporal.h"
#include "common/parallel.h"
#include "cpu/weight_norm_row.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements a task
constexpr int64_t kBlock = 1024;     // elements at a time in the first-level cache

struct Factors {
    float clip, rate, inv_sqrt_correction2, decay;
};

DINO_MULTIVERSION
double sum_of_squares(const void* grad, DType dtype, int64_t begin, int64_t count) {
    float scratch[kBlock];
    double total = 0;
    for (int64_t i = 0; i < count; i += kBlock) {
        int64_t n = std::min(kBlock, count - i);
        const float* g = load(grad, dtype, begin + i, n, scratch);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += g[j] * g[j];
        total += sum;
    }
    return total;
}

// The optimizer's step, where there is one, and the teacher's of n weights from i on.
DINO_INLINE inline void update_block(const AdamwEmaArgs& a, int64_t i, int64_t n, const Factors* f, float* scratch) {
    float beta1 = float(a.beta1), beta2 = float(a.beta2), rest1 = float(1 - a.beta1), rest2 = float(1 - a.beta2);
    float momentum = float(a.momentum), rest = float(1 - a.momentum), eps = float(a.eps);
    float *s = a.student + i, *m1 = a.exp_avg + i, *m2 = a.exp_avg_sq + i, *t = a.teacher + i;
    if (f) {
        const float* g = load(a.grad, a.grad_dtype, i, n, scratch);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            float x = g[j] * f->clip;
            m1[j] = beta1 * m1[j] + rest1 * x;
            m2[j] = beta2 * m2[j] + rest2 * x * x;
            s[j] = s[j] * f->decay - f->rate * m1[j] / (std::sqrt(m2[j]) * f->inv_sqrt_correction2 + eps);
        }
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) t[j] = momentum * t[j] + rest * s[j];
}

// n values of x to [offset, offset + n) of `to`, rounded through `scratch`; copies of a whole net are read at the next
// step, when no cache holds them any more.
DINO_INLINE inline void put_copy(const AdamwEmaArgs& a, void* to, DType dtype, int64_t offset, int64_t n,
                                 const float* x, void* scratch) {
    int64_t width = width_of(dtype);
    store(scratch, dtype, 0, n, x);
    stream_store(static_cast<char*>(to) + offset * width, scratch, n * width, a.offsets[a.segments] * width > kCached);
}

DINO_MULTIVERSION
void update(const AdamwEmaArgs& a, int64_t begin, int64_t count, const Factors* f) {
    bool clear = begin < a.offsets[a.cleared];
    int64_t width = width_of(a.grad_dtype);
    alignas(64) float scratch[kBlock];
    for (int64_t i = begin; i < begin + count; i += kBlock) {
        int64_t n = std::min(kBlock, begin + count - i);
        update_block(a, i, n, f, scratch);
        if (clear) std::memset(static_cast<char*>(a.grad) + i * width, 0, size_t(n * width));
        if (a.student_16) put_copy(a, a.student_16, a.student_16_dtype, i, n, a.student + i, scratch);
        if (a.teacher_16) put_copy(a, a.teacher_16, a.teacher_16_dtype, i, n, a.teacher + i, scratch);
    }
    finish_streaming();
}

// to[row] = g v / |v|
DINO_INLINE inline void normalize(const AdamwEmaArgs& a, const float* v, float g, void* to, int64_t row,
                                  float* scratch) {
    alignas(64) float rounded[kMostChannels];
    int64_t n = a.channels;
    normalize_row(v, g, n, scratch);
    put_copy(a, to, a.rows_dtype, row * n, n, scratch, rounded);
}

// Rows [first, first + count) of the weight-normed layer, and what they are multiplied as.
DINO_MULTIVERSION
void update_rows(const AdamwEmaArgs& a, int64_t first, int64_t count, const Factors* f) {
    float scratch[kMostChannels];
    int64_t v = a.offsets[a.segments - 1], g = a.offsets[a.segments - 2], n = a.channels;
    for (int64_t row = first; row < first + count; ++row) {
        int64_t i = v + row * n;
        update_block(a, i, n, f, scratch);
        normalize(a, a.student + i, a.student[g + row], a.student_rows, row, scratch);
        normalize(a, a.teacher + i, a.teacher[g + row], a.teacher_rows, row, scratch);
    }
    finish_streaming();
}

}  // namespace

bool adamw_ema_step(const AdamwEmaArgs& a) {
    std::vector<int64_t> first_chunk(a.segments + 1, 0);
    for (int64_t i = 0; i < a.segments; ++i)
        first_chunk[i + 1] = first_chunk[i] + (a.offsets[i + 1] - a.offsets[i] + kChunk - 1) / kChunk;
    auto locate = [&](int64_t chunk, int64_t& begin, int64_t& count) {
        int64_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
        begin = a.offsets[i] + (chunk - first_chunk[i]) * kChunk;
        count = std::min(kChunk, a.offsets[i + 1] - begin);
        return i;
    };
    std::vector<double> squares(first_chunk.back());
    parallel_for(first_chunk.back(), a.threads, [&](int64_t chunk) {
        int64_t begin, count, i = locate(chunk, begin, count);
        squares[chunk] = a.frozen[i] ? 0 : sum_of_squares(a.grad, a.grad_dtype, begin, count);
    });
    std::vector<Factors> factors(a.segments);
    for (int64_t i = 0; i < a.segments; ++i) {
        double total = 0;
        for (int64_t chunk = first_chunk[i]; chunk < first_chunk[i + 1]; ++chunk) total += squares[chunk];
        double norm = std::sqrt(total), n = double(a.steps[i] + 1);
        if (!std::isfinite(norm)) return true;
        factors[i] = {float(a.clip_norm > 0 ? std::min(1.0, a.clip_norm / (norm + 1e-6)) : 1.0),
                      float(a.lr / (1 - std::pow(a.beta1, n))), float(1 / std::sqrt(1 - std::pow(a.beta2, n))),
                      float(a.decayed[i] ? 1 - a.lr * a.weight_decay : 1.0)};
    }
    auto factors_of = [&](int64_t i) { return a.frozen[i] ? nullptr : &factors[i]; };
    int64_t last = a.segments - 1;
    parallel_for(first_chunk[a.student_rows ? last : a.segments], a.threads, [&](int64_t chunk) {
        int64_t begin, count, i = locate(chunk, begin, count);
        update(a, begin, count, factors_of(i));
    });
    if (a.student_rows) {  // after their norms
        int64_t rows = std::max<int64_t>(1, kChunk / a.channels);
        parallel_for((a.rows + rows - 1) / rows, a.threads,
                     [&](int64_t i) { update_rows(a, i * rows, std::min(rows, a.rows - i * rows), factors_of(last)); });
    }
    for (int64_t i = 0; i < a.segments; ++i) a.steps[i] += !a.frozen[i];
    return false;
}

}  // namespace dino
