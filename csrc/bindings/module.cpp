// The Python module dino_kernels._C: pointers and sizes in. Callers check shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/adamw_ema.h"
#include "cpu/add_layer_norm.h"
#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/dino_head_loss.h"
#include "cpu/dino_loss.h"
#include "cpu/drop_path_add.h"
#include "cpu/ema_update.h"
#include "cpu/fused_block.h"
#include "cpu/gemm/add_product.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/mlp.h"
#include "cpu/gemm/weight_norm_product.h"
#include "cpu/multicrop/multicrop.h"
#include "cpu/weight_norm.h"
#ifdef DINO_CUDA_ARCHS
#include "bindings/cuda.h"
#endif

namespace py = pybind11;

namespace {

template <class T, class Addresses>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> result;
    for (uintptr_t address : addresses) result.push_back(reinterpret_cast<T*>(address));
    return result;
}

double dino_loss(uintptr_t student, uintptr_t teacher, uintptr_t center, uintptr_t grad, uintptr_t batch_center,
                 int64_t views, int64_t batch, int64_t outputs, int64_t student_stride, int64_t teacher_stride,
                 int64_t grad_stride, int student_dtype, int teacher_dtype, double student_temp, double teacher_temp,
                 int threads) {
    py::gil_scoped_release unlocked;
    return dino::dino_loss({reinterpret_cast<const void*>(student), reinterpret_cast<const void*>(teacher),
                            reinterpret_cast<const float*>(center), reinterpret_cast<void*>(grad),
                            reinterpret_cast<float*>(batch_center), views, batch, outputs, student_stride,
                            teacher_stride, grad_stride, dino::DType(student_dtype), dino::DType(teacher_dtype),
                            float(student_temp), float(teacher_temp), threads});
}

double dino_head_loss(uintptr_t student_z, uintptr_t teacher_z, uintptr_t student_w, uintptr_t teacher_w,
                      uintptr_t center, uintptr_t grad_z, uintptr_t grad_w, uintptr_t batch_center, int64_t views,
                      int64_t batch, int64_t outputs, int64_t channels, int dtype, double student_temp,
                      double teacher_temp, int threads) {
    py::gil_scoped_release unlocked;
    return dino::dino_head_loss({reinterpret_cast<const void*>(student_z), reinterpret_cast<const void*>(teacher_z),
                                 reinterpret_cast<const void*>(student_w), reinterpret_cast<const void*>(teacher_w),
                                 reinterpret_cast<const float*>(center), reinterpret_cast<void*>(grad_z),
                                 reinterpret_cast<void*>(grad_w), reinterpret_cast<float*>(batch_center), views, batch,
                                 outputs, channels, dino::DType(dtype), float(student_temp), float(teacher_temp),
                                 threads});
}

void ema_update(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& source_dtypes, double momentum,
                int threads) {
    py::gil_scoped_release unlocked;
    std::vector<float*> t = pointers<float>(targets);
    std::vector<const void*> s = pointers<const void>(sources);
    std::vector<dino::DType> dtypes;
    for (int dtype : source_dtypes) dtypes.push_back(dino::DType(dtype));
    dino::ema_update({t.data(), s.data(), sizes.data(), dtypes.data(), int64_t(sizes.size()), momentum, threads});
}

// Address and count of numbers of rows; a negative count for all.
using Rows = std::pair<uintptr_t, int64_t>;
dino::RowsOf rows_of(const Rows& rows) { return {reinterpret_cast<const int32_t*>(rows.first), rows.second}; }

void add_layer_norm(uintptr_t x, uintptr_t branch, uintptr_t scale, uintptr_t weight, uintptr_t bias, uintptr_t total,
                    uintptr_t normed, uintptr_t mean, uintptr_t rstd, Rows branch_rows, Rows normed_rows,
                    int64_t tokens, int64_t channels, int x_dtype, int branch_dtype, double eps, int threads) {
    py::gil_scoped_release unlocked;
    dino::add_layer_norm({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(branch),
                          reinterpret_cast<const float*>(scale), rows_of(branch_rows), rows_of(normed_rows),
                          reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias),
                          reinterpret_cast<void*>(total), reinterpret_cast<void*>(normed),
                          reinterpret_cast<float*>(mean), reinterpret_cast<float*>(rstd), tokens, channels,
                          dino::DType(x_dtype), dino::DType(branch_dtype), float(eps), threads});
}

void add_layer_norm_backward(uintptr_t grad_total, uintptr_t grad_normed, uintptr_t total, uintptr_t mean,
                             uintptr_t rstd, uintptr_t weight, uintptr_t scale, uintptr_t grad_x, uintptr_t grad_branch,
                             uintptr_t partial, uintptr_t grad_weight, uintptr_t grad_bias, Rows branch_rows,
                             Rows normed_rows, int64_t tokens, int64_t channels, int64_t groups, int x_dtype,
                             int branch_dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::add_layer_norm_backward({reinterpret_cast<const void*>(grad_total),
                                   reinterpret_cast<const void*>(grad_normed),
                                   reinterpret_cast<const void*>(total),
                                   reinterpret_cast<const float*>(mean),
                                   reinterpret_cast<const float*>(rstd),
                                   reinterpret_cast<const float*>(weight),
                                   reinterpret_cast<const float*>(scale),
                                   rows_of(branch_rows),
                                   rows_of(normed_rows),
                                   reinterpret_cast<void*>(grad_x),
                                   reinterpret_cast<void*>(grad_branch),
                                   reinterpret_cast<float*>(partial),
                                   reinterpret_cast<float*>(grad_weight),
                                   reinterpret_cast<float*>(grad_bias),
                                   tokens,
                                   channels,
                                   groups,
                                   dino::DType(x_dtype),
                                   dino::DType(branch_dtype),
                                   threads});
}

void bias_gelu(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t tokens, int64_t channels, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::bias_gelu({reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(bias),
                     reinterpret_cast<void*>(out), tokens, channels, dino::DType(dtype), threads});
}

void bias_gelu_backward(uintptr_t grad_out, uintptr_t x, uintptr_t bias, uintptr_t grad_x, uintptr_t partial,
                        uintptr_t out, int64_t tokens, int64_t channels, int64_t groups, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::bias_gelu_backward({reinterpret_cast<const void*>(grad_out), reinterpret_cast<const void*>(x),
                              reinterpret_cast<const float*>(bias), reinterpret_cast<void*>(grad_x),
                              reinterpret_cast<float*>(partial), reinterpret_cast<void*>(out), tokens, channels, groups,
                              dino::DType(dtype), threads});
}

void drop_path_add(uintptr_t x, uintptr_t branch, uintptr_t scale, uintptr_t out, int64_t tokens, int64_t channels,
                   int out_dtype, int branch_dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::drop_path_add({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(branch),
                         reinterpret_cast<const float*>(scale), reinterpret_cast<void*>(out), tokens, channels,
                         dino::DType(out_dtype), dino::DType(branch_dtype), threads});
}

void add_product(uintptr_t into, uintptr_t grad, uintptr_t x, int64_t tokens, int64_t outputs, int64_t inputs,
                 int threads) {
    py::gil_scoped_release unlocked;
    dino::add_product({reinterpret_cast<float*>(into), reinterpret_cast<const float*>(grad),
                       reinterpret_cast<const float*>(x), tokens, outputs, inputs, threads});
}

void add_linear(uintptr_t into, uintptr_t grad, uintptr_t x, uintptr_t into_bias, int64_t tokens, int64_t outputs,
                int64_t inputs, int dtype, int products, int threads) {
    py::gil_scoped_release unlocked;
    dino::add_linear({reinterpret_cast<float*>(into), reinterpret_cast<const void*>(grad),
                      reinterpret_cast<const void*>(x), reinterpret_cast<float*>(into_bias), tokens, outputs, inputs,
                      dino::DType(dtype), dino::Products(products), threads});
}

void linear(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t tokens, int64_t depth,
            int64_t outputs, bool transposed, int dtype, int products, int threads) {
    py::gil_scoped_release unlocked;
    dino::linear({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(weight),
                  reinterpret_cast<const float*>(bias), reinterpret_cast<void*>(out), tokens, depth, outputs,
                  transposed, dino::DType(dtype), dino::Products(products), threads});
}

// data: x, weights, biases, out, hidden
void mlp(const std::vector<uintptr_t>& data, int64_t tokens, int64_t channels, int64_t hidden_channels, int dtype,
         int products, int threads) {
    py::gil_scoped_release unlocked;
    std::vector<void*> x = pointers<void>(data);
    dino::mlp({x[0], x[1], x[2], static_cast<const float*>(x[3]), static_cast<const float*>(x[4]), x[5], x[6], tokens,
               channels, hidden_channels, dino::DType(dtype), dino::Products(products), threads});
}

// data: grad, x, hidden, weights, bias1, grad_x, gradients of weight1, bias1, weight2, bias2
void mlp_backward(const std::vector<uintptr_t>& data, int64_t tokens, int64_t channels, int64_t hidden_channels,
                  int dtype, int products, int threads) {
    py::gil_scoped_release unlocked;
    std::vector<void*> x = pointers<void>(data);
    auto floats = [&](int i) { return static_cast<float*>(x[i]); };
    dino::mlp_backward({x[0], x[1], x[2], x[3], x[4], floats(5), x[6], floats(7), floats(8), floats(9), floats(10),
                        tokens, channels, hidden_channels, dino::DType(dtype), dino::Products(products), threads});
}

void add_column_sums(uintptr_t into, uintptr_t from, int dtype, int64_t rows, int64_t columns, int threads) {
    py::gil_scoped_release unlocked;
    dino::add_column_sums(reinterpret_cast<float*>(into), reinterpret_cast<const void*>(from), dino::DType(dtype), rows,
                          columns, threads);
}

void add_to(uintptr_t into, uintptr_t from, int dtype, int64_t count, int threads) {
    py::gil_scoped_release unlocked;
    dino::add_to(reinterpret_cast<float*>(into), reinterpret_cast<const void*>(from), dino::DType(dtype), count,
                 threads);
}

void weight_norm(uintptr_t v, uintptr_t g, uintptr_t w, int64_t rows, int64_t channels, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::weight_norm({reinterpret_cast<const float*>(v), reinterpret_cast<const float*>(g), reinterpret_cast<void*>(w),
                       rows, channels, dino::DType(dtype), threads});
}

void weight_norm_backward(uintptr_t grad_w, uintptr_t v, uintptr_t g, uintptr_t grad_v, uintptr_t grad_g, int64_t rows,
                          int64_t channels, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    dino::weight_norm_backward({reinterpret_cast<const void*>(grad_w), reinterpret_cast<const float*>(v),
                                reinterpret_cast<const float*>(g), reinterpret_cast<float*>(grad_v),
                                reinterpret_cast<float*>(grad_g), rows, channels, dino::DType(dtype), threads});
}

// data: grad, x, v, g, grad_v, grad_g
void weight_norm_product_backward(const std::vector<uintptr_t>& data, bool fresh, int64_t tokens, int64_t rows,
                                  int64_t channels, int dtype, int products, int threads) {
    py::gil_scoped_release unlocked;
    std::vector<float*> x = pointers<float>(data);
    dino::weight_norm_product_backward({x[0], x[1], x[2], x[3], x[4], x[5], fresh, tokens, rows, channels,
                                        dino::DType(dtype), dino::Products(products), threads});
}

// data: student, grad, both moments, teacher, both copies, both rows; dtypes: of grad, copies and rows; segments:
// steps, decayed, frozen; settings: lr, weight decay, momentum, clip, betas, eps; shape: of the rows.
bool adamw_ema_step(const std::vector<uintptr_t>& data, const std::vector<int>& dtypes,
                    const std::vector<int64_t>& offsets, const std::vector<uintptr_t>& segments,
                    const std::vector<double>& settings, const std::vector<int64_t>& shape, int64_t cleared,
                    int threads) {
    py::gil_scoped_release unlocked;
    std::vector<float*> x = pointers<float>(data);
    return dino::adamw_ema_step({x[0],
                                 x[1],
                                 x[2],
                                 x[3],
                                 x[4],
                                 x[5],
                                 x[6],
                                 dino::DType(dtypes[0]),
                                 dino::DType(dtypes[1]),
                                 dino::DType(dtypes[2]),
                                 offsets.data(),
                                 int64_t(offsets.size()) - 1,
                                 reinterpret_cast<int64_t*>(segments[0]),
                                 reinterpret_cast<const bool*>(segments[1]),
                                 reinterpret_cast<const bool*>(segments[2]),
                                 settings[0],
                                 settings[1],
                                 settings[2],
                                 settings[3],
                                 settings[4],
                                 settings[5],
                                 settings[6],
                                 x[7],
                                 x[8],
                                 dino::DType(dtypes[3]),
                                 shape[0],
                                 shape[1],
                                 cleared,
                                 threads});
}

// data: qkv, bounds, out, lse, and for the backward pass grad_out, grad; sizes: of AttentionArgs, in its order
void attention(const std::vector<uintptr_t>& data, const std::vector<int64_t>& sizes, int dtype, double scale,
               int bf16_products, int threads) {
    py::gil_scoped_release unlocked;
    std::vector<void*> x = pointers<void>(data);
    bool backward = x.size() > 4;
    dino::AttentionArgs args{x[0],
                             static_cast<const int32_t*>(x[1]),
                             x[2],
                             static_cast<float*>(x[3]),
                             backward ? x[4] : nullptr,
                             backward ? x[5] : nullptr,
                             sizes[0],
                             sizes[1],
                             sizes[2],
                             sizes[3],
                             sizes[4],
                             sizes[5],
                             sizes[6],
                             dino::DType(dtype),
                             float(scale),
                             bf16_products,
                             threads};
    backward ? dino::attention_backward(args) : dino::attention(args);
}

// operands: weights, bounds, both scales; sizes: sequences to groups
dino::FusedBlockArgs fused_block_args(const std::array<uintptr_t, 15>& operands, const std::array<Rows, 3>& rows,
                                      const std::array<int64_t, 6>& sizes, double eps, int dtype, int products,
                                      int threads) {
    std::vector<void*> x = pointers<void>(operands);
    dino::FusedBlockArgs args{};
    std::copy_n(x.begin(), 12, args.weights);
    args.bounds = static_cast<const int32_t*>(x[12]);
    args.scale = static_cast<const float*>(x[13]), args.mlp_scale = static_cast<const float*>(x[14]);
    args.attention_rows = rows_of(rows[0]), args.mlp_rows = rows_of(rows[1]), args.next_rows = rows_of(rows[2]);
    args.sequences = sizes[0], args.tokens = sizes[1], args.channels = sizes[2], args.heads = sizes[3];
    args.hidden_channels = sizes[4], args.groups = sizes[5];
    args.eps = float(eps), args.dtype = dino::DType(dtype), args.products = dino::Products(products);
    args.threads = threads;
    return args;
}

// data: kept and then of FusedBlockForward, in its order
void fused_block(dino::FusedBlockArgs args, const std::array<uintptr_t, 6>& data) {
    py::gil_scoped_release unlocked;
    std::vector<void*> x = pointers<void>(data);
    args.kept = x[0];
    dino::fused_block(args, {x[1], x[2], x[3], x[4], x[5]});
}

// data: kept and then of FusedBlockBackward up to partial
void fused_block_backward(dino::FusedBlockArgs args, const std::array<uintptr_t, 9>& data,
                          const std::array<uintptr_t, 12>& grads) {
    py::gil_scoped_release unlocked;
    std::vector<void*> x = pointers<void>(data);
    std::vector<float*> into = pointers<float>(grads);
    args.kept = x[0];
    dino::FusedBlockBackward tensors{x[1], x[2], x[3], x[4], x[5], x[6], x[7], static_cast<float*>(x[8])};
    std::copy_n(into.begin(), 12, tensors.grads);
    dino::fused_block_backward(args, tensors);
}

// crops: address of [images, views] structs Crop
void check_crops(uintptr_t crops, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                 const std::vector<int64_t>& sizes) {
    dino::check_crops(reinterpret_cast<const dino::Crop*>(crops), int64_t(heights.size()), int64_t(sizes.size()),
                      heights.data(), widths.data(), sizes.data());
}

// The same; dtype: of the outputs, or -1 for bytes
void multicrop(const std::vector<uintptr_t>& pixels, const std::vector<int64_t>& heights,
               const std::vector<int64_t>& widths, const std::vector<int64_t>& row_strides, uintptr_t crops,
               const std::vector<uintptr_t>& out, const std::vector<int64_t>& sizes,
               const std::vector<int64_t>& out_strides, int dtype, int threads) {
    py::gil_scoped_release unlocked;
    std::vector<const uint8_t*> images = pointers<const uint8_t>(pixels);
    std::vector<void*> views = pointers<void>(out);
    dino::multicrop({images.data(), heights.data(), widths.data(), row_strides.data(),
                     reinterpret_cast<const dino::Crop*>(crops), views.data(), sizes.data(), out_strides.data(),
                     int64_t(images.size()), int64_t(views.size()), dtype < 0, dino::DType(std::max(dtype, 0)),
                     threads});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dino_kernels: of the CPU, and in `cuda`, where nvcc was found, of NVIDIA's GPUs.";
#ifdef DINO_CUDA_ARCHS
    py::module_ cuda = m.def_submodule("cuda");
    cuda.attr("archs") = py::str(DINO_CUDA_ARCHS).attr("split")();
    bind_cuda(cuda);
#endif
    m.def("dino_loss", &dino_loss);
    m.def("dino_head_loss", &dino_head_loss);
    m.def("ema_update", &ema_update);
    m.def("adamw_ema_step", &adamw_ema_step);
    m.def("attention", &attention);
    m.def("add_layer_norm", &add_layer_norm);
    m.def("add_layer_norm_backward", &add_layer_norm_backward);
    m.def("bias_gelu", &bias_gelu);
    m.def("bias_gelu_backward", &bias_gelu_backward);
    m.def("drop_path_add", &drop_path_add);
    m.def("add_product", &add_product);
    m.def("add_linear", &add_linear);
    m.def("linear", &linear);
    m.def("best_products", [](int dtype) { return int(dino::best_products(dino::DType(dtype))); });
    py::class_<dino::FusedBlockArgs>(m, "FusedBlock")
        .def(py::init(&fused_block_args))
        .def("bytes", &dino::fused_block_bytes)
        .def("forward", &fused_block)
        .def("backward", &fused_block_backward);
    m.def("mlp", &mlp);
    m.def("mlp_backward", &mlp_backward);
    m.def("add_column_sums", &add_column_sums);
    m.def("add_to", &add_to);
    m.def("check_crops", &check_crops);
    m.def("multicrop", &multicrop);
    m.def("weight_norm", &weight_norm);
    m.def("weight_norm_backward", &weight_norm_backward);
    m.def("weight_norm_product_backward", &weight_norm_product_backward);
}
