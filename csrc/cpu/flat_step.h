// One step of an optimizer and of the teacher's EMA over flat buffers, for ops that differ in the optimizer's rule: a
// pass for the norms, a pass for the rest. It is bound by memory: clearing the gradient that it has just read takes no
// extra time.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "common/dtype.h"
#include "common/nontemporal.h"
#include "common/parallel.h"
#include "cpu/weight_norm_row.h"

namespace dino {

struct FlatStepArgs {
    float* student;  // flat, as all of the next
    void* grad;      // set to zero in the first `cleared` segments
    float* teacher;
    void *student_16, *teacher_16;  // or null
    DType grad_dtype, student_16_dtype, teacher_16_dtype;
    const int64_t* offsets;  // [segments + 1]
    int64_t segments;
    const bool *decayed, *frozen;                  // [segments]
    const int64_t* clip_groups;                    // [segments], or null: each is clipped by itself
    double lr, weight_decay, momentum, clip_norm;  // clip_norm 0: none
    // Null, or the normalized rows [rows, channels] of a weight-normed layer, whose v is the last segment and g the one
    // before. They replace the copies of the last segment.
    void *student_rows, *teacher_rows;
    DType rows_dtype;
    int64_t rows, channels;  // channels at most kMostChannels
    int64_t cleared;
    int threads;
};
constexpr int64_t kMostChannels = 4096;

namespace {

constexpr int64_t kChunk = 1 << 15;  // elements a task
constexpr int64_t kBlock = 1024;     // elements at a time in the first-level cache

// Of a segment or a part of it: squared norms of the gradient and the weights, and their dot product.
struct Sums {
    double grad, weights, product;

    void add(const Sums& x) { grad += x.grad, weights += x.weights, product += x.product; }
};

// min(1, clip_norm / norm) of a gradient, from the square of its norm
inline double clip_factor(const FlatStepArgs& a, double square) {
    return a.clip_norm > 0 ? std::min(1.0, a.clip_norm / (std::sqrt(square) + 1e-6)) : 1.0;
}

// The optimizer's step (`advance`, of each op) where there is one, and the teacher's, of n weights from i on.
template <class Args, class Factors>
DINO_INLINE inline void update_block(const Args& a, int64_t i, int64_t n, const Factors* f, float* scratch) {
    if (f) advance(a, i, n, load(a.grad, a.grad_dtype, i, n, scratch), *f);
    float momentum = float(a.momentum), rest = float(1 - a.momentum);
    float *s = a.student + i, *t = a.teacher + i;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) t[j] = momentum * t[j] + rest * s[j];
}

// n values of x to [offset, offset + n) of `to`, rounded through `scratch`; copies of a large net have left
// the caches when the next step reads them.
DINO_INLINE inline void put_copy(const FlatStepArgs& a, void* to, DType dtype, int64_t offset, int64_t n,
                                 const float* x, void* scratch) {
    int64_t width = width_of(dtype);
    store(scratch, dtype, 0, n, x);
    stream_store(static_cast<char*>(to) + offset * width, scratch, n * width, a.offsets[a.segments] * width > kCached);
}

template <class Args, class Factors>
DINO_INLINE inline void update_chunk(const Args& a, int64_t begin, int64_t count, const Factors* f) {
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
DINO_INLINE inline void normalize(const FlatStepArgs& a, const float* v, float g, void* to, int64_t row,
                                  float* scratch) {
    alignas(64) float rounded[kMostChannels];
    int64_t n = a.channels;
    normalize_row(v, g, n, scratch);
    put_copy(a, to, a.rows_dtype, row * n, n, scratch, rounded);
}

// Rows [first, first + count) of the weight-normed layer, and their normalized copies.
template <class Args, class Factors>
DINO_INLINE inline void update_layer(const Args& a, int64_t first, int64_t count, const Factors* f) {
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

// Returns whether a gradient's norm was not finite; then nothing was changed.
//   measure(args, segment, begin, count): of a part of a segment
//   make_factors(args, segment, sums, clip): what `advance` takes, from the whole segment's
//   update, update_rows: update_chunk and update_layer, compiled for each instruction set
template <class Args, class Factors>
bool flat_step(const Args& a, Sums (*measure)(const Args&, int64_t, int64_t, int64_t),
               Factors (*make_factors)(const Args&, int64_t, const Sums&, double),
               void (*update)(const Args&, int64_t, int64_t, const Factors*),
               void (*update_rows)(const Args&, int64_t, int64_t, const Factors*)) {
    std::vector<int64_t> first_chunk(a.segments + 1, 0);
    for (int64_t i = 0; i < a.segments; ++i)
        first_chunk[i + 1] = first_chunk[i] + (a.offsets[i + 1] - a.offsets[i] + kChunk - 1) / kChunk;
    auto locate = [&](int64_t chunk, int64_t& begin, int64_t& count) {
        int64_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
        begin = a.offsets[i] + (chunk - first_chunk[i]) * kChunk;
        count = std::min(kChunk, a.offsets[i + 1] - begin);
        return i;
    };
    std::vector<Sums> sums(first_chunk.back());
    parallel_for(first_chunk.back(), a.threads, [&](int64_t chunk) {
        int64_t begin, count, i = locate(chunk, begin, count);
        if (!a.frozen[i]) sums[chunk] = measure(a, i, begin, count);
    });
    std::vector<Sums> totals(a.segments);
    std::map<int64_t, double> squares;  // of the gradients that are clipped together
    auto group = [&](int64_t i) { return a.clip_groups ? a.clip_groups[i] : i; };
    for (int64_t i = 0; i < a.segments; ++i) {
        for (int64_t chunk = first_chunk[i]; chunk < first_chunk[i + 1]; ++chunk) totals[i].add(sums[chunk]);
        if (!std::isfinite(totals[i].grad)) return true;
        squares[group(i)] += totals[i].grad;
    }
    std::vector<Factors> factors(a.segments);
    for (int64_t i = 0; i < a.segments; ++i)
        factors[i] = make_factors(a, i, totals[i], clip_factor(a, squares[group(i)]));
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
    return false;
}

}  // namespace
}  // namespace dino
