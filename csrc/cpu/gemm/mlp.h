// The MLP of a transformer block on the CPU.
#pragma once

#include "common/dtype.h"
#include "cpu/gemm/products.h"

namespace dino {

struct MlpArgs {
    const void *x, *weight1, *weight2;  // [T, C], [H, C], [C, H]
    const float *bias1, *bias2;         // [H], [C]
    void *out, *hidden;                 // [T, C]; the first product without bias [T, H], or null
    int64_t tokens, channels, hidden_channels;
    DType dtype;        // bf16 or f32
    Products products;  // tiles: of bf16
    int threads;
};
void mlp(const MlpArgs& args);

struct MlpBackwardArgs {
    const void *grad, *x, *hidden, *weight1, *weight2;  // hidden: null if the product is to be made once more
    const float* bias1;
    void* grad_x;
    float *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2;  // added to
    int64_t tokens, channels, hidden_channels;
    DType dtype;
    Products products;
    int threads;
};
void mlp_backward(const MlpBackwardArgs& args);

}  // namespace dino
