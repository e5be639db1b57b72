#include "cpu/fused_block.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/mlp.h"

namespace dino {
namespace {

// Tokens of the attention, of the MLP and of the next block, and what the forward pass saves for backward, in one piece
// of memory.
struct Saved {
    int64_t a, m, n;
    void *projected, *heads;                     // [A, 3 C], [A, C]
    float *lse, *middle;                         // [heads, A], [T, C]
    void* normed;                                // [M, C]
    float *mean, *rstd, *next_mean, *next_rstd;  // [M], [N]
    void* hidden = nullptr;                      // [M, hidden channels]; with AMX it is recomputed
    int64_t bytes = 0;

    Saved(const FusedBlockArgs& block, void* memory) {
        auto count = [&](const RowsOf& rows) { return rows.count < 0 ? block.tokens : rows.count; };
        auto take = [&](int64_t size) {
            uintptr_t begin = reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes);  // null: only to count
            bytes += (size + 63) / 64 * 64;
            return reinterpret_cast<void*>(begin);
        };
        auto floats = [&](int64_t size) { return static_cast<float*>(take(4 * size)); };
        int64_t width = width_of(block.dtype), c = block.channels;
        a = count(block.attention_rows), m = count(block.mlp_rows), n = count(block.next_rows);
        projected = take(3 * width * a * c), heads = take(width * a * c);
        lse = floats(block.heads * a), middle = floats(block.tokens * c);
        normed = take(width * m * c);
        mean = floats(m), rstd = floats(m), next_mean = floats(n), next_rstd = floats(n);
        if (block.products != Products::amx) hidden = take(width * m * block.hidden_channels);
    }
};

AttentionArgs attention_args(const FusedBlockArgs& b, const Saved& saved, const void* grad_out, void* grad) {
    int64_t c = b.channels, d = c / b.heads;
    return {saved.projected,
            b.bounds,
            saved.heads,
            saved.lse,
            grad_out,
            grad,
            b.sequences,
            saved.a,
            b.heads,
            d,
            3 * c,
            c,
            d,
            b.dtype,
            float(1 / std::sqrt(double(d))),
            Products::amx,
            b.threads};
}

}  // namespace

int64_t fused_block_bytes(const FusedBlockArgs& b) { return Saved(b, nullptr).bytes; }

void fused_block(const FusedBlockArgs& b, const FusedBlockForward& t) {
    Saved saved(b, t.saved);
    int64_t c = b.channels, a = saved.a;
    auto product = [&](const void* x, const Layer& layer, int64_t outputs, void* out) {
        linear({x, layer.weight, layer.bias, out, a, c, outputs, false, b.dtype, b.products, b.threads});
    };
    product(t.normed, b.qkv, 3 * c, saved.projected);
    attention(attention_args(b, saved, nullptr, nullptr));
    product(saved.heads, b.proj, c, t.scratch);
    add_layer_norm({t.x, t.scratch, b.scale, b.attention_rows, b.mlp_rows, static_cast<const float*>(b.norm.weight),
                    b.norm.bias, saved.middle, saved.normed, saved.mean, saved.rstd, b.tokens, c, DType::f32, b.dtype,
                    b.eps, b.threads});
    mlp({saved.normed, b.fc1.weight, b.fc2.weight, b.fc1.bias, b.fc2.bias, t.scratch, saved.hidden, saved.m, c,
         b.hidden_channels, b.dtype, b.products, b.threads});
    add_layer_norm({saved.middle, t.scratch, b.mlp_scale, b.mlp_rows, b.next_rows,
                    static_cast<const float*>(b.next_norm.weight), b.next_norm.bias, t.out, t.out_normed,
                    saved.next_mean, saved.next_rstd, b.tokens, c, DType::f32, b.dtype, b.eps, b.threads});
}

void fused_block_backward(const FusedBlockArgs& b, const FusedBlockBackward& t) {
    Saved saved(b, t.saved);
    int64_t c = b.channels, a = saved.a, groups = std::min(b.groups, b.tokens), width = width_of(b.dtype);
    int64_t branch = std::max(a, saved.m) * c * width;
    auto of_branch = static_cast<char*>(t.scratch), other = of_branch + branch, of_projected = other + branch;
    auto normalized = [&](const void* grad, const void* grad_normed, const void* total, const float* mean,
                          const float* rstd, const Layer& norm, const LayerGradient& into, const float* scale,
                          const RowsOf& added, const RowsOf& read) {
        auto weight = static_cast<const float*>(norm.weight);
        add_layer_norm_backward({grad,     grad_normed, total,    mean,       rstd,      weight,      scale,
                                 added,    read,        t.grad_x, of_branch,  t.partial, into.weight, into.bias,
                                 b.tokens, c,           groups,   DType::f32, b.dtype,   b.threads});
    };
    auto product = [&](const void* grad, const void* x, const Layer& layer, const LayerGradient& into, int64_t outputs,
                       void* grad_x) {
        add_linear({into.weight, grad, x, into.bias, a, outputs, c, b.dtype, b.products, b.threads});
        linear({grad, layer.weight, nullptr, grad_x, a, outputs, c, true, b.dtype, b.products, b.threads});
    };
    normalized(t.grad, t.grad_normed, t.out, saved.next_mean, saved.next_rstd, b.next_norm, t.next_norm, b.mlp_scale,
               b.mlp_rows, b.next_rows);
    mlp_backward({of_branch, saved.normed, saved.hidden, b.fc1.weight, b.fc2.weight, b.fc1.bias, other, t.fc1.weight,
                  t.fc1.bias, t.fc2.weight, t.fc2.bias, saved.m, c, b.hidden_channels, b.dtype, b.products, b.threads});
    // grad_x is read and written a row at a time.
    normalized(t.grad_x, other, saved.middle, saved.mean, saved.rstd, b.norm, t.norm, b.scale, b.attention_rows,
               b.mlp_rows);
    product(of_branch, saved.heads, b.proj, t.proj, c, other);
    attention_backward(attention_args(b, saved, other, of_projected));
    product(of_projected, t.normed, b.qkv, t.qkv, 3 * c, t.grad_normed_x);
}

}  // namespace dino
