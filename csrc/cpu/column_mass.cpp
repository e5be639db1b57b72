// Column sums of a softmax, and the column log-sum-exp in two parts; formula in dino_kernels/ops/column_mass.py.
// Every row is read from memory once. With a center, a task owns rows, whose probabilities it adds to sums of its own;
// without one, it owns columns.
#include "cpu/column_mass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kBlock = 1024;   // elements a block: a few blocks fit the first-level cache
constexpr int64_t kGroups = 16;    // tasks of at least four rows; fixed, so that sums do not depend on the threads
constexpr int64_t kColumns = 512;  // columns a task
constexpr int64_t kRows = 64;      // rows of these columns that are in the second-level cache when read again
constexpr float kLowest = std::numeric_limits<float>::lowest();  // a maximum of nothing: differences are no NaN

// Exponentials are powers of two of `scale` times the logits.
DINO_INLINE inline float scale_of(const ColumnMassArgs& a) { return float(1.4426950408889634 / double(a.temp)); }

DINO_INLINE inline float power(float y) { return exp2_negative<DType::f32>(y < -126.0f ? -126.0f : y); }

DINO_INLINE inline bool counted(const ColumnMassArgs& a, int64_t row) { return !a.counted || a.counted[row]; }

// sums += softmax((row - center) / temp); scratch: exps [K], block_max: one number a block
DINO_MULTIVERSION
void add_softmax(const ColumnMassArgs& a, int64_t row, float* exps, float* block_max, float* sums) {
    float scratch[kBlock];
    float scale = scale_of(a), max = kLowest;
    double total = 0;
    for (int64_t k = 0; k < a.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, a.outputs - k);
        const float* s = load(a.logits, a.dtype, row * a.stride + k, n, scratch);
        const float* center = a.center + k;
        float *e = exps + k, highest = max, sum = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < n; ++j) {
            float x = (s[j] - center[j]) * scale;
            e[j] = x;
            highest = x > highest ? x : highest;
        }
        if (highest > max) total *= std::exp2(double(max) - double(highest));
        block_max[k / kBlock] = max = highest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) {
            float y = power(e[j] - max);
            e[j] = y;
            sum += y;
        }
        total += sum;
    }
    unsigned mode = flush_denormals();  // not before: it would take float16's subnormal logits for zeros
    for (int64_t k = 0; k < a.outputs; k += kBlock) {
        int64_t n = std::min(kBlock, a.outputs - k);
        float factor = float(std::exp2(double(block_max[k / kBlock]) - double(max)) / total);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) sums[k + j] += factor * exps[k + j];
    }
    restore_denormals(mode);
}

// mass[1] = sums over the groups, in their order; partial: [groups, K]
DINO_MULTIVERSION
void add_groups(const ColumnMassArgs& a, const float* partial, int64_t groups, int64_t begin, int64_t count) {
    float* mass = a.mass + a.outputs + begin;
    std::copy_n(partial + begin, count, mass);
    for (int64_t group = 1; group < groups; ++group) {
        const float* part = partial + group * a.outputs + begin;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) mass[j] += part[j];
    }
}

// mass of columns [begin, begin + count) without a center
DINO_MULTIVERSION
void add_exponentials(const ColumnMassArgs& a, int64_t begin, int64_t count) {
    float scratch[kColumns], before[kColumns];
    float *top = a.mass + begin, *sum = a.mass + a.outputs + begin, scale = scale_of(a);
    std::fill_n(top, count, kLowest);
    std::fill_n(sum, count, 0.0f);
    for (int64_t first = 0; first < a.rows; first += kRows) {
        int64_t end = std::min(first + kRows, a.rows);
        std::copy_n(top, count, before);
        for (int64_t row = first; row < end; ++row) {
            if (!counted(a, row)) continue;
            const float* s = load(a.logits, a.dtype, row * a.stride + begin, count, scratch);
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) top[j] = s[j] > top[j] ? s[j] : top[j];
        }
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) sum[j] *= power((before[j] - top[j]) * scale);
        for (int64_t row = first; row < end; ++row) {
            if (!counted(a, row)) continue;
            const float* s = load(a.logits, a.dtype, row * a.stride + begin, count, scratch);
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) sum[j] += power((s[j] - top[j]) * scale);
        }
    }
    for (int64_t j = 0; j < count; ++j)
        if (top[j] == kLowest) top[j] = -std::numeric_limits<float>::infinity();
}

}  // namespace

void column_mass(const ColumnMassArgs& a) {
    int64_t blocks = (a.outputs + kColumns - 1) / kColumns;
    auto of_columns = [&](auto&& body) {
        parallel_for(blocks, a.threads,
                     [&](int64_t task) { body(task * kColumns, std::min(kColumns, a.outputs - task * kColumns)); });
    };
    if (!a.center) {
        of_columns([&](int64_t begin, int64_t count) { add_exponentials(a, begin, count); });
        return;
    }
    static thread_local Buffer partial_buffer;
    int64_t groups = std::min(kGroups, (a.rows + 3) / 4);
    float* partial = partial_buffer.fit(groups * a.outputs);
    parallel_for(groups, a.threads, [&](int64_t group) {
        static thread_local Buffer buffers[2];
        float *exps = buffers[0].fit(a.outputs), *block_max = buffers[1].fit((a.outputs + kBlock - 1) / kBlock);
        float* sums = partial + group * a.outputs;
        std::fill_n(sums, a.outputs, 0.0f);
        for (int64_t row = group * a.rows / groups; row < (group + 1) * a.rows / groups; ++row)
            if (counted(a, row)) add_softmax(a, row, exps, block_max, sums);
    });
    std::fill_n(a.mass, a.outputs, 0.0f);
    of_columns([&](int64_t begin, int64_t count) { add_groups(a, partial, groups, begin, count); });
}

}  // namespace dino
