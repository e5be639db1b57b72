// Softmax averages of keys, blocked over the keys: their logits live in cache, all logits nowhere. Formula in
// dino_kernels/ops/info_nce.py.
//
// A task has a tile of rows and a share of the keys, which it reads once; then each row adds up its shares.
#include "cpu/info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "cpu/block_softmax.h"
#include "cpu/gemm/microkernel.h"

namespace dino {
namespace {

constexpr int64_t kRows = 64;   // rows a tile: with a block of keys and their logits they fit the second-level cache
constexpr int64_t kTasks = 32;  // or a task a tile; fixed, so that sums do not depend on the threads

DINO_MULTIVERSION
void scale_row(float* x, int64_t count, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

DINO_MULTIVERSION
void add_scaled(float* to, const float* from, int64_t count, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// Statistics of keys [begin, end), and sums [padded rows, padded D] of them, weighted with exponentials.
void add_keys(const InfoNceArgs& a, const Rows& rows, int64_t begin, int64_t end, Statistics& stats, float* sums) {
    Microkernel kernel = microkernel_for(DType::f32, Products::f32);
    int64_t width = rows.width, channels = padded(a.channels);
    float inv_temp = 1 / a.temp;
    static thread_local Buffer buffers[6];
    float *x = buffers[0].fit(kBlock * width), *scratch = buffers[1].fit(kBlock * channels);
    float *highest = buffers[2].fit(width), *sum = buffers[3].fit(width), *ones = buffers[4].fit(width);
    float* no_center = zeros(buffers[5], kBlock);
    std::fill_n(ones, width, 1.0f);
    for (int64_t k = begin; k < end; k += kBlock) {
        int64_t count = std::min(kBlock, end - k);
        const float* keys = block_of(a.keys, a.dtype, k, count, a.channels, scratch);
        FlushDenormals flush;  // not before: it would take float16's subnormal values for zeros
        product(kernel, count, width, {a.channels, channels, 1, width, width}, keys, rows.transposed, x);
        block_max(x, width, no_center, count, highest);
        for (int64_t i = 0; i < width; ++i) {
            double factor = stats.raise(i, highest[i], inv_temp);
            if (factor != 1) scale_row(sums + i * channels, channels, float(factor));
        }
        std::fill_n(sum, width, 0.0f);
        exponentials(x, width, no_center, count, stats.max.data(), inv_temp, ones, sum);
        for (int64_t i = 0; i < width; ++i) stats.total[i] += sum[i];
        product(kernel, rows.count, channels, {count, 1, width, channels, channels, true}, x, keys, sums);
    }
}

// A row i of a tile, from its share of the keys in each group: writes the gradient, returns the loss without `scale`.
double finish(const InfoNceArgs& a, const Rows& rows, int64_t tile, int64_t i, const std::vector<Statistics>& shares,
              const float* sums, int64_t tiles, int64_t groups) {
    int64_t row = tile * kRows + i, channels = padded(a.channels);
    static thread_local Buffer buffers[2];
    float *grad = zeros(buffers[0], channels), *positive = zeros(buffers[1], channels);
    const void* from = a.positive ? a.positive : a.keys;
    widen(from, a.dtype, (a.positive ? row : a.labels[row]) * a.channels, 1, a.channels, positive, channels);
    double target = 0, inv_temp = 1 / double(a.temp);
    for (int64_t d = 0; d < a.channels; ++d) target += double(rows.wide[i * channels + d]) * double(positive[d]);
    double max = a.positive ? target : double(shares[tile].max[i]);
    for (int64_t group = 0; group < groups; ++group) max = std::max(max, double(shares[group * tiles + tile].max[i]));
    double own = a.positive ? std::exp((target - max) * inv_temp) : 0, total = own;
    for (int64_t group = 0; group < groups; ++group) {
        int64_t share = group * tiles + tile;
        double weight = std::exp((double(shares[share].max[i]) - max) * inv_temp);
        total += weight * shares[share].total[i];
        add_scaled(grad, sums + (share * kRows + i) * channels, channels, float(weight));
    }
    double scale = a.scale * inv_temp / double(a.rows);
    scale_row(grad, channels, float(scale / total));
    add_scaled(grad, positive, channels, float(scale * (own / total - 1)));
    narrow(grad, channels, 1, a.channels, a.grad, a.dtype, row * a.channels);
    return (max - target) * inv_temp + std::log(total);
}

}  // namespace

double info_nce(const InfoNceArgs& a) {
    std::vector<Rows> rows;
    for (int64_t row = 0; row < a.rows; row += kRows) {
        auto first = static_cast<const char*>(a.query) + row * a.channels * width_of(a.dtype);
        rows.emplace_back(first, a.dtype, std::min(kRows, a.rows - row), 0, a.channels).transpose(a.channels);
    }
    int64_t tiles = int64_t(rows.size()), blocks = (a.outputs + kBlock - 1) / kBlock;
    int64_t groups = std::clamp(kTasks / tiles, int64_t(1), blocks), size = kRows * padded(a.channels);
    auto begin = [&](int64_t group) { return std::min(group * blocks / groups * kBlock, a.outputs); };
    std::vector<Statistics> shares(tiles * groups, Statistics(kRows));
    static thread_local Buffer buffer;
    float* sums = zeros(buffer, tiles * groups * size);
    parallel_for(tiles * groups, a.threads, [&](int64_t task) {
        int64_t group = task / tiles;
        add_keys(a, rows[task % tiles], begin(group), begin(group + 1), shares[task], sums + task * size);
    });
    std::vector<double> losses(a.rows);
    parallel_for(a.rows, a.threads, [&](int64_t row) {
        int64_t tile = row / kRows;
        losses[row] = finish(a, rows[tile], tile, row % kRows, shares, sums, tiles, groups);
    });
    double loss = 0;
    for (double x : losses) loss += x;
    return a.scale * loss / double(a.rows);
}

}  // namespace dino
