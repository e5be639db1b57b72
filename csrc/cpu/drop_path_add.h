// x + scale * branch on the CPU.
#pragma once

#include "common/dtype.h"

namespace dino {

struct DropPathAddArgs {
    const void *x, *branch;  // [T, C] contiguous; x may be null
    const float* scale;      // [T]
    void* out;               // [T, C], dtype of x
    int64_t tokens, channels;
    DType out_dtype, branch_dtype;
    int threads;
};
void drop_path_add(const DropPathAddArgs& args);

}  // namespace dino
