// Weight-normed rows on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct WeightNormArgs {
    const float *v, *g;  // [K, D] contiguous, as all of these; [K]
    void* w;             // [K, D]
    int64_t rows, channels;
    DType dtype;  // of w
    int threads;
};
void weight_norm(const WeightNormArgs& args);

struct WeightNormBackwardArgs {
    const void* grad_w;      // [K, D]
    const float *v, *g;      // [K, D]; [K]
    float *grad_v, *grad_g;  // [K, D] and [K], added to; grad_g may be null
    int64_t rows, channels;
    DType dtype;  // of grad_w
    int threads;
};
void weight_norm_backward(const WeightNormBackwardArgs& args);

}  // namespace dino
