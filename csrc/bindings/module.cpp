// The Python module dino_kernels._C: addresses and sizes in, by name. Callers check shapes and dtypes.
#include "bindings/bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dino_kernels: of the CPU, and in `cuda`, where nvcc was found, of NVIDIA's GPUs.";
    dino::bindings::bind_gemm(m);
    dino::bindings::bind_block(m);
    dino::bindings::bind_training(m);
    dino::bindings::bind_multicrop(m);
#ifdef DINO_CUDA_ARCHS
    py::module_ cuda = m.def_submodule("cuda");
    cuda.attr("archs") = py::str(DINO_CUDA_ARCHS).attr("split")();
    dino::bindings::bind_cuda(cuda);
#endif
}
