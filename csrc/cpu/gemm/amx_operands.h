// The policy of linear layers' products by AMX tiles.
//
// A float32 value is the sum of three bfloat16 parts: itself rounded, the remainder rounded, and the remainder of that.
// Six products of parts give a float32 product; the other three are below its rounding (Henry, Tang, Heinecke 2019,
// arXiv 1904.06376). Parts are stored by tiles: for 32 rows or a panel, and every 16 units, [3 parts, 512 units].
#pragma once

#include "cpu/gemm/panels.h"

#if defined(DINO_HAS_AMX)
namespace dino {
namespace {

constexpr int64_t kDepth = 128;  // units of the contraction at a time: 16 KiB of a panel, in the first-level cache
constexpr int64_t kTiles = 16 * kPanel;  // units of two tiles

template <class Value>
constexpr int64_t kParts = std::is_same_v<Value, float> ? 3 : 1;  // bfloat16 parts of a value

inline const float* units(const void* x, int64_t offset) {  // offset in values, even
    return reinterpret_cast<const float*>(static_cast<const uint16_t*>(x) + offset);
}

// low and high, rounded to bfloat16; they become the remainders.
DINO_BF16 inline __m512i take_part(__m512& low, __m512& high) {
    auto part = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    low -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(part)), 16);
    high -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1)), 16);
    return part;
}

// [low half, high half] as pairs of a value of each.
DINO_BF16 inline __m512i interleave_halves(__m512i halves) {
    const __m512i order =
        _mm512_add_epi16(_mm512_set1_epi32(0x00100000),
                         _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9,
                                                               9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)));
    return _mm512_permutexvar_epi16(order, halves);
}

// 32 columns of `rows` <= 32 rows of x as parts of pairs of columns [3, 32, 16], padded with zeros.
DINO_BF16 inline void split(const float* x, int64_t stride, int64_t rows, float* to) {
    for (int64_t i = 0; i < 32; ++i, x += stride, to += kLanes) {
        next_panel(x, 1, 0, false);
        __m512 low = i < rows ? _mm512_loadu_ps(x) : _mm512_setzero_ps();
        __m512 high = i < rows ? _mm512_loadu_ps(x + kLanes) : _mm512_setzero_ps();
        for (int64_t part = 0; part < kParts<float>; ++part)
            _mm512_store_si512(to + part * kTiles, take_part(low, high));
    }
}

// `rows` rows of `width` units as tiles read them, padded to 32 with zeros; bfloat16 in place where no row is missing.
template <class Value = uint16_t>
const float* whole_tiles(const void* x, int64_t offset, int64_t rows, int64_t width, Buffer& copy) {
    auto from = static_cast<const Value*>(x) + offset;
    if (kParts<Value> == 1 && rows == whole(rows)) return units(x, offset);
    float* to = copy.fit(kParts<Value> * whole(rows) * width);
    if constexpr (kParts<Value> == 1) {
        std::copy_n(units(x, offset), rows * width, to);
        std::fill(to + rows * width, to + whole(rows) * width, 0.0f);
    } else {
        float* block = to;
        for (int64_t i = 0; i < rows; i += 32)
            for (int64_t k = 0; k < width; k += kLanes, block += kParts<Value> * kTiles)
                split(from + 2 * (i * width + k), 2 * width, rows - i, block);
    }
    return to;
}

// `finish` with the instruction that rounds to bfloat16
DINO_BF16 inline void finish_rounded(const float* c, int64_t rows, const float* bias, uint16_t* to, int64_t stride) {
    __m512 low = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
    __m512 high = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i, c += kPanel, to += stride) {
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_load_ps(c + 16) + high, _mm512_load_ps(c) + low);
        _mm512_storeu_si512(to, (__m512i)pair);
    }
}

// to [rows / 2, 32] = pairs of rows of c [rows, 32], rounded
DINO_BF16 inline void finish_pairs(const float* c, int64_t rows, float* to) {
    for (int64_t i = 0; i < rows; i += 2, c += 2 * kPanel, to += kPanel)
        for (int64_t j = 0; j < kPanel; j += 16) {
            __m512 even = _mm512_load_ps(c + j), odd = _mm512_load_ps(c + kPanel + j);
            _mm512_store_si512(to + j, interleave_halves((__m512i)_mm512_cvtne2ps_pbh(odd, even)));
        }
}

DINO_AMX inline void load_left(const float* a) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTiles / 2, 64);
}

DINO_AMX inline void load_right(const float* b) {
    _tile_loadd(6, b, kPanel * 4);
    _tile_loadd(7, b + 16, kPanel * 4);
}

DINO_AMX inline void add_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// c [32, 32] (+)= a [32, depth] b [depth, 32] for operands of three parts, in the order of fewest tile loads.
template <class Work>
DINO_AMX void split_tile(int64_t depth, const float* a, const float* b, float* c, bool add, Work&& interleave) {
    load_sums<2, 2>(c, kPanel, add);
    for (int64_t k = 0; k < depth; k += kLanes, a += kParts<float> * kTiles, b += kParts<float> * kTiles) {
        load_left(a + 2 * kTiles);
        load_right(b);
        add_tiles();
        load_left(a);
        add_tiles();
        load_right(b + 2 * kTiles);
        add_tiles();
        load_right(b + kTiles);
        add_tiles();
        load_left(a + kTiles);
        add_tiles();
        load_right(b);
        add_tiles();
        interleave();
    }
    store_sums<2, 2>(c, kPanel);
}

// c [rows, 32] (+)= x [rows, width] times a packed panel; rows is a multiple of 32. If `prefetch_next`, the panel that
// follows in memory is fetched into the second-level cache.
template <class Value = uint16_t, class Work>
inline void multiply(const float* x, int64_t rows, int64_t width, const float* panel, float* c, bool add,
                     bool prefetch_next, Work&& interleave) {
    constexpr int64_t parts = kParts<Value>, depth = parts == 1 ? kDepth : kDepth / 4;
    const float* next = panel + parts * kPanel * width;
    int64_t lines = prefetch_next ? parts * 2 * kTiles / rows : 0;  // a step
    auto step = [&] {
        interleave();
        for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
    };
    for (int64_t k = 0; k < width; k += depth)
        for (int64_t i = 0; i < rows; i += 32) {
            int64_t count = std::min(depth, width - k);
            const float* b = panel + parts * k * kPanel;
            if constexpr (parts == 1)
                amx_tile<2, 2>({count, width, 1, kPanel, kPanel, add || k > 0}, x + i * width + k, b, c + i * kPanel,
                               step);
            else
                split_tile(count, x + parts * (i * width + 32 * k), b, c + i * kPanel, add || k > 0, step);
        }
}

// Columns [column, column + 32) of `rows` rows as pairs of rows [room, 32], padded with zeros.
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

// The same of at most 32 rows, as parts [3, 16, 32].
DINO_BF16 inline void pairs_of(const float* x, int64_t stride, int64_t rows, int64_t column, float* to, int64_t room) {
    x += column;
    for (int64_t i = 0; i < 2 * room; i += 2, x += 2 * stride, to += kPanel) {
        next_panel(x, 2, stride, false);
        for (int64_t j = 0; j < kPanel; j += kLanes) {
            __m512 even = i < rows ? _mm512_loadu_ps(x + j) : _mm512_setzero_ps();
            __m512 odd = i + 1 < rows ? _mm512_loadu_ps(x + stride + j) : _mm512_setzero_ps();
            for (int64_t part = 0; part < kParts<float>; ++part)
                _mm512_store_si512(to + part * kTiles + j, interleave_halves(take_part(even, odd)));
        }
    }
}

// The same of many rows: [padded(rows / 2), 32]
inline void pair_rows_of(const uint16_t* x, int64_t stride, int64_t rows, int64_t column, float* to) {
    next_panel(x + column, rows, stride, false);
    pairs_of(x, stride, rows, column, to, padded((rows + 1) / 2));
}

// A panel: 32 rows of weights [outputs, depth], or 32 columns of weights [depth, outputs] if transposed, as pairs along
// the contraction [depth / 2, 32].
inline void pack_panel(const uint16_t* weights, int64_t depth, int64_t outputs, bool transposed, int64_t first,
                       float* to) {
    if (transposed) return pairs_of(weights, outputs, depth, first, to, depth / 2);
    transpose(units(weights, first * depth), kPanel, depth / 2, to, kPanel);
}

inline void pack_panel(const float* weights, int64_t depth, int64_t outputs, bool transposed, int64_t first,
                       float* to) {
    alignas(64) float rows[kParts<float> * kTiles];
    for (int64_t k = 0; k < depth; k += 32, to += kParts<float> * kTiles) {
        if (transposed) {
            pairs_of(weights + k * outputs, outputs, 32, first, to, 16);
        } else {
            split(weights + first * depth + k, depth, 32, rows);
            for (int64_t i = 0; i < kParts<float> * kTiles; i += kTiles)
                transpose(rows + i, 32, kLanes, to + i, kPanel);
        }
    }
}

template <class V>
struct AmxOperands {
    using Value = V;
    using Scope = TileConfigScope;
    static constexpr bool kPrefetch = true;
    // Tokens at a time in a gradient of weights: packed, they stay in the second-level cache.
    static constexpr int64_t kChunk = kParts<Value> == 1 ? 512 : 256;

    static int64_t floats(int64_t values) { return kParts<Value> * values / 2; }
    // 64 tokens stay in the first-level cache while weights stream from the second; of larger weights each load serves
    // 128 tokens.
    static int64_t block(int64_t weights) { return exceeds_half_l2(weights) ? kBlock : kBlock / 2; }
    static int64_t whole(int64_t rows) { return dino::whole(rows); }

    static const float* rows(const Value* x, int64_t count, int64_t depth, Buffer& copy) {
        return whole_tiles<Value>(x, 0, count, depth / 2, copy);
    }

    template <class Work>
    static void multiply(const float* x, int64_t rows, int64_t depth, const float* panel, float* c, bool add,
                         bool prefetch_next, Work&& interleave) {
        dino::multiply<Value>(x, rows, depth / 2, panel, c, add, prefetch_next, interleave);
    }

    static int64_t steps(int64_t rows, int64_t depth) { return rows / 32 * depth / 32; }

    static void finish(const float* c, int64_t rows, const float* bias, Value* to, int64_t stride) {
        if constexpr (kParts<Value> == 1)
            finish_rounded(c, rows, bias, to, stride);
        else
            dino::finish(c, rows, bias, to, stride);
    }

    static void finish_tokens(const float* c, int64_t rows, float* to) {
        static_assert(kParts<Value> == 1);
        finish_pairs(c, rows, to);
    }

    static void pack(const Value* weights, int64_t depth, int64_t outputs, bool transposed, int64_t first, float* to) {
        pack_panel(weights, depth, outputs, transposed, first, to);
    }

    static void pack_tokens(const Value* x, int64_t stride, int64_t rows, int64_t room, float* to) {
        pairs_of(x, stride, rows, 0, to, room / 2);
    }
    static int64_t token_offset(int64_t row) { return (row / 32 * kParts<Value> * 16 + row / 2 % 16) * kPanel; }

    static void pack_transposed(const Value* x, int64_t count, int64_t narrow, float* to) {
        constexpr int64_t parts = kParts<Value>;
        alignas(64) float block[parts * kTiles];
        int64_t width = whole(count) / 2;
        for (int64_t i = 0; i < count; i += 32, x += 32 * narrow) {
            int64_t rows = std::min<int64_t>(32, count - i), next = std::min<int64_t>(32, count - i - 32);
            for (int64_t j = 0; j < next * narrow; j += 64 / sizeof(Value)) __builtin_prefetch(x + 32 * narrow + j);
            for (int64_t j = 0; j < narrow; j += kPanel) {
                pairs_of(x, narrow, rows, j, block, 16);
                if constexpr (parts == 1)
                    transpose(block, 16, kPanel, to + j * width + i / 2, width);
                else
                    for (int64_t k = 0; k < parts * kTiles; k += kTiles)
                        transpose(block + k, 16, kPanel, to + parts * (j * width + i / 2 * 32) + k, kLanes);
            }
        }
    }
};

}  // namespace
}  // namespace dino
#endif
