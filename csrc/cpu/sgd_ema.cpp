// Clip, momentum SGD, LARS or LARC, EMA and 16-bit copies over flat buffers. Formula in dino_kernels/ops/sgd_ema.py.
#include "cpu/sgd_ema.h"

namespace dino {
namespace {

struct Factors {
    float grad, weights;  // d = grad * gradient + weights * student
};

DINO_INLINE inline void advance(const SgdEmaArgs& a, int64_t i, int64_t n, const float* g, const Factors& f) {
    float beta = float(a.momentum_sgd), lr = float(a.lr);
    float *s = a.student + i, *m = a.momentum_buffer + i;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        m[j] = beta * m[j] + (f.grad * g[j] + f.weights * s[j]);
        s[j] -= lr * m[j];
    }
}

DINO_MULTIVERSION
Sums measure(const SgdEmaArgs& a, int64_t segment, int64_t begin, int64_t count) {
    float scratch[kBlock];
    Sums sum{};
    for (int64_t i = 0; i < count; i += kBlock) {
        int64_t n = std::min(kBlock, count - i);
        const float *g = load(a.grad, a.grad_dtype, begin + i, n, scratch), *s = a.student + begin + i;
        sum.grad += dot(g, g, n);
        if (!a.adapted[segment]) continue;
        sum.weights += dot(s, s, n);
        sum.product += dot(g, s, n);
    }
    return sum;
}

DINO_MULTIVERSION
void update(const SgdEmaArgs& a, int64_t begin, int64_t count, const Factors* f) { update_chunk(a, begin, count, f); }

DINO_MULTIVERSION
void update_rows(const SgdEmaArgs& a, int64_t first, int64_t count, const Factors* f) {
    update_layer(a, first, count, f);
}

Factors make_factors(const SgdEmaArgs& a, int64_t i, const Sums& sums, double clip) {
    double grad = std::sqrt(sums.grad), weights = std::sqrt(sums.weights), decay = a.decayed[i] ? a.weight_decay : 0;
    double ratio = 1;
    if (a.adapted[i] && a.larc && weights > 0)
        ratio = grad > 0 ? a.eta * weights / (clip * grad + decay * weights + a.eps) : 0;
    if (a.adapted[i] && !a.larc && weights > 0) {
        double square = clip * clip * sums.grad + 2 * clip * decay * sums.product + decay * decay * sums.weights;
        if (square > 0) ratio = a.eta * weights / std::sqrt(square);
    }
    return {float(clip * ratio), float(decay * ratio)};
}

}  // namespace

bool sgd_ema_step(const SgdEmaArgs& a) { return flat_step(a, measure, make_factors, update, update_rows); }

}  // namespace dino
