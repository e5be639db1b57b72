// AMX tile and bfloat16 instructions in plain C++. Included before all other headers, it makes the kernels that use
// these instructions run on any processor with AVX-512.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

using Tile = unsigned char[16][64];
inline thread_local Tile tiles[8];

inline void load(int tile, const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile][i], static_cast<const char*>(from) + i * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile][i], 64);
}

inline float flushed(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

inline float widened(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return flushed(f);
}

inline uint16_t rounded(float f) {
    f = flushed(f);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (std::isnan(f)) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void add_product(int sums, int left, int right) {
    float c[16][16];
    uint16_t a[16][32], b[16][32];
    std::memcpy(c, tiles[sums], 1024);
    std::memcpy(a, tiles[left], 1024);
    std::memcpy(b, tiles[right], 1024);
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 32; ++k)
            for (int j = 0; j < 16; ++j) c[i][j] += widened(a[i][k]) * widened(b[k / 2][2 * j + k % 2]);
    std::memcpy(tiles[sums], c, 1024);
}

using Halves16 __attribute__((vector_size(32))) = uint16_t;
using Halves32 __attribute__((vector_size(64))) = uint16_t;

__attribute__((target("avx512f"))) inline Halves16 rounded(__m512 x) {
    Halves16 out;
    for (int i = 0; i < 16; ++i) out[i] = rounded(x[i]);
    return out;
}

__attribute__((target("avx512f"))) inline Halves32 rounded(__m512 high, __m512 low) {
    Halves32 out;
    for (int i = 0; i < 32; ++i) out[i] = rounded(i < 16 ? low[i] : high[i - 16]);
    return out;
}

template <class Pairs>
__attribute__((target("avx512f"))) inline __m512 add_pairs(__m512 sums, Pairs x, Pairs y) {
    uint16_t a[32], b[32];
    std::memcpy(a, &x, 64);
    std::memcpy(b, &y, 64);
    for (int i = 0; i < 32; ++i) sums[i / 2] += widened(a[i]) * widened(b[i]);
    return sums;
}

inline bool supports(const char* feature) { return !std::strcmp(feature, "avx512bf16"); }

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, 1024)
#define _tile_dpbf16ps emulated::add_product
#define _mm512_cvtneps_pbh emulated::rounded
#define _mm512_cvtne2ps_pbh (__m512bh) emulated::rounded
#define _mm512_dpbf16_ps emulated::add_pairs
#define __builtin_cpu_supports(feature) (emulated::supports(feature) || __builtin_cpu_supports(feature))
// AMX-BF16 is there, and Linux grants the request for its tiles.
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(d) = 1u << 22, 1)
#define syscall(...) 0
