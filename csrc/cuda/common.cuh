// What the CUDA C++ kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace dino::cuda {

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, Stream stream,
            const Arguments&... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared > 48 << 10) {  // more must be asked for
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    static_assert((std::is_same_v<Parameters, Arguments> && ...));
    check(cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(threads), addresses, shared, cudaStream_t(stream)));
}

__device__ inline double read(const Scalar& scalar) {
    if (!scalar.address) return scalar.value;
    return scalar.wide ? *static_cast<const double*>(scalar.address) : *static_cast<const float*>(scalar.address);
}

// (momentum, 1 - momentum); the complement of a float32 is exact in double, and rounds as in float32.
__device__ inline float2 blend(const Scalar& momentum) {
    double m = read(momentum);
    return {float(m), float(1.0 - m)};
}

// The last i < count whose first[i] is not after block.
template <class First>
__device__ int owner(int count, int block, First first) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        int middle = (low + high) / 2;
        (first(middle) > block ? high : low) = middle;
    }
    return low;
}

// Four values from an address that is a multiple of their size.
__device__ inline float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }
__device__ inline float4 load4(const __half* x) {
    uint2 bits = *reinterpret_cast<const uint2*>(x);
    float2 low = __half22float2(reinterpret_cast<__half2&>(bits.x));
    float2 high = __half22float2(reinterpret_cast<__half2&>(bits.y));
    return {low.x, low.y, high.x, high.y};
}
__device__ inline float4 load4(const __nv_bfloat16* x) {
    uint2 bits = *reinterpret_cast<const uint2*>(x);
    return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
            __uint_as_float(bits.y & 0xffff0000u)};
}

// Calls body with a null pointer of the type that dtype names.
template <class Body>
__host__ __device__ void with_type(DType dtype, Body body) {
    if (dtype == DType::f32) body(static_cast<float*>(nullptr));
    if (dtype == DType::f16) body(static_cast<__half*>(nullptr));
    if (dtype == DType::bf16) body(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace dino::cuda
