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
    return {.qkv = saved.projected,
            .bounds = b.bounds,
            .out = saved.heads,
            .lse = saved.lse,
            .grad_out = grad_out,
            .grad = grad,
            .sequences = b.sequences,
            .tokens = saved.a,
            .heads = b.heads,
            .channels = d,
            .token_stride = 3 * c,
            .part_stride = c,
            .head_stride = d,
            .dtype = b.dtype,
            .scale = float(1 / std::sqrt(double(d))),
            .products = Products::amx,
            .threads = b.threads};
}

}  // namespace

int64_t fused_block_bytes(const FusedBlockArgs& b) { return Saved(b, nullptr).bytes; }

void fused_block(const FusedBlockArgs& b, const FusedBlockForward& t) {
    Saved saved(b, t.saved);
    int64_t c = b.channels, a = saved.a;
    auto product = [&](const void* x, const Layer& layer, int64_t outputs, void* out) {
        linear({.x = x,
                .weight = layer.weight,
                .bias = layer.bias,
                .out = out,
                .tokens = a,
                .depth = c,
                .outputs = outputs,
                .transposed = false,
                .dtype = b.dtype,
                .products = b.products,
                .threads = b.threads});
    };
    auto normalize = [&](const void* x, const float* scale, const RowsOf& added, const RowsOf& read, const Layer& norm,
                         void* total, void* normed, float* mean, float* rstd) {
        add_layer_norm({.x = x,
                        .branch = t.scratch,
                        .scale = scale,
                        .branch_rows = added,
                        .normed_rows = read,
                        .weight = static_cast<const float*>(norm.weight),
                        .bias = norm.bias,
                        .total = total,
                        .normed = normed,
                        .mean = mean,
                        .rstd = rstd,
                        .tokens = b.tokens,
                        .channels = c,
                        .x_dtype = DType::f32,
                        .branch_dtype = b.dtype,
                        .eps = b.eps,
                        .threads = b.threads});
    };
    product(t.normed, b.qkv, 3 * c, saved.projected);
    attention(attention_args(b, saved, nullptr, nullptr));
    product(saved.heads, b.proj, c, t.scratch);
    normalize(t.x, b.scale, b.attention_rows, b.mlp_rows, b.norm, saved.middle, saved.normed, saved.mean, saved.rstd);
    mlp({.x = saved.normed,
         .weight1 = b.fc1.weight,
         .weight2 = b.fc2.weight,
         .bias1 = b.fc1.bias,
         .bias2 = b.fc2.bias,
         .out = t.scratch,
         .hidden = saved.hidden,
         .tokens = saved.m,
         .channels = c,
         .hidden_channels = b.hidden_channels,
         .dtype = b.dtype,
         .products = b.products,
         .threads = b.threads});
    normalize(saved.middle, b.mlp_scale, b.mlp_rows, b.next_rows, b.next_norm, t.out, t.out_normed, saved.next_mean,
              saved.next_rstd);
}

void fused_block_backward(const FusedBlockArgs& b, const FusedBlockBackward& t) {
    Saved saved(b, t.saved);
    int64_t c = b.channels, a = saved.a, groups = std::min(b.groups, b.tokens), width = width_of(b.dtype);
    int64_t branch = std::max(a, saved.m) * c * width;
    auto of_branch = static_cast<char*>(t.scratch), other = of_branch + branch, of_projected = other + branch;
    auto normalized = [&](const void* grad, const void* grad_normed, const void* total, const float* mean,
                          const float* rstd, const Layer& norm, const LayerGradient& into, const float* scale,
                          const RowsOf& added, const RowsOf& read) {
        add_layer_norm_backward({.grad_total = grad,
                                 .grad_normed = grad_normed,
                                 .total = total,
                                 .mean = mean,
                                 .rstd = rstd,
                                 .weight = static_cast<const float*>(norm.weight),
                                 .scale = scale,
                                 .branch_rows = added,
                                 .normed_rows = read,
                                 .grad_x = t.grad_x,
                                 .grad_branch = of_branch,
                                 .partial = t.partial,
                                 .grad_weight = into.weight,
                                 .grad_bias = into.bias,
                                 .tokens = b.tokens,
                                 .channels = c,
                                 .groups = groups,
                                 .x_dtype = DType::f32,
                                 .branch_dtype = b.dtype,
                                 .threads = b.threads});
    };
    auto product = [&](const void* grad, const void* x, const Layer& layer, const LayerGradient& into, int64_t outputs,
                       void* grad_x) {
        add_linear({.into = into.weight,
                    .grad = grad,
                    .x = x,
                    .into_bias = into.bias,
                    .tokens = a,
                    .outputs = outputs,
                    .inputs = c,
                    .dtype = b.dtype,
                    .products = b.products,
                    .threads = b.threads});
        linear({.x = grad,
                .weight = layer.weight,
                .bias = nullptr,
                .out = grad_x,
                .tokens = a,
                .depth = outputs,
                .outputs = c,
                .transposed = true,
                .dtype = b.dtype,
                .products = b.products,
                .threads = b.threads});
    };
    normalized(t.grad, t.grad_normed, t.out, saved.next_mean, saved.next_rstd, b.next_norm, t.next_norm, b.mlp_scale,
               b.mlp_rows, b.next_rows);
    mlp_backward({.grad = of_branch,
                  .x = saved.normed,
                  .hidden = saved.hidden,
                  .weight1 = b.fc1.weight,
                  .weight2 = b.fc2.weight,
                  .bias1 = b.fc1.bias,
                  .grad_x = other,
                  .grad_weight1 = t.fc1.weight,
                  .grad_bias1 = t.fc1.bias,
                  .grad_weight2 = t.fc2.weight,
                  .grad_bias2 = t.fc2.bias,
                  .tokens = saved.m,
                  .channels = c,
                  .hidden_channels = b.hidden_channels,
                  .dtype = b.dtype,
                  .products = b.products,
                  .threads = b.threads});
    // grad_x is read and written a row at a time.
    normalized(t.grad_x, other, saved.middle, saved.mean, saved.rstd, b.norm, t.norm, b.scale, b.attention_rows,
               b.mlp_rows);
    product(of_branch, saved.heads, b.proj, t.proj, c, other);
    attention_backward(attention_args(b, saved, other, of_projected));
    product(of_projected, t.normed, b.qkv, t.qkv, 3 * c, t.grad_normed_x);
}

}  // namespace dino
