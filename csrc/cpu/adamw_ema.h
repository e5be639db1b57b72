// The optimizer's step and the teacher's update on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct AdamwEmaArgs {
    float* student;  // flat, as all up to the copies
    void* grad;      // of the first `cleared` segments it becomes zero
    float *exp_avg, *exp_avg_sq, *teacher;
    void *student_16, *teacher_16;  // or null
    DType grad_dtype, student_16_dtype, teacher_16_dtype;
    const int64_t* offsets;  // [segments + 1]
    int64_t segments;
    int64_t* steps;                                                   // [segments]
    const bool *decayed, *frozen;                                     // [segments]
    double lr, weight_decay, momentum, clip_norm, beta1, beta2, eps;  // clip_norm 0: none
    // Or null: the rows [rows, channels] of a weight-normed layer, whose v is the last segment and g the one before;
    // they take the place of the last segment's copies.
    void *student_rows, *teacher_rows;
    DType rows_dtype;
    int64_t rows, channels;  // channels at most kMostChannels
    int64_t cleared;
    int threads;
};
constexpr int64_t kMostChannels = 4096;
// Whether a gradient's norm was not finite; then nothing was changed.
bool adamw_ema_step(const AdamwEmaArgs& args);

}  // namespace dino
