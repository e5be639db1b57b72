// Linear layers on the CPU.
#pragma once

#include "common/dtype.h"
#include "cpu/gemm/products.h"

namespace dino {

// The fastest on this processor for operands of f32 or bf16; the library where it multiplies bfloat16 without AMX.
Products best_products(DType dtype);

struct LinearArgs {
    const void *x, *weight;  // [T, D]; [O, D], or [D, O] if transposed
    const float* bias;       // [O], or null
    void* out;               // [T, O]
    int64_t tokens, depth, outputs;
    bool transposed;
    DType dtype;  // bf16 or f32
    Products products;
    int threads;
};
void linear(const LinearArgs& args);

// Which operand is packed already, as panels of tokens.
enum class Packed { neither, grad, x };

// into [O, I] += grad^T x
struct AddLinearArgs {
    float* into;           // contiguous, as all of these
    const void *grad, *x;  // [T, O], [T, I]
    float* into_bias;      // [O] += sums over T of grad, which then is not packed; or null
    int64_t tokens, outputs, inputs;
    DType dtype;  // bf16 or f32
    Products products;
    int threads;
    Packed packed = Packed::neither;
};
void add_linear(const AddLinearArgs& args);

}  // namespace dino
