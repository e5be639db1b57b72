// The moving average of parameters on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct EmaArgs {
    float* const* targets;
    const void* const* sources;
    const int64_t* sizes;
    const DType* source_dtypes;
    int64_t count;
    double momentum;
    int threads;
};
void ema_update(const EmaArgs& args);

}  // namespace dino
