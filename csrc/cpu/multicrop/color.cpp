// ColorJitter and grayscale, step by step.
#include "cpu/multicrop/parts.h"

namespace dino {

void change_colors(const Crop& crop, uint8_t* planes) {
    const Loops& loops = widest_loops();
    const int64_t n = int64_t(crop.size) * crop.size;
    for (int i = 0; i < 4 && crop.jitter; ++i) {
        if (crop.order[i] == Crop::kBrightness)
            loops.blend_with_level(0, crop.brightness, 3 * n, planes);
        else if (crop.order[i] == Crop::kContrast)
            loops.blend_with_level(int32_t(double(loops.sum_of_luma(n, planes)) / double(n) + 0.5), crop.contrast,
                                   3 * n, planes);
        else if (crop.order[i] == Crop::kSaturation)
            loops.blend_with_luma(crop.saturation, n, planes);
        else
            loops.turn_hue(uint8_t(int32_t(double(crop.hue) * 255.0)), n, planes);
    }
    if (crop.grayscale) loops.to_gray(n, planes);
}

}  // namespace dino
