// into += grad^T x on the CPU: the gradient of a linear layer's weights, and sums like it.
#pragma once

#include "common/dtype.h"

namespace dino {

struct AddProductArgs {
    float* into;            // [O, I] contiguous, as all of these
    const float *grad, *x;  // [T, O], [T, I]
    int64_t tokens, outputs, inputs;
    int threads;
};
void add_product(const AddProductArgs& args);

// into [columns] += sums of the columns of from [rows, columns]
void add_column_sums(float* into, const void* from, DType dtype, int64_t rows, int64_t columns, int threads);

// into += from
void add_to(float* into, const void* from, DType dtype, int64_t count, int threads);

}  // namespace dino
