// Clip, AdamW, EMA and 16-bit copies over flat buffers. Formula in dino_kernels/ops/adamw_ema.py.
#include "cpu/adamw_ema.h"

namespace dino {
namespace {

struct Factors {
    float clip, rate, inv_sqrt_correction2, decay;
};

DINO_INLINE inline void advance(const AdamwEmaArgs& a, int64_t i, int64_t n, const float* g, const Factors& f) {
    float beta1 = float(a.beta1), beta2 = float(a.beta2), rest1 = float(1 - a.beta1), rest2 = float(1 - a.beta2);
    float eps = float(a.eps), *s = a.student + i, *m1 = a.exp_avg + i, *m2 = a.exp_avg_sq + i;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float x = g[j] * f.clip;
        m1[j] = beta1 * m1[j] + rest1 * x;
        m2[j] = beta2 * m2[j] + rest2 * x * x;
        s[j] = s[j] * f.decay - f.rate * m1[j] / (std::sqrt(m2[j]) * f.inv_sqrt_correction2 + eps);
    }
}

DINO_MULTIVERSION
Sums measure(const AdamwEmaArgs& a, int64_t, int64_t begin, int64_t count) {
    float scratch[kBlock];
    Sums sum{};
    for (int64_t i = 0; i < count; i += kBlock) {
        int64_t n = std::min(kBlock, count - i);
        const float* g = load(a.grad, a.grad_dtype, begin + i, n, scratch);
        sum.grad += dot(g, g, n);
    }
    return sum;
}

DINO_MULTIVERSION
void update(const AdamwEmaArgs& a, int64_t begin, int64_t count, const Factors* f) { update_chunk(a, begin, count, f); }

DINO_MULTIVERSION
void update_rows(const AdamwEmaArgs& a, int64_t first, int64_t count, const Factors* f) {
    update_layer(a, first, count, f);
}

Factors make_factors(const AdamwEmaArgs& a, int64_t i, const Sums&, double clip) {
    double n = double(a.steps[i] + 1), lr = a.lr_scale ? a.lr * a.lr_scale[i] : a.lr;
    return {float(clip), float(lr / (1 - std::pow(a.beta1, n))), float(1 / std::sqrt(1 - std::pow(a.beta2, n))),
            float(a.decayed[i] ? 1 - lr * a.weight_decay : 1.0)};
}

}  // namespace

bool adamw_ema_step(const AdamwEmaArgs& a) {
    if (flat_step(a, measure, make_factors, update, update_rows)) return true;
    for (int64_t i = 0; i < a.segments; ++i) a.steps[i] += !a.frozen[i];
    return false;
}

}  // namespace dino
