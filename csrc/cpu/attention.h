// Attention of packed sequences on the CPU.
#pragma once

#include "common/dtype.h"
#include "cpu/gemm/products.h"

namespace dino {

struct AttentionArgs {
    const void* qkv;        // [T, 3, H, D], strides below, adjacent channels
    const int32_t* bounds;  // [sequences + 1]
    void* out;              // [T, H, D] contiguous, as all that follow; read by the backward pass
    float* lse;             // [H, T]; read by the backward pass
    const void* grad_out;   // [T, H, D]; null in the forward pass
    void* grad;             // [T, 3, H, D]; null in the forward pass
    int64_t sequences, tokens, heads, channels, token_stride, part_stride, head_stride;
    DType dtype;
    float scale;
    Products products;  // of bfloat16 tensors: f32, bf16_pairs or amx, or else what the processor has
    int threads;
};
void attention(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);

}  // namespace dino
