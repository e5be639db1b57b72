// Attention of packed sequences, forward and backward; formulas and notation in dino_kernels/attention.py.
//
// A task is one head of one sequence. It gathers its queries, keys and values into scratch of its thread, takes the
// queries a stripe of rows at a time, so that their scores stay in the first-level cache, and shares no sum with
// another task: results do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "unit_products.h"

namespace dino {
namespace {

constexpr int64_t kStripe = kLanes;  // queries whose scores are formed at a time: as many as one fold() reduces
constexpr int64_t kBlock = 256;      // queries whose probabilities are kept for the gradients of keys and values

// --- softmax -----------------------------------------------------------------------------------------

// Rows of scores [rows <= kStripe, width] become exp(scale * scores + mask - their maximum).
DINO_MULTIVERSION
void softmax(float* scores, int64_t rows, int64_t width, float scale, const float* mask, float* lse,
             float* inverse_total) {
    alignas(64) float high[kStripe * kLanes], total[kStripe * kLanes];
    std::fill_n(high, kStripe * kLanes, -std::numeric_limits<float>::infinity());
    std::fill_n(total, kStripe * kLanes, 0.0f);
    auto larger = [](float x, float y) __attribute__((always_inline)) { return x > y ? x : y; };
    for (int64_t j = 0; j < width; j += kLanes)
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l)
                high[i * kLanes + l] = larger(scores[i * width + j + l] * scale + mask[j + l], high[i * kLanes + l]);
    fold(high, larger);
    for (int64_t i = 0; i < rows; ++i) {
        float* x = scores + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width / kLanes * kLanes; ++j) x[j] = exp_negative(x[j] * scale + mask[j] - high[i]);
    }
    for (int64_t j = 0; j < width; j += kLanes)
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l) total[i * kLanes + l] += scores[i * width + j + l];
    fold(total, [](float x, float y) __attribute__((always_inline)) { return x + y; });
    for (int64_t i = 0; i < rows; ++i) {
        lse[i] = high[i] + std::log(total[i]);
        inverse_total[i] = 1 / total[i];
    }
}

DINO_MULTIVERSION
void scale_rows(float* x, int64_t rows, int64_t width, const float* factors) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < width / kLanes * kLanes; ++j) x[i * width + j] *= factors[i];
}

// Scores become probabilities, their gradients dP become scale * dS.
DINO_MULTIVERSION
void gradients(float* scores, float* grads, int64_t rows, int64_t width, float scale, const float* mask,
               const float* lse, const float* delta) {
    for (int64_t i = 0; i < rows; ++i) {
        float *p = scores + i * width, *ds = grads + i * width, shift = lse[i], mean = delta[i];
#pragma omp simd
        for (int64_t j = 0; j < width / kLanes * kLanes; ++j) {
            p[j] = exp_negative(p[j] * scale + mask[j] - shift);
            ds[j] = p[j] * (ds[j] - mean) * scale;
        }
    }
}

// --- tasks -------------------------------------------------------------------------------------------

struct Scratch {
    Buffer q, k, v, grad_out, k_transposed, v_transposed, q_pairs, k_pairs, v_pairs, grad_out_pairs, mask;
    Buffer scores, grad_scores, p, ds, ds_rows, out, grad_q, grad_k, grad_v;
};

// A head of a sequence. Operands have rows of units of channels, [n, depth], or pairs of rows, [n / pair, columns].
struct Task {
    const AttentionArgs& a;
    const Kind& kind;
    int64_t head, begin, n;
    int64_t width, depth, depth_row, columns;  // padded keys; units of channels, padded; padded channels
    Scratch& s;

    Task(const AttentionArgs& a, const Kind& kind, int64_t number)
        : a(a), kind(kind), head(number % a.heads), begin(a.bounds[number / a.heads]), s(scratch()) {
        n = a.bounds[number / a.heads + 1] - begin;
        width = padded(n);
        depth = kind.units(a.channels);
        depth_row = padded(depth);
        columns = padded(a.channels);
        mask = s.mask.fit(width);  // 0 for the keys there are, -inf for those that pad
        std::fill_n(mask, n, 0.0f);
        std::fill(mask + n, mask + width, -std::numeric_limits<float>::infinity());
    }
    static Scratch& scratch() {
        static thread_local Scratch mine;
        return mine;
    }

    int64_t output(int64_t row) const { return ((begin + row) * a.heads + head) * a.channels; }
    // Rows of q, k or v (part 0, 1, 2), or of a tensor like the output; to [padded count, depth_row]
    void read_qkv(int64_t part, int64_t first, int64_t count, float* to) const {
        gather(a.qkv, a.dtype, (begin + first) * a.token_stride + part * a.part_stride + head * a.head_stride,
               a.token_stride, count, a.channels, kind.pair, to, padded(count), depth_row);
    }
    void read(const void* x, int64_t first, int64_t count, float* to) const {
        gather(x, a.dtype, output(first), a.heads * a.channels, count, a.channels, kind.pair, to, padded(count),
               depth_row);
    }
    // Floats [count, columns], which are lost, to their place
    void write(float* rows, int64_t count, void* to, int64_t offset, int64_t stride) const {
        if (kind.pair == 2) kind.pair_columns(rows, count, columns, rows);
        scatter(rows, columns / kind.pair, count, a.channels, kind.pair, to, a.dtype, offset, stride);
    }
    void write_grad(int64_t part, int64_t first, int64_t count, float* rows) const {
        int64_t offset = (((begin + first) * 3 + part) * a.heads + head) * a.channels;
        write(rows, count, a.grad, offset, 3 * a.heads * a.channels);
    }
    float* transposed(const float* rows, Buffer& to) const {  // [depth, width]
        transpose(rows, width, depth_row, to.fit(depth_row * width));
        return to.fit(0);
    }
    // Rows [first, first + count) as pairs of rows: the same where a unit is one value.
    float* paired(float* rows, int64_t first, int64_t count, Buffer& to) const {
        if (kind.pair == 1) return rows;
        float* pairs = to.fit(width / 2 * columns);
        pair_up(rows + first * depth_row, padded(count), depth_row, pairs + first / 2 * columns, columns);
        return pairs;
    }
    // scores [count, width] = rows [count, depth] others [depth, width]
    void score(int64_t count, const float* rows, const float* others, float* scores) const {
        product(kind, count, width, {depth, depth_row, 1, width, width}, rows, others, scores);
    }
    // sums [count, columns] = weights [count, n] values [n, columns]
    void average(int64_t count, const float* weights, const float* values, float* sums) const {
        product(kind, count, columns, {kind.units(n), width / kind.pair, 1, columns, columns}, weights, values, sums);
    }

    void forward() const;
    void backward() const;

   private:
    float* mask;
};

void Task::forward() const {
    float *q = s.q.fit(kStripe * depth_row), *k = s.k.fit(width * depth_row), *v = s.v.fit(width * depth_row);
    read_qkv(1, 0, n, k);
    read_qkv(2, 0, n, v);
    float *k_transposed = transposed(k, s.k_transposed), *v_pairs = paired(v, 0, n, s.v_pairs);
    float *scores = s.scores.fit(kStripe * width), *out = s.out.fit(kStripe * columns);
    float* p = kind.pair == 2 ? s.p.fit(kStripe * width / 2) : scores;
    float inverse_total[kStripe];
    for (int64_t i = 0; i < n; i += kStripe) {
        int64_t count = std::min(kStripe, n - i);
        read_qkv(0, i, count, q);
        score(count, q, k_transposed, scores);
        softmax(scores, count, width, a.scale, mask, a.lse + head * a.tokens + begin + i, inverse_total);
        if (kind.pair == 2) kind.pair_columns(scores, count, width, p);
        average(count, p, v_pairs, out);
        scale_rows(out, count, columns, inverse_total);
        write(out, count, a.out, output(i), a.heads * a.channels);
    }
}

void Task::backward() const {
    float *q = s.q.fit(width * depth_row), *grad_out = s.grad_out.fit(width * depth_row);
    float *k = s.k.fit(width * depth_row), *v = s.v.fit(width * depth_row);
    read_qkv(1, 0, n, k);
    read_qkv(2, 0, n, v);
    float *k_transposed = transposed(k, s.k_transposed), *v_transposed = transposed(v, s.v_transposed);
    float *k_pairs = paired(k, 0, n, s.k_pairs), *q_pairs = q, *grad_out_pairs = grad_out;
    float *out = s.out.fit(kStripe * depth_row), *grad_q = s.grad_q.fit(kStripe * columns);
    float *grad_k = s.grad_k.fit(width * columns), *grad_v = s.grad_v.fit(width * columns);
    int64_t block = std::min(kBlock, width) / kind.pair * width;
    float *p = s.p.fit(block), *ds = s.ds.fit(block);  // of a block of queries, as pairs of rows
    for (int64_t first = 0; first < n; first += kBlock) {
        int64_t last = std::min(first + kBlock, n);
        for (int64_t i = first; i < last; i += kStripe) {
            int64_t count = std::min(kStripe, n - i), even = count + count % 2;
            float delta[kStripe], lse[kStripe] = {};
            std::copy_n(a.lse + head * a.tokens + begin + i, count, lse);
            read_qkv(0, i, count, q + i * depth_row);
            read(a.grad_out, i, count, grad_out + i * depth_row);
            read(a.out, i, count, out);
            kind.row_dots(grad_out + i * depth_row, out, depth_row, delta);
            q_pairs = paired(q, i, count, s.q_pairs);
            grad_out_pairs = paired(grad_out, i, count, s.grad_out_pairs);
            float *p_rows = p + (i - first) / kind.pair * width, *ds_rows = ds + (i - first) / kind.pair * width;
            float* scores = kind.pair == 2 ? s.scores.fit(kStripe * width) : p_rows;
            float* grad_scores = kind.pair == 2 ? s.grad_scores.fit(kStripe * width) : ds_rows;
            score(count, q + i * depth_row, k_transposed, scores);
            score(count, grad_out + i * depth_row, v_transposed, grad_scores);
            gradients(scores, grad_scores, even, width, a.scale, mask, lse, delta);
            if (kind.pair == 2) {
                kind.pair_rows(scores, even, width, p_rows);
                kind.pair_rows(grad_scores, even, width, ds_rows);
                ds_rows = s.ds_rows.fit(kStripe * width / 2);
                kind.pair_columns(grad_scores, count, width, ds_rows);
            }
            average(count, ds_rows, k_pairs, grad_q);
            write_grad(0, i, count, grad_q);
        }
        Product by_queries{kind.units(last - first), 1, width, columns, columns, first > 0};
        product(kind, n, columns, by_queries, p, grad_out_pairs + first / kind.pair * columns, grad_v);
        product(kind, n, columns, by_queries, ds, q_pairs + first / kind.pair * columns, grad_k);
    }
    write_grad(1, 0, n, grad_k);
    write_grad(2, 0, n, grad_v);
}

void run(const AttentionArgs& a, void (Task::*pass)() const) {
    Kind kind = kind_of(a.dtype, a.bf16_products);
    parallel_for(a.sequences * a.heads, a.threads, [&](int64_t number) {
        FlushDenormals flush;
        Task task(a, kind, number);
        (task.*pass)();
    });
}

}  // namespace

void attention(const AttentionArgs& a) { run(a, &Task::forward); }

void attention_backward(const AttentionArgs& a) { run(a, &Task::backward); }

}  // namespace dino
