// gelu(x + bias) on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct BiasGeluArgs {
    const void* x;      // [T, C] contiguous, as all of these
    const float* bias;  // [C]
    void* out;          // [T, C]
    int64_t tokens, channels;
    DType dtype;
    int threads;
};
void bias_gelu(const BiasGeluArgs& args);

struct BiasGeluBackwardArgs {
    const void *grad_out, *x;  // [T, C]
    const float* bias;         // [C]
    void* grad_x;              // [T, C]
    float* partial;            // [groups, C]: gradients of the bias
    void* out;                 // [T, C], gelu(x + bias) once more, or null
    int64_t tokens, channels, groups;
    DType dtype;
    int threads;
};
void bias_gelu_backward(const BiasGeluBackwardArgs& args);

}  // namespace dino
