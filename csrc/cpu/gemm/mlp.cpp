// The MLP of a transformer block, forward and backward; formulas in dino_kernels/ops/mlp.py. A task takes a block of
// tokens through both layers, so that the hidden activations stay in the second-level cache. With AMX none are saved
// for backward: it recomputes the first product, which costs no more than reading it.
#include "cpu/gemm/mlp.h"

#include "cpu/gelu.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/operands.h"

namespace dino {
namespace {

// c [rows, 32] = gelu(c + bias)
template <DType D>
DINO_INLINE inline void activate_rows(float* c, int64_t rows, const float* bias) {
    for (int64_t i = 0; i < rows; ++i, c += kPanel)
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) c[j] = gelu<D>(c[j] + bias[j]);
}

DINO_MULTIVERSION
void activate(float* c, int64_t rows, const float* bias, bool rounded) {
    if (rounded)
        activate_rows<DType::bf16>(c, rows, bias);
    else
        activate_rows<DType::f32>(c, rows, bias);
}

// c [rows, 32], the gradient of gelu's output, becomes that of its input, whose column sums are added to `sums`; x, the
// first product without bias, becomes gelu's output.
template <DType D, class Sum>
DINO_INLINE inline void gelu_backward_rows(float* c, float* x, int64_t rows, const float* bias, Sum* sums) {
    for (int64_t i = 0; i < rows; ++i, c += kPanel, x += kPanel) {
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) {
            float slope;
            x[j] = gelu_with_slope<D>(x[j] + bias[j], slope);
            c[j] *= slope;
            sums[j] += c[j];
        }
    }
}

DINO_MULTIVERSION
void gelu_backward(float* c, float* x, int64_t rows, const float* bias, float* sums) {
    gelu_backward_rows<DType::bf16>(c, x, rows, bias, sums);
}

DINO_MULTIVERSION
void gelu_backward(float* c, float* x, int64_t rows, const float* bias, double* sums) {
    gelu_backward_rows<DType::f32>(c, x, rows, bias, sums);
}

template <class P>
void forward_block(const MlpArgs& a, const float* packed1, int64_t first, int64_t rows) {
    using Value = typename P::Value;
    static thread_local Sums sums;
    static thread_local Buffer x_copy, active_copy;
    static thread_local BufferOf<Value> between;
    int64_t c = a.channels, n = a.hidden_channels;
    int64_t size1 = kPanel * P::floats(c), size2 = kPanel * P::floats(n);
    const float *x = P::rows(static_cast<const Value*>(a.x) + first * c, rows, c, x_copy),
                *packed2 = packed1 + n * P::floats(c);
    bool prefetch_next = exceeds_half_l2(2 * n * P::floats(c));
    Value *active = between.fit(kBlock * n), *hidden = static_cast<Value*>(a.hidden) + first * n;
    for_each_panel(
        n / kPanel, P::whole(rows), P::steps(P::whole(rows), c),
        [&](int64_t j, auto& interleave) {
            P::multiply(x, P::whole(rows), c, packed1 + j * size1, sums.of(j), false, prefetch_next, interleave);
        },
        [&](int64_t j, int64_t i) {
            float* y = sums.of(j, i);
            int64_t to = i * n + j * kPanel;
            if (a.hidden) P::finish(y, std::min(kPiece, rows - i), nullptr, hidden + to, n);
            activate(y, kPiece, a.bias1 + j * kPanel, a.dtype == DType::bf16);
            P::finish(y, kPiece, nullptr, active + to, n);
        });
    const float* actives = P::rows(active, P::whole(rows), n, active_copy);
    for_each_panel(
        c / kPanel, rows, P::steps(P::whole(rows), n),
        [&](int64_t j, auto& interleave) {
            P::multiply(actives, P::whole(rows), n, packed2 + j * size2, sums.of(j), false, prefetch_next, interleave);
        },
        [&](int64_t j, int64_t i) {
            Value* out = static_cast<Value*>(a.out) + (first + i) * c + j * kPanel;
            P::finish(sums.of(j, i), std::min(kPiece, rows - i), a.bias2 + j * kPanel, out, c);
        });
}

// From the backward pass over blocks, for the gradients of weights and biases: the gradient of gelu's input and gelu's
// output, both as panels of tokens [H / 32, P::floats(tokens), 32], and column sums [blocks, H + C].
template <class P>
struct Between {
    float *grad_hidden, *active;
    int64_t tokens, block;  // whole; of a task
    SumOf<typename P::Value>* bias_sums;
};

template <class P>
void backward_block(const MlpBackwardArgs& a, const float* packed1, const Between<P>& b, int64_t first) {
    using Value = typename P::Value;
    static thread_local Sums sums, firsts;
    static thread_local Buffer x_copy, grad_copy, hidden_copy;
    static thread_local BufferOf<Value> inner;
    int64_t rows = std::min(b.block, a.tokens - first), c = a.channels, n = a.hidden_channels;
    int64_t size = kPanel * P::floats(c), all = n * P::floats(c);
    auto grad = static_cast<const Value*>(a.grad) + first * c;
    bool prefetch_next = exceeds_half_l2(3 * all);
    const float *packed1_back = packed1 + all, *packed2_back = packed1_back + all;
    SumOf<Value>* bias1 = b.bias_sums + first / b.block * (n + c);
    std::fill_n(bias1, n + c, 0);
    const float* x = a.hidden ? nullptr : P::rows(static_cast<const Value*>(a.x) + first * c, rows, c, x_copy);
    const float* grads = P::rows(grad, rows, c, grad_copy);
    Value* grad_hidden = inner.fit(kBlock * n);
    for_each_panel(
        n / kPanel, P::whole(rows), (a.hidden ? 1 : 2) * P::steps(P::whole(rows), c),
        [&](int64_t j, auto& interleave) {
            if (!a.hidden)
                P::multiply(x, P::whole(rows), c, packed1 + j * size, firsts.of(j), false, prefetch_next, interleave);
            P::multiply(grads, P::whole(rows), c, packed2_back + j * size, sums.of(j), false, prefetch_next,
                        interleave);
        },
        [&](int64_t j, int64_t i) {
            float *y = sums.of(j, i), *hidden = firsts.of(j, i);
            int64_t to = i * n + j * kPanel;
            if (a.hidden) {
                auto kept = static_cast<const Value*>(a.hidden) + first * n + to;
                int64_t count = std::clamp<int64_t>(rows - i, 0, kPiece);
                next_panel(kept, count, n, false);
                widen(kept, count, kPanel, n, hidden);
                std::fill(hidden + count * kPanel, hidden + kPiece * kPanel, 0.0f);
            }
            gelu_backward(y, hidden, kPiece, a.bias1 + j * kPanel, bias1 + j * kPanel);
            P::finish(y, kPiece, nullptr, grad_hidden + to, n);
            int64_t panel = P::floats(j * b.tokens + first + i) * kPanel;
            P::finish_tokens(y, kPiece, b.grad_hidden + panel);
            P::finish_tokens(hidden, kPiece, b.active + panel);
        });
    for (int64_t j = 0; j < n / kPanel; ++j)  // zeros pad a panel's tokens
        for (float* panels : {b.grad_hidden, b.active})
            std::fill(panels + P::floats(j * b.tokens + first + P::whole(rows)) * kPanel,
                      panels + P::floats(j * b.tokens + std::min(b.tokens, first + b.block)) * kPanel, 0.0f);
    const float* of_hidden = P::rows(grad_hidden, P::whole(rows), n, hidden_copy);
    for_each_panel(
        c / kPanel, rows, P::steps(P::whole(rows), n),
        [&](int64_t j, auto& interleave) {
            const float* panel = packed1_back + j * kPanel * P::floats(n);
            P::multiply(of_hidden, P::whole(rows), n, panel, sums.of(j), false, prefetch_next, interleave);
        },
        [&](int64_t j, int64_t i) {
            Value* out = static_cast<Value*>(a.grad_x) + (first + i) * c + j * kPanel;
            P::finish(sums.of(j, i), std::min(kPiece, rows - i), nullptr, out, c);
        });
    add_rows_to(bias1 + n, grad, rows, c, c);
}

template <class P>
void forward(const MlpArgs& a) {
    static thread_local Buffer buffer;
    int64_t size = a.hidden_channels * P::floats(a.channels);
    float* packed = buffer.fit(2 * size);
    pack_weights<P>(a.weight1, a.channels, a.hidden_channels, false, a.threads, packed);
    pack_weights<P>(a.weight2, a.hidden_channels, a.channels, false, a.threads, packed + size);
    int64_t tokens = P::block(2 * size);
    parallel_for((a.tokens + tokens - 1) / tokens, a.threads, [&](int64_t i) {
        typename P::Scope scope;
        forward_block<P>(a, packed, i * tokens, std::min(tokens, a.tokens - i * tokens));
    });
}

template <class P>
void backward(const MlpBackwardArgs& a) {
    using Value = typename P::Value;
    static thread_local Buffer weights, panels;
    static thread_local BufferOf<SumOf<Value>> sums;
    int64_t c = a.channels, n = a.hidden_channels, size = n * P::floats(c), tokens = whole(a.tokens);
    int64_t block = P::block(3 * size), blocks = (a.tokens + block - 1) / block;
    float* packed = weights.fit(3 * size);
    if (!a.hidden) pack_weights<P>(a.weight1, c, n, false, a.threads, packed);
    pack_weights<P>(a.weight1, n, c, true, a.threads, packed + size);
    pack_weights<P>(a.weight2, c, n, true, a.threads, packed + 2 * size);
    float* made = panels.fit(2 * P::floats(tokens) * n);
    Between<P> between{made, made + P::floats(tokens) * n, tokens, block, sums.fit(blocks * (n + c))};
    parallel_for(blocks, a.threads, [&](int64_t i) {
        typename P::Scope scope;
        backward_block<P>(a, packed, between, i * block);
    });
    auto add = [&](float* into, const void* grad, const void* x, int64_t outputs, int64_t inputs, Packed packed) {
        add_linear({.into = into,
                    .grad = grad,
                    .x = x,
                    .into_bias = nullptr,
                    .tokens = a.tokens,
                    .outputs = outputs,
                    .inputs = inputs,
                    .dtype = a.dtype,
                    .products = a.products,
                    .threads = a.threads,
                    .packed = packed});
    };
    add(a.grad_weight1, between.grad_hidden, a.x, n, c, Packed::grad);
    add(a.grad_weight2, a.grad, between.active, c, n, Packed::x);
    auto add_bias = [&](float* into, int64_t columns, int64_t first) {
        for (int64_t j = 0; j < columns; ++j) {
            SumOf<Value> sum = 0;
            for (int64_t i = 0; i < blocks; ++i) sum += between.bias_sums[i * (n + c) + first + j];
            into[j] += float(sum);
        }
    };
    add_bias(a.grad_bias1, n, 0);
    add_bias(a.grad_bias2, c, n);
}

}  // namespace

void mlp(const MlpArgs& a) {
#if defined(DINO_HAS_AMX)
    if (a.products == Products::amx) return forward<AmxOperands<uint16_t>>(a);
#endif
    a.dtype == DType::f32 ? forward<F32Operands<float>>(a) : forward<F32Operands<uint16_t>>(a);
}

void mlp_backward(const MlpBackwardArgs& a) {
#if defined(DINO_HAS_AMX)
    if (a.products == Products::amx) return backward<AmxOperands<uint16_t>>(a);
#endif
    a.dtype == DType::f32 ? backward<F32Operands<float>>(a) : backward<F32Operands<uint16_t>>(a);
}

}  // namespace dino
