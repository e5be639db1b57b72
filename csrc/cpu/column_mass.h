// Sums over rows of exponentials or of softmax rows, on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct ColumnMassArgs {
    const void* logits;   // [R, K], row stride `stride` elements
    const float* center;  // [K], or null
    const bool* counted;  // [R]: the rows that are read; null: all
    float* mass;          // [2, K]
    int64_t rows, outputs, stride;
    DType dtype;
    float temp;
    int threads;
};
void column_mass(const ColumnMassArgs& args);

}  // namespace dino
