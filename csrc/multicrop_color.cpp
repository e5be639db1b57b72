// ColorJitter and grayscale in Pillow's 8-bit arithmetic: every step leaves levels, cut off where Pillow cuts off.
#include <algorithm>

#include "multicrop.h"

namespace dino {
namespace {

DINO_INLINE inline int32_t luma(int32_t r, int32_t g, int32_t b) {
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
}

// ImageEnhance: from the degenerate image (factor 0) to the image (1) and beyond
DINO_INLINE inline uint8_t blend(int32_t degenerate, int32_t level, float factor) {
    float mixed = float(degenerate) + factor * float(level - degenerate);
    return uint8_t(int32_t(std::min(std::max(mixed, 0.0f), 255.0f)));
}

DINO_MULTIVERSION
void blend_with_level(int32_t degenerate, float factor, int64_t n, uint8_t* __restrict levels) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) levels[i] = blend(degenerate, levels[i], factor);
}

DINO_MULTIVERSION
void blend_with_luma(float factor, int64_t n, uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        int32_t gray = luma(r[i], g[i], b[i]);
        r[i] = blend(gray, r[i], factor);
        g[i] = blend(gray, g[i], factor);
        b[i] = blend(gray, b[i], factor);
    }
}

DINO_MULTIVERSION
int32_t sum_of_luma(int64_t n, const uint8_t* r, const uint8_t* g, const uint8_t* b) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += luma(r[i], g[i], b[i]);
    return sum;
}

int32_t mean_luma(int64_t n, const uint8_t* r, const uint8_t* g, const uint8_t* b) {
    constexpr int64_t kPart = 1 << 23;  // whose sum fits 32 bits
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i += kPart) sum += sum_of_luma(std::min(kPart, n - i), r + i, g + i, b + i);
    return int32_t(double(sum) / double(n) + 0.5);
}

DINO_MULTIVERSION
void to_gray(int64_t n, uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) r[i] = g[i] = b[i] = uint8_t(luma(r[i], g[i], b[i]));
}

// --- hue ---------------------------------------------------------------------------------------------

// The whole number below 255 x, for x in [0, 1]: what rounding of the product adds is taken off again.
DINO_INLINE inline int32_t byte_below(float x) {
    int32_t byte = int32_t(255.0f * x);
    return byte - (256.0f * x - float(byte) < x);
}

struct Hsv {
    int32_t h, s, v;  // 0 .. 255; h is a full circle
};

DINO_INLINE inline Hsv to_hsv(int32_t r, int32_t g, int32_t b) {
    int32_t most = std::max(r, std::max(g, b)), least = std::min(r, std::min(g, b));
    float range = float(std::max(most - least, 1));
    float middle = float(2 * most + least - r - g - b) / range;  // distance from the largest
    // The sector's corner, from which the middle one turns the hue up or down.
    float corner, turn;
    if (r == most) {
        corner = b == least ? 1.0f : -1.0f;
        turn = b == least ? -1.0f : 1.0f;
    } else if (g == most) {
        corner = r == least ? 3.0f : 1.0f;
        turn = r == least ? -1.0f : 1.0f;
    } else {
        corner = g == least ? 5.0f : 3.0f;
        turn = g == least ? -1.0f : 1.0f;
    }
    float hue = (corner + turn * middle) / 6.0f;
    hue = hue < 0.0f ? hue + 1.0f : hue;
    return {byte_below(hue), byte_below(float(most - least) / float(std::max(most, 1))), most};
}

// A channel: v where the hue is near, v (1 - s) where it is far; `from` is the hue in 1530ths of a circle, turned so
// that the channel falls in [0, 255], stays low to 765 and rises to 1020.
DINO_INLINE inline uint8_t channel(int32_t from, int32_t s, int32_t v) {
    from -= from >= 1530 ? 1530 : 0;
    int32_t fallen = std::max(std::min(std::min(from, 1020 - from), 255), 0);
    return uint8_t(int32_t(float(v * (65025 - s * fallen)) * (1.0f / 65025.0f) + 0.5f));
}

DINO_MULTIVERSION
void turn_hue(int32_t shift, int64_t n, uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        Hsv x = to_hsv(r[i], g[i], b[i]);
        int32_t h = 6 * ((x.h + shift) & 255);
        r[i] = channel(h + 1275, x.s, x.v);
        g[i] = channel(h + 765, x.s, x.v);
        b[i] = channel(h + 255, x.s, x.v);
    }
}

}  // namespace

void change_colors(const Crop& crop, uint8_t* planes) {
    const int64_t n = int64_t(crop.size) * crop.size;
    uint8_t *r = planes, *g = planes + n, *b = planes + 2 * n;
    for (int i = 0; i < 4 && crop.jitter; ++i) {
        if (crop.order[i] == Crop::kBrightness)
            blend_with_level(0, crop.brightness, 3 * n, planes);
        else if (crop.order[i] == Crop::kContrast)
            blend_with_level(mean_luma(n, r, g, b), crop.contrast, 3 * n, planes);
        else if (crop.order[i] == Crop::kSaturation)
            blend_with_luma(crop.saturation, n, r, g, b);
        else
            turn_hue(int32_t(double(crop.hue) * 255.0), n, r, g, b);
    }
    if (crop.grayscale) to_gray(n, r, g, b);
}

}  // namespace dino
