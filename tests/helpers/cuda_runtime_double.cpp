// The functions of the CUDA runtime that the launchers of csrc/cuda call, for tests without a GPU: a launch calls a
// Python function, which runs the kernel on the emulator. Other calls (an allocation, a copy, a synchronization: not
// allowed in a CUDA graph or in a step) are not defined here, so the module would not load.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "bindings/bindings.h"

namespace {

// name, (grid, block, shared memory), address of the addresses of the arguments, stream
using Launcher = void (*)(const char*, const unsigned*, void**, void*);

struct Function {
    std::string name;
    int most_shared = 48 << 10;
};
std::map<const void*, Function>& functions() {  // a static local: kernels are registered before globals exist
    static std::map<const void*, Function> all;
    return all;
}
std::map<int, int> attributes;
Launcher launcher;
cudaError_t last = cudaSuccess;

cudaError_t result(cudaError_t error) { return last = error; }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    functions()[host].name = name;
}
// Functions of `kernel<<<...>>>`. The launchers do not use it, but nvcc's stubs of kernels reference them.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { abort(); }

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "invalid argument" : "no error";
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, result(cudaSuccess); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    auto found = attributes.find(attribute);
    if (found == attributes.end()) return result(cudaErrorInvalidValue);
    return *value = found->second, result(cudaSuccess);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    int most = attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin];
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most) return result(cudaErrorInvalidValue);
    return functions().at(function).most_shared = value, result(cudaSuccess);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    const Function& kernel = functions().at(function);
    bool fits = grid.x && grid.y && grid.z && grid.y < 1 << 16 && grid.z < 1 << 16 && block.x * block.y * block.z &&
                block.x * block.y * block.z <= 1024 && int(shared) <= kernel.most_shared;
    if (!fits) return result(cudaErrorInvalidValue);
    unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, unsigned(shared)};
    launcher(kernel.name.c_str(), sizes, arguments, stream);
    return result(cudaSuccess);
}
}

PYBIND11_MODULE(cuda_double, m) {
    dino::bindings::bind_cuda(m);
    m.def("set_launcher", [](uintptr_t function) { launcher = reinterpret_cast<Launcher>(function); });
    m.def("set_attribute", [](int attribute, int value) { attributes[attribute] = value; });
}
