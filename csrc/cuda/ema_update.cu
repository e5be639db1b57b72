// t = m t + (1 - m) s over a list of tensors: dino_kernels/ops/ema_update.py has the definition.
//
// One block of threads for each 4096 elements of a tensor. The list travels in the kernel's parameters (32 bytes a
// tensor, up to kMost a launch), so there is no table to upload, to keep, or to find again when a graph is replayed; a
// block finds its tensor by bisection in the constant cache. Each thread has four loads of 16 bytes of each operand
// under way before it computes; a tensor that is not aligned to that, and the last elements, go one by one.
// Bytes: 12 an element with a float32 source, each touched once. It is bound by memory.
#include "cuda/common.cuh"

namespace dino::cuda {
namespace {

constexpr int kThreads = 256, kLoads = 4, kBlock = kThreads * kLoads * 4;
constexpr int kMost = 480;

struct Pair {
    float* target;
    const void* source;
    int64_t size;
    int first;  // block
    DType source_dtype;
};

struct Table {
    Scalar momentum;
    int count;
    Pair pairs[kMost];
};

template <class Source>
__device__ void update(float* target, const Source* source, int64_t size, float2 m) {
    auto blended = [&](float t, float s) { return fmaf(m.x, t, m.y * s); };
    bool aligned = reinterpret_cast<uintptr_t>(target) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(source) % (4 * sizeof(Source)) == 0;
    int whole = aligned ? int(min(size, int64_t(kBlock))) / 4 : 0;
    float4 t[kLoads], s[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        int at = i * kThreads + threadIdx.x;
        if (at < whole) t[i] = load4(target + 4 * at), s[i] = load4(source + 4 * at);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        int at = i * kThreads + threadIdx.x;
        if (at < whole) {
            reinterpret_cast<float4*>(target)[at] = {blended(t[i].x, s[i].x), blended(t[i].y, s[i].y),
                                                     blended(t[i].z, s[i].z), blended(t[i].w, s[i].w)};
        }
    }
    for (int at = 4 * whole + threadIdx.x; at < min(size, int64_t(kBlock)); at += kThreads) {
        target[at] = blended(target[at], float(source[at]));
    }
}

__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Table table) {
    int i = owner(table.count, blockIdx.x, [&](int i) { return table.pairs[i].first; });
    const Pair& pair = table.pairs[i];
    int64_t begin = int64_t(blockIdx.x - pair.first) * kBlock;
    float2 m = blend(table.momentum);
    float* target = pair.target + begin;
    int64_t size = pair.size - begin;
    if (pair.source_dtype == DType::f32) {
        update(target, static_cast<const float*>(pair.source) + begin, size, m);
    } else if (pair.source_dtype == DType::f16) {
        update(target, static_cast<const __half*>(pair.source) + begin, size, m);
    } else {
        update(target, static_cast<const __nv_bfloat16*>(pair.source) + begin, size, m);
    }
}

}  // namespace

void launch_ema_update(const EmaArgs& a, Stream stream) {
    Table table;
    table.momentum = a.momentum;
    for (int64_t next = 0; next < a.count;) {
        int blocks = 0;
        for (table.count = 0; next < a.count && table.count < kMost; ++next) {
            if (!a.sizes[next]) continue;
            table.pairs[table.count++] = {a.targets[next], a.sources[next], a.sizes[next], blocks,
                                          a.source_dtypes[next]};
            blocks += int((a.sizes[next] + kBlock - 1) / kBlock);
        }
        if (table.count) launch(ema_kernel, blocks, kThreads, 0, stream, table);
    }
}

}  // namespace dino::cuda
