// Pieces of linear layers' products in bfloat16 by the processor's matrix tiles (AMX): what a task does with a block of
// tokens or with 32 columns.
#pragma once

#include <algorithm>

#include "unit_products.h"

#if defined(DINO_HAS_AMX)
namespace dino {
namespace {

constexpr int64_t kPanel = 32;   // columns of a product at a time: two tiles
constexpr int64_t kBlock = 128;  // tokens a task
constexpr int64_t kDepth = 192;  // units of a contraction at a time: of a panel they stay in the first-level cache

inline const float* units(const void* x, int64_t offset) {  // offset in values, even
    return reinterpret_cast<const float*>(static_cast<const uint16_t*>(x) + offset);
}

// `rows` rows of units as tiles read them, 16 at a time: in place, or a copy where the last tile would leave memory.
inline const float* whole_tiles(const float* x, int64_t rows, int64_t width, Buffer& copy) {
    if (rows % 16 == 0) return x;
    std::copy_n(x, rows * width, copy.fit(padded(rows) * width));
    return copy.fit(0);
}

// Rows of the panel that comes next are fetched ahead: prefetchers do not follow such strides.
inline void next_panel(const uint16_t* x, int64_t rows, int64_t stride, bool to_write) {
    for (int64_t i = 0; i < rows; ++i)
        if (to_write)
            __builtin_prefetch(x + i * stride + kPanel, 1);
        else
            __builtin_prefetch(x + i * stride + kPanel, 0);
}

// to [rows, 32] = c [rows, 32] + bias, rounded
DINO_BF16 inline void finish(const float* c, int64_t rows, const float* bias, uint16_t* to, int64_t stride) {
    __m512 low = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
    __m512 high = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i, c += kPanel, to += stride) {
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_load_ps(c + 16) + high, _mm512_load_ps(c) + low);
        _mm512_storeu_si512(to, (__m512i)pair);
    }
}

// body(row, count, c): sums c [count <= 32, 32] of a block of rows x [rows, width] with packed columns. Vector work in
// `body` runs beside the next one's tiles.
template <class Body>
inline void by_tiles(const Kind& kind, const float* x, int64_t rows, int64_t width, const float* packed, float* sums,
                     const Body& body) {
    for (int64_t k = 0; k < width; k += kDepth)
        for (int64_t i = 0; i < rows; i += 32) {
            int64_t count = std::min<int64_t>(32, rows - i), depth = std::min(kDepth, width - k);
            float* c = sums + i * kPanel;
            product(kind, count, kPanel, {depth, width, 1, kPanel, kPanel, k > 0}, x + i * width + k,
                    packed + k * kPanel, c);
            if (k + depth == width) body(i, count, c);
        }
}

// Weights [outputs, depth], or [depth, outputs] if transposed, as pairs along the contraction, by panels of columns of
// the product [depth / 2, 32].
inline void pack_weights(const void* weight, int64_t depth, int64_t outputs, bool transposed, int threads, float* to) {
    parallel_for(outputs / kPanel, threads, [&](int64_t i) {
        float* panel = to + i * kPanel * depth / 2;
        if (transposed)
            pair_up(units(weight, i * kPanel), depth, outputs / 2, panel, kPanel);
        else
            transpose(units(weight, i * kPanel * depth), kPanel, depth / 2, panel, kPanel);
    });
}

// Columns [column, column + 32) of rows as pairs of rows [padded, 32].
inline void pair_rows_of(const uint16_t* x, int64_t stride, int64_t rows, int64_t column, float* to) {
    int64_t even = rows / 2 * 2, filled = (rows + 1) / 2;
    next_panel(x + column, rows, stride, false);
    pair_up(units(x, column), even, stride / 2, to, kPanel);
    if (rows % 2)
        for (int64_t i = 0; i < kPanel; ++i)
            reinterpret_cast<Unit*>(to)[even / 2 * kPanel + i] = x[even * stride + column + i];
    std::fill(to + filled * kPanel, to + padded(filled) * kPanel, 0.0f);
}

}  // namespace
}  // namespace dino
#endif
