// Products of matrices of 4-byte units: floats, or two bfloat16 neighbors along the contraction where the processor
// multiplies such pairs (AVX512-BF16, or a tile of them at once: AMX); and how tensors become such matrices. An
// algorithm written for units serves all.
#pragma once

#include <algorithm>
#include <functional>

#include "common/dtype.h"
#include "common/memory.h"
#include "cpu/gemm/products.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define DINO_HAS_AMX
#endif

namespace dino {
namespace {

constexpr int64_t kLanes = 16;  // units a vector; wider than some machines have, which then take several. Of AMX a tile
constexpr int64_t kTile = 8;    // rows of a tile of a product

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// --- products ----------------------------------------------------------------------------------------

struct Nothing {
    void operator()() const {}
};

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; A has any strides, rows of B and C are aligned.
struct Product {
    int64_t depth, a_row, a_column, b_row, c_row;
    bool add = false;
};

// C[M, a vector * N]; vectors have the width of the machine's, others would live in memory.
template <class Vector, int M, int N>
__attribute__((always_inline)) inline void tile(const Product& p, const float* a, const float* b, float* c) {
    constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
    Vector sum[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j)
            sum[i][j] = p.add ? *reinterpret_cast<Vector*>(c + i * p.c_row + j * kWidth) : Vector{};
    for (int64_t k = 0; k < p.depth; ++k) {
        Vector row[N];
        for (int j = 0; j < N; ++j) row[j] = *reinterpret_cast<const Vector*>(b + k * p.b_row + j * kWidth);
        for (int i = 0; i < M; ++i) {
            float factor = a[i * p.a_row + k * p.a_column];
            for (int j = 0; j < N; ++j) sum[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) *reinterpret_cast<Vector*>(c + i * p.c_row + j * kWidth) = sum[i][j];
}

// A tile of C: kTile rows, 16 columns (at most 48 with AVX-512, where 24 sums fill the registers).
void float_tile(int64_t, const Product& p, const float* a, const float* b, float* c) {
    using Vector __attribute__((vector_size(16))) = float;
    for (int64_t i = 0; i < kTile; i += 2) tile<Vector, 2, 4>(p, a + i * p.a_row, b, c + i * p.c_row);
}

// x[i] = op over row i of x [kLanes, kLanes], halving the rows: loops that vectorize, unlike one over a row.
template <class Op>
__attribute__((always_inline)) inline void fold(float* x, Op op) {
    for (int64_t n = kLanes * kLanes / 2; n >= kLanes; n /= 2)
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] = op(x[2 * i], x[2 * i + 1]);
}

// to[i] = sum over row i of x * y, both [kLanes, width]
DINO_MULTIVERSION
void float_row_dots(const float* x, const float* y, int64_t width, float* to) {
    alignas(64) float sums[kLanes * kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t j = 0; j < width; j += kLanes)
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l) sums[i * kLanes + l] += x[i * width + j + l] * y[i * width + j + l];
    fold(sums, std::plus<float>());
    std::copy_n(sums, kLanes, to);
}

// What the unit is and how it is computed with.
struct Kind {
    int64_t pair;     // values a unit
    int64_t vectors;  // of a tile, at most
    void (*tile)(int64_t vectors, const Product&, const float* a, const float* b, float* c);
    // Floats x [rows, width] as units: pairs along a row [rows, width / 2] with rows to_row apart, also in place; pairs
    // of rows [rows / 2, width].
    void (*pair_columns)(const float* x, int64_t rows, int64_t width, float* to, int64_t to_row);
    void (*pair_rows)(const float* x, int64_t rows, int64_t width, float* to);
    void (*row_dots)(const float* x, const float* y, int64_t width, float* to);
    bool amx = false;  // then A has adjacent columns, all rows come in 16, depth is a multiple of 16 and TileUse lives

    int64_t units(int64_t values) const { return (values + pair - 1) / pair; }
    int64_t contraction(int64_t values) const { return amx ? padded(units(values)) : units(values); }
};

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void float_tile_avx2(int64_t, const Product& p, const float* a, const float* b,
                                                         float* c) {
    using Vector __attribute__((vector_size(32))) = float;
    for (int64_t i = 0; i < kTile; i += 4) tile<Vector, 4, 2>(p, a + i * p.a_row, b, c + i * p.c_row);
}

__attribute__((target("avx512f"))) void float_tile_avx512(int64_t vectors, const Product& p, const float* a,
                                                          const float* b, float* c) {
    using Vector __attribute__((vector_size(64))) = float;
    if (vectors == 3)
        tile<Vector, kTile, 3>(p, a, b, c);
    else if (vectors == 2)
        tile<Vector, kTile, 2>(p, a, b, c);
    else
        tile<Vector, kTile, 1>(p, a, b, c);
}

#define DINO_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

template <int M, int N>
DINO_BF16
    __attribute__((always_inline)) inline void pair_tile(const Product& p, const float* a, const float* b, float* c) {
    __m512 sum[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j)
            sum[i][j] = p.add ? _mm512_load_ps(c + i * p.c_row + j * kLanes) : _mm512_setzero_ps();
    for (int64_t k = 0; k < p.depth; ++k) {
        __m512bh row[N];
        for (int j = 0; j < N; ++j) row[j] = (__m512bh)_mm512_load_ps(b + k * p.b_row + j * kLanes);
        for (int i = 0; i < M; ++i) {
            __m512bh factor = (__m512bh)_mm512_set1_ps(a[i * p.a_row + k * p.a_column]);
            for (int j = 0; j < N; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, row[j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) _mm512_store_ps(c + i * p.c_row + j * kLanes, sum[i][j]);
}

DINO_BF16 void bf16_tile(int64_t vectors, const Product& p, const float* a, const float* b, float* c) {
    if (vectors == 3)
        pair_tile<kTile, 3>(p, a, b, c);
    else if (vectors == 2)
        pair_tile<kTile, 2>(p, a, b, c);
    else
        pair_tile<kTile, 1>(p, a, b, c);
}

DINO_BF16 void bf16_pair_columns(const float* x, int64_t rows, int64_t width, float* to, int64_t to_row) {
    for (; rows; --rows, x += width, to += to_row)
        for (int64_t j = 0; j < width; j += kLanes)
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + j / 2),
                               (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(x + j)));
}

DINO_BF16 void bf16_pair_rows(const float* x, int64_t rows, int64_t width, float* to) {
    using Halves __attribute__((vector_size(32))) = uint16_t;
    using Words __attribute__((vector_size(64))) = uint32_t;
    for (int64_t i = 0; i < rows; i += 2, x += 2 * width, to += width)
        for (int64_t j = 0; j < width; j += kLanes) {
            auto even = __builtin_convertvector((Halves)_mm512_cvtneps_pbh(_mm512_load_ps(x + j)), Words);
            auto odd = __builtin_convertvector((Halves)_mm512_cvtneps_pbh(_mm512_load_ps(x + width + j)), Words);
            _mm512_store_si512(to + j, (__m512i)(even | odd << 16));
        }
}

DINO_BF16 void bf16_row_dots(const float* x, const float* y, int64_t width, float* to) {
    alignas(64) float sums[kLanes * kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = i * width; j < (i + 1) * width; j += kLanes)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_load_ps(x + j), (__m512bh)_mm512_load_ps(y + j));
        _mm512_store_ps(sums + i * kLanes, sum);
    }
    fold(sums, std::plus<float>());
    std::copy_n(sums, kLanes, to);
}
#endif

#if defined(DINO_HAS_AMX)
#define DINO_AMX __attribute__((target("avx512f,amx-tile,amx-bf16")))

// C[16 * M, 16 * N] to tiles 0 to 3, or zeros unless `add`; and back.
template <int M, int N>
DINO_AMX __attribute__((always_inline)) inline void load_sums(const float* c, int64_t row, bool add) {
    if (add) {
        _tile_loadd(0, c, row * 4);
        if (N > 1) _tile_loadd(1, c + 16, row * 4);
        if (M > 1) _tile_loadd(2, c + 16 * row, row * 4);
        if (M > 1 && N > 1) _tile_loadd(3, c + 16 * row + 16, row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

template <int M, int N>
DINO_AMX __attribute__((always_inline)) inline void store_sums(float* c, int64_t row) {
    _tile_stored(0, c, row * 4);
    if (N > 1) _tile_stored(1, c + 16, row * 4);
    if (M > 1) _tile_stored(2, c + 16 * row, row * 4);
    if (M > 1 && N > 1) _tile_stored(3, c + 16 * row + 16, row * 4);
}

// C[16 * M, 16 * N] in tiles 0 to 3, A in 4 and 5, B in 6 and 7; after each step of 16 units a call of `beside`.
template <int M, int N, class Beside>
DINO_AMX void amx_tile(const Product& p, const float* a, const float* b, float* c, Beside&& beside) {
    int64_t a_row = p.a_row * 4, b_row = p.b_row * 4;
    load_sums<M, N>(c, p.c_row, p.add);
    for (int64_t k = 0; k < p.depth; k += kLanes) {
        _tile_loadd(4, a + k, a_row);
        _tile_loadd(6, b + k * p.b_row, b_row);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + k * p.b_row + 16, b_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + 16 * p.a_row + k, a_row);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
        beside();
    }
    store_sums<M, N>(c, p.c_row);
}

void amx_product(int64_t rows, int64_t columns, const Product& p, const float* a, const float* b, float* c) {
    for (int64_t j = 0; j < columns; j += 32)  // B's columns stay in the first-level cache while A goes by
        for (int64_t i = 0; i < rows; i += 32) {
            bool tall = rows - i > 16, wide = columns - j > 16;
            auto tile = tall   ? wide ? amx_tile<2, 2, Nothing> : amx_tile<2, 1, Nothing>
                        : wide ? amx_tile<1, 2, Nothing>
                               : amx_tile<1, 1, Nothing>;
            tile(p, a + i * p.a_row, b + j, c + i * p.c_row + j, Nothing());
        }
}

// Linux gives a process the tiles' state when asked.
bool amx_allowed() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, kRequest, kTileData);
    return allowed;
}

// The instruction's memory operand, all of which a compiler must not take for unread.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

DINO_AMX void use_tiles() { _tile_loadconfig(&kTileConfig); }

DINO_AMX void leave_tiles() { _tile_release(); }
#else
void amx_product(int64_t, int64_t, const Product&, const float*, const float*, float*) {}
bool amx_allowed() { return false; }
void use_tiles() {}
void leave_tiles() {}
#endif

// This thread's tiles are 16 rows of 16 units while it lives; other libraries use them in between.
struct TileUse {
    bool amx;
    explicit TileUse(bool amx = true) : amx(amx) {
        if (amx) use_tiles();
    }
    ~TileUse() {
        if (amx) leave_tiles();
    }
    TileUse(const TileUse&) = delete;
};

// The widest of this processor for operands of a dtype, of bf16 at most `products`.
Kind kind_of(DType dtype, Products products) {
#if defined(__x86_64__)
    if (products >= Products::bf16_pairs && dtype == DType::bf16 && __builtin_cpu_supports("avx512bf16"))
        return {2,
                3,
                bf16_tile,
                bf16_pair_columns,
                bf16_pair_rows,
                bf16_row_dots,
                products == Products::amx && amx_allowed()};
    if (__builtin_cpu_supports("avx512f")) return {1, 3, float_tile_avx512, nullptr, nullptr, float_row_dots};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {1, 1, float_tile_avx2, nullptr, nullptr, float_row_dots};
#endif
    return {1, 1, float_tile, nullptr, nullptr, float_row_dots};
}

// Rows and columns of C are padded to tiles.
inline void product(const Kind& kind, int64_t rows, int64_t columns, const Product& p, const float* a, const float* b,
                    float* c) {
    if (kind.amx) return amx_product(rows, columns, p, a, b, c);
    int64_t left = columns / kLanes, panels = (left + kind.vectors - 1) / kind.vectors;
    for (int64_t j = 0; panels; --panels) {  // of nearly equal widths; B's columns stay in the first-level cache
        int64_t vectors = (left + panels - 1) / panels;
        for (int64_t i = 0; i < rows; i += kTile) kind.tile(vectors, p, a + i * p.a_row, b + j, c + i * p.c_row + j);
        left -= vectors;
        j += vectors * kLanes;
    }
}

// --- operands ----------------------------------------------------------------------------------------

using Value16 __attribute__((may_alias)) = uint16_t;
using Unit __attribute__((may_alias)) = uint32_t;

// A call of memcpy for each row would cost more than the row.
__attribute__((always_inline)) inline void copy(const void* from, int64_t bytes, void* to) {
    auto source = static_cast<const char*>(from);
    auto target = static_cast<char*>(to);
    for (; bytes >= 64; bytes -= 64, source += 64, target += 64) std::memcpy(target, source, 64);
    if (bytes) std::memcpy(target, source, size_t(bytes));
}

constexpr int64_t kAhead = 64;  // rows; prefetchers do not follow these strides

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
