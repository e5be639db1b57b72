// Launchers of the CUDA C++ kernels. Every pointer is of the device unless it says otherwise; nothing synchronizes, so
// that all of it may be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dino::cuda {

using Stream = void*;  // a cudaStream_t

// A scalar argument: the value at `address` (float32, or float64 if `wide`), or `value` where there is no address.
struct Scalar {
    const void* address;
    bool wide;
    double value;
};

struct EmaArgs {  // the arrays are on the host and read during the call only
    float* const* targets;
    const void* const* sources;
    const int64_t* sizes;
    const DType* source_dtypes;
    int64_t count;
    Scalar momentum;
};
void launch_ema_update(const EmaArgs& args, Stream stream);

struct DinoLossArgs {
    const void* student;  // [V*B, K], row stride student_stride elements
    const void* teacher;  // [2*B, K]
    const float* center;  // [K] for each teacher view, center_stride elements apart; 0: one for both
    void* grad;           // [V*B, K], dtype of the student; may be the student itself
    float* batch_center;  // [K]
    float* loss;          // 0-d
    // Scratch: [2*B, 2, ceil(K / 256)]; [3, B, ceil(K / 8) * 8], float32 for a float32 student, else float16; [V*B];
    // 0-d
    float* partials;
    void* targets;
    float* losses;
    int* arrived;
    int64_t views, batch, outputs, student_stride, teacher_stride, center_stride, grad_stride;
    DType student_dtype, teacher_dtype;
    Scalar student_temp, teacher_temp;
};
void launch_dino_loss(const DinoLossArgs& args, Stream stream);

struct DinoLossScaleArgs {
    void* grad;  // [rows, outputs]
    int64_t rows, outputs, stride;
    DType dtype;
    Scalar upstream;
};
void launch_dino_loss_scale(const DinoLossScaleArgs& args, Stream stream);

struct AdamwEmaArgs {
    float* student;  // flat, as all of the next
    void* grad;      // set to zero in the first `cleared` segments
    float *exp_avg, *exp_avg_sq, *teacher;
    void *student_16, *teacher_16;  // or null
    // Null, or the normalized rows [rows, channels] of a weight-normed layer, whose v is the last segment and g the one
    // before. They replace the copies of the last segment.
    void *student_rows, *teacher_rows;
    int64_t* steps;  // [segments], as all of the next
    const bool *decayed, *frozen;
    const float* lr_scale;       // or null: 1
    const int64_t* clip_groups;  // or null: each is clipped by itself
    int* nonfinite;
    // Scratch: [offsets[segments] / 4096 + segments]; [segments, 4]; with clip_groups [segments]
    float *partials, *factors, *squares;
    DType grad_dtype, student_16_dtype, teacher_16_dtype, rows_dtype;
    const int64_t* offsets;  // [segments + 1], on the host
    int64_t segments, cleared, rows, channels;
    Scalar lr, weight_decay, momentum;
    double clip_norm, beta1, beta2, eps;  // clip_norm 0: none
};
void launch_adamw_ema_step(const AdamwEmaArgs& args, Stream stream);

struct AttentionArgs {     // D = 64; every address and stride a multiple of 16 bytes
    const void* qkv;       // [T, 3, H, D], strides in elements
    void* out;             // [T, H, D]; the rest is contiguous, too
    float* lse;            // [H, T]
    const void* grad_out;  // like out; for the backward pass
    void* grad;            // [T, 3, H, D]
    int64_t tokens, heads, token_stride, part_stride, head_stride;
    DType dtype;  // f16 or bf16
    float scale;  // > 0
    // (sequences, tokens of each, at most 256) in packed order, on the host
    const int64_t* groups;
    int64_t group_count;
};
void launch_attention_short(const AttentionArgs& args, Stream stream);
void launch_attention_short_backward(const AttentionArgs& args, Stream stream);

}  // namespace dino::cuda
