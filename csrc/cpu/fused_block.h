// A transformer block as one call of the kernels of its parts; formula in dino_kernels/ops/fused_block.py.
#pragma once

#include "common/dtype.h"
#include "cpu/add_layer_norm.h"
#include "cpu/gemm/products.h"

namespace dino {

struct Layer {  // a matrix of the block's dtype and float32, or of a norm both float32
    const void* weight;
    const float* bias;
};

struct LayerGradient {  // added to
    float *weight, *bias;
};

// A transformer block of T tokens, of which its attention has A, its MLP M and the next block N.
struct FusedBlockArgs {
    Layer qkv, proj, norm, fc1, fc2, next_norm;
    const int32_t* bounds;           // [sequences + 1]
    const float *scale, *mlp_scale;  // [A] and [M], or null for ones
    RowsOf attention_rows, mlp_rows, next_rows;
    int64_t sequences, tokens, channels, heads, hidden_channels, groups;  // groups: of AddLayerNormBackwardArgs
    float eps;
    DType dtype;  // of matrices and norms: bf16 or f32
    Products products;
    int threads;
};
int64_t fused_block_bytes(const FusedBlockArgs& args);  // of what is saved for backward

struct FusedBlockForward {
    void* saved;             // [fused_block_bytes]
    const void *x, *normed;  // [T, C] float32; [A, C]
    void *out, *out_normed;  // [T, C] float32; [N, C]
    void* scratch;           // [max(A, M), C]
};
void fused_block(const FusedBlockArgs& args, const FusedBlockForward& tensors);

struct FusedBlockBackward {
    void* saved;                                    // by the forward pass
    const void *grad, *grad_normed, *normed, *out;  // grad may be null
    void *grad_x, *grad_normed_x;
    void* scratch;   // [2 max(A, M) + 3 A, C]
    float* partial;  // [groups, 2, C]
    LayerGradient qkv, proj, norm, fc1, fc2, next_norm;
};
void fused_block_backward(const FusedBlockArgs& args, const FusedBlockBackward& tensors);

}  // namespace dino
