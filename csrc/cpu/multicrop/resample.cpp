// Bicubic resize with antialiasing in Pillow's 8-bit arithmetic: weights of 22 fractional bits, first along rows, then
// along columns, each result rounded to a level. Integers, so every processor gives the same.
//
// Both passes are sums of vectors, each times a weight. Along columns the vectors are rows as they lie in memory; for
// the pass along rows, kRows rows at a time are transposed before it and after it.
#include <algorithm>

#include "cpu/multicrop/filter.h"

namespace dino {
namespace {

constexpr int64_t kOutputs = 64;               // of a row at a time
constexpr int64_t kHalf = kRows / 2 * kLanes;  // every other one of kRows pixels of kRows rows

int64_t padded(int64_t n) { return (n + kRows - 1) / kRows * kRows; }

struct PairFilter : Weights {
    Filter filter;
    BufferOf<int32_t> high_, low_;

    void make(int64_t inputs, int64_t outputs);
};

struct Scratch {
    PairFilter horizontal, vertical;
    BufferOf<int32_t> columns, rows, sums, row_sums;
    BufferOf<uint8_t> filtered, bytes, levels;
};

// --- weights -----------------------------------------------------------------------------------------

DINO_MULTIVERSION
void pack(int64_t size, const int32_t* even, const int32_t* odd, int32_t* __restrict high, int32_t* __restrict low) {
    constexpr int32_t kLow = (1 << kLowBits) - 1;
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) {
        int32_t a = even[x], b = odd[x];
        high[x] = int32_t((uint32_t(a >> kLowBits) & 0xffffu) | uint32_t(b >> kLowBits) << 16);
        low[x] = (a & kLow) | (b & kLow) << 16;
    }
}

void PairFilter::make(int64_t inputs, int64_t outputs) {
    filter.make(inputs, outputs, 2, 2, false);
    first = filter.first;
    end = filter.end;
    size = outputs;
    most_pairs = filter.taps / 2;
    high = high_.fit(most_pairs * size);
    low = low_.fit(most_pairs * size);
    for (int64_t i = 0; i < most_pairs * size; i += size)
        pack(size, filter.weights + 2 * i, filter.weights + 2 * i + size, high + i, low + i);
}

// --- transposing -------------------------------------------------------------------------------------

using Bytes __attribute__((vector_size(16))) = uint8_t;

// x [16, 16] transposed in place: interleaving the upper and the lower half of the rows four times.
DINO_INLINE inline void transpose(Bytes* x) {
    Bytes half[kRows];
    for (int step = 0; step < 4; ++step) {
        std::copy_n(x, kRows, half);
        for (int i = 0; i < 8; ++i) {
            x[2 * i] =
                DINO_SHUFFLE(Bytes, half[i], half[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            x[2 * i + 1] =
                DINO_SHUFFLE(Bytes, half[i], half[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

// In these two the units are made after all bytes are transposed: a load waits for the stores that it spans.

// even[i] and odd[i] to the 16-bit halves of units[i]; interleaved first, since that is cheaper on bytes
DINO_INLINE inline void pair_up(const uint8_t* __restrict even, const uint8_t* __restrict odd, int64_t n,
                                int32_t* __restrict units) {
    alignas(64) uint8_t zipped[2 * kHalf];
    char* to = reinterpret_cast<char*>(units);
    for (int64_t start = 0; start < n; start += kHalf) {
        int64_t m = std::min(kHalf, n - start);
#pragma omp simd
        for (int64_t i = 0; i < m; ++i) {
            zipped[2 * i] = even[start + i];
            zipped[2 * i + 1] = odd[start + i];
        }
#pragma omp simd
        for (int64_t i = 0; i < 2 * m; ++i) {
            uint16_t wide = zipped[i];
            std::memcpy(to + 2 * (2 * start + i), &wide, sizeof wide);
        }
    }
}

// kRows rows of kRows pixels transposed, to their even pixels and then their odd ones, each [kRows / 2, 3, kRows]
DINO_INLINE inline void transpose_group(const uint8_t* rows, int64_t stride, uint8_t* to) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < kLanes; j += kRows) {
        Bytes x[kRows];
#pragma GCC unroll 16
        for (int64_t r = 0; r < kRows; ++r) std::memcpy(&x[r], rows + r * stride + j, kRows);
        transpose(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kRows; ++i) {
            int64_t pixel = (j + i) / 3, channel = (j + i) % 3;
            std::memcpy(to + pixel % 2 * kHalf + pixel / 2 * kLanes + channel * kRows, &x[i], kRows);
        }
    }
}

// `height` rows of n bytes, repeated to kRows rows, to pairs of pixels [pairs, kLanes], by way of groups as bytes
DINO_MULTIVERSION
void rows_to_columns(const uint8_t* rows, int64_t stride, int64_t height, int64_t n, uint8_t* bytes, int32_t* columns) {
    uint8_t edge[kRows * kLanes] = {};
    int64_t groups = (n + kLanes - 1) / kLanes;
    for (int64_t i = 0; i < groups; ++i) {
        const uint8_t* group = rows + i * kLanes;
        int64_t width = std::min(kLanes, n - i * kLanes);
        if (height == kRows && width == kLanes) {
            transpose_group(group, stride, bytes + 2 * i * kHalf);
            continue;
        }
        for (int64_t r = 0; r < kRows; ++r)
            std::memcpy(edge + r * kLanes, group + std::min(r, height - 1) * stride, size_t(width));
        transpose_group(edge, kLanes, bytes + 2 * i * kHalf);
    }
    for (int64_t i = 0; i < groups; ++i)
        pair_up(bytes + 2 * i * kHalf, bytes + (2 * i + 1) * kHalf, kHalf, columns + i * kHalf);
}

// Pixels [width, kLanes] to pairs of rows [kRows / 2, 3, width], by way of the rows as bytes
DINO_MULTIVERSION
void columns_to_rows(const uint8_t* columns, int64_t width, uint8_t* bytes, int32_t* rows) {
    Bytes x[kRows];
    for (int64_t channel = 0; channel < 3; ++channel)
        for (int64_t j = 0; j < width; j += kRows) {
            for (int64_t i = 0; i < kRows; ++i) std::memcpy(&x[i], columns + (j + i) * kLanes + channel * kRows, kRows);
            transpose(x);
            for (int64_t r = 0; r < kRows; ++r) std::memcpy(bytes + (r * 3 + channel) * width + j, &x[r], kRows);
        }
    for (int64_t r = 0; r < kRows; r += 2)
        pair_up(bytes + r * 3 * width, bytes + (r + 1) * 3 * width, 3 * width, rows + r / 2 * 3 * width);
}

// --- the two passes ----------------------------------------------------------------------------------

// The first pass over `height` rows of pixels, to kRows / 2 pairs of rows [3, padded size]; some outputs at a time,
// whose columns stay in the nearest cache.
void first_pass(const Loops& loops, const uint8_t* block, int64_t stride, int64_t height, bool flip, int64_t row,
                Scratch& s, int32_t* rows) {
    const PairFilter& f = s.horizontal;
    uint8_t* filtered = s.filtered.fit(row * kRows);
    int32_t* results = s.sums.fit(kOutputs * kLanes + kSlack);
    for (int64_t x = 0; x < f.size; x += kOutputs) {
        int64_t outputs = std::min(kOutputs, f.size - x), start = f.first[x], n = f.end[x + outputs - 1] - start;
        int64_t room = padded(n) * kLanes;
        int32_t* columns = s.columns.fit(room / 2);
        rows_to_columns(block + 3 * start, stride, height, 3 * n, s.bytes.fit(room), columns);
        loops.columns(columns, start, f, x, outputs, flip, results);
        loops.levels(results, outputs * kLanes, filtered + (flip ? f.size - x - outputs : x) * kLanes);
    }
    columns_to_rows(filtered, row / 3, s.bytes.fit(row * kRows), rows);
}

}  // namespace

void resample(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes) {
    const Loops& loops = widest_loops();
#if DINO_HAS_QUADS
    if (!loops.columns) return resample_quads(image, row_stride, crop, planes);
#endif
    static thread_local Scratch s;
    const int64_t height = crop.bottom - crop.top, size = crop.size;
    s.horizontal.make(crop.right - crop.left, size);
    s.vertical.make(height, size);
    const PairFilter& f = s.vertical;
    const int64_t row = 3 * padded(size), held = 2 * f.most_pairs + kRows;
    int32_t *rows = s.rows.fit(held / 2 * row), *results = s.row_sums.fit(row + kSlack);
    uint8_t* levels = s.levels.fit(row);
    const uint8_t* corner = image + crop.top * row_stride + 3 * crop.left;
    // `rows` holds the results of the first pass from row `begin` up to row `end`: what an output row needs.
    for (int64_t y = 0, begin = 0, end = 0; y < size; ++y) {
        for (; end < f.end[y]; end += kRows) {
            if (end + kRows > begin + held) {
                std::copy(rows + (f.first[y] - begin) / 2 * row, rows + (end - begin) / 2 * row, rows);
                begin = f.first[y];
            }
            first_pass(loops, corner + end * row_stride, row_stride, std::min(kRows, height - end), crop.flip, row, s,
                       rows + (end - begin) / 2 * row);
        }
        loops.rows(rows + (f.first[y] - begin) / 2 * row, row, f, y, results);
        loops.levels(results, row, levels);
        for (int64_t c = 0; c < 3; ++c) std::memcpy(planes + (c * size + y) * size, levels + c * row / 3, size_t(size));
    }
}

}  // namespace dino
