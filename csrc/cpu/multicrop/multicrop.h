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
};
static_assert(sizeof(Crop) == 48);

struct MultiCropArgs {
    const uint8_t* const* pixels;                   // [images], each [H, W, 3] with adjacent pixels
    const int64_t *heights, *widths, *row_strides;  // [images]; strides in bytes
    const Crop* crops;                              // [images, views]
    void* const* out;  // [views], each [images, 3, size, size], contiguous but for the first dimension
    const int64_t *sizes, *out_strides;  // [views]; strides in elements from image to image
    int64_t images, views;
    bool levels;  // bytes as they are, else normalized and in dtype
    DType dtype;
    int threads;
};
// Throws std::invalid_argument for a crop [images, views] that does not fit its image or output.
void check_crops(const Crop* crops, int64_t images, int64_t views, const int64_t* heights, const int64_t* widths,
                 const int64_t* sizes);
// Checks the crops before anything is written.
void multicrop(const MultiCropArgs& args);

}  // namespace dino
