// The resize for processors that multiply bytes: VNNI sums the products of four of them in each 32-bit lane, VBMI picks
// bytes from anywhere in a vector. A weight of 22 fractional bits is three signed digits of 8 bits.
//
// The pass along rows makes 16 outputs of a row at a time. Four rows of them, one in each byte of a lane, are what the
// pass along columns reads: quads.
#include <algorithm>

#include "cpu/multicrop/filter.h"

#if DINO_HAS_QUADS
#include <immintrin.h>

namespace dino {
namespace {

constexpr int64_t kQuad = 4, kDigits = 3, kGroup = 16;  // of pixels or rows; of a weight; of outputs

int64_t padded(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

struct Scratch {
    Filter horizontal, vertical;
    BufferOf<uint32_t> digits, rows_digits, rows;
    BufferOf<uint8_t> picks, planes, levels;
    BufferOf<int32_t> starts;
    BufferOf<const uint32_t*> quads;
};

// --- weights -----------------------------------------------------------------------------------------

// to[x], to[step + x] and to[2 * step + x]: the lowest, middle and highest digits of weights[tap * size + x] for four
// taps, a byte each. Added to 0x808080, every byte of a weight is its digit and 128.
DINO_MULTIVERSION
void to_digits(const int32_t* weights, int64_t size, int64_t n, int64_t step, uint32_t* __restrict to) {
    for (int64_t digit = 0; digit < kDigits; ++digit) {
        int shift = int(8 * digit);
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) {
            uint32_t quad = 0;
            for (int64_t tap = 0; tap < kQuad; ++tap)
                quad |= (uint32_t(weights[tap * size + x] + 0x808080) >> shift & 0xffu) << (8 * tap);
            to[digit * step + x] = quad ^ 0x80808080u;
        }
    }
}

// --- along rows --------------------------------------------------------------------------------------

struct Picks {
    alignas(64) uint8_t of[3][64];

    constexpr Picks() : of{} {
        for (int c = 0; c < 3; ++c)
            for (int i = 0; i < 64; ++i) of[c][i] = uint8_t(3 * i + c);  // permutes take it modulo 64 or 128
    }
};
constexpr Picks kPicks;

// n pixels to planes of red, green and blue, `stride` bytes apart
DINO_QUADS void split(const uint8_t* pixels, int64_t n, int64_t ahead, int64_t stride, uint8_t* to) {
    for (int64_t i = 0; i < n; i += 64) {
        __m512i x[3];
        for (int v = 0; v < 3; ++v) {
            int64_t left = std::clamp<int64_t>(3 * (n - i) - 64 * v, 0, 64);
            __mmask64 inside = left == 64 ? ~0ull : (1ull << left) - 1;
            x[v] = _mm512_maskz_loadu_epi8(inside, pixels + 3 * i + 64 * v);
            __builtin_prefetch(pixels + 3 * i + 64 * v + ahead);
        }
        for (int c = 0; c < 3; ++c) {
            __m512i pick = _mm512_load_si512(kPicks.of[c]);
            __m512i two = _mm512_permutex2var_epi8(x[0], pick, x[1]);
            __mmask64 third = _mm512_movepi8_mask(pick);  // 128 and more
            _mm512_store_si512(to + c * stride + i, _mm512_mask_permutexvar_epi8(two, third, pick, x[2]));
        }
    }
}

struct Sums {
    __m512i digit[kDigits];
};

DINO_QUADS DINO_INLINE inline Sums half_a_level() {
    return {{_mm512_set1_epi32(1 << (kWeightBits - 1)), _mm512_setzero_si512(), _mm512_setzero_si512()}};
}

DINO_QUADS DINO_INLINE inline void add(Sums& sums, __m512i quads, const __m512i* digits) {
    for (int64_t d = 0; d < kDigits; ++d) sums.digit[d] = _mm512_dpbusd_epi32(sums.digit[d], quads, digits[d]);
}

// Four vectors of sums to bytes, those of every 16 bytes of each in turn
DINO_QUADS DINO_INLINE inline __m512i to_levels(const Sums* sums) {
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i* d = sums[i].digit;
        x[i] = _mm512_add_epi32(_mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(d[2], 8), d[1]), 8), d[0]);
        x[i] = _mm512_srai_epi32(x[i], kWeightBits);
    }
    return _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
}

// 16 outputs of four rows, `stride` bytes apart, as quads
template <bool kNear>
DINO_QUADS DINO_INLINE inline __m512i group(const uint8_t* rows, int64_t stride, __m512i picks, const int32_t* first,
                                            const uint32_t* digits, int64_t taps) {
    Sums sums[4];
    for (Sums& s : sums) s = half_a_level();
    for (int64_t tap = 0; tap < taps; tap += kQuad, digits += kDigits * kGroup) {
        __m512i w[kDigits];
        for (int64_t d = 0; d < kDigits; ++d) w[d] = _mm512_load_si512(digits + d * kGroup);
        for (int64_t r = 0; r < 4; ++r) {
            const uint8_t* row = rows + r * stride + tap;
            __m512i quads = kNear ? _mm512_permutexvar_epi8(picks, _mm512_loadu_si512(row))
                                  : _mm512_i32gather_epi32(_mm512_loadu_si512(first), row, 1);
            add(sums[r], quads, w);
        }
    }
    const __m512i by_output =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(to_levels(sums), by_output);
}

struct Horizontal {
    const uint8_t* picks;    // [groups, 64]: bytes of a vector that begins with pixel starts[group]
    const int32_t* starts;   // [groups]; negative where the pixels of a group do not fit a vector
    const int32_t* first;    // [padded size]
    const uint32_t* digits;  // [groups, taps / 4, kDigits, kGroup]
    int64_t taps, groups;
};

DINO_QUADS void four_rows(const Horizontal& h, const uint8_t* planes, int64_t stride, uint32_t* to) {
    for (int64_t c = 0; c < 3; ++c)
        for (int64_t g = 0; g < h.groups; ++g) {
            const uint8_t* rows = planes + c * stride;
            const uint32_t* digits = h.digits + g * h.taps / kQuad * kDigits * kGroup;
            __m512i quads = h.starts[g] >= 0 ? group<true>(rows + h.starts[g], 3 * stride,
                                                           _mm512_load_si512(h.picks + 64 * g), nullptr, digits, h.taps)
                                             : group<false>(rows, 3 * stride, _mm512_setzero_si512(),
                                                            h.first + g * kGroup, digits, h.taps);
            _mm512_store_si512(to + (c * h.groups + g) * kGroup, quads);
        }
}

// --- along columns -----------------------------------------------------------------------------------

// A row of n levels from quads of rows; digits [n_quads, kDigits]
DINO_QUADS void one_row(const uint32_t* const* quads, int64_t n_quads, const uint32_t* digits, int64_t step, int64_t n,
                        uint8_t* to) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < n; i += 4 * kGroup) {
        Sums sums[4];
        for (Sums& s : sums) s = half_a_level();
        for (int64_t q = 0; q < n_quads; ++q) {
            __m512i w[kDigits];
            for (int64_t d = 0; d < kDigits; ++d) w[d] = _mm512_set1_epi32(int32_t(digits[(q * kDigits + d) * step]));
            for (int64_t v = 0; v < 4; ++v) add(sums[v], _mm512_loadu_si512(quads[q] + i + v * kGroup), w);
        }
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(in_order, to_levels(sums)));
    }
}

// --- both --------------------------------------------------------------------------------------------

Horizontal prepare(Scratch& s) {
    const Filter& f = s.horizontal;
    int64_t groups = padded(f.size) / kGroup, n_quads = f.taps / kQuad;
    uint8_t* picks = s.picks.fit(groups * 64);
    int32_t* starts = s.starts.fit(groups * (kGroup + 1));
    int32_t* first = starts + groups;
    uint32_t* digits = s.digits.fit(groups * n_quads * kDigits * kGroup);
    std::fill_n(digits, groups * n_quads * kDigits * kGroup, 0);
    for (int64_t x = 0; x < groups * kGroup; ++x) first[x] = f.first[std::min(x, f.size - 1)];
    for (int64_t g = 0; g < groups; ++g) {
        const int32_t *x = first + g * kGroup, start = std::min(x[0], x[kGroup - 1]);
        int64_t n = std::min(kGroup, f.size - g * kGroup);
        for (int64_t i = 0; i < 64; ++i) picks[64 * g + i] = uint8_t(x[i / 4] - start + i % 4);
        starts[g] = std::max(x[0], x[kGroup - 1]) - start + kQuad <= 64 ? start : -1;
        for (int64_t q = 0; q < n_quads; ++q)
            to_digits(f.weights + kQuad * q * f.size + g * kGroup, f.size, n, kGroup,
                      digits + (g * n_quads + q) * kDigits * kGroup);
    }
    return {picks, starts, first, digits, f.taps, groups};
}

}  // namespace

void resample_quads(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes) {
    static thread_local Scratch s;
    const int64_t width = crop.right - crop.left, height = crop.bottom - crop.top, size = crop.size;
    s.horizontal.make(width, size, 1, kQuad, crop.flip);
    s.vertical.make(height, size, kQuad, kQuad, false);
    const Filter& f = s.vertical;
    const Horizontal h = prepare(s);
    const int64_t row = 3 * padded(size), most = f.taps / kQuad, stride = (width + h.taps + 2 * 64) / 64 * 64;
    uint32_t* digits = s.rows_digits.fit(kDigits * most * size);
    for (int64_t q = 0; q < most; ++q)
        to_digits(f.weights + kQuad * q * size, size, size, size, digits + q * kDigits * size);
    uint32_t* rows = s.rows.fit(most * row + kSlack);  // a ring of `most` times four rows
    uint8_t *split_rows = s.planes.fit(kQuad * 3 * stride), *levels = s.levels.fit(row + kSlack);
    const uint32_t** quads = s.quads.fit(most);
    const uint8_t* corner = image + crop.top * row_stride + 3 * crop.left;
    for (int64_t y = 0, made = 0; y < size; ++y) {
        int64_t first = f.first[y] / kQuad, end = (f.end[y] + kQuad - 1) / kQuad;
        for (made = std::max(made, first); made < end; ++made) {
            for (int64_t r = 0; r < kQuad; ++r)
                split(corner + std::min(kQuad * made + r, height - 1) * row_stride, width, kQuad * row_stride, stride,
                      split_rows + r * 3 * stride);
            four_rows(h, split_rows, stride, rows + made % most * row);
        }
        for (int64_t q = first; q < end; ++q) quads[q - first] = rows + q % most * row;
        one_row(quads, end - first, digits + y, size, row, levels);
        for (int64_t c = 0; c < 3; ++c) std::memcpy(planes + (c * size + y) * size, levels + c * row / 3, size_t(size));
    }
}

}  // namespace dino
#endif
