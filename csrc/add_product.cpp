// into += grad^T x: the gradient of a linear layer's weights, added where it is kept.
#include <algorithm>

#include "kernels.h"
#include "products.h"

namespace dino {
namespace {

constexpr int64_t kDepth = 192;         // tokens at a time: a panel of them stays in the first-level cache
constexpr int64_t kPanel = 3 * kLanes;  // columns of x a task
constexpr int64_t kOutputs = 96;        // columns of grad a task

// Rows [0, depth) of the panel, next to each other.
DINO_MULTIVERSION
void task(const AddProductArgs& a, int64_t output, int64_t column, float* packed) {
    int64_t outputs = std::min(kOutputs, a.outputs - output), columns = std::min(kPanel, a.inputs - column);
    for (int64_t t = 0; t < a.tokens; t += kDepth) {
        int64_t depth = std::min(kDepth, a.tokens - t);
        for (int64_t i = 0; i < depth; ++i)
            std::copy_n(a.x + (t + i) * a.inputs + column, columns, packed + i * columns);
        product(outputs, columns, depth, a.grad + t * a.outputs + output, 1, a.outputs, packed, columns,
                a.into + output * a.inputs + column, a.inputs, true);
    }
}

DINO_MULTIVERSION
void add(float* into, const void* from, DType dtype, int64_t begin, int64_t count) {
    constexpr int64_t kBlock = 1024;
    float scratch[kBlock];
    for (int64_t i = begin; i < begin + count; i += kBlock) {
        int64_t n = std::min(kBlock, begin + count - i);
        const float* x = load(from, dtype, i, n, scratch);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) into[i + j] += x[j];
    }
}

}  // namespace

void add_to(float* into, const void* from, DType dtype, int64_t count, int threads) {
    constexpr int64_t kChunk = 1 << 15;  // elements a task
    parallel_for((count + kChunk - 1) / kChunk, threads,
                 [&](int64_t i) { add(into, from, dtype, i * kChunk, std::min(kChunk, count - i * kChunk)); });
}

void add_product(const AddProductArgs& a) {
    int64_t panels = (a.inputs + kPanel - 1) / kPanel, blocks = (a.outputs + kOutputs - 1) / kOutputs;
    parallel_for(panels * blocks, a.threads, [&](int64_t i) {
        Buffer packed(kDepth * kPanel);
        task(a, i / panels * kOutputs, i % panels * kPanel, packed + 0);
    });
}

}  // namespace dino
