// t = m * t + (1 - m) * s over a list of tensors, in one pass over memory.
#include "cpu/ema_update.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace dino {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements a task: 512 KiB of traffic in float32
constexpr int64_t kBlock = 1024;     // elements widened at a time from 16 bits

DINO_MULTIVERSION
void update(float* target, const void* source, DType dtype, int64_t begin, int64_t count, float m, float one_minus_m) {
    float scratch[kBlock];
    for (int64_t i = 0; i < count; i += kBlock) {
        int64_t n = std::min(kBlock, count - i);
        const float* s = load(source, dtype, begin + i, n, scratch);
        float* t = target + begin + i;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) t[j] = m * t[j] + one_minus_m * s[j];
    }
}

}  // namespace

void ema_update(const EmaArgs& a) {
    std::vector<int64_t> first_chunk(a.count + 1, 0);
    for (int64_t i = 0; i < a.count; ++i) first_chunk[i + 1] = first_chunk[i] + (a.sizes[i] + kChunk - 1) / kChunk;
    float m = float(a.momentum), one_minus_m = float(1.0 - a.momentum);
    parallel_for(first_chunk.back(), a.threads, [&](int64_t task) {
        int64_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), task) - first_chunk.begin() - 1;
        int64_t begin = (task - first_chunk[i]) * kChunk;
        update(a.targets[i], a.sources[i], a.source_dtypes[i], begin, std::min(kChunk, a.sizes[i] - begin), m,
               one_minus_m);
    });
}

}  // namespace dino
