// The Python module dino_kernels._C.cuda, where nvcc was found: pointers and sizes in. Callers check shapes and dtypes.
#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "launch.h"

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

}  // namespace

void bind_cuda(py::module_& m) {
    m.doc() = "Launchers of the CUDA C++ kernels of dino_kernels.";
    m.def("dino_loss", &dino_loss);
    m.def("dino_loss_scale", &dino_loss_scale);
    m.def("ema_update", &ema_update);
}
