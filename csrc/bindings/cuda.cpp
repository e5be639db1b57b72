// The Python module dino_kernels._C.cuda, where nvcc was found: pointers and sizes in. Callers check shapes and dtypes.
#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;

namespace {

using dino::cuda::Scalar;
using dino::cuda::Stream;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<T*> result;
    for (uintptr_t address : addresses) result.push_back(pointer<T>(address));
    return result;
}

// Address (0: none), whether it is of a float64, value.
using Given = std::tuple<uintptr_t, bool, double>;
Scalar scalar(const Given& given) {
    auto [address, wide, value] = given;
    return {pointer<const void>(address), wide, value};
}

void ema_update(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& source_dtypes, const Given& momentum,
                uintptr_t stream) {
    std::vector<float*> t = pointers<float>(targets);
    std::vector<const void*> s = pointers<const void>(sources);
    std::vector<dino::DType> dtypes;
    for (int dtype : source_dtypes) dtypes.push_back(dino::DType(dtype));
    dino::cuda::launch_ema_update(
        {t.data(), s.data(), sizes.data(), dtypes.data(), int64_t(sizes.size()), scalar(momentum)},
        pointer<void>(stream));
}

// data: student to arrived of DinoLossArgs, sizes: views to grad_stride, dtypes: of student and teacher, in its order
void dino_loss(const std::array<uintptr_t, 10>& data, const std::array<int64_t, 6>& sizes,
               const std::array<int, 2>& dtypes, const Given& student_temp, const Given& teacher_temp,
               uintptr_t stream) {
    dino::cuda::launch_dino_loss({pointer<const void>(data[0]),
                                  pointer<const void>(data[1]),
                                  pointer<const float>(data[2]),
                                  pointer<void>(data[3]),
                                  pointer<float>(data[4]),
                                  pointer<float>(data[5]),
                                  pointer<float>(data[6]),
                                  pointer<void>(data[7]),
                                  pointer<float>(data[8]),
                                  pointer<int>(data[9]),
                                  sizes[0],
                                  sizes[1],
                                  sizes[2],
                                  sizes[3],
                                  sizes[4],
                                  sizes[5],
                                  dino::DType(dtypes[0]),
                                  dino::DType(dtypes[1]),
                                  scalar(student_temp),
                                  scalar(teacher_temp)},
                                 pointer<void>(stream));
}

void dino_loss_scale(uintptr_t grad, int64_t rows, int64_t outputs, int64_t stride, int dtype, const Given& upstream,
                     uintptr_t stream) {
    dino::cuda::launch_dino_loss_scale(
        {pointer<void>(grad), rows, outputs, stride, dino::DType(dtype), scalar(upstream)}, pointer<void>(stream));
}

// data: student to factors of AdamwEmaArgs, in its order; dtypes: of grad, student_16, teacher_16, rows; sizes:
// cleared, rows, channels; hyper: clip_norm to eps
void adamw_ema_step(const std::array<uintptr_t, 15>& data, const std::array<int, 4>& dtypes,
                    const std::vector<int64_t>& offsets, const std::array<int64_t, 3>& sizes,
                    const std::array<Given, 3>& scalars, const std::array<double, 4>& hyper, uintptr_t stream) {
    dino::cuda::AdamwEmaArgs a{};
    a.student = pointer<float>(data[0]), a.grad = pointer<void>(data[1]), a.exp_avg = pointer<float>(data[2]);
    a.exp_avg_sq = pointer<float>(data[3]), a.teacher = pointer<float>(data[4]);
    a.student_16 = pointer<void>(data[5]), a.teacher_16 = pointer<void>(data[6]);
    a.student_rows = pointer<void>(data[7]), a.teacher_rows = pointer<void>(data[8]);
    a.steps = pointer<int64_t>(data[9]), a.decayed = pointer<bool>(data[10]), a.frozen = pointer<bool>(data[11]);
    a.nonfinite = pointer<int>(data[12]), a.partials = pointer<float>(data[13]), a.factors = pointer<float>(data[14]);
    a.grad_dtype = dino::DType(dtypes[0]), a.student_16_dtype = dino::DType(dtypes[1]);
    a.teacher_16_dtype = dino::DType(dtypes[2]), a.rows_dtype = dino::DType(dtypes[3]);
    a.offsets = offsets.data(), a.segments = int64_t(offsets.size()) - 1;
    a.cleared = sizes[0], a.rows = sizes[1], a.channels = sizes[2];
    a.lr = scalar(scalars[0]), a.weight_decay = scalar(scalars[1]), a.momentum = scalar(scalars[2]);
    a.clip_norm = hyper[0], a.beta1 = hyper[1], a.beta2 = hyper[2], a.eps = hyper[3];
    dino::cuda::launch_adamw_ema_step(a, pointer<void>(stream));
}

// data: qkv, out, lse, and for the backward pass grad_out, grad; sizes: tokens to stride_h of AttentionArgs
void attention_short(const std::vector<uintptr_t>& data, const std::array<int64_t, 5>& sizes, int dtype, double scale,
                     const std::vector<int64_t>& groups, uintptr_t stream) {
    bool backward = data.size() > 3;
    dino::cuda::AttentionArgs a{pointer<const void>(data[0]),
                                pointer<void>(data[1]),
                                pointer<float>(data[2]),
                                backward ? pointer<const void>(data[3]) : nullptr,
                                backward ? pointer<void>(data[4]) : nullptr,
                                sizes[0],
                                sizes[1],
                                sizes[2],
                                sizes[3],
                                sizes[4],
                                dino::DType(dtype),
                                float(scale),
                                groups.data(),
                                int64_t(groups.size()) / 2};
    auto launch = backward ? dino::cuda::launch_attention_short_backward : dino::cuda::launch_attention_short;
    launch(a, pointer<void>(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.doc() = "Launchers of the CUDA C++ kernels of dino_kernels.";
    m.def("adamw_ema_step", &adamw_ema_step);
    m.def("attention_short", &attention_short);
    m.def("dino_loss", &dino_loss);
    m.def("dino_loss_scale", &dino_loss_scale);
    m.def("ema_update", &ema_update);
}
