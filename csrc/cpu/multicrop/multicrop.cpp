// Crops of decoded images, from the drawn parameters to rows of a batch. A crop is a task: resized, then changed step
// by step in a buffer that stays in the cache, then written once.
#include "cpu/multicrop/multicrop.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/nontemporal.h"
#include "common/parallel.h"
#include "cpu/multicrop/parts.h"

namespace dino {
namespace {

constexpr float kMostFactor = 100.0f;
constexpr float kMostBlur = 2.4f;  // of wider ones the boxes would reach further than kReach
constexpr float kMean[3] = {0.485f, 0.456f, 0.406f}, kStd[3] = {0.229f, 0.224f, 0.225f};  // of ImageNet

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

constexpr int kPasses = 3;
constexpr int64_t kReach = 2;  // pixels that a box reaches to each side at most

Box box_of(float sigma) {                      // three passes of it are about a Gaussian
    float variance = sigma * sigma / kPasses;  // float and double where Pillow has them
    float length = float(std::sqrt(12.0 * variance + 1.0)), l = float(std::floor((length - 1.0) / 2.0));
    float a = (2 * l + 1) * (l * (l + 1) - 3 * variance);
    a /= 6 * (variance - (l + 1) * (l + 1));
    float width = l + a;
    int64_t radius = int64_t(width);
    uint32_t whole = uint32_t(float(1 << 24) / (width * 2 + 1));
    return {radius, whole, ((1u << 24) - uint32_t(2 * radius + 1) * whole) / 2};
}

// The plane as 16-bit numbers with kReach more on every side, so that a pass is one long loop; what it leaves in these
// is replaced.
struct Bordered {
    int64_t size, row = size + 2 * kReach;

    void repeat_sides(int16_t* x) const {
        for (int64_t y = 0; y < size; ++y) {
            int16_t* line = x + (y + kReach) * row;
            line[0] = line[1] = line[kReach];
            line[row - 2] = line[row - 1] = line[row - 1 - kReach];
        }
    }
    void repeat_ends(int16_t* x) const {
        for (int64_t i = 0; i < kReach; ++i) {
            std::copy_n(x + kReach * row, row, x + i * row);
            std::copy_n(x + (row - 1 - kReach) * row, row, x + (row - 1 - i) * row);
        }
    }
};

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
    static thread_local BufferOf<int16_t> buffers[2];
    auto blur = widest_loops().blur;
    Box box = box_of(radius);
    Bordered shape{size};
    int64_t row = shape.row, inner = kReach * row, n = size * row;  // from the first to the last row of the plane
    int16_t *x = buffers[0].fit(row * row + kSlack), *y = buffers[1].fit(row * row + kSlack);
    widen(plane, size, x + inner + kReach, row);
    for (int pass = 0; pass < kPasses; ++pass, std::swap(x, y)) {
        shape.repeat_sides(x);
        blur(box, x + inner, 1, n, y + inner);
    }
    for (int pass = 0; pass < kPasses; ++pass, std::swap(x, y)) {
        shape.repeat_ends(x);
        blur(box, x + inner, row, n, y + inner);
    }
    narrow(x + inner + kReach, row, size, plane);
}

// --- output ------------------------------------------------------------------------------------------

DINO_MULTIVERSION
void solarize(int64_t n, uint8_t* levels) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) levels[i] = levels[i] < 128 ? levels[i] : uint8_t(255 - levels[i]);
}

// Past the caches: a batch does not fit them and waits to be read.
DINO_MULTIVERSION
void normalize(const uint8_t* plane, int64_t n, float mean, float std, DType dtype, void* out, int64_t offset) {
    constexpr int64_t kPart = 1024;
    alignas(64) float part[kPart];
    float scale = 1.0f / (255.0f * std), shift = mean / std;
    for (int64_t start = 0; start < n; start += kPart) {
        int64_t m = std::min(kPart, n - start);
        with_dtype(dtype, [=, &part](auto d) DINO_INLINE {
#pragma omp simd
            for (int64_t i = 0; i < m; ++i) put<decltype(d)::value>(part, i, float(plane[start + i]) * scale - shift);
        });
        stream_store(static_cast<char*>(out) + (offset + start) * width_of(dtype), part, m * width_of(dtype));
    }
}

void write(const MultiCropArgs& a, const uint8_t* planes, int64_t n, void* out, int64_t offset) {
    if (a.levels) {
        std::memcpy(static_cast<uint8_t*>(out) + offset, planes, size_t(3 * n));
        return;
    }
    for (int64_t c = 0; c < 3; ++c) normalize(planes + c * n, n, kMean[c], kStd[c], a.dtype, out, offset + c * n);
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
