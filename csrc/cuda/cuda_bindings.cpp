// The Python module dino_kernels._C.cuda, where nvcc was found: pointers and sizes in. Callers check shapes and dtypes.
#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include <utility>
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

}  // namespace

void bind_cuda(py::module_& m) {
    m.doc() = "Launchers of the CUDA C++ kernels of dino_kernels.";
    m.def("ema_update", &ema_update);
}
