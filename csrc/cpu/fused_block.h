// A transformer block as one call of the kernels of its parts; formula in dino_kernels/ops/fused_block.py.
#pragma once

#include "cpu/add_layer_norm.h"
#include "cpu/gemm/products.h"

namespace dino {

// A transformer block of T tokens, of which its attention has A, its MLP M and the next block N.
struct FusedBlockArgs {
    const void* weights[12];         // of qkv, proj, norm, fc1, fc2 and next_norm each the weight and the bias
    const int32_t* bounds;           // [sequences + 1]
    const float *scale, *mlp_scale;  // [A] and [M], or null for ones
    RowsOf attention_rows, mlp_rows, next_rows;
    int64_t sequences, tokens, channels, heads, hidden_channels, groups;  // groups: of AddLayerNormBackwardArgs
    float eps;
    DType dtype;  // of matrices and norms: bf16 or f32
    Products products;
    int threads;
    void* kept;  // from the forward to the backward pass, of as many bytes as fused_block_bytes says
};
int64_t fused_block_bytes(const FusedBlockArgs& args);

struct FusedBlockForward {
    const void *x, *normed;  // [T, C] float32; [A, C]
    void *out, *out_normed;  // [T, C] float32; [N, C]
    void* scratch;           // [max(A, M), C]
};
void fused_block(const FusedBlockArgs& args, const FusedBlockForward& tensors);

struct FusedBlockBackward {
    const void *grad, *grad_normed, *normed, *out;  // grad may be null
    void *grad_x, *grad_normed_x;
    void* scratch;     // [2 max(A, M) + 3 A, C]
    float* partial;    // [groups, 2, C]
    float* grads[12];  // of the weights, added to
};
void fused_block_backward(const FusedBlockArgs& args, const FusedBlockBackward& tensors);

}  // namespace dino
