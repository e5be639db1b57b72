// out = x + scale * branch, a factor a row; without x it is the branch's gradient.
#include "cpu/drop_path_add.h"

#include <algorithm>

#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a task
constexpr int64_t kBlock = 1024;     // elements widened at a time from 16 bits

DINO_MULTIVERSION
void scale_rows(const DropPathAddArgs& a, int64_t begin, int64_t end) {
    float branch_scratch[kBlock], x_scratch[kBlock], out[kBlock];
    for (int64_t row = begin; row < end; ++row) {
        float scale = a.scale[row];
        for (int64_t c = 0; c < a.channels; c += kBlock) {
            int64_t n = std::min(kBlock, a.channels - c), offset = row * a.channels + c;
            const float* branch = load(a.branch, a.branch_dtype, offset, n, branch_scratch);
            if (a.x) {
                const float* x = load(a.x, a.out_dtype, offset, n, x_scratch);
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) out[j] = x[j] + scale * branch[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) out[j] = scale * branch[j];
            }
            store(a.out, a.out_dtype, offset, n, out);
        }
    }
}

}  // namespace

void drop_path_add(const DropPathAddArgs& a) {
    int64_t rows = std::max<int64_t>(1, kChunk / a.channels);  // a task
    parallel_for((a.tokens + rows - 1) / rows, a.threads,
                 [&](int64_t task) { scale_rows(a, task * rows, std::min(a.tokens, (task + 1) * rows)); });
}

}  // namespace dino
