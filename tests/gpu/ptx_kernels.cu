// Correct and wrong CUDA C++ kernels for test_ptx_cuda.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern "C" {

// ---- correct

__global__ void reverse(const float* in, float* out, int n) {  // through shared memory
    __shared__ float tile[256];
    const int i = blockIdx.x * 256 + threadIdx.x;
    tile[threadIdx.x] = i < n ? in[i] : 0;
    __syncthreads();
    const int j = blockIdx.x * 256 + 255 - threadIdx.x;
    if (j < n) out[j] = tile[255 - threadIdx.x] * 2 + tile[(threadIdx.x + 1) % 256] * 0;
}

__global__ void sum(const float* in, float* out, int n) {  // tree, warps, one atomic per block
    extern __shared__ float part[];
    float s = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += in[i];
    for (int d = 16; d; d >>= 1) s += __shfl_down_sync(~0u, s, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned w = 1; w < blockDim.x / 32; w++) s += part[w];
        atomicAdd(out, s);
    }
}

__global__ void last_block(const float* in, float* parts, unsigned* count, float* out, int n) {
    // The pattern of the CUDA sample threadFenceReduction
    __shared__ bool last;
    if (threadIdx.x == 0) {
        float s = 0;
        for (int i = blockIdx.x; i < n; i += gridDim.x) s += in[i];
        parts[blockIdx.x] = s;
        __threadfence();
        last = atomicAdd(count, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        __threadfence();
        float s = 0;
        for (unsigned i = 0; i < gridDim.x; i++) s += parts[i];
        *out = s;
    }
}

__global__ void mixed(const __half* h, const __nv_bfloat16* b, double* d, long long* l, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = __half2float(h[i]), y = __bfloat162float(b[i]);
    d[i] = exp(double(x)) * y + sqrt(fabs(double(y)));
    l[i] = (long long)(x * 1e6f) / (i + 1) % 1000;
}

__global__ void locals(const int* in, int* out, int n) {  // an array with run-time indices, in local memory
    int a[8];
    for (int k = 0; k < 8; k++) a[k] = in[(threadIdx.x + k) % n];
    out[threadIdx.x] = a[in[threadIdx.x] & 7];
}

__global__ void transcendental(const float* in, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] =
            expf(in[i]) + logf(1 + in[i] * in[i]) + erff(in[i]) + tanhf(in[i]) + in[i] / 3 + powf(fabsf(in[i]), 1.5f);
}

__constant__ float table[4] = {1, 2, 3, 4};
__global__ void constants(float* out) { out[threadIdx.x] = table[threadIdx.x % 4]; }

__global__ void switches(const int* in, int* out) {
    const int i = threadIdx.x;
    int v;
    switch (in[i]) {
        case 0:
            v = 3;
            break;
        case 1:
            v = in[i] * 7 + i;
            break;
        case 2:
            v = -i;
            break;
        case 3:
            v = i * i;
            break;
        case 4:
            v = i ^ 55;
            break;
        case 5:
            v = i << 3;
            break;
        default:
            v = 9;
    }
    out[i] = v;
}

__global__ void wide(const unsigned long long* a, const unsigned long long* b, unsigned long long* out) {
    const unsigned __int128 p = (unsigned __int128)a[threadIdx.x] * b[threadIdx.x] + b[threadIdx.x],
                            q = p - ((unsigned __int128)a[threadIdx.x] << 31);
    out[2 * threadIdx.x] = q, out[2 * threadIdx.x + 1] = q >> 64;
}

// A ring buffer of two tiles filled by bulk copies; mbarriers signal full and empty tiles.
__global__ void bulk(const float* in, float* out, int tiles, int broken) {
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) float tile[2][256];
    __shared__ alignas(8) uint64_t full[2], empty[2];
    const uint32_t f = __cvta_generic_to_shared(full), e = __cvta_generic_to_shared(empty),
                   t = __cvta_generic_to_shared(tile);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(f + 8 * i), "r"(1));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(e + 8 * i), "r"(256));
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncthreads();
    auto wait = [](uint32_t barrier, int parity) {
        asm volatile(
            "{ .reg .pred p;\nAGAIN_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN_%=; }" ::
                "r"(barrier),
            "r"(parity)
            : "memory");
    };
    if (threadIdx.x >= 256) {
        if (threadIdx.x == 256)
            for (int i = 0; i < tiles; i++) {
                if (i >= 2 && !broken) wait(e + i % 2 * 8, (i / 2 - 1) & 1);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(f + i % 2 * 8), "r"(1024)
                             : "memory");
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        t + i % 2 * 1024),
                    "l"(in + 256 * i), "r"(1024), "r"(f + i % 2 * 8)
                    : "memory");
            }
    } else {
        float s = 0;
        for (int i = 0; i < tiles; i++) {
            wait(f + i % 2 * 8, i / 2 & 1);
            s += tile[i % 2][255 - threadIdx.x];
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(e + i % 2 * 8) : "memory");
        }
        out[threadIdx.x] = s;
    }
#endif
}

// ---- wrong

__global__ void missing_barrier(const float* in, float* out) {
    __shared__ float tile[256];
    tile[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = tile[255 - threadIdx.x];
}

__global__ void missing_second_barrier(const float* in, float* out) {  // write after read
    __shared__ float tile[256];
    float s = 0;
    for (int r = 0; r < 4; r++) {
        tile[threadIdx.x] = in[r * 256 + threadIdx.x];
        __syncthreads();
        s += tile[255 - threadIdx.x];
    }
    out[threadIdx.x] = s;
}

__global__ void race_of_blocks(float* out) { out[threadIdx.x] = blockIdx.x * 1.5f + threadIdx.x; }

__global__ void no_atomic(int* out) { *out += 1; }

__global__ void last_block_without_fence(const float* in, float* parts, unsigned* count, float* out, int n) {
    if (threadIdx.x == 0) {
        float s = 0;
        for (int i = blockIdx.x; i < n; i += gridDim.x) s += in[i];
        parts[blockIdx.x] = s;
        if (atomicAdd(count, 1) == gridDim.x - 1) {
            float s = 0;
            for (unsigned i = 0; i < gridDim.x; i++) s += ((volatile float*)parts)[i];
            *out = s;
        }
    }
}

__global__ void out_of_bounds(const float* in, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) out[i] = in[i];
}

__global__ void out_of_shared(float* out) {
    extern __shared__ float tile[];
    tile[threadIdx.x] = 1;
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned(const float* in, float4* out) {
    out[threadIdx.x] = *(const float4*)(in + 1 + 4 * threadIdx.x);
}

__global__ void uninitialised_shared(float* out) {
    __shared__ float tile[64];
    if (threadIdx.x < 32) tile[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void barrier_not_reached(float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        asm volatile("bar.sync 1, 64;");
    out[threadIdx.x] = 1;
}

__global__ void copy_not_waited(const float4* in, float4* out) {
    __shared__ float4 tile[64];
    const uint32_t to = __cvta_generic_to_shared(&tile[threadIdx.x]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.commit_group;" ::"r"(to), "l"(in + threadIdx.x)
                 : "memory");
    out[threadIdx.x] = tile[threadIdx.x];
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

__global__ void copy_waited_without_barrier(const float4* in, float4* out) {
    __shared__ float4 tile[64];
    const uint32_t to = __cvta_generic_to_shared(&tile[threadIdx.x]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;" ::"r"(to),
                 "l"(in + threadIdx.x)
                 : "memory");
    out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void copy_right(const float4* in, float4* out) {
    __shared__ float4 tile[64];
    const uint32_t to = __cvta_generic_to_shared(&tile[threadIdx.x]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;" ::"r"(to),
                 "l"(in + threadIdx.x)
                 : "memory");
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void unwritten(const float* fresh, float* out) { out[threadIdx.x] = fresh[threadIdx.x]; }

__global__ void endless(int* flag) {
    while (atomicAdd(flag, 0) == 0) {
    }
}

__global__ void lanes_without_sync(int* out) {  // a warning: lanes of one warp, unordered
    __shared__ volatile int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = tile[31 - threadIdx.x];
}

__global__ void lanes_with_sync(int* out) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}
}
