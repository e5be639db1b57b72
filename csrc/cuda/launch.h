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

}  // namespace dino::cuda
