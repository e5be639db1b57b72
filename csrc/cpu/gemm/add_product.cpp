// into += grad^T x, and sums into float32 like it.
#include "cpu/gemm/add_product.h"

#include <algorithm>

#include "common/parallel.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/units.h"

namespace dino {
namespace {

constexpr int64_t kDepth = 192;      // tokens at a time: packed, they stay in the first-level cache
constexpr int64_t kInputs = 96;      // columns of x a task
constexpr int64_t kOutputs = 192;    // columns of grad a task
constexpr int64_t kColumns = 96;     // columns whose sums stay in registers
constexpr int64_t kBlock = 1024;     // values widened at a time from 16 bits
constexpr int64_t kChunk = 1 << 15;  // values a task adds

DINO_MULTIVERSION
void add(float* into, const void* from, DType dtype, int64_t begin, int64_t count) {
    float scratch[kBlock];
    for (int64_t i = begin; i < begin + count; i += kBlock) {
        int64_t n = std::min(kBlock, begin + count - i);
        const float* x = load(from, dtype, i, n, scratch);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) into[i + j] += x[j];
    }
}

// Outputs from `output` on and inputs from `input` on, over all tokens.
void block(const AddProductArgs& a, const Microkernel& kernel, int64_t output, int64_t input) {
    static thread_local Buffer packed_grad, packed_x, sums;
    int64_t outputs = std::min(kOutputs, a.outputs - output), inputs = std::min(kInputs, a.inputs - input);
    int64_t rows = padded(outputs), width = padded(inputs);
    float *grad = packed_grad.fit(kDepth * rows), *x = packed_x.fit(kDepth * width), *c = sums.fit(rows * width);
    for (int64_t t = 0; t < a.tokens; t += kDepth) {
        int64_t count = std::min(kDepth, a.tokens - t);
        gather(a.grad, DType::f32, t * a.outputs + output, a.outputs, count, outputs, 1, grad, count, rows);
        gather(a.x, DType::f32, t * a.inputs + input, a.inputs, count, inputs, 1, x, count, width);
        product(kernel, rows, width, {count, 1, rows, width, width, t > 0}, grad, x, c);
    }
    for (int64_t i = 0; a.tokens && i < outputs; ++i)
        add(a.into + (output + i) * a.inputs + input, c + i * width, DType::f32, 0, inputs);
}

// Sums of columns [begin, begin + count) of a matrix, in the order of its rows, added to `into`. In double precision:
// where a bias' gradient cancels, AdamW scales up what rounding left.
DINO_MULTIVERSION
void add_columns(float* into, const void* from, DType dtype, int64_t rows, int64_t columns, int64_t begin,
                 int64_t count) {
    float scratch[kColumns];
    double sum[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
        const float* x = load(from, dtype, row * columns + begin, count, scratch);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) sum[j] += x[j];
    }
    for (int64_t j = 0; j < count; ++j) into[begin + j] += float(sum[j]);
}

}  // namespace

void add_column_sums(const AddColumnSumsArgs& a) {
    parallel_for((a.columns + kColumns - 1) / kColumns, a.threads, [&](int64_t i) {
        add_columns(a.into, a.x, a.dtype, a.rows, a.columns, i * kColumns,
                    std::min(kColumns, a.columns - i * kColumns));
    });
}

void add_to(const AddToArgs& a) {
    parallel_for((a.count + kChunk - 1) / kChunk, a.threads,
                 [&](int64_t i) { add(a.into, a.x, a.dtype, i * kChunk, std::min(kChunk, a.count - i * kChunk)); });
}

void add_product(const AddProductArgs& a) {
    Microkernel kernel = microkernel_for(DType::f32, Products::f32);
    int64_t across = (a.inputs + kInputs - 1) / kInputs, down = (a.outputs + kOutputs - 1) / kOutputs;
    parallel_for(across * down, a.threads,
                 [&](int64_t i) { block(a, kernel, i / across * kOutputs, i % across * kInputs); });
}

}  // namespace dino
