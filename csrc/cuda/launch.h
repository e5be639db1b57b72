// Launchers of the CUDA C++ kernels: what csrc/kernels.h is for the CPU. Every pointer is of the device unless it says
// otherwise; nothing synchronizes, so that all of it may be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace dino::cuda {

using Stream = void*;  // a cudaStream_t

// A scalar argument: the value at `address` (float32, or float64 if `wide`), or `value` where there is no address.
struct Scalar {
    const void* address;
    bool wide;
    double value;
};

struct EmaArgs {  // the arrays are the host's, and may go after the call
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
    const float* center;  // [K]
    void* grad;           // [V*B, K], dtype of the student; may be the student itself
    float* batch_center;  // [K]
    float* loss;          // 0-d
    // Scratch: [2*B, 2, ceil(K / 256)]; [3, B, ceil(K / 8) * 8], float32 for a float32 student, else float16; [V*B];
    // 0-d
    float* partials;
    void* targets;
    float* losses;
    int* arrived;
    int64_t views, batch, outputs, student_stride, teacher_stride, grad_stride;
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

}  // namespace dino::cuda
