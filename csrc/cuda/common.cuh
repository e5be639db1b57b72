// What the CUDA C++ kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"

namespace dino::cuda {

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Stream stream,
            const Arguments&... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared > 48 << 10) {  // more must be asked for
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    static_assert((std::is_same_v<Parameters, Arguments> && ...));
    check(cudaLaunchKernel(function, grid, dim3(threads), addresses, shared, cudaStream_t(stream)));
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

// Stores four values, rounded, to an address that is a multiple of their size.
__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store4(__half* to, float4 x) {
    __half2 pairs[] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(to) = {reinterpret_cast<uint32_t&>(pairs[0]), reinterpret_cast<uint32_t&>(pairs[1])};
}
__device__ inline void store4(__nv_bfloat16* to, float4 x) {
    __nv_bfloat162 pairs[] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(to) = {reinterpret_cast<uint32_t&>(pairs[0]), reinterpret_cast<uint32_t&>(pairs[1])};
}

// 2^x; what is below 2^-126 becomes zero.
__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The 16 bytes of a thread as values.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

__device__ inline void unpack(uint4 bits, float (&x)[4]) {
    x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
    x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
}
template <class T>
__device__ void unpack(uint4 bits, float (&x)[8]) {
    uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, __half>) {
            float2 both = __half22float2(reinterpret_cast<__half2&>(words[i]));
            x[2 * i] = both.x, x[2 * i + 1] = both.y;
        } else {
            x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}
template <class T>
__device__ void widen(uint4 bits, float (&x)[kWidth<T>]) {
    if constexpr (sizeof(T) == 4) {
        unpack(bits, x);
    } else {
        unpack<T>(bits, x);
    }
}

template <class T>
__device__ T narrow(float x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(x);
    } else {
        return x;
    }
}
template <class T>
__device__ uint4 narrow(const float (&x)[kWidth<T>]) {
    uint4 bits;
    if constexpr (sizeof(T) == 4) {
        bits = {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
    } else {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (std::is_same_v<T, __half>) {
                reinterpret_cast<__half2&>(words[i]) = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
            } else {
                reinterpret_cast<__nv_bfloat162&>(words[i]) = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            }
        }
        bits = {words[0], words[1], words[2], words[3]};
    }
    return bits;
}

// Sum and largest over a warp, the same in all of its lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// Over a block, in the first warp; shared: for each warp. The caller synchronizes before it is used again.
__device__ inline float block_sum(float x, float* shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return threadIdx.x < 32 ? warp_sum(threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x] : 0.0f) : 0.0f;
}

// Starts a copy of 16 bytes into shared memory; groups of copies end in the order in which they were committed.
__device__ inline void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

__host__ __device__ inline bool aligned(const void* address, int64_t stride_bytes = 0) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride_bytes % 16 == 0;
}

// Calls body with a null pointer of the type that dtype names.
template <class Body>
void with_type(DType dtype, Body body) {
    if (dtype == DType::f32) body(static_cast<float*>(nullptr));
    if (dtype == DType::f16) body(static_cast<__half*>(nullptr));
    if (dtype == DType::bf16) body(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace dino::cuda
