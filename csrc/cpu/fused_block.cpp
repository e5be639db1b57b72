#include "cpu/fused_block.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/mlp.h"

namespace dino {
namespace {

constexpr int kByTiles = 2;  // bf16_products of the attention, where the processor has them

enum { qkv, qkv_bias, proj, proj_bias, norm, norm_bias, fc1, fc1_bias, fc2, fc2_bias, next_norm, next_norm_bias };

// Tokens of the attention, of the MLP and of the next block, and what the forward pass leaves for the backward pass, in
// one piece of memory.
struct Kept {
    int64_t a, m, n;
    void *projected, *heads;                     // [A, 3 C], [A, C]
    float *lse, *middle;                         // [heads, A], [T, C]
    void* normed;                                // [M, C]
    float *mean, *rstd, *next_mean, *next_rstd;  // [M], [N]
    void* hidden = nullptr;                      // [M, hidden channels]; tiles make it again
    int64_t bytes = 0;

    explicit Kept(const FusedBlockArgs& block) {
        auto count = [&](const RowsOf& rows) { return rows.count < 0 ? block.tokens : rows.count; };
        auto piece = [&](int64_t size) {
            uintptr_t begin = reinterpret_cast<uintptr_t>(block.kept) + uintptr_t(bytes);  // of null to count
            bytes += (size + 63) / 64 * 64;
            return reinterpret_cast<void*>(begin);
        };
        auto floats = [&](int64_t size) { return static_cast<float*>(piece(4 * size)); };
        int64_t width = width_of(block.dtype), c = block.channels;
        a = count(block.attention_rows), m = count(block.mlp_rows), n = count(block.next_rows);
        projected = piece(3 * width * a * c), heads = piece(width * a * c);
        lse = floats(block.heads * a), middle = floats(block.tokens * c);
        normed = piece(width * m * c);
        mean = floats(m), rstd = floats(m), next_mean = floats(n), next_rstd = floats(n);
        if (block.products != Products::tiles) hidden = piece(width * m * block.hidden_channels);
    }
};

const float* vector(const FusedBlockArgs& b, int i) { return static_cast<const float*>(b.weights[i]); }

AttentionArgs attention_args(const FusedBlockArgs& b, const Kept& kept, const void* grad_out, void* grad) {
    int64_t c = b.channels, d = c / b.heads;
    return {kept.projected, b.bounds,    kept.heads, kept.lse, grad_out,
            grad,           b.sequences, kept.a,     b.heads,  d,
            3 * c,          c,           d,          b.dtype,  float(1 / std::sqrt(double(d))),
            kByTiles,       b.threads};
}

}  // namespace

int64_t fused_block_bytes(const FusedBlockArgs& b) { return Kept(b).bytes; }

void fused_block(const FusedBlockArgs& b, const FusedBlockForward& t) {
    Kept kept(b);
    int64_t c = b.channels, a = kept.a;
    auto product = [&](const void* x, int layer, int64_t outputs, void* out) {
        linear({x, b.weights[layer], vector(b, layer + 1), out, a, c, outputs, false, b.dtype, b.products, b.threads});
    };
    product(t.normed, qkv, 3 * c, kept.projected);
    attention(attention_args(b, kept, nullptr, nullptr));
    product(kept.heads, proj, c, t.scratch);
    add_layer_norm({t.x, t.scratch, b.scale, b.attention_rows, b.mlp_rows, vector(b, norm), vector(b, norm_bias),
                    kept.middle, kept.normed, kept.mean, kept.rstd, b.tokens, c, DType::f32, b.dtype, b.eps,
                    b.threads});
    mlp({kept.normed, b.weights[fc1], b.weights[fc2], vector(b, fc1_bias), vector(b, fc2_bias), t.scratch, kept.hidden,
         kept.m, c, b.hidden_channels, b.dtype, b.products, b.threads});
    add_layer_norm({kept.middle, t.scratch, b.mlp_scale, b.mlp_rows, b.next_rows, vector(b, next_norm),
                    vector(b, next_norm_bias), t.out, t.out_normed, kept.next_mean, kept.next_rstd, b.tokens, c,
                    DType::f32, b.dtype, b.eps, b.threads});
}

void fused_block_backward(const FusedBlockArgs& b, const FusedBlockBackward& t) {
    Kept kept(b);
    int64_t c = b.channels, a = kept.a, groups = std::min(b.groups, b.tokens), width = width_of(b.dtype);
    int64_t branch = std::max(a, kept.m) * c * width;
    auto of_branch = static_cast<char*>(t.scratch), other = of_branch + branch, of_projected = other + branch;
    auto normalized = [&](const void* grad, const void* grad_normed, const void* total, const float* mean,
                          const float* rstd, int layer, const float* scale, const RowsOf& added, const RowsOf& read) {
        add_layer_norm_backward(
            {grad,     grad_normed, total,    mean,       rstd,      vector(b, layer), scale,
             added,    read,        t.grad_x, of_branch,  t.partial, t.grads[layer],   t.grads[layer + 1],
             b.tokens, c,           groups,   DType::f32, b.dtype,   b.threads});
    };
    auto product = [&](const void* grad, const void* x, int layer, int64_t outputs, void* grad_x) {
        add_linear({t.grads[layer], grad, x, t.grads[layer + 1], a, outputs, c, b.dtype, b.products, b.threads});
        linear({grad, b.weights[layer], nullptr, grad_x, a, outputs, c, true, b.dtype, b.products, b.threads});
    };
    normalized(t.grad, t.grad_normed, t.out, kept.next_mean, kept.next_rstd, next_norm, b.mlp_scale, b.mlp_rows,
               b.next_rows);
    mlp_backward({of_branch, kept.normed, kept.hidden, b.weights[fc1], b.weights[fc2], vector(b, fc1_bias), other,
                  t.grads[fc1], t.grads[fc1_bias], t.grads[fc2], t.grads[fc2_bias], kept.m, c, b.hidden_channels,
                  b.dtype, b.products, b.threads});
    // grad_x is read and written a row at a time.
    normalized(t.grad_x, other, kept.middle, kept.mean, kept.rstd, norm, b.scale, b.attention_rows, b.mlp_rows);
    product(of_branch, kept.heads, proj, c, other);
    attention_backward(attention_args(b, kept, other, of_projected));
    product(of_projected, t.normed, qkv, 3 * c, t.grad_normed_x);
}

}  // namespace dino
