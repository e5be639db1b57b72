// The functions of dino_kernels._C by groups of ops.
#pragma once

#include <pybind11/pybind11.h>

namespace dino::bindings {

void bind_gemm(pybind11::module_& m);
void bind_block(pybind11::module_& m);
void bind_training(pybind11::module_& m);
void bind_multicrop(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // where nvcc was found

}  // namespace dino::bindings
