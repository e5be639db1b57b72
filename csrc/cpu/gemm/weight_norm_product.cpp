// Gradients of a weight-normed layer's v and g from those of its logits. The gradient of its rows w, as large as they
// are, is computed 32 rows at a time and never written. Formulas in dino_kernels/ops/weight_norm.py.
#include "cpu/gemm/weight_norm_product.h"

#include "common/nontemporal.h"
#include "cpu/gemm/operands.h"
#include "cpu/weight_norm_row.h"

namespace dino {
namespace {

constexpr int64_t kAheadRows = 8;  // prefetched

// Of rows [first, + 32), whose gradients of w are grad_w [32, channels].
DINO_MULTIVERSION
void finish_rows(const WeightNormProductBackwardArgs& a, int64_t first, float* grad_w) {
    int64_t n = a.channels;
    bool nontemporal = a.rows * n * 4 > kCached;
    for (int64_t row = first; row < first + kPanel; ++row, grad_w += n) {
        const float* v = a.v + row * n;
        float* grad_v = a.grad_v + row * n;
        prefetch(v, kAheadRows * n * 4, n * 4);
        RowGradient of = row_gradient(grad_w, v, a.g[row], n);
        if (a.overwrite) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) grad_w[j] = of.scale * (grad_w[j] - of.pull * v[j]);
            stream_store(grad_v, grad_w, n * 4, nontemporal);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) grad_v[j] += of.scale * (grad_w[j] - of.pull * v[j]);
        }
        if (a.grad_g) a.grad_g[row] += of.along;
    }
    finish_streaming();
}

template <class Value>
void with_f32(const WeightNormProductBackwardArgs& a) {
    static thread_local Buffer buffer;
    Microkernel kernel = microkernel_for(DType::f32, Products::f32);
    int64_t n = a.channels;
    float* x = buffer.fit(a.tokens * n);
    widen(static_cast<const Value*>(a.x), a.tokens, n, n, x);
    parallel_for(a.rows / kPanel, a.threads, [&](int64_t i) {
        static thread_local Buffer grads, sums;
        float *grad = grads.fit(a.tokens * kPanel), *c = sums.fit(kPanel * n);
        widen(static_cast<const Value*>(a.grad) + i * kPanel, a.tokens, kPanel, a.rows, grad);
        product(kernel, kPanel, n, {a.tokens, 1, kPanel, n, n}, grad, x, c);
        finish_rows(a, i * kPanel, c);
    });
}

#if defined(DINO_HAS_AMX)
void with_amx(const WeightNormProductBackwardArgs& a) {
    static thread_local Buffer buffer;
    Microkernel kernel = microkernel_for(DType::bf16, Products::amx);
    int64_t pairs = padded((a.tokens + 1) / 2), n = a.channels;
    float* x = buffer.fit(pairs * n);  // by panels [pairs, 32]
    for (int64_t j = 0; j < n; j += kPanel)
        pair_rows_of(static_cast<const uint16_t*>(a.x), n, a.tokens, j, x + j * pairs);
    parallel_for(a.rows / kPanel, a.threads, [&](int64_t i) {
        static thread_local Buffer grads, transposed_grads, sums;
        TileConfigScope scope;
        float *grad = grads.fit(pairs * kPanel), *transposed = transposed_grads.fit(pairs * kPanel),
              *c = sums.fit(kPanel * n);
        pair_rows_of(static_cast<const uint16_t*>(a.grad), a.rows, a.tokens, i * kPanel, grad);
        transpose(grad, pairs, kPanel, transposed, pairs);
        for (int64_t j = 0; j < n; j += kPanel)
            product(kernel, kPanel, kPanel, {pairs, pairs, 1, kPanel, n}, transposed, x + j * pairs, c + j);
        finish_rows(a, i * kPanel, c);
    });
}
#endif

}  // namespace

void weight_norm_product_backward(const WeightNormProductBackwardArgs& a) {
#if defined(DINO_HAS_AMX)
    if (a.products == Products::amx) return with_amx(a);
#endif
    a.dtype == DType::f32 ? with_f32<float>(a) : with_f32<uint16_t>(a);
}

}  // namespace dino
