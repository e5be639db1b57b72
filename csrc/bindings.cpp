// The Python module dino_kernels._C: pointers and sizes in. Callers check shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

template <class T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled CPU kernels of dino_kernels.";
    m.def("dino_loss", &dino_loss);
    m.def("ema_update", &ema_update);
}
