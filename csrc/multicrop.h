// The parts of multicrop. A crop's pixels are three planes, red, green and blue, each [size, size] bytes.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "kernels.h"

// Floats must round as Pillow's do, product and sum each: a fused multiply-add differs where a level is cut off.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace dino {

// The box of an image of a row stride in bytes, resized to planes [3, size, size] and flipped as the crop says.
void resample(const uint8_t* image, int64_t row_stride, const Crop& crop, uint8_t* planes);

// Brightness, contrast, saturation and hue in the crop's order, if it has jitter; then grayscale, if it has that.
void change_colors(const Crop& crop, uint8_t* planes);

}  // namespace dino
