// Crops of decoded images on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

// Drawn parameters of a crop; dino_kernels/ops/multicrop.py says what they are and has the same layout.
struct Crop {
    enum : uint8_t { kBrightness, kContrast, kSaturation, kHue };
    int32_t left, top, right, bottom, size;
    float brightness, contrast, saturation, hue, blur;
    uint8_t order[4];  // of the jitter's four steps
    bool flip, jitter, grayscale, solarize;
    bool vertical_flip;  // this and the next: done in Python, on the finished crop
    uint8_t turns, unused[2];
};
static_assert(sizeof(Crop) == 52);

struct MultiCropArgs {
    const uint8_t* const* pixels;                   // [images], each [H, W, 3] with adjacent pixels
    const int64_t *heights, *widths, *row_strides;  // [images]; strides in bytes
    const Crop* crops;                              // [images, views]
    void* const* out;  // [views], each [images, 3, size, size], contiguous but for the first dimension
    const int64_t *sizes, *out_strides;  // [views]; strides in elements from image to image
    int64_t images, views;
    bool levels;              // out has uint8 levels, else values of dtype, normalized by
    const float *mean, *std;  // [3], of pixels in 0 .. 1
    DType dtype;
    int threads;
};

// Images of other numbers than 8-bit RGB: `channels` of one type each, of which low .. high are the levels 0 .. 255.
enum class Depth : int { u8, u16, f32 };
struct DeepCropArgs {
    const void* const* pixels;  // [images], each [H, W, channels] with adjacent pixels
    Depth depth;
    int64_t channels;
    const int64_t *heights, *widths, *row_strides;  // [images]; strides in bytes
    const float *low, *high, *mean, *std;           // [channels]
    const Crop* crops;                              // [images, views]
    void* const* out;  // [views], each [images, channels, size, size], contiguous but for the first dimension
    const int64_t *sizes, *out_strides;  // [views]; strides in elements from image to image
    int64_t images, views;
    DType dtype;
    int threads;
};
// Throws std::invalid_argument for a crop [images, views] that does not fit its image or output.
void check_crops(const Crop* crops, int64_t images, int64_t views, const int64_t* heights, const int64_t* widths,
                 const int64_t* sizes);
// Checks the crops before anything is written.
void multicrop(const MultiCropArgs& args);
// The same of other images, in float32: levels are limited to 0 .. 255 but not rounded.
void multicrop_deep(const DeepCropArgs& args);

}  // namespace dino
