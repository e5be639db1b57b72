// The DINO loss on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct DinoLossArgs {
    const void* student;  // [V*B, K], row stride student_stride elements
    const void* teacher;  // [2*B, K]
    const float* center;  // [K] for each teacher view, center_stride elements apart; 0: one for both
    void* grad;           // [V*B, K], dtype of the student; may be the student itself
    float* batch_center;  // [K]
    int64_t views, batch, outputs, student_stride, teacher_stride, center_stride, grad_stride;
    DType student_dtype, teacher_dtype;
    float student_temp, teacher_temp;
    int threads;
};
double dino_loss(const DinoLossArgs& args);

}  // namespace dino
