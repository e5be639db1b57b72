// Attention of packed sequences, forward and backward; formulas and notation in dino_kernels/ops/attention.py.
//
// A task is one head of one sequence. It gathers its queries, keys and values into scratch of its thread, takes the
// queries (backward: the keys) a stripe of rows at a time, so that their scores stay in the first-level cache, and
// shares no sum with another task: results do not depend on the threads.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/parallel.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/units.h"

namespace dino {
namespace {

constexpr int64_t kStripe = 32;  // queries (backward: keys) whose scores are formed at a time, at most
constexpr int64_t kBlock = 256;  // keys whose dS are kept for the gradients of the queries

// --- softmax -----------------------------------------------------------------------------------------

// exp(x) for x <= 0; of a probability that is rounded to bfloat16 within 8e-5
template <bool kRounded>
DINO_INLINE inline float probability(float x) {
    if constexpr (!kRounded) return exp_negative(x);
    float y = x * 0x1.715476p0f;
    return exp2_negative<DType::bf16>(y < -126.0f ? -126.0f : y);
}

// Rows of scores [rows, width], as many as one fold() reduces, become exp(scale * scores + mask - their maximum).
template <bool kRounded>
DINO_INLINE inline void softmax_rows(float* scores, int64_t rows, int64_t width, float scale, const float* mask,
                                     float* lse, float* inverse_total) {
    alignas(64) float high[kLanes * kLanes], total[kLanes * kLanes];
    std::fill_n(high, kLanes * kLanes, -std::numeric_limits<float>::infinity());
    std::fill_n(total, kLanes * kLanes, 0.0f);
    auto larger = [](float x, float y) __attribute__((always_inline)) { return x > y ? x : y; };
    for (int64_t j = 0; j < width; j += kLanes)
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l)
                high[i * kLanes + l] = larger(scores[i * width + j + l] * scale + mask[j + l], high[i * kLanes + l]);
    fold(high, larger);
    for (int64_t j = 0; j < width; j += kLanes)
        for (int64_t i = 0; i < rows; ++i) {
            float* x = scores + i * width + j;
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l) {
                x[l] = probability<kRounded>(x[l] * scale + mask[j + l] - high[i]);
                total[i * kLanes + l] += x[l];
            }
        }
    fold(total, [](float x, float y) __attribute__((always_inline)) { return x + y; });
    for (int64_t i = 0; i < rows; ++i) {
        lse[i] = high[i] + std::log(total[i]);
        inverse_total[i] = 1 / total[i];
    }
}

DINO_MULTIVERSION
void softmax(float* scores, int64_t rows, int64_t width, float scale, const float* mask, float* lse,
             float* inverse_total, bool rounded) {
    if (rounded)
        softmax_rows<true>(scores, rows, width, scale, mask, lse, inverse_total);
    else
        softmax_rows<false>(scores, rows, width, scale, mask, lse, inverse_total);
}

DINO_MULTIVERSION
void scale_rows(float* x, int64_t rows, int64_t width, const float* factors) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < width / kLanes * kLanes; ++j) x[i * width + j] *= factors[i];
}

// Scores [keys, queries] become probabilities, their gradients dP become scale * dS. lse and delta are the queries'.
template <bool kRounded>
DINO_INLINE inline void gradients_of_rows(float* scores, float* grads, int64_t rows, int64_t width, float scale,
                                          const float* lse, const float* delta) {
    for (int64_t i = 0; i < rows; ++i) {
        float *p = scores + i * width, *ds = grads + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width / kLanes * kLanes; ++j) {
            p[j] = probability<kRounded>(p[j] * scale - lse[j]);
            ds[j] = p[j] * (ds[j] - delta[j]) * scale;
        }
    }
}

DINO_MULTIVERSION
void gradients(float* scores, float* grads, int64_t rows, int64_t width, float scale, const float* lse,
               const float* delta, bool rounded) {
    if (rounded)
        gradients_of_rows<true>(scores, grads, rows, width, scale, lse, delta);
    else
        gradients_of_rows<false>(scores, grads, rows, width, scale, lse, delta);
}

// --- tasks -------------------------------------------------------------------------------------------

struct Scratch {
    Buffer q, k, v, grad_out, q_transposed, k_transposed, grad_out_transposed, q_pairs, k_pairs, v_pairs;
    Buffer grad_out_pairs, mask, lse, delta, scores, grad_scores, p, ds, ds_pairs, out, grad, grad_q;
};

// A head of a sequence. Operands have rows of units of channels, [n, depth], or pairs of rows, [n / pair, columns];
// what pads them is zero.
struct Task {
    const AttentionArgs& a;
    const Microkernel& kernel;
    int64_t head, begin, n;
    int64_t width, units_row;           // tokens, padded; units of them, padded
    int64_t depth, depth_row, columns;  // units of channels; padded; padded channels
    int64_t stripe;
    Scratch& s;

    Task(const AttentionArgs& a, const Microkernel& kernel, int64_t number)
        : a(a), kernel(kernel), head(number % a.heads), begin(a.bounds[number / a.heads]), s(scratch()) {
        n = a.bounds[number / a.heads + 1] - begin;
        width = padded(n);
        units_row = padded(kernel.units(n));
        depth = kernel.contraction(a.channels);
        depth_row = padded(kernel.units(a.channels));
        columns = padded(a.channels);
        stripe = kernel.amx ? kStripe : kLanes;  // two tiles' rows; else what leaves most of the first-level cache
    }
    static Scratch& scratch() {
        static thread_local Scratch mine;
        return mine;
    }

    int64_t output(int64_t row) const { return ((begin + row) * a.heads + head) * a.channels; }
    // Rows of q, k or v (part 0, 1, 2), or of a tensor like the output; to [padded count, depth_row]
    float* read_qkv(int64_t part, int64_t first, int64_t count, Buffer& to) const {
        gather(a.qkv, a.dtype, (begin + first) * a.token_stride + part * a.part_stride + head * a.head_stride,
               a.token_stride, count, a.channels, kernel.pair, to.fit(padded(count) * depth_row), padded(count),
               depth_row);
        return to.fit(0);
    }
    float* read(const void* x, int64_t first, int64_t count, Buffer& to) const {
        gather(x, a.dtype, output(first), a.heads * a.channels, count, a.channels, kernel.pair,
               to.fit(padded(count) * depth_row), padded(count), depth_row);
        return to.fit(0);
    }
    // Floats [count, columns], which are lost, to their place
    void write(float* rows, int64_t count, void* to, int64_t offset, int64_t stride) const {
        if (kernel.pair == 2) kernel.pair_columns(rows, count, columns, rows, columns / 2);
        scatter(rows, columns / kernel.pair, count, a.channels, kernel.pair, to, a.dtype, offset, stride);
    }
    void write_grad(int64_t part, int64_t first, int64_t count, float* rows) const {
        int64_t offset = (((begin + first) * 3 + part) * a.heads + head) * a.channels;
        write(rows, count, a.grad, offset, 3 * a.heads * a.channels);
    }
    float* transposed(const float* rows, int64_t count, int64_t row, Buffer& to) const {  // [row, count]
        transpose(rows, count, row, to.fit(count * row), count);
        return to.fit(0);
    }
    // Rows [width, depth_row] as pairs of rows [units_row, columns]: the same where a unit is one value.
    float* paired(float* rows, Buffer& to) const {
        if (kernel.pair == 1) return rows;
        float* pairs = to.fit(units_row * columns);
        pair_up(rows, width, depth_row, pairs, columns);
        std::fill(pairs + width / 2 * columns, pairs + units_row * columns, 0.0f);
        return pairs;
    }
    // Floats [rows, width] as pairs along a row [kStripe, units_row]: the same where a unit is one value.
    float* along(float* rows, int64_t count, Buffer& to) const {
        if (kernel.pair == 1) return rows;
        float* pairs = to.fit(kStripe * units_row);
        kernel.pair_columns(rows, count, width, pairs, units_row);
        for (int64_t i = 0; i < count; ++i)
            std::fill(pairs + i * units_row + width / 2, pairs + (i + 1) * units_row, 0.0f);
        return pairs;
    }
    // scores [count, width] = rows [count, depth] others [depth, width]
    void score(int64_t count, const float* rows, const float* others, float* scores) const {
        product(kernel, count, width, {depth, depth_row, 1, width, width}, rows, others, scores);
    }
    // sums [count, columns] = weights [count, n] values [n, columns]
    void average(int64_t count, const float* weights, const float* values, float* sums) const {
        product(kernel, count, columns, {kernel.contraction(n), units_row, 1, columns, columns}, weights, values, sums);
    }

    void forward() const;
    void backward() const;
};

void Task::forward() const {
    float *k = read_qkv(1, 0, n, s.k), *v = read_qkv(2, 0, n, s.v);
    float *k_transposed = transposed(k, width, depth_row, s.k_transposed), *v_pairs = paired(v, s.v_pairs);
    float *scores = s.scores.fit(kStripe * width), *out = s.out.fit(kStripe * columns);
    float* mask = s.mask.fit(width);  // 0 for the keys there are, -inf for those that pad
    std::fill_n(mask, n, 0.0f);
    std::fill(mask + n, mask + width, -std::numeric_limits<float>::infinity());
    float inverse_total[kStripe];
    for (int64_t i = 0; i < n; i += stripe) {
        int64_t count = std::min(stripe, n - i);
        score(count, read_qkv(0, i, count, s.q), k_transposed, scores);
        for (int64_t j = 0; j < count; j += kLanes)
            softmax(scores + j * width, std::min(kLanes, count - j), width, a.scale, mask,
                    a.lse + head * a.tokens + begin + i + j, inverse_total + j, kernel.pair == 2);
        average(count, along(scores, count, s.p), v_pairs, out);
        scale_rows(out, count, columns, inverse_total);
        write(out, count, a.out, output(i), a.heads * a.channels);
    }
}

// By stripes of keys, whose gradients are then whole; those of the queries are summed over blocks of keys, transposed.
void Task::backward() const {
    float *q = read_qkv(0, 0, n, s.q), *k = read_qkv(1, 0, n, s.k), *v = read_qkv(2, 0, n, s.v);
    float *grad_out = read(a.grad_out, 0, n, s.grad_out), *out = read(a.out, 0, n, s.out);
    float *lse = s.lse.fit(width), *delta = s.delta.fit(width);
    std::copy_n(a.lse + head * a.tokens + begin, n, lse);
    std::fill(lse + n, lse + width, std::numeric_limits<float>::infinity());  // no probability for what pads
    for (int64_t i = 0; i < width; i += kLanes)
        kernel.row_dots(grad_out + i * depth_row, out + i * depth_row, depth_row, delta + i);
    float *q_transposed = transposed(q, width, depth_row, s.q_transposed), *q_pairs = paired(q, s.q_pairs);
    float* grad_out_transposed = transposed(grad_out, width, depth_row, s.grad_out_transposed);
    float *grad_out_pairs = paired(grad_out, s.grad_out_pairs), *k_pairs = paired(k, s.k_pairs);
    float* k_transposed = transposed(k_pairs, units_row, columns, s.k_transposed);
    float *scores = s.scores.fit(kStripe * width), *grad = s.grad.fit(kStripe * columns);
    float* grad_q = s.grad_q.fit(columns * width);
    float* ds_pairs = s.ds_pairs.fit(padded(kernel.units(std::min(kBlock, width))) * width);  // of a block of keys
    for (int64_t first = 0; first < n; first += kBlock) {
        int64_t last = std::min(first + kBlock, n), depth_keys = kernel.contraction(last - first);
        for (int64_t i = first; i < last; i += stripe) {
            int64_t count = std::min(stripe, n - i), rows = padded(count);
            float* ds_rows = ds_pairs + (i - first) / kernel.pair * width;
            float* grad_scores = kernel.pair == 2 ? s.grad_scores.fit(kStripe * width) : ds_rows;
            score(rows, k + i * depth_row, q_transposed, scores);
            score(rows, v + i * depth_row, grad_out_transposed, grad_scores);
            gradients(scores, grad_scores, count, width, a.scale, lse, delta, kernel.pair == 2);
            std::fill(grad_scores + count * width, grad_scores + rows * width, 0.0f);
            if (kernel.pair == 2) kernel.pair_rows(grad_scores, rows, width, ds_rows);
            average(count, along(scores, count, s.p), grad_out_pairs, grad);
            write_grad(2, i, count, grad);
            average(count, along(grad_scores, count, s.ds), q_pairs, grad);
            write_grad(1, i, count, grad);
        }
        int64_t filled = padded(last - first) / kernel.pair;
        if (filled < depth_keys) std::fill(ds_pairs + filled * width, ds_pairs + depth_keys * width, 0.0f);
        product(kernel, columns, width, {depth_keys, units_row, 1, width, width, first > 0},
                k_transposed + first / kernel.pair, ds_pairs, grad_q);
    }
    write_grad(0, 0, n, transposed(grad_q, columns, width, s.q));
}

void run(const AttentionArgs& a, void (Task::*pass)() const) {
    Microkernel kernel = microkernel_for(a.dtype, a.products);
    parallel_for(a.sequences * a.heads, a.threads, [&](int64_t number) {
        FlushDenormals flush;
        TileConfigScope tiles(kernel.amx);
        Task task(a, kernel, number);
        (task.*pass)();
    });
}

}  // namespace

void attention(const AttentionArgs& a) { run(a, &Task::forward); }

void attention_backward(const AttentionArgs& a) { run(a, &Task::backward); }

}  // namespace dino
