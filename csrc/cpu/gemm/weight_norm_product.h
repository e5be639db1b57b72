// The backward pass of a product by weight-normed rows on the CPU.
#pragma once

#include "common/dtype.h"
#include "cpu/gemm/products.h"

namespace dino {

struct WeightNormProductBackwardArgs {
    const void *grad, *x;    // of logits [T, K]; [T, D]
    const float *v, *g;      // [K, D]; [K]
    float *grad_v, *grad_g;  // [K, D] and [K], added to; grad_g may be null
    bool overwrite;          // grad_v is overwritten, not added to
    int64_t tokens, rows, channels;
    DType dtype;        // bf16 or f32
    Products products;  // tiles: of bf16
    int threads;
};
void weight_norm_product_backward(const WeightNormProductBackwardArgs& args);

}  // namespace dino
