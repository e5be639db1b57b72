// The last layer and the DINO loss together on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct DinoHeadLossArgs {
    const void *student_z, *teacher_z;  // [V*B, D], [2*B, D], contiguous as all of these
    const void *student_w, *teacher_w;  // [K, D]
    const float* center;                // [K]
    void *grad_z, *grad_w;              // [V*B, D]; [K, D], or null where it is not wanted
    float* batch_center;                // [K]
    int64_t views, batch, outputs, channels;
    DType dtype;  // of rows, weights and gradients
    float student_temp, teacher_temp;
    int threads;
};
double dino_head_loss(const DinoHeadLossArgs& args);

}  // namespace dino
