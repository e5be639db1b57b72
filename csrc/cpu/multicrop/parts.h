// The parts of multicrop. A crop's pixels are three planes, red, green and blue, each [size, size] bytes.
#pragma once

#include <cstdint>

#include "common/memory.h"
#include "common/nontemporal.h"
#include "cpu/multicrop/multicrop.h"

// Floats must round as Pillow's do, product and sum each: a fused multiply-add differs where a level is cut off.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own intrinsics
#endif

// Elements of vectors a and b, seen as of a type, of the numbers that follow
#if defined(__clang__)
#define DINO_SHUFFLE(Type, a, b, ...) __builtin_shufflevector((Type)(a), (Type)(b), __VA_ARGS__)
#else
#define DINO_SHUFFLE(Type, a, b, ...) __builtin_shuffle((Type)(a), (Type)(b), Type{__VA_ARGS__})
#endif

// Which versions are compiled: all, or with DINO_ONE_VERSION those of -march. Quads take AVX-512 of 2019 and later,
// VBMI and VNNI; older processors with AVX-512 take the version for AVX2.
#if defined(__x86_64__) && (!defined(DINO_ONE_VERSION) || defined(__AVX2__))
#define DINO_HAS_AVX2 1
#endif
#if defined(__x86_64__) && (!defined(DINO_ONE_VERSION) || (defined(__AVX512VBMI__) && defined(__AVX512VNNI__)))
#define DINO_HAS_QUADS 1
#define DINO_QUADS __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vnni")))
#endif

namespace dino {

// The box of an image of a row stride in bytes, resized to planes [3, size, size] and flipped as the crop says.
void resample(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes);

// The same by quads, where DINO_HAS_QUADS and Loops has no columns()
void resample_quads(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes);

// Brightness, contrast, saturation and hue in the crop's order, if it has jitter; then grayscale, if it has that.
void change_colors(const Crop& crop, uint8_t* planes);

// A plane as (level / 255 - mean) / std, with non-temporal stores: a batch does not fit the caches and is read later.
template <class T>
DINO_INLINE inline void write_normalized(const T* plane, int64_t n, float mean, float std, DType dtype, void* out,
                                         int64_t offset) {
    constexpr int64_t kPart = 1024;
    alignas(64) float part[kPart];
    float scale = 1.0f / (255.0f * std), shift = mean / std;
    for (int64_t start = 0; start < n; start += kPart) {
        int64_t m = n - start < kPart ? n - start : kPart;
        with_dtype(dtype, [=, &part](auto d) DINO_INLINE {
#pragma omp simd
            for (int64_t i = 0; i < m; ++i) put<decltype(d)::value>(part, i, float(plane[start + i]) * scale - shift);
        });
        stream_store(static_cast<char*>(out) + (offset + start) * width_of(dtype), part, m * width_of(dtype));
    }
}

// --- loops for the instruction set at hand: vectors.h ----------------------------------------

constexpr int kWeightBits = 22, kLowBits = 8;
constexpr int64_t kRows = 16;          // transposed at a time
constexpr int64_t kLanes = 3 * kRows;  // a pixel of kRows rows; also what the pass along columns takes at a time
constexpr int64_t kSlack = 64;         // the widest vector, in bytes

// The weights of each output of a resize: of pairs of inputs from first[x], which is even, up to before end[x]. Those
// of a pair are packed into the halves of high[pair * size + x], without their lowest kLowBits, and low[pair * size +
// x].
struct Weights {
    const int32_t *first, *end;
    int32_t *high, *low;
    int64_t size, most_pairs;
};

// A box of 2 * radius + 1 whole pixels (radius 0 or 1) and a part of one more on each side; weights in 2^-24.
struct Box {
    int64_t radius;
    uint32_t whole, part;
};

struct Loops {
    // The resize by pairs of 16-bit numbers; these three are null where it goes by quads instead.
    //
    // Sums and half a level [n, kLanes] of outputs x .. x + n - 1, the other way round if flipped, from pairs of pixels
    // [pairs, kLanes] that begin with pixel `start`
    void (*columns)(const int32_t* from, int64_t start, const Weights& w, int64_t x, int64_t n, bool flip, int32_t* to);
    // The same [width] of output row y, from pairs of rows [pairs, width]
    void (*rows)(const int32_t* from, int64_t width, const Weights& w, int64_t y, int32_t* to);
    // Sums to levels; reads up to 4 * kSlack bytes more
    void (*levels)(const int32_t* sums, int64_t n, uint8_t* to);
    // to[i] = the box around x[i], of levels a step apart; reads and writes up to kSlack bytes more
    void (*blur)(const Box& box, const int16_t* x, int64_t step, int64_t n, int16_t* to);
    // Colors of planes [3, n]; read up to kSlack bytes more
    void (*blend_with_level)(int32_t degenerate, float factor, int64_t n, uint8_t* levels);
    void (*blend_with_luma)(float factor, int64_t n, uint8_t* planes);
    int64_t (*sum_of_luma)(int64_t n, const uint8_t* planes);
    void (*to_gray)(int64_t n, uint8_t* planes);
    void (*turn_hue)(uint8_t shift, int64_t n, uint8_t* planes);  // in 256ths of the circle
};
const Loops& widest_loops();

}  // namespace dino
