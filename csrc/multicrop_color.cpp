// ColorJitter and grayscale in Pillow's 8-bit arithmetic: every step leaves levels, cut off where Pillow cuts off.
#include <algorithm>

#include "multicrop.h"

namespace dino {
namespace {

DINO_INLINE inline int32_t luma(int32_t r, int32_t g, int32_t b) {
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
}

DINO_INLINE inline int32_t clamp(int32_t x, int32_t most) { return std::min(std::max(x, 0), most); }

// ImageEnhance: from the degenerate image (factor 0) to the image (1) and beyond
DINO_INLINE inline uint8_t blend(int32_t degenerate, int32_t level, float factor) {
    return uint8_t(clamp(int32_t(float(degenerate) + factor * float(level - degenerate)), 255));
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
    int32_t most = std::max(r, std::max(g, b)), least = std::min(r, std::min(g, b)), range = most - least;
    float middle = float(2 * most + least - r - g - b) / float(std::max(range, 1));  // its distance from the largest
    // From the corner of its sector the middle one turns the hue up or down.
    float side = r == most ? 0.0f : g == most ? 2.0f : 4.0f;
    int32_t last = r == most ? b : g == most ? r : g;
    float hue = last == least ? (side + 1.0f) - middle : (side - 1.0f) + middle;
    hue /= 6.0f;
    hue = hue < 0.0f ? hue + 1.0f : hue;
    return {byte_below(hue), byte_below(float(range) / float(std::max(most, 1))), most};
}

// A channel: v where the hue is near, v (1 - s) where it is far; `from` is the hue in 1530ths of a circle, turned so
// that the channel falls up to 255, stays low to 765 and rises to 1020.
DINO_INLINE inline int32_t channel(int32_t from, float s, float v) {
    from = int32_t(std::min(uint32_t(from), uint32_t(from - 1530)));  // modulo 1530
    float fallen = float(clamp(std::min(from, 1020 - from), 255));
    return int32_t(v * (65025.0f - s * fallen) * (1.0f / 65025.0f) + 0.5f);
}

// Conversions apart from the arithmetic, whose intermediate results then stay in registers.
DINO_MULTIVERSION
void turn_hue(int32_t shift, int64_t n, uint8_t* __restrict planes) {
    constexpr int64_t kPart = 512;
    alignas(64) int32_t x[3][kPart];
    for (int64_t start = 0; start < n; start += kPart) {
        int64_t m = std::min(kPart, n - start);
        for (int64_t c = 0; c < 3; ++c)
#pragma omp simd
            for (int64_t i = 0; i < m; ++i) x[c][i] = planes[c * n + start + i];
#pragma omp simd
        for (int64_t i = 0; i < m; ++i) {
            Hsv color = to_hsv(x[0][i], x[1][i], x[2][i]);
            int32_t h = 6 * ((color.h + shift) & 255);
            float s = float(color.s), v = float(color.v);
            x[0][i] = channel(h + 1275, s, v);
            x[1][i] = channel(h + 765, s, v);
            x[2][i] = channel(h + 255, s, v);
        }
        for (int64_t c = 0; c < 3; ++c)
#pragma omp simd
            for (int64_t i = 0; i < m; ++i) planes[c * n + start + i] = uint8_t(x[c][i]);
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
            turn_hue(int32_t(double(crop.hue) * 255.0), n, planes);
    }
    if (crop.grayscale) to_gray(n, r, g, b);
}

}  // namespace dino
