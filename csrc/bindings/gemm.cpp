// Linear layers and what is computed together with them.
#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cpu/gemm/add_product.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/mlp.h"
#include "cpu/gemm/weight_norm_product.h"

namespace dino::bindings {
namespace {

void bind_linear(py::module_& m) {
    using Args = LinearArgs;
    bind(m, "linear", linear, DINO_FIELD(x), DINO_FIELD(weight), DINO_FIELD(bias), DINO_FIELD(out), DINO_FIELD(tokens),
         DINO_FIELD(depth), DINO_FIELD(outputs), DINO_FIELD(transposed), DINO_FIELD(dtype), DINO_FIELD(products),
         DINO_FIELD(threads));
}

void bind_add_linear(py::module_& m) {  // whose operands are never packed by Python
    using Args = AddLinearArgs;
    bind(m, "add_linear", add_linear, DINO_FIELD(into), DINO_FIELD(grad), DINO_FIELD(x), DINO_FIELD(into_bias),
         DINO_FIELD(tokens), DINO_FIELD(outputs), DINO_FIELD(inputs), DINO_FIELD(dtype), DINO_FIELD(products),
         DINO_FIELD(threads));
}

void bind_add_product(py::module_& m) {
    using Args = AddProductArgs;
    bind(m, "add_product", add_product, DINO_FIELD(into), DINO_FIELD(grad), DINO_FIELD(x), DINO_FIELD(tokens),
         DINO_FIELD(outputs), DINO_FIELD(inputs), DINO_FIELD(threads));
}

void bind_add_column_sums(py::module_& m) {
    using Args = AddColumnSumsArgs;
    bind(m, "add_column_sums", add_column_sums, DINO_FIELD(into), DINO_FIELD(x), DINO_FIELD(rows), DINO_FIELD(columns),
         DINO_FIELD(dtype), DINO_FIELD(threads));
}

void bind_add_to(py::module_& m) {
    using Args = AddToArgs;
    bind(m, "add_to", add_to, DINO_FIELD(into), DINO_FIELD(x), DINO_FIELD(count), DINO_FIELD(dtype),
         DINO_FIELD(threads));
}

void bind_mlp(py::module_& m) {
    using Args = MlpArgs;
    bind(m, "mlp", mlp, DINO_FIELD(x), DINO_FIELD(weight1), DINO_FIELD(bias1), DINO_FIELD(weight2), DINO_FIELD(bias2),
         DINO_FIELD(out), DINO_FIELD(hidden), DINO_FIELD(tokens), DINO_FIELD(channels), DINO_FIELD(hidden_channels),
         DINO_FIELD(dtype), DINO_FIELD(products), DINO_FIELD(threads));
}

void bind_mlp_backward(py::module_& m) {
    using Args = MlpBackwardArgs;
    bind(m, "mlp_backward", mlp_backward, DINO_FIELD(grad), DINO_FIELD(x), DINO_FIELD(hidden), DINO_FIELD(weight1),
         DINO_FIELD(bias1), DINO_FIELD(weight2), DINO_FIELD(grad_x), DINO_FIELD(grad_weight1), DINO_FIELD(grad_bias1),
         DINO_FIELD(grad_weight2), DINO_FIELD(grad_bias2), DINO_FIELD(tokens), DINO_FIELD(channels),
         DINO_FIELD(hidden_channels), DINO_FIELD(dtype), DINO_FIELD(products), DINO_FIELD(threads));
}

void bind_weight_norm_product_backward(py::module_& m) {
    using Args = WeightNormProductBackwardArgs;
    bind(m, "weight_norm_product_backward", weight_norm_product_backward, DINO_FIELD(grad), DINO_FIELD(x),
         DINO_FIELD(v), DINO_FIELD(g), DINO_FIELD(grad_v), DINO_FIELD(grad_g), DINO_FIELD(overwrite),
         DINO_FIELD(tokens), DINO_FIELD(rows), DINO_FIELD(channels), DINO_FIELD(dtype), DINO_FIELD(products),
         DINO_FIELD(threads));
}

}  // namespace

void bind_gemm(py::module_& m) {
    py::enum_<Products>(m, "Products")
        .value("library", Products::library)
        .value("f32", Products::f32)
        .value("bf16_pairs", Products::bf16_pairs)
        .value("amx", Products::amx);
    auto best = [](int dtype) { return best_products(DType(dtype)); };
    m.def("best_products", best, py::kw_only(), py::arg("dtype"));
    bind_linear(m);
    bind_add_linear(m);
    bind_add_product(m);
    bind_add_column_sums(m);
    bind_add_to(m);
    bind_mlp(m);
    bind_mlp_backward(m);
    bind_weight_norm_product_backward(m);
}

}  // namespace dino::bindings
