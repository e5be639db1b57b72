// The loss of masked patch tokens on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct PatchLossArgs {
    const void* student;   // [M, K], row stride student_stride elements
    const void* teacher;   // [M, K]
    const float* center;   // [K]
    const float* weights;  // [M]: rows of weight 0 are not read
    void* grad;            // [M, K], dtype of the student; may be the student itself
    float* batch_center;   // [K]
    int64_t rows, outputs, student_stride, teacher_stride, grad_stride;
    DType student_dtype, teacher_dtype;
    float student_temp, teacher_temp;
    int threads;
};
double patch_loss(const PatchLossArgs& args);

}  // namespace dino
