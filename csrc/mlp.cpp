// The MLP of a transformer block in bfloat16 by the processor's matrix tiles (AMX), forward and backward; formulas in
// dino_kernels/mlp.py. A task takes a block of tokens through both layers, so that what lies between them stays in the
// second-level cache and is not kept: the backward pass makes the first product once more, which costs no more than
// reading it.
#include "gelu.h"
#include "tile_products.h"

namespace dino {
#if defined(DINO_HAS_AMX)
namespace {

constexpr DType kBF16 = DType::bf16;

// c [rows, 32] = gelu(c + bias)
DINO_BF16 void activate(float* c, int64_t rows, const float* bias) {
    for (int64_t i = 0; i < rows; ++i, c += kPanel)
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) c[j] = gelu<kBF16>(c[j] + bias[j]);
}

// Gradients c [rows, 32] of gelu's output become those of its input, whose sums are added to `sums`; x, the first
// product without bias, becomes the output.
DINO_BF16 void deactivate(float* c, float* x, int64_t rows, const float* bias, float* sums) {
    for (int64_t i = 0; i < rows; ++i, c += kPanel, x += kPanel) {
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) {
            float slope;
            x[j] = gelu_with_slope<kBF16>(x[j] + bias[j], slope);
            c[j] *= slope;
            sums[j] += c[j];
        }
    }
}

void forward_block(const MlpArgs& a, const Kind& kind, const float* packed1, const float* packed2, int64_t first) {
    static thread_local Buffer sums, copy, between;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.channels / 2, n = a.hidden_channels;
    const float* x = whole_tiles(units(a.x, first * a.channels), rows, width, copy);
    float* c = sums.fit(kBlock * kPanel);
    auto active = reinterpret_cast<uint16_t*>(between.fit(kBlock * n / 2));
    for (int64_t j = 0; j < n; j += kPanel)
        by_tiles(kind, x, rows, width, packed1 + j * width, c, [&](int64_t i, int64_t count, float* c) {
            activate(c, count, a.bias1 + j);
            finish(c, count, nullptr, active + i * n + j, n);
        });
    for (int64_t j = 0; j < a.channels; j += kPanel)
        by_tiles(kind, units(active, 0), rows, n / 2, packed2 + j * n / 2, c, [&](int64_t i, int64_t count, float* c) {
            finish(c, count, a.bias2 + j, static_cast<uint16_t*>(a.out) + (first + i) * a.channels + j, a.channels);
        });
}

// What a backward pass makes for the gradients of the weights: gradients of gelu's input and its output [T, H], and
// sums of the gradients of the biases [blocks, H + C].
struct Between {
    const float *packed1, *packed1_back, *packed2_back;  // weights, and as the gradients are multiplied by them
    uint16_t *grad_hidden, *active;
    float* bias_sums;
};

void backward_block(const MlpBackwardArgs& a, const Kind& kind, const Between& b, int64_t first) {
    static thread_local Buffer sums, firsts, x_copy, grad_copy, inner_copy;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.channels / 2, n = a.hidden_channels;
    auto grad = static_cast<const uint16_t*>(a.grad) + first * a.channels;
    uint16_t *grad_hidden = b.grad_hidden + first * n, *active = b.active + first * n;
    float *c = sums.fit(kBlock * kPanel), *hidden = firsts.fit(kBlock * kPanel);
    float* bias1 = b.bias_sums + first / kBlock * (n + a.channels);
    std::fill_n(bias1, n + a.channels, 0.0f);
    const float* x = whole_tiles(units(a.x, first * a.channels), rows, width, x_copy);
    const float* whole = whole_tiles(units(grad, 0), rows, width, grad_copy);
    for (int64_t j = 0; j < n; j += kPanel) {
        by_tiles(kind, x, rows, width, b.packed1 + j * width, hidden, [](int64_t, int64_t, float*) {});
        by_tiles(kind, whole, rows, width, b.packed2_back + j * width, c, [&](int64_t i, int64_t count, float* c) {
            next_panel(grad_hidden + i * n + j, count, n, true);
            next_panel(active + i * n + j, count, n, true);
            deactivate(c, hidden + i * kPanel, count, a.bias1 + j, bias1 + j);
            finish(c, count, nullptr, grad_hidden + i * n + j, n);
            finish(hidden + i * kPanel, count, nullptr, active + i * n + j, n);
        });
    }
    const float* inner = whole_tiles(units(grad_hidden, 0), rows, n / 2, inner_copy);
    for (int64_t j = 0; j < a.channels; j += kPanel)
        by_tiles(kind, inner, rows, n / 2, b.packed1_back + j * n / 2, c, [&](int64_t i, int64_t count, float* c) {
            finish(c, count, nullptr, static_cast<uint16_t*>(a.grad_x) + (first + i) * a.channels + j, a.channels);
        });
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < a.channels; ++j) bias1[n + j] += bf16_to_float(grad[i * a.channels + j]);
}

}  // namespace

void mlp(const MlpArgs& a) {
    static thread_local Buffer buffer;
    Kind kind = kind_of(kBF16, 2);
    int64_t size = a.channels * a.hidden_channels / 2;
    float *packed1 = buffer.fit(2 * size), *packed2 = packed1 + size;
    pack_weights(a.weight1, a.channels, a.hidden_channels, false, a.threads, packed1);
    pack_weights(a.weight2, a.hidden_channels, a.channels, false, a.threads, packed2);
    parallel_for((a.tokens + kBlock - 1) / kBlock, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        forward_block(a, kind, packed1, packed2, i * kBlock);
    });
}

void mlp_backward(const MlpBackwardArgs& a) {
    static thread_local Buffer packed, rows, sums;
    Kind kind = kind_of(kBF16, 2);
    int64_t n = a.hidden_channels, size = a.channels * n / 2, width = n + a.channels;
    int64_t blocks = (a.tokens + kBlock - 1) / kBlock;
    float *packed1 = packed.fit(3 * size), *packed1_back = packed1 + size, *packed2_back = packed1_back + size;
    pack_weights(a.weight1, a.channels, n, false, a.threads, packed1);
    pack_weights(a.weight1, n, a.channels, true, a.threads, packed1_back);
    pack_weights(a.weight2, a.channels, n, true, a.threads, packed2_back);
    auto made = reinterpret_cast<uint16_t*>(rows.fit(a.tokens * n));
    Between between{packed1, packed1_back, packed2_back, made, made + a.tokens * n, sums.fit(blocks * width)};
    parallel_for(blocks, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        backward_block(a, kind, between, i * kBlock);
    });
    add_linear({a.grad_weight1, between.grad_hidden, a.x, a.tokens, n, a.channels, a.threads});
    add_linear({a.grad_weight2, a.grad, between.active, a.tokens, a.channels, n, a.threads});
    for (int64_t i = 0; i < blocks; ++i) {
        const float* part = between.bias_sums + i * width;
        for (int64_t j = 0; j < n; ++j) a.grad_bias1[j] += part[j];
        for (int64_t j = 0; j < a.channels; ++j) a.grad_bias2[j] += part[n + j];
    }
}
#else
void mlp(const MlpArgs&) {}
void mlp_backward(const MlpBackwardArgs&) {}
#endif

}  // namespace dino
