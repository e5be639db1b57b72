// Microkernels: products of matrices of 4-byte units. A unit is a float32 or, where the processor multiplies such pairs
// (AVX512-BF16, AMX), two bfloat16 values adjacent along the contraction. An algorithm written for units serves both.
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
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define DINO_HAS_AMX
#endif

namespace dino {
namespace {

constexpr int64_t kLanes = 16;  // units of an AVX-512 vector and of a row of an AMX tile; narrower vectors take several
constexpr int64_t kTile = 8;    // rows of a microkernel's block of C

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Nothing {
    void operator()() const {}
};

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; A has any strides, rows of B and C are aligned.
struct Product {
    int64_t depth, a_row, a_column, b_row, c_row;
    bool add = false;
};

// C[M, a vector * N], in registers: the vector must be one of the instruction set.
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

// A block of C: kTile rows and 16 columns; with AVX-512 up to 48, whose 24 sums fill the registers.
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

// What a unit is, and the functions of one instruction set that compute with units.
struct Microkernel {
    int64_t pair;     // values a unit
    int64_t vectors;  // of 16 columns in a block of C, at most
    void (*tile)(int64_t vectors, const Product&, const float* a, const float* b, float* c);
    // Floats x [rows, width] as units: pairs along a row [rows, width / 2] with rows to_row apart, also in place; pairs
    // of rows [rows / 2, width].
    void (*pair_columns)(const float* x, int64_t rows, int64_t width, float* to, int64_t to_row);
    void (*pair_rows)(const float* x, int64_t rows, int64_t width, float* to);
    void (*row_dots)(const float* x, const float* y, int64_t width, float* to);
    bool amx = false;  // then columns of A are adjacent, rows and depth are multiples of 16, in a TileConfigScope

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

// C[16 * M, 16 * N] in tiles 0 to 3, A in 4 and 5, B in 6 and 7; after each step of 16 units a call of `interleave`.
template <int M, int N, class Work>
DINO_AMX void amx_tile(const Product& p, const float* a, const float* b, float* c, Work&& interleave) {
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
        interleave();
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

// Not __builtin_cpu_supports: clang 14 does not know that name of a feature.
bool has_amx_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

// Linux lets a process use the tile registers once it has asked.
bool amx_allowed() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = has_amx_bf16() && !syscall(SYS_arch_prctl, kRequest, kTileData);
    return allowed;
}

// The memory operand of the instruction; the compiler must not drop what it takes for unread.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

DINO_AMX void configure_tiles() { _tile_loadconfig(&kTileConfig); }

DINO_AMX void release_tiles() { _tile_release(); }
#else
void amx_product(int64_t, int64_t, const Product&, const float*, const float*, float*) {}
[[maybe_unused]] bool amx_allowed() { return false; }
void configure_tiles() {}
void release_tiles() {}
#endif

// Configures this thread's tiles as 16 rows of 16 units, and releases them: other libraries have configurations of
// their own.
struct TileConfigScope {
    bool amx;
    explicit TileConfigScope(bool amx = true) : amx(amx) {
        if (amx) configure_tiles();
    }
    ~TileConfigScope() {
        if (amx) release_tiles();
    }
    TileConfigScope(const TileConfigScope&) = delete;
};

// The fastest on this processor for operands of a dtype; of bf16 what `products` allows.
Microkernel microkernel_for(DType dtype, Products products) {
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

// Memory of A, B and C is padded: rows to kTile (AMX: 16), columns to 16.
inline void product(const Microkernel& kernel, int64_t rows, int64_t columns, const Product& p, const float* a,
                    const float* b, float* c) {
    if (kernel.amx) return amx_product(rows, columns, p, a, b, c);
    int64_t left = columns / kLanes, panels = (left + kernel.vectors - 1) / kernel.vectors;
    for (int64_t j = 0; panels; --panels) {  // of nearly equal widths; B's columns stay in the first-level cache
        int64_t vectors = (left + panels - 1) / panels;
        for (int64_t i = 0; i < rows; i += kTile) kernel.tile(vectors, p, a + i * p.a_row, b + j, c + i * p.c_row + j);
        left -= vectors;
        j += vectors * kLanes;
    }
}

}  // namespace
}  // namespace dino
