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
constexpr int64_t kPiece = 4;    // rows of a panel's sums that vector work takes at a time

inline const float* units(const void* x, int64_t offset) {  // offset in values, even
    return reinterpret_cast<const float*>(static_cast<const uint16_t*>(x) + offset);
}

inline int64_t whole(int64_t rows) { return (rows + 31) / 32 * 32; }

// `rows` rows of units as tiles read them, 32 at a time: in place, or a copy with zeros below.
inline const float* whole_tiles(const float* x, int64_t rows, int64_t width, Buffer& copy) {
    if (rows == whole(rows)) return x;
    float* to = copy.fit(whole(rows) * width);
    std::copy_n(x, rows * width, to);
    std::fill(to + rows * width, to + whole(rows) * width, 0.0f);
    return to;
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

// to [rows / 2, 32] = pairs of rows of c [rows, 32], rounded
DINO_BF16 inline void finish_pairs(const float* c, int64_t rows, float* to) {
    const __m512i order =
        _mm512_add_epi16(_mm512_set1_epi32(0x00100000),
                         _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9,
                                                               9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)));
    for (int64_t i = 0; i < rows; i += 2, c += 2 * kPanel, to += kPanel)
        for (int64_t j = 0; j < kPanel; j += 16) {
            __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(c + kPanel + j), _mm512_load_ps(c + j));
            _mm512_store_si512(to + j, _mm512_permutexvar_epi16(order, (__m512i)rounded));
        }
}

// sums [columns] += the rows of x, `stride` apart
DINO_BF16 inline void add_rows_to(float* sums, const uint16_t* x, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) sums[j] += bf16_to_float(x[j]);
}

// Pieces of other work spread over the steps of a product: tiles and vectors are computed at the same time by units of
// their own, but only what stands close together in the program.
template <class Piece>
struct Spread {
    const Piece& piece;
    int64_t pieces, steps, done = 0, due = 0;

    void operator()() {
        for (due += pieces; due >= steps && done < pieces; due -= steps) piece(done++);
    }
    void rest() {
        while (done < pieces) piece(done++);
    }
};

// c [rows, 32] = x [rows, width] times a packed panel, plus what c held if `add`; rows come in 32. If `far`, the panel
// that lies behind this one is fetched into the second-level cache.
template <class Beside>
inline void multiply(const float* x, int64_t rows, int64_t width, const float* panel, float* c, bool add, bool far,
                     Beside&& beside) {
    const float* next = panel + kPanel * width;
    int64_t lines = far ? 2 * kPanel * 16 / rows : 0;  // a step
    auto step = [&] {
        beside();
        for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
    };
    for (int64_t k = 0; k < width; k += kDepth)
        for (int64_t i = 0; i < rows; i += 32)
            amx_tile<2, 2>({std::min(kDepth, width - k), width, 1, kPanel, kPanel, add || k > 0}, x + i * width + k,
                           panel + k * kPanel, c + i * kPanel, step);
}

// Whether packed weights of that many units are more than half of a second-level cache.
inline bool far(int64_t units) { return units > 1 << 18; }

inline int64_t steps_of(int64_t rows, int64_t width) { return rows / 32 * width / 16; }

// multiply(panel, beside) for one panel after another, each beside finish(panel, row) of the one before it, which takes
// four rows.
template <class Multiply, class Finish>
inline void by_panels(int64_t panels, int64_t rows, int64_t steps, const Multiply& multiply, const Finish& finish) {
    for (int64_t i = 0; i <= panels; ++i) {
        auto piece = [&](int64_t j) { finish(i - 1, j * kPiece); };
        Spread<decltype(piece)> beside{piece, i ? (rows + kPiece - 1) / kPiece : 0, steps};
        if (i < panels) multiply(i, beside);
        beside.rest();
    }
}

// The sums of two panels that by_panels has in hand.
struct Sums {
    Buffer buffer;
    float* of(int64_t panel, int64_t row = 0) {
        return buffer.fit(2 * kBlock * kPanel) + (panel % 2 * kBlock + row) * kPanel;
    }
};

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

// Columns [column, column + 32) of rows, if any, as pairs of rows [room, 32]; zeros fill the room.
inline void pairs_of(const uint16_t* x, int64_t stride, int64_t rows, int64_t column, float* to, int64_t room) {
    int64_t even = std::max<int64_t>(rows, 0) / 2 * 2;
    pair_up(units(x, column), even, stride / 2, to, kPanel);
    float* rest = to + even / 2 * kPanel;
    if (rows > even) {
        for (int64_t i = 0; i < kPanel; ++i) reinterpret_cast<Unit*>(rest)[i] = x[even * stride + column + i];
        rest += kPanel;
    }
    std::fill(rest, to + room * kPanel, 0.0f);
}

// The same of many rows: [padded, 32]
inline void pair_rows_of(const uint16_t* x, int64_t stride, int64_t rows, int64_t column, float* to) {
    next_panel(x + column, rows, stride, false);
    pairs_of(x, stride, rows, column, to, padded((rows + 1) / 2));
}

}  // namespace
}  // namespace dino
#endif
