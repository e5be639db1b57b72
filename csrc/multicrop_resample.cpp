// Bicubic resize with antialiasing in Pillow's 8-bit arithmetic: weights of 22 fractional bits, first along rows, then
// along columns, each result rounded to a level. Integers, so every processor gives the same.
//
// Both passes are one loop: sums of vectors, each times a weight. Along columns the vectors are rows as they lie in
// memory; for the pass along rows, kRows rows at a time are transposed before it and after it.
#include <algorithm>
#include <cmath>

#include "multicrop.h"

namespace dino {
namespace {

constexpr int kWeightBits = 22;
constexpr int64_t kRows = 16;          // transposed at a time
constexpr int64_t kOutputs = 64;       // of a row at a time
constexpr int64_t kLanes = 3 * kRows;  // a pixel of kRows rows; also what the pass along columns takes at a time

int64_t padded(int64_t n) { return (n + kRows - 1) / kRows * kRows; }

// Weights of the inputs first[x] .. first[x] + count[x] - 1 of output x: weights[tap * size + x].
struct Filter {
    BufferOf<int32_t> first_, count_, weights_;
    BufferOf<double> center_, sum_, exact_;
    int32_t *first, *count, *weights;
    int64_t size, taps;

    void make(int64_t inputs, int64_t outputs);
};

struct Scratch {
    Filter horizontal, vertical;
    BufferOf<int32_t> columns, rows, sums, row_sums;
    BufferOf<uint8_t> filtered, bytes, levels;
};

DINO_INLINE inline double bicubic(double x) {  // a = -0.5
    double near = (1.5 * x - 2.5) * x * x + 1.0, far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// A tap of all outputs at once: a loop over the few taps of an output would not fill a vector.
DINO_MULTIVERSION
void weigh(int64_t size, int64_t taps, double inverse, const int32_t* first, const int32_t* count,
           const double* __restrict center, double* __restrict sum, double* __restrict exact,
           int32_t* __restrict weights) {
    std::fill_n(sum, size, 0.0);
    for (int64_t tap = 0; tap < taps; ++tap) {
        double* row = exact + tap * size;
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            double weight = bicubic(std::abs((double(first[x] + int32_t(tap)) - center[x] + 0.5) * inverse));
            row[x] = int32_t(tap) < count[x] ? weight : 0.0;
            sum[x] += row[x];
        }
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
        const double* row = exact + tap * size;
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) {
            double weight = row[x] / sum[x] * (1 << kWeightBits);
            weights[tap * size + x] = int32_t(weight + (weight < 0.0 ? -0.5 : 0.5));
        }
    }
}

void Filter::make(int64_t inputs, int64_t outputs) {
    size = outputs;
    double scale = double(inputs) / double(size), stretch = std::max(scale, 1.0), support = 2.0 * stretch;
    first = first_.fit(size);
    count = count_.fit(size);
    double* center = center_.fit(size);
    taps = 0;
    for (int64_t x = 0; x < size; ++x) {
        center[x] = (double(x) + 0.5) * scale;
        first[x] = int32_t(std::max(center[x] - support + 0.5, 0.0));
        count[x] = int32_t(std::min(int64_t(center[x] + support + 0.5), inputs)) - first[x];
        taps = std::max<int64_t>(taps, count[x]);
    }
    weights = weights_.fit(taps * size);
    weigh(size, taps, 1.0 / stretch, first, count, center, sum_.fit(size), exact_.fit(taps * size), weights);
}

// to[i] = sum over taps of weights[tap * weight_stride] * from[tap * stride + i], and a half
DINO_INLINE inline void weighted_sum(const int32_t* __restrict from, int64_t stride, const int32_t* __restrict weights,
                                     int64_t weight_stride, int64_t taps, int32_t* __restrict to) {
    int32_t sums[kLanes];
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) sums[i] = 1 << (kWeightBits - 1);
    for (int64_t tap = 0; tap < taps; ++tap) {
        int32_t weight = weights[tap * weight_stride];
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) sums[i] += weight * from[tap * stride + i];
    }
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) to[i] = sums[i];
}

DINO_INLINE inline void to_levels(const int32_t* __restrict sums, int64_t n, uint8_t* __restrict levels) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) levels[i] = uint8_t(std::min(std::max(sums[i] >> kWeightBits, 0), 255));
}

DINO_INLINE inline void widen(const uint8_t* __restrict bytes, int64_t n, int32_t* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = bytes[i];
}

// --- transposing -------------------------------------------------------------------------------------

using Bytes __attribute__((vector_size(16))) = uint8_t;

#if defined(__clang__)
#define DINO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DINO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

// x [16, 16] transposed in place: interleaving the upper and the lower half of the rows four times.
DINO_INLINE inline void transpose(Bytes* x) {
    Bytes half[kRows];
    for (int step = 0; step < 4; ++step) {
        std::copy_n(x, kRows, half);
        for (int i = 0; i < 8; ++i) {
            x[2 * i] = DINO_SHUFFLE(half[i], half[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            x[2 * i + 1] =
                DINO_SHUFFLE(half[i], half[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

// In these two the bytes are widened after all are transposed: a load waits for the stores that it spans.

// kRows rows of n bytes to columns [padded n, kRows], by way of bytes of the same shape
DINO_MULTIVERSION
void rows_to_columns(const uint8_t* const* rows, int64_t n, uint8_t* bytes, int32_t* columns) {
    Bytes x[kRows];
    for (int64_t j = 0; j < n; j += kRows) {
        if (n - j >= kRows)
            for (int64_t r = 0; r < kRows; ++r) std::memcpy(&x[r], rows[r] + j, kRows);
        else
            for (int64_t r = 0; r < kRows; ++r) std::memcpy(&x[r], rows[r] + j, size_t(n - j));
        transpose(x);
        std::memcpy(bytes + j * kRows, x, sizeof x);
    }
    widen(bytes, padded(n) * kRows, columns);
}

// Pixels [width, kLanes] to kRows rows [3, width], by way of bytes of the same shape
DINO_MULTIVERSION
void columns_to_rows(const uint8_t* columns, int64_t width, uint8_t* bytes, int32_t* rows) {
    Bytes x[kRows];
    for (int64_t channel = 0; channel < 3; ++channel)
        for (int64_t j = 0; j < width; j += kRows) {
            for (int64_t i = 0; i < kRows; ++i) std::memcpy(&x[i], columns + (j + i) * kLanes + channel * kRows, kRows);
            transpose(x);
            for (int64_t r = 0; r < kRows; ++r) std::memcpy(bytes + (r * 3 + channel) * width + j, &x[r], kRows);
        }
    widen(bytes, kRows * 3 * width, rows);
}

// --- the two passes ----------------------------------------------------------------------------------

// Outputs x .. x + n - 1, from columns of which the first is pixel `start`; sums [n, kLanes]
DINO_MULTIVERSION
void filter_columns(const int32_t* columns, int64_t start, const Filter& f, int64_t x, int64_t n, bool flip,
                    int32_t* sums, uint8_t* to) {
    for (int64_t i = 0; i < n; ++i)
        weighted_sum(columns + (f.first[x + i] - start) * kLanes, kLanes, f.weights + x + i, f.size, f.count[x + i],
                     sums + (flip ? n - 1 - i : i) * kLanes);
    to_levels(sums, n * kLanes, to + (flip ? f.size - x - n : x) * kLanes);
}

// Output row y, sums [width]
DINO_MULTIVERSION
void filter_rows(const int32_t* rows, int64_t width, const Filter& f, int64_t y, int32_t* sums, uint8_t* to) {
    for (int64_t i = 0; i < width; i += kLanes)
        weighted_sum(rows + i, width, f.weights + y, f.size, f.count[y], sums + i);
    to_levels(sums, width, to);
}

// The first pass over kRows rows of pixels, to rows [3, padded size]; some outputs at a time, whose columns stay in the
// nearest cache.
void first_pass(const uint8_t* const* block, bool flip, int64_t row, Scratch& s, int32_t* rows) {
    const Filter& f = s.horizontal;
    uint8_t* filtered = s.filtered.fit(row * kRows);
    int32_t* sums = s.sums.fit(kOutputs * kLanes);
    for (int64_t x = 0; x < f.size; x += kOutputs) {
        int64_t outputs = std::min(kOutputs, f.size - x), start = f.first[x];
        int64_t n = 3 * (f.first[x + outputs - 1] + f.count[x + outputs - 1] - start);
        const uint8_t* part[kRows];
        for (int64_t r = 0; r < kRows; ++r) part[r] = block[r] + 3 * start;
        int32_t* columns = s.columns.fit(padded(n) * kRows);
        rows_to_columns(part, n, s.bytes.fit(padded(n) * kRows), columns);
        filter_columns(columns, start, f, x, outputs, flip, sums, filtered);
    }
    columns_to_rows(filtered, row / 3, s.bytes.fit(row * kRows), rows);
}

}  // namespace

void resample(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes) {
    static thread_local Scratch s;
    const int64_t height = crop.bottom - crop.top, size = crop.size;
    s.horizontal.make(crop.right - crop.left, size);
    s.vertical.make(height, size);
    const Filter& f = s.vertical;
    const int64_t row = 3 * padded(size), held = f.taps + kRows;
    int32_t* rows = s.rows.fit(held * row);
    uint8_t* levels = s.levels.fit(row);
    int32_t* sums = s.row_sums.fit(row);
    const uint8_t *corner = image + crop.top * row_stride + 3 * crop.left, *block[kRows];
    // `rows` holds the results of the first pass from row `begin` up to row `end`: what an output row needs.
    for (int64_t y = 0, begin = 0, end = 0; y < size; ++y) {
        for (; end < f.first[y] + f.count[y]; end += kRows) {
            if (end + kRows > begin + held) {
                std::copy(rows + (f.first[y] - begin) * row, rows + (end - begin) * row, rows);
                begin = f.first[y];
            }
            for (int64_t r = 0; r < kRows; ++r) block[r] = corner + std::min(end + r, height - 1) * row_stride;
            first_pass(block, crop.flip, row, s, rows + (end - begin) * row);
        }
        filter_rows(rows + (f.first[y] - begin) * row, row, f, y, sums, levels);
        for (int64_t c = 0; c < 3; ++c) std::memcpy(planes + (c * size + y) * size, levels + c * row / 3, size_t(size));
    }
}

}  // namespace dino
