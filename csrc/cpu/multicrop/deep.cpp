// Crops of images of up to 16 channels of 8 or 16 bits or float32. The steps are those of multicrop.cpp, in float32 and
// without rounding between them; sums are in a fixed order, so every processor gives the same.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/multicrop/blur.h"
#include "cpu/multicrop/filter.h"
#include "cpu/multicrop/parts.h"

namespace dino {
namespace {

constexpr int64_t kLines = 16;  // rows of a crop that are resized together

// Output x is the sum of inputs first[x] <= i < end[x], each times weights[x * taps + i - first[x]].
struct FloatFilter {
    int64_t taps;
    int32_t *first, *end;
    float* weights;

    void make(int64_t inputs, int64_t outputs) {
        double scale = double(inputs) / double(outputs), stretch = std::max(scale, 1.0), support = 2.0 * stretch;
        taps = 2 * int64_t(std::ceil(support)) + 1;
        first = first_.fit(outputs);
        end = end_.fit(outputs);
        weights = weights_.fit(outputs * taps);
        double* exact = exact_.fit(taps);
        for (int64_t x = 0; x < outputs; ++x) {
            double center = (double(x) + 0.5) * scale, sum = 0.0;
            first[x] = int32_t(std::max(center - support + 0.5, 0.0));
            end[x] = int32_t(std::min(int64_t(center + support + 0.5), inputs));
            int64_t n = end[x] - first[x];
            for (int64_t i = 0; i < n; ++i)
                sum += exact[i] = bicubic(std::abs((double(first[x] + i) - center + 0.5) / stretch));
            for (int64_t i = 0; i < n; ++i) weights[x * taps + i] = float(exact[i] / sum);
        }
    }

   private:
    BufferOf<int32_t> first_, end_;
    BufferOf<float> weights_;
    BufferOf<double> exact_;
};

struct Scratch {
    FloatFilter horizontal, vertical;
    Buffer low, scale, ring, rows, lines;
};

// --- loops -------------------------------------------------------------------------------------------

DINO_INLINE inline float limited(float level) {  // NaN is 0
    level = level > 0.0f ? level : 0.0f;
    return level < 255.0f ? level : 255.0f;
}

template <class T>
DINO_INLINE inline void levels_of(const T* from, int64_t n, const float* low, const float* scale, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = limited((float(from[i]) - low[i]) * scale[i]);
}

DINO_MULTIVERSION
void to_levels(Depth depth, const void* from, int64_t n, const float* low, const float* scale, float* to) {
    if (depth == Depth::u8)
        levels_of(static_cast<const uint8_t*>(from), n, low, scale, to);
    else if (depth == Depth::u16)
        levels_of(static_cast<const uint16_t*>(from), n, low, scale, to);
    else
        levels_of(static_cast<const float*>(from), n, low, scale, to);
}

DINO_MULTIVERSION
void add_row(const float* row, float weight, int64_t n, float* __restrict sums) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += weight * row[i];
}

// lines[i * kLines + y] = rows[y * n + i]
DINO_MULTIVERSION
void transpose(const float* rows, int64_t n, float* __restrict lines) {
    for (int64_t i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t y = 0; y < kLines; ++y) lines[i * kLines + y] = rows[y * n + i];
}

// Levels of one pixel and channel of kLines rows
DINO_MULTIVERSION
void columns(const float* lines, int64_t channels, const float* weights, int64_t taps, float* levels) {
    float sums[kLines] = {};
    for (int64_t i = 0; i < taps; ++i)
#pragma omp simd
        for (int64_t y = 0; y < kLines; ++y) sums[y] += weights[i] * lines[i * channels * kLines + y];
#pragma omp simd
    for (int64_t y = 0; y < kLines; ++y) levels[y] = limited(sums[y]);
}

DINO_MULTIVERSION
void blend(float degenerate, float factor, int64_t n, float* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = limited(degenerate + factor * (x[i] - degenerate));
}

DINO_INLINE inline float luma(const float* x, int64_t n, int64_t i) {
    return (19595.0f * x[i] + 38470.0f * x[n + i] + 7471.0f * x[2 * n + i]) / 65536.0f;
}

// Factor 0: gray
DINO_MULTIVERSION
void blend_with_luma(float factor, int64_t n, float* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        float gray = luma(x, n, i);
        for (int c = 0; c < 3; ++c) x[c * n + i] = limited(gray + factor * (x[c * n + i] - gray));
    }
}

// shift: of the circle of hues, 1 once around
DINO_MULTIVERSION
void turn_hue(float shift, int64_t n, float* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        float r = x[i], g = x[n + i], b = x[2 * n + i];
        float most = std::max(r, std::max(g, b)), chroma = most - std::min(r, std::min(g, b));
        float sixth = most == r ? g - b : most == g ? b - r : r - g;
        float hue = chroma > 0.0f ? sixth / chroma : 0.0f;
        hue += (most == r ? 0.0f : most == g ? 2.0f : 4.0f) + 6.0f * shift + 12.0f;
        for (int c = 0; c < 3; ++c) {
            float k = hue + float(5 - 2 * c);  // 5, 3, 1
            k -= 6.0f * float(int32_t(k / 6.0f));
            float part = std::min(std::min(k, 4.0f - k), 1.0f);
            x[c * n + i] = most - chroma * std::max(part, 0.0f);
        }
    }
}

DINO_MULTIVERSION
void blur_pass(const Box& box, const float* x, int64_t step, int64_t n, float* to) {
    float whole = float(box.whole) / float(1 << 24), part = float(box.part) / float(1 << 24);
    if (box.radius == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = whole * x[i] + part * (x[i - step] + x[i + step]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            to[i] = whole * (x[i - step] + x[i] + x[i + step]) + part * (x[i - 2 * step] + x[i + 2 * step]);
    }
}

DINO_MULTIVERSION
void solarize(int64_t n, float* x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 128.0f ? x[i] : 255.0f - x[i];
}

DINO_MULTIVERSION
void normalize(const float* plane, int64_t n, float mean, float std, DType dtype, void* out, int64_t offset) {
    write_normalized(plane, n, mean, std, dtype, out, offset);
}

// --- steps -------------------------------------------------------------------------------------------

// The box of an image, resized to planes [channels, size, size] of levels and flipped as the crop says. First along
// columns, of which a row is one long vector; each row of the image becomes levels once, in a ring of as many as an
// output reads.
void resample(const DeepCropArgs& a, int64_t image, const Crop& crop, float* planes) {
    static thread_local Scratch scratch;
    Scratch& s = scratch;
    const int64_t size = crop.size, width = crop.right - crop.left, n = width * a.channels;
    const int64_t bytes = a.depth == Depth::u8 ? 1 : a.depth == Depth::u16 ? 2 : 4;
    s.horizontal.make(width, size);
    s.vertical.make(crop.bottom - crop.top, size);
    float *low = s.low.fit(n), *scale = s.scale.fit(n);
    for (int64_t i = 0; i < n; ++i) {
        low[i] = a.low[i % a.channels];
        scale[i] = 255.0f / (a.high[i % a.channels] - low[i]);
    }
    const char* box =
        static_cast<const char*>(a.pixels[image]) + crop.top * a.row_strides[image] + crop.left * a.channels * bytes;
    const int64_t held = s.vertical.taps;
    float *ring = s.ring.fit(held * n), *rows = s.rows.fit(kLines * n), *lines = s.lines.fit(kLines * n);
    int64_t made = 0;
    for (int64_t y = 0; y < size; y += kLines) {
        const int64_t count = std::min(kLines, size - y);
        std::fill_n(rows, kLines * n, 0.0f);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t i = s.vertical.first[y + r]; i < s.vertical.end[y + r]; ++i) {
                for (; made <= i; ++made)
                    to_levels(a.depth, box + made * a.row_strides[image], n, low, scale, ring + made % held * n);
                add_row(ring + i % held * n, s.vertical.weights[(y + r) * held + i - s.vertical.first[y + r]], n,
                        rows + r * n);
            }
        transpose(rows, n, lines);
        for (int64_t x = 0; x < size; ++x) {
            const int64_t first = s.horizontal.first[x], to = crop.flip ? size - 1 - x : x;
            for (int64_t c = 0; c < a.channels; ++c) {
                alignas(64) float levels[kLines];
                columns(lines + (first * a.channels + c) * kLines, a.channels,
                        s.horizontal.weights + x * s.horizontal.taps, s.horizontal.end[x] - first, levels);
                for (int64_t r = 0; r < count; ++r) planes[(c * size + y + r) * size + to] = levels[r];
            }
        }
    }
}

float mean_of(int64_t n, const float* x) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return float(sum / double(n));
}

float mean_luma(int64_t n, const float* x) {
    return (19595.0f * mean_of(n, x) + 38470.0f * mean_of(n, x + n) + 7471.0f * mean_of(n, x + 2 * n)) / 65536.0f;
}

// Saturation and hue are those of RGB; multicrop in Python refuses them for other channels.
void change_colors(const Crop& crop, int64_t channels, float* planes) {
    const int64_t n = int64_t(crop.size) * crop.size;
    for (int i = 0; i < 4 && crop.jitter; ++i) {
        if (crop.order[i] == Crop::kBrightness)
            blend(0.0f, crop.brightness, channels * n, planes);
        else if (crop.order[i] == Crop::kContrast && channels == 3)
            blend(mean_luma(n, planes), crop.contrast, 3 * n, planes);
        else if (crop.order[i] == Crop::kContrast)
            for (int64_t c = 0; c < channels; ++c) blend(mean_of(n, planes + c * n), crop.contrast, n, planes + c * n);
        else if (crop.order[i] == Crop::kSaturation && channels == 3)
            blend_with_luma(crop.saturation, n, planes);
        else if (crop.order[i] == Crop::kHue && channels == 3)
            turn_hue(float(int32_t(double(crop.hue) * 255.0)) / 256.0f, n, planes);
    }
    if (crop.grayscale && channels == 3) blend_with_luma(0.0f, n, planes);
}

void blur_plane(float radius, int64_t size, float* plane) {
    static thread_local Bordered<float> bordered;
    bordered.fit(size);
    for (int64_t y = 0; y < size; ++y) std::copy_n(plane + y * size, size, bordered.inside() + y * bordered.row);
    bordered.blur(box_of(radius), blur_pass);
    for (int64_t y = 0; y < size; ++y) std::copy_n(bordered.inside() + y * bordered.row, size, plane + y * size);
}

}  // namespace

void multicrop_deep(const DeepCropArgs& a) {
    check_crops(a.crops, a.images, a.views, a.heights, a.widths, a.sizes);
    parallel_for(a.images * a.views, a.threads, [&](int64_t task) {
        static thread_local Buffer buffer;
        int64_t image = task / a.views, view = task % a.views;
        const Crop& crop = a.crops[task];
        int64_t n = int64_t(crop.size) * crop.size;
        float* planes = buffer.fit(a.channels * n);
        resample(a, image, crop, planes);
        change_colors(crop, a.channels, planes);
        for (int64_t c = 0; c < a.channels && crop.blur > 0.0f; ++c) blur_plane(crop.blur, crop.size, planes + c * n);
        if (crop.solarize) solarize(a.channels * n, planes);
        for (int64_t c = 0; c < a.channels; ++c)
            normalize(planes + c * n, n, a.mean[c], a.std[c], a.dtype, a.out[view],
                      image * a.out_strides[view] + c * n);
        finish_streaming();
    });
}

}  // namespace dino
