// The other parts of a transformer block, and a block as one call.
#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cpu/add_layer_norm.h"
#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/fused_block.h"

namespace dino::bindings {
namespace {

void bind_attention(py::module_& m) {
    using Args = AttentionArgs;
    auto bind_pass = [&](const char* name, void (*function)(const Args&), auto... gradients) {
        bind(m, name, function, DINO_FIELD(qkv), DINO_FIELD(bounds), DINO_FIELD(out), DINO_FIELD(lse), gradients...,
             DINO_FIELD(sequences), DINO_FIELD(tokens), DINO_FIELD(heads), DINO_FIELD(channels),
             DINO_FIELD(token_stride), DINO_FIELD(part_stride), DINO_FIELD(head_stride), DINO_FIELD(dtype),
             DINO_FIELD(scale), DINO_FIELD(products), DINO_FIELD(threads));
    };
    bind_pass("attention", attention);
    bind_pass("attention_backward", attention_backward, DINO_FIELD(grad_out), DINO_FIELD(grad));
}

// The keywords <rows> and <rows>_count of a struct RowsOf.
#define DINO_ROWS(rows)                                                                                               \
    PartField<Args, RowsOf, const int32_t*>{#rows, &Args::rows, &RowsOf::indices}, PartField<Args, RowsOf, int64_t> { \
        #rows "_count", &Args::rows, &RowsOf::count                                                                   \
    }

void bind_add_layer_norm(py::module_& m) {
    using Args = AddLayerNormArgs;
    bind(m, "add_layer_norm", add_layer_norm, DINO_FIELD(x), DINO_FIELD(branch), DINO_FIELD(scale),
         DINO_ROWS(branch_rows), DINO_ROWS(normed_rows), DINO_FIELD(weight), DINO_FIELD(bias), DINO_FIELD(total),
         DINO_FIELD(normed), DINO_FIELD(mean), DINO_FIELD(rstd), DINO_FIELD(tokens), DINO_FIELD(channels),
         DINO_FIELD(x_dtype), DINO_FIELD(branch_dtype), DINO_FIELD(eps), DINO_FIELD(threads));
}

void bind_add_layer_norm_backward(py::module_& m) {
    using Args = AddLayerNormBackwardArgs;
    bind(m, "add_layer_norm_backward", add_layer_norm_backward, DINO_FIELD(grad_total), DINO_FIELD(grad_normed),
         DINO_FIELD(total), DINO_FIELD(mean), DINO_FIELD(rstd), DINO_FIELD(weight), DINO_FIELD(scale),
         DINO_ROWS(branch_rows), DINO_ROWS(normed_rows), DINO_FIELD(grad_x), DINO_FIELD(grad_branch),
         DINO_FIELD(partial), DINO_FIELD(grad_weight), DINO_FIELD(grad_bias), DINO_FIELD(tokens), DINO_FIELD(channels),
         DINO_FIELD(groups), DINO_FIELD(x_dtype), DINO_FIELD(branch_dtype), DINO_FIELD(threads));
}

void bind_bias_gelu(py::module_& m) {
    using Args = BiasGeluArgs;
    bind(m, "bias_gelu", bias_gelu, DINO_FIELD(x), DINO_FIELD(bias), DINO_FIELD(out), DINO_FIELD(tokens),
         DINO_FIELD(channels), DINO_FIELD(dtype), DINO_FIELD(threads));
}

void bind_bias_gelu_backward(py::module_& m) {
    using Args = BiasGeluBackwardArgs;
    bind(m, "bias_gelu_backward", bias_gelu_backward, DINO_FIELD(grad_out), DINO_FIELD(x), DINO_FIELD(bias),
         DINO_FIELD(grad_x), DINO_FIELD(partial), DINO_FIELD(out), DINO_FIELD(tokens), DINO_FIELD(channels),
         DINO_FIELD(groups), DINO_FIELD(dtype), DINO_FIELD(threads));
}

// The keywords <layer>_weight and <layer>_bias of a struct of both.
#define DINO_LAYER(Layer, layer)                                                                     \
    PartField<Args, Layer, decltype(Layer::weight)>{#layer "_weight", &Args::layer, &Layer::weight}, \
        PartField<Args, Layer, decltype(Layer::bias)> {                                              \
        #layer "_bias", &Args::layer, &Layer::bias                                                   \
    }

void bind_forward(py::class_<FusedBlockArgs>& block) {
    using Args = FusedBlockForward;
    bind(block, "forward", fused_block, DINO_FIELD(saved), DINO_FIELD(x), DINO_FIELD(normed), DINO_FIELD(out),
         DINO_FIELD(out_normed), DINO_FIELD(scratch));
}

void bind_backward(py::class_<FusedBlockArgs>& block) {
    using Args = FusedBlockBackward;
    bind(block, "backward", fused_block_backward, DINO_FIELD(saved), DINO_FIELD(grad), DINO_FIELD(grad_normed),
         DINO_FIELD(normed), DINO_FIELD(out), DINO_FIELD(grad_x), DINO_FIELD(grad_normed_x), DINO_FIELD(scratch),
         DINO_FIELD(partial), DINO_LAYER(LayerGradient, qkv), DINO_LAYER(LayerGradient, proj),
         DINO_LAYER(LayerGradient, norm), DINO_LAYER(LayerGradient, fc1), DINO_LAYER(LayerGradient, fc2),
         DINO_LAYER(LayerGradient, next_norm));
}

void bind_fused_block(py::module_& m) {
    using Args = FusedBlockArgs;
    py::class_<Args> block(m, "FusedBlock");
    bind_constructor(block, DINO_LAYER(Layer, qkv), DINO_LAYER(Layer, proj), DINO_LAYER(Layer, norm),
                     DINO_LAYER(Layer, fc1), DINO_LAYER(Layer, fc2), DINO_LAYER(Layer, next_norm), DINO_FIELD(bounds),
                     DINO_FIELD(scale), DINO_FIELD(mlp_scale), DINO_ROWS(attention_rows), DINO_ROWS(mlp_rows),
                     DINO_ROWS(next_rows), DINO_FIELD(sequences), DINO_FIELD(tokens), DINO_FIELD(channels),
                     DINO_FIELD(heads), DINO_FIELD(hidden_channels), DINO_FIELD(groups), DINO_FIELD(eps),
                     DINO_FIELD(dtype), DINO_FIELD(products), DINO_FIELD(threads));
    block.def("bytes", &fused_block_bytes);
    bind_forward(block);
    bind_backward(block);
}

}  // namespace

void bind_block(py::module_& m) {
    bind_attention(m);
    bind_add_layer_norm(m);
    bind_add_layer_norm_backward(m);
    bind_bias_gelu(m);
    bind_bias_gelu_backward(m);
    bind_fused_block(m);
}

}  // namespace dino::bindings
