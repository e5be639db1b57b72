// Crops of decoded images, from the drawn parameters to rows of a batch. A crop is a task: resized, then changed step
// by step in a buffer that stays in the cache, then written once.
#include "multicrop.h"

#include <algorithm>
#include <cmath>

namespace dino {
namespace {

constexpr float kMean[3] = {0.485f, 0.456f, 0.406f}, kStd[3] = {0.229f, 0.224f, 0.225f};  // of ImageNet

// --- blur --------------------------------------------------------------------------------------------

constexpr int kPasses = 3;
constexpr int64_t kReach = 2;  // pixels that a box reaches to each side at most

// A box of 2 * radius + 1 whole pixels (radius 0 or 1) and a part of one more on each side; weights in 2^-24.
struct Box {
    int64_t radius;
    uint32_t whole, part;

    explicit Box(float sigma) {                    // three passes of it are about a Gaussian
        float variance = sigma * sigma / kPasses;  // float and double where Pillow has them
        float length = float(std::sqrt(12.0 * variance + 1.0)), l = float(std::floor((length - 1.0) / 2.0));
        float a = (2 * l + 1) * (l * (l + 1) - 3 * variance);
        a /= 6 * (variance - (l + 1) * (l + 1));
        float width = l + a;
        radius = int64_t(width);
        whole = uint32_t(float(1 << 24) / (width * 2 + 1));
        part = ((1u << 24) - uint32_t(2 * radius + 1) * whole) / 2;
    }
};

// to[i] = the box around x[2][i], of neighbors x[0][i] .. x[4][i]
DINO_INLINE inline void box_of(const Box& box, const uint8_t* const* x, int64_t n, uint8_t* __restrict to) {
    const uint8_t *a = x[0], *b = x[1], *c = x[2], *d = x[3], *e = x[4];
    uint32_t whole = box.whole, part = box.part;
    if (box.radius == 0)
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            to[i] = uint8_t((whole * c[i] + part * uint32_t(b[i] + d[i]) + (1u << 23)) >> 24);
    else
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            to[i] = uint8_t((whole * uint32_t(b[i] + c[i] + d[i]) + part * uint32_t(a[i] + e[i]) + (1u << 23)) >> 24);
}

DINO_MULTIVERSION
void blur_rows(const Box& box, int64_t size, uint8_t* plane, uint8_t* row) {
    row += kReach;
    for (int64_t y = 0; y < size; ++y) {
        uint8_t* line = plane + y * size;
        for (int pass = 0; pass < kPasses; ++pass) {
            std::memcpy(row, line, size_t(size));
            row[-2] = row[-1] = row[0];
            row[size] = row[size + 1] = row[size - 1];
            const uint8_t* x[] = {row - 2, row - 1, row, row + 1, row + 2};
            box_of(box, x, size, line);
        }
    }
}

DINO_MULTIVERSION
void blur_columns(const Box& box, int64_t size, const uint8_t* from, uint8_t* to) {
    for (int64_t y = 0; y < size; ++y) {
        const uint8_t* x[2 * kReach + 1];
        for (int64_t i = -kReach; i <= kReach; ++i)
            x[i + kReach] = from + std::min(std::max<int64_t>(y + i, 0), size - 1) * size;
        box_of(box, x, size, to + y * size);
    }
}

// --- output ------------------------------------------------------------------------------------------

DINO_MULTIVERSION
void solarize(int64_t n, uint8_t* levels) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) levels[i] = levels[i] < 128 ? levels[i] : uint8_t(255 - levels[i]);
}

DINO_MULTIVERSION
void normalize(const uint8_t* plane, int64_t n, float mean, float std, DType dtype, void* out, int64_t offset) {
    float scale = 1.0f / (255.0f * std), shift = mean / std;
    with_dtype(dtype, [=](auto d) DINO_INLINE {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) put<decltype(d)::value>(out, offset + i, float(plane[i]) * scale - shift);
    });
}

void write(const MultiCropArgs& a, const uint8_t* planes, int64_t n, void* out, int64_t offset) {
    if (a.levels) {
        std::memcpy(static_cast<uint8_t*>(out) + offset, planes, size_t(3 * n));
        return;
    }
    for (int64_t c = 0; c < 3; ++c) normalize(planes + c * n, n, kMean[c], kStd[c], a.dtype, out, offset + c * n);
}

}  // namespace

void blur_plane(float radius, int64_t size, uint8_t* plane) {
    static thread_local BufferOf<uint8_t> row, other;
    Box box(radius);
    blur_rows(box, size, plane, row.fit(size + 2 * kReach));
    uint8_t* scratch = other.fit(size * size);
    blur_columns(box, size, plane, scratch);
    blur_columns(box, size, scratch, plane);
    blur_columns(box, size, plane, scratch);
    std::memcpy(plane, scratch, size_t(size * size));
}

void multicrop(const MultiCropArgs& a) {
    parallel_for(a.images * a.views, a.threads, [&](int64_t task) {
        static thread_local BufferOf<uint8_t> buffer;
        int64_t image = task / a.views, view = task % a.views;
        const Crop& crop = a.crops[task];
        int64_t n = int64_t(crop.size) * crop.size;
        uint8_t* planes = buffer.fit(3 * n);
        resample(a.pixels[image], a.row_strides[image], crop, planes);
        change_colors(crop, planes);
        for (int64_t c = 0; c < 3 && crop.blur > 0.0f; ++c) blur_plane(crop.blur, crop.size, planes + c * n);
        if (crop.solarize) solarize(3 * n, planes);
        write(a, planes, n, a.out[view], image * a.out_strides[view]);
    });
}

}  // namespace dino
