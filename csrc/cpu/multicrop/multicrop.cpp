// Crops of decoded images, from the drawn parameters to rows of a batch. A crop is a task: resized, then changed step
// by step in a buffer that stays in the cache, then written once.
#include "cpu/multicrop/multicrop.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/nontemporal.h"
#include "common/parallel.h"
#include "cpu/multicrop/blur.h"
#include "cpu/multicrop/parts.h"

namespace dino {
namespace {

constexpr float kMostFactor = 100.0f;
constexpr float kMostBlur = 2.4f;  // of wider ones the boxes would reach further than kReach

// --- what a caller can get wrong --------------------------------------------------------------------

void check(const Crop& c, int64_t height, int64_t width, int64_t size, int64_t image, int64_t view) {
    auto require = [=](bool fits, const char* rule) {
        if (!fits)
            throw std::invalid_argument("crops[" + std::to_string(image) + ", " + std::to_string(view) + "]: " + rule);
    };
    require(0 <= c.left && c.left < c.right && c.right <= width && 0 <= c.top && c.top < c.bottom && c.bottom <= height,
            "box must be (left, top, right, bottom), not empty and inside the image");
    require(c.size == size, "size must be that of the output");
    for (float factor : {c.brightness, c.contrast, c.saturation})
        require(0.0f <= factor && factor <= kMostFactor, "brightness, contrast and saturation must be in [0, 100]");
    require(-0.5f <= c.hue && c.hue <= 0.5f, "hue must be in [-0.5, 0.5]");
    require(0.0f <= c.blur && c.blur <= kMostBlur, "blur must be in [0, 2.4]");
    int steps = 0;
    for (uint8_t step : c.order) steps |= 1 << std::min<int>(step, 4);
    require(steps == 15, "order must be a permutation of 0, 1, 2, 3");
}

// --- blur --------------------------------------------------------------------------------------------

template <class From, class To>
DINO_INLINE inline void convert(const From* from, int64_t from_row, int64_t size, To* to, int64_t to_row) {
    for (int64_t y = 0; y < size; ++y)
#pragma omp simd
        for (int64_t x = 0; x < size; ++x) to[y * to_row + x] = To(from[y * from_row + x]);
}

DINO_MULTIVERSION
void widen(const uint8_t* plane, int64_t size, int16_t* to, int64_t row) { convert(plane, size, size, to, row); }

DINO_MULTIVERSION
void narrow(const int16_t* from, int64_t row, int64_t size, uint8_t* plane) { convert(from, row, size, plane, size); }

// Pillow's Gaussian blur
void blur_plane(float radius, int64_t size, uint8_t* plane) {
    static thread_local Bordered<int16_t> bordered;
    bordered.fit(size);
    widen(plane, size, bordered.inside(), bordered.row);
    bordered.blur(box_of(radius), widest_loops().blur);
    narrow(bordered.inside(), bordered.row, size, plane);
}

// --- output ------------------------------------------------------------------------------------------

DINO_MULTIVERSION
void normalize(const uint8_t* plane, int64_t n, float mean, float std, DType dtype, void* out, int64_t offset) {
    write_normalized(plane, n, mean, std, dtype, out, offset);
}

DINO_MULTIVERSION
void solarize(int64_t n, uint8_t* levels) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) levels[i] = levels[i] < 128 ? levels[i] : uint8_t(255 - levels[i]);
}

void write(const MultiCropArgs& a, const uint8_t* planes, int64_t n, void* out, int64_t offset) {
    if (a.levels) {
        std::memcpy(static_cast<uint8_t*>(out) + offset, planes, size_t(3 * n));
        return;
    }
    for (int64_t c = 0; c < 3; ++c) normalize(planes + c * n, n, a.mean[c], a.std[c], a.dtype, out, offset + c * n);
}

}  // namespace

void check_crops(const Crop* crops, int64_t images, int64_t views, const int64_t* heights, const int64_t* widths,
                 const int64_t* sizes) {
    for (int64_t i = 0; i < images; ++i)
        for (int64_t v = 0; v < views; ++v) check(crops[i * views + v], heights[i], widths[i], sizes[v], i, v);
}

void multicrop(const MultiCropArgs& a) {
    check_crops(a.crops, a.images, a.views, a.heights, a.widths, a.sizes);
    parallel_for(a.images * a.views, a.threads, [&](int64_t task) {
        static thread_local BufferOf<uint8_t> buffer;
        int64_t image = task / a.views, view = task % a.views;
        const Crop& crop = a.crops[task];
        int64_t n = int64_t(crop.size) * crop.size;
        uint8_t* planes = buffer.fit(3 * n + kSlack);
        resample(a.pixels[image], a.row_strides[image], crop, planes);
        change_colors(crop, planes);
        for (int64_t c = 0; c < 3 && crop.blur > 0.0f; ++c) blur_plane(crop.blur, crop.size, planes + c * n);
        if (crop.solarize) solarize(3 * n, planes);
        write(a, planes, n, a.out[view], image * a.out_strides[view]);
        finish_streaming();
    });
}

}  // namespace dino
