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

void forward_block(const MlpArgs& a, const float* packed1, int64_t first) {
    static thread_local Sums sums;
    static thread_local Buffer copy, between;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.channels / 2, n = a.hidden_channels;
    const float *x = whole_tiles(a.x, first * a.channels, rows, width, copy), *packed2 = packed1 + width * n;
    bool distant = far(2 * width * n);
    auto active = reinterpret_cast<uint16_t*>(between.fit(kBlock * n / 2));
    by_panels(
        n / kPanel, whole(rows), steps_of(whole(rows), width),
        [&](int64_t j, auto& beside) {
            multiply(x, whole(rows), width, packed1 + j * kPanel * width, sums.of(j), false, distant, beside);
        },
        [&](int64_t j, int64_t i) {
            activate(sums.of(j, i), kPiece, a.bias1 + j * kPanel);
            finish(sums.of(j, i), kPiece, nullptr, active + i * n + j * kPanel, n);
        });
    by_panels(
        a.channels / kPanel, rows, steps_of(whole(rows), n / 2),
        [&](int64_t j, auto& beside) {
            multiply(units(active, 0), whole(rows), n / 2, packed2 + j * kPanel * n / 2, sums.of(j), false, distant,
                     beside);
        },
        [&](int64_t j, int64_t i) {
            uint16_t* out = static_cast<uint16_t*>(a.out) + (first + i) * a.channels + j * kPanel;
            finish(sums.of(j, i), std::min(kPiece, rows - i), a.bias2 + j * kPanel, out, a.channels);
        });
}

// What a backward pass makes for the gradients of the weights: gradients of gelu's input and its output as panels of
// pairs of tokens [H / 32, pairs, 32], and sums of the gradients of the biases [blocks, H + C].
struct Between {
    float *grad_hidden, *active;
    int64_t pairs;
    float* bias_sums;
};

void backward_block(const MlpBackwardArgs& a, const float* packed1, const Between& b, int64_t first) {
    static thread_local Sums sums, firsts;
    static thread_local Buffer x_copy, grad_copy, inner;
    int64_t rows = std::min(kBlock, a.tokens - first), width = a.channels / 2, n = a.hidden_channels;
    auto grad = static_cast<const uint16_t*>(a.grad) + first * a.channels;
    bool distant = far(3 * width * n);
    auto grad_hidden = reinterpret_cast<uint16_t*>(inner.fit(kBlock * n / 2));
    const float *packed1_back = packed1 + width * n, *packed2_back = packed1_back + width * n;
    float* bias1 = b.bias_sums + first / kBlock * (n + a.channels);
    std::fill_n(bias1, n + a.channels, 0.0f);
    const float* x = whole_tiles(a.x, first * a.channels, rows, width, x_copy);
    const float* grads = whole_tiles(grad, 0, rows, width, grad_copy);
    by_panels(
        n / kPanel, whole(rows), 2 * steps_of(whole(rows), width),
        [&](int64_t j, auto& beside) {
            multiply(x, whole(rows), width, packed1 + j * kPanel * width, firsts.of(j), false, distant, beside);
            multiply(grads, whole(rows), width, packed2_back + j * kPanel * width, sums.of(j), false, distant, beside);
        },
        [&](int64_t j, int64_t i) {
            float *c = sums.of(j, i), *hidden = firsts.of(j, i);
            int64_t to = (j * b.pairs + (first + i) / 2) * kPanel;
            deactivate(c, hidden, kPiece, a.bias1 + j * kPanel, bias1 + j * kPanel);
            finish(c, kPiece, nullptr, grad_hidden + i * n + j * kPanel, n);
            finish_pairs(c, kPiece, b.grad_hidden + to);
            finish_pairs(hidden, kPiece, b.active + to);
        });
    by_panels(
        a.channels / kPanel, rows, steps_of(whole(rows), n / 2),
        [&](int64_t j, auto& beside) {
            const float* panel = packed1_back + j * kPanel * n / 2;
            multiply(units(grad_hidden, 0), whole(rows), n / 2, panel, sums.of(j), false, distant, beside);
        },
        [&](int64_t j, int64_t i) {
            uint16_t* out = static_cast<uint16_t*>(a.grad_x) + (first + i) * a.channels + j * kPanel;
            finish(sums.of(j, i), std::min(kPiece, rows - i), nullptr, out, a.channels);
        });
    add_rows_to(bias1 + n, grad, rows, a.channels, a.channels);
}

}  // namespace

void mlp(const MlpArgs& a) {
    static thread_local Buffer buffer;
    Kind kind = kind_of(kBF16, 2);
    int64_t size = a.channels * a.hidden_channels / 2;
    float* packed = buffer.fit(2 * size);
    pack_weights(a.weight1, a.channels, a.hidden_channels, false, a.threads, packed);
    pack_weights(a.weight2, a.hidden_channels, a.channels, false, a.threads, packed + size);
    parallel_for((a.tokens + kBlock - 1) / kBlock, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        forward_block(a, packed, i * kBlock);
    });
}

void mlp_backward(const MlpBackwardArgs& a) {
    static thread_local Buffer weights, panels, sums;
    Kind kind = kind_of(kBF16, 2);
    int64_t n = a.hidden_channels, size = a.channels * n / 2, width = n + a.channels, pairs = whole(a.tokens) / 2;
    int64_t blocks = (a.tokens + kBlock - 1) / kBlock;
    float* packed = weights.fit(3 * size);
    pack_weights(a.weight1, a.channels, n, false, a.threads, packed);
    pack_weights(a.weight1, n, a.channels, true, a.threads, packed + size);
    pack_weights(a.weight2, a.channels, n, true, a.threads, packed + 2 * size);
    float* made = panels.fit(2 * pairs * n);
    Between between{made, made + pairs * n, pairs, sums.fit(blocks * width)};
    parallel_for(blocks, a.threads, [&](int64_t i) {
        TileUse tiles(kind);
        backward_block(a, packed, between, i * kBlock);
    });
    add_linear({a.grad_weight1, between.grad_hidden, a.x, a.tokens, n, a.channels, a.threads, Paired::grad});
    add_linear({a.grad_weight2, a.grad, between.active, a.tokens, a.channels, n, a.threads, Paired::x});
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
