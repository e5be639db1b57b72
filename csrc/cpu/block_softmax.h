// Logits of rows and their softmax, block by block of the outputs, not kept. Blocks are transposed, [outputs, rows], so
// that a vector holds one output of 16 rows and no sum runs across its lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/math.h"
#include "common/memory.h"
#include "cpu/gemm/microkernel.h"

namespace dino {
namespace {

constexpr int64_t kBlock = 128;  // outputs a block: its weights and logits fit the second-level cache

// --- rows and weights as floats ----------------------------------------------------------------------

inline float* zeros(Buffer& buffer, int64_t size) {
    float* x = buffer.fit(size);
    std::fill_n(x, size, 0.0f);
    return x;
}

DINO_MULTIVERSION inline void widen(const void* from, DType dtype, int64_t offset, int64_t rows, int64_t columns,
                                    float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
        const float* x = load(from, dtype, offset + i * columns, columns, to + i * to_row);
        if (x != to + i * to_row) std::copy_n(x, columns, to + i * to_row);
    }
}

DINO_MULTIVERSION inline void narrow(const float* from, int64_t from_row, int64_t rows, int64_t columns, void* to,
                                     DType dtype, int64_t offset) {
    for (int64_t i = 0; i < rows; ++i) store(to, dtype, offset + i * columns, columns, from + i * from_row);
}

// Rows of the bottleneck [count, D] and their transpose [D, width], padded with zeros.
struct Rows {
    int64_t count, width;
    Buffer wide_buffer, transposed_buffer;
    float *wide, *transposed;

    Rows(const void* z, DType dtype, int64_t given, int64_t extra, int64_t channels)
        : count(given + extra),
          width(padded(count)),
          wide(zeros(wide_buffer, count * padded(channels))),
          transposed(zeros(transposed_buffer, channels * width)) {
        widen(z, dtype, 0, given, channels, wide, padded(channels));
    }
    void transpose(int64_t channels) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < channels; ++d) transposed[d * width + i] = wide[i * padded(channels) + d];
    }
};

// Rows [begin, begin + count) of a matrix [., channels] as floats with aligned rows, padded to kTile: in place where
// they are so, else in `scratch` [kBlock, padded channels].
inline const float* block_of(const void* x, DType dtype, int64_t begin, int64_t count, int64_t channels,
                             float* scratch) {
    const float* direct = static_cast<const float*>(x) + begin * channels;
    bool aligned = padded(channels) == channels && reinterpret_cast<uintptr_t>(direct) % 64 == 0;
    if (dtype == DType::f32 && aligned && count % kTile == 0) return direct;
    widen(x, dtype, begin * channels, count, channels, scratch, padded(channels));
    return scratch;
}

// --- statistics --------------------------------------------------------------------------------------

// Of rows of x / temp: their maximum (before the division) and the sum of exp((x - max) / temp).
struct Statistics {
    std::vector<float> max;
    std::vector<double> total;

    explicit Statistics(int64_t width) : max(width, -std::numeric_limits<float>::infinity()), total(width, 0.0) {}

    // Returns the factor of all that was summed before.
    double raise(int64_t row, float to, double inv_temp) {
        if (!(to > max[row])) return 1;
        double factor = std::exp((double(max[row]) - double(to)) * inv_temp);
        total[row] *= factor;
        max[row] = to;
        return factor;
    }
    void merge(const Statistics& other, double inv_temp) {
        for (size_t row = 0; row < max.size(); ++row) {
            raise(int64_t(row), other.max[row], inv_temp);
            total[row] += other.total[row] * std::exp((double(other.max[row]) - double(max[row])) * inv_temp);
        }
    }
};

// highest[row] = max over the block of logits - center
DINO_MULTIVERSION inline void block_max(const float* logits, int64_t width, const float* center, int64_t outputs,
                                        float* highest) {
    std::fill_n(highest, width, -std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < outputs; ++k) {
        const float* x = logits + k * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float y = x[i] - center[k];
            highest[i] = y > highest[i] ? y : highest[i];
        }
    }
}

// logits = weight[row] exp((logits - center - max[row]) / temp); sum[row] += those
DINO_MULTIVERSION inline void exponentials(float* logits, int64_t width, const float* center, int64_t outputs,
                                           const float* max, float inv_temp, const float* weight, float* sum) {
    for (int64_t k = 0; k < outputs; ++k) {
        float* x = logits + k * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float e = weight[i] * exp_negative((x[i] - center[k] - max[i]) * inv_temp);
            x[i] = e;
            sum[i] += e;
        }
    }
}

}  // namespace
}  // namespace dino
