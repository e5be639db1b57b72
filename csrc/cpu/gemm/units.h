// How values of tensors become matrices of units, and such matrices transposed; README.md says what a unit is.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dino {
namespace {

using Value16 __attribute__((may_alias)) = uint16_t;
using Unit __attribute__((may_alias)) = uint32_t;

// A call of memcpy would cost more than a short row.
__attribute__((always_inline)) inline void copy(const void* from, int64_t bytes, void* to) {
    auto source = static_cast<const char*>(from);
    auto target = static_cast<char*>(to);
    for (; bytes >= 64; bytes -= 64, source += 64, target += 64) std::memcpy(target, source, 64);
    if (bytes) std::memcpy(target, source, size_t(bytes));
}

constexpr int64_t kAhead = 64;  // rows fetched ahead: hardware prefetchers do not follow these strides

__attribute__((always_inline)) inline void prefetch(const void* x, int64_t offset, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(x) + offset + i);
}

// `count` rows of `channels` values as units to [rows, width]; the rest is zero.
DINO_MULTIVERSION inline void gather(const void* x, DType dtype, int64_t offset, int64_t stride, int64_t count,
                                     int64_t channels, int64_t pair, float* to, int64_t rows, int64_t width) {
    int64_t size = width_of(dtype);
    for (int64_t i = 0; i < count; ++i, offset += stride, to += width) {
        prefetch(x, (offset + kAhead * stride) * size, channels * size);
        to[(channels - 1) / pair] = 0;
        if (pair == 2) {
            copy(static_cast<const uint16_t*>(x) + offset, channels * 2, to);
        } else {
            const float* from = load(x, dtype, offset, channels, to);
            if (from != to) copy(from, channels * 4, to);
        }
        std::fill(to + (channels - 1) / pair + 1, to + width, 0.0f);
    }
    std::fill_n(to, (rows - count) * width, 0.0f);
}

// The inverse, from floats or from pairs.
DINO_MULTIVERSION inline void scatter(const float* from, int64_t width, int64_t count, int64_t channels, int64_t pair,
                                      void* to, DType dtype, int64_t offset, int64_t stride) {
    for (int64_t i = 0; i < count; ++i, offset += stride, from += width)
        if (pair == 2)
            copy(from, channels * 2, static_cast<uint16_t*>(to) + offset);
        else
            store(to, dtype, offset, channels, from);
}

// to [columns, rows] with rows to_row apart = from [rows, columns], both multiples of 16, by blocks of 16 x 16.
DINO_MULTIVERSION inline void transpose_blocks(const float* from, int64_t rows, int64_t columns, float* to,
                                               int64_t to_row) {
    // Rotating the 8 bits of an element's number in a block by 4 transposes it, and rotating by one interleaves its
    // halves: loops that vectorize.
    alignas(64) float x[256], y[256];
    auto interleave = [](const float* in, float* out) __attribute__((always_inline)) {
#pragma omp simd
        for (int i = 0; i < 128; ++i) {
            out[2 * i] = in[i];
            out[2 * i + 1] = in[128 + i];
        }
    };
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            for (int64_t r = 0; r < 16; ++r) std::memcpy(x + 16 * r, from + (i + r) * columns + j, 64);
            interleave(x, y);
            interleave(y, x);
            interleave(x, y);
            interleave(y, x);
            for (int64_t r = 0; r < 16; ++r) std::memcpy(to + (j + r) * to_row + i, x + 16 * r, 64);
        }
}

#if defined(__x86_64__)
// The same with the halves of each interleaving in registers.
__attribute__((target("avx512f"))) void transpose_avx512(const float* from, int64_t rows, int64_t columns, float* to,
                                                         int64_t to_row) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            __m512 x[16], y[16];
            for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_ps(from + (i + r) * columns + j);
            for (int round = 0; round < 4; round += 2) {
                for (int r = 0; r < 8; ++r) {
                    y[2 * r] = _mm512_permutex2var_ps(x[r], low, x[r + 8]);
                    y[2 * r + 1] = _mm512_permutex2var_ps(x[r], high, x[r + 8]);
                }
                for (int r = 0; r < 8; ++r) {
                    x[2 * r] = _mm512_permutex2var_ps(y[r], low, y[r + 8]);
                    x[2 * r + 1] = _mm512_permutex2var_ps(y[r], high, y[r + 8]);
                }
            }
            for (int r = 0; r < 16; ++r) _mm512_storeu_ps(to + (j + r) * to_row + i, x[r]);
        }
}
#endif

inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
#if defined(__x86_64__)
    static const bool wide = __builtin_cpu_supports("avx512f");
    if (wide) return transpose_avx512(from, rows, columns, to, to_row);
#endif
    transpose_blocks(from, rows, columns, to, to_row);
}

// Units of pairs along a row, [rows, from_width], as units of pairs of rows, [rows / 2, width].
DINO_MULTIVERSION inline void pair_up(const float* from, int64_t rows, int64_t from_width, float* to, int64_t width) {
    for (int64_t i = 0; i < rows; i += 2, to += width) {
        auto even = reinterpret_cast<const Value16*>(from + i * from_width), odd = even + 2 * from_width;
        auto out = reinterpret_cast<Unit*>(to);
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) out[d] = uint32_t(even[d]) | uint32_t(odd[d]) << 16;
    }
}

}  // namespace
}  // namespace dino
