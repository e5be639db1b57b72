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

// into [columns] += sums of the columns of x [rows, columns]
struct AddColumnSumsArgs {
    float* into;
    const void* x;
    int64_t rows, columns;
    DType dtype;  // of x
    int threads;
};
void add_column_sums(const AddColumnSumsArgs& args);

// into += x
struct AddToArgs {
    float* into;
    const void* x;
    int64_t count;
    DType dtype;  // of x
    int threads;
};
void add_to(const AddToArgs& args);

}  // namespace dino
