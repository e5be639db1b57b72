// Residual sum and layer norm on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

// Which of T rows a tensor has: sorted indices.
struct RowsOf {
    const int32_t* indices;
    int64_t count;  // negative: all rows
};

struct AddLayerNormArgs {
    const void *x, *branch;  // [T, C] and [B, C] contiguous, as all of these
    const float* scale;      // [B], or null for ones
    RowsOf branch_rows, normed_rows;
    const float *weight, *bias;
    void *total, *normed;  // [T, C] and [N, C], dtypes of x and of branch
    float *mean, *rstd;    // [N]
    int64_t tokens, channels;
    DType x_dtype, branch_dtype;
    float eps;
    int threads;
};
void add_layer_norm(const AddLayerNormArgs& args);

struct AddLayerNormBackwardArgs {
    const void *grad_total, *grad_normed;  // [T, C], may be null; [N, C]
    const void* total;                     // [T, C]
    const float *mean, *rstd;              // [N]
    const float *weight, *scale;           // [C]; [B], or null for ones
    RowsOf branch_rows, normed_rows;
    void *grad_x, *grad_branch;      // [T, C]; [B, C], null where it would equal grad_x
    float* partial;                  // [groups, 2, C]: gradients of weight and bias
    float *grad_weight, *grad_bias;  // [C], added to
    int64_t tokens, channels, groups;
    DType x_dtype, branch_dtype;
    int threads;
};
void add_layer_norm_backward(const AddLayerNormBackwardArgs& args);

}  // namespace dino
