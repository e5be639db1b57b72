// AdamW and the teacher's update on the CPU.
#pragma once

#include "cpu/flat_step.h"

namespace dino {

struct AdamwEmaArgs : FlatStepArgs {
    float *exp_avg, *exp_avg_sq;
    int64_t* steps;         // [segments]
    const float* lr_scale;  // [segments], or null: 1
    double beta1, beta2, eps;
};
// Returns whether a gradient's norm was not finite; then nothing was changed.
bool adamw_ema_step(const AdamwEmaArgs& args);

}  // namespace dino
