// Momentum SGD, LARS or LARC and the teacher's update on the CPU.
#pragma once

#include "cpu/flat_step.h"

namespace dino {

struct SgdEmaArgs : FlatStepArgs {
    float* momentum_buffer;
    const bool* adapted;  // [segments]
    double momentum_sgd, eta, eps;
    bool larc;
};
// Returns whether a gradient's norm was not finite; then nothing was changed.
bool sgd_ema_step(const SgdEmaArgs& args);

}  // namespace dino
