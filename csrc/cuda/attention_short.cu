// Self-attention of sequences of at most 256 tokens, D = 64, forward and backward: dino_kernels/ops/attention.py has
// the formulas. Tensor cores by mma.sync, so that one source serves every architecture from sm_80 on.
//
// A block of threads owns a (sequence, head) and keeps what it needs of it in shared memory, read once: rows of 128
// bytes, whose pieces of 16 bytes are permuted by the row's number so that ldmatrix meets no bank twice.
// Forward: a warp takes 16 queries at a time through all keys, 64 a step, scale and log2(e) folded into one factor.
// Backward: a warp owns 16 keys and their dK and dV in registers, and goes through the queries 32 a step; dS^T passes
// through shared memory to the warps that make dQ of the 32 queries from all keys. Five products, not seven; sums in a
// fixed order without atomics: bitwise repeatable.
// Bytes: forward reads qkv and writes out, 8 an element of out; backward reads qkv, out and its gradient, writes
// grad, 16.
#include "cuda/common.cuh"

namespace dino::cuda {
namespace {

constexpr int kD = 64, kRowBytes = 2 * kD, kStep = 64, kQueries = 32;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;  // of a maximum that has seen nothing: differences are no NaN

// Offset of a row's piece in a tile of rows of 64 values, or of 32: their pieces are permuted. Tiles begin at multiples
// of 128 bytes and blocks of rows at multiples of 16, so that a block's other columns are an exclusive or away.
__device__ inline uint32_t piece(int row, int at) { return row * kRowBytes + ((at ^ (row & 7)) << 4); }
__device__ inline uint32_t narrow_piece(int row, int at) { return row * (2 * kQueries) + ((at ^ (row >> 1 & 3)) << 4); }

template <bool Transposed>
__device__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

// This lane's row and piece of the four 8 x 8 matrices of an operand: side by side below each other, or the other way.
__device__ inline int row_of_a() { return threadIdx.x & 15; }
__device__ inline int piece_of_a() { return threadIdx.x >> 4 & 1; }
__device__ inline int row_of_b() { return (threadIdx.x & 7) + (threadIdx.x >> 1 & 8); }
__device__ inline int piece_of_b() { return threadIdx.x >> 3 & 1; }

// Operands of products from a tile, whose address includes the lane's offset: A, 16 rows by 16 columns; B, 16 deep and
// two times 8 wide, from a tile whose rows are its columns, or (by depth) whose rows are its depth.
__device__ inline void load_a(uint32_t (&r)[4], uint32_t address, int row, int column) {
    load_matrices<false>(r, (address + row * kRowBytes) ^ (2 * column));
}
__device__ inline void load_b(uint32_t (&r)[4], uint32_t address, int column, int depth) {
    load_matrices<false>(r, (address + column * kRowBytes) ^ (2 * depth));
}
__device__ inline void load_b_by_depth(uint32_t (&r)[4], uint32_t address, int depth, int column) {
    load_matrices<true>(r, (address + depth * kRowBytes) ^ (2 * column));
}

template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <class T>
__device__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        __half2 both = __floats2half2_rn(low, high);
        return reinterpret_cast<uint32_t&>(both);
    } else {
        __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t&>(both);
    }
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Starts the copy of `length` rows of 64 values into a tile of `padded` rows; the others become zero.
template <class T>
__device__ void copy_rows(char* memory, uint32_t tile, const T* from, int64_t stride, int length, int padded) {
    for (int i = threadIdx.x; i < padded * 8; i += blockDim.x) {
        int row = i / 8, at = i % 8;
        char* to = memory + tile + piece(row, at);
        if (row < length) {
            copy_async(to, from + row * stride + 8 * at);
        } else {
            *reinterpret_cast<uint4*>(to) = uint4{};
        }
    }
}

// A block's part of the tensors: pointers to its head's first token.
template <class T>
struct Sequence {
    const T *q, *k, *v;
    int64_t rows;    // of tokens before it
    int64_t column;  // of its head in out
    int64_t lse;     // its first element
    int length, padded;

    __device__ Sequence(const AttentionArgs& a, int64_t first, int length_) : length(length_) {
        int64_t head = blockIdx.x % a.heads;
        rows = first + blockIdx.x / a.heads * length;
        column = head * kD, lse = head * a.tokens + rows, padded = (length + 15) / 16 * 16;
        q = static_cast<const T*>(a.qkv) + rows * a.token_stride + head * a.head_stride;
        k = q + a.part_stride, v = k + a.part_stride;
    }
};

template <class T>
__global__ void __launch_bounds__(256) attention_short_kernel(AttentionArgs a, int64_t first, int length) {
    extern __shared__ __align__(128) uint4 shared[];
    char* memory = reinterpret_cast<char*>(shared);
    Sequence<T> x(a, first, length);
    uint32_t keys = 0, values = x.padded * kRowBytes, base = uint32_t(__cvta_generic_to_shared(memory));
    copy_rows(memory, keys, x.k, a.token_stride, length, x.padded);
    copy_rows(memory, values, x.v, a.token_stride, length, x.padded);
    commit_copies();
    keys += base + piece(row_of_b(), piece_of_b()), values += base + piece(row_of_a(), piece_of_a());
    int lane = threadIdx.x % 32, row = lane / 4, pair = 2 * (lane % 4);
    float factor = a.scale * kLog2E;
    bool copied = false;
    for (int tile = threadIdx.x / 32; tile < x.padded / 16; tile += blockDim.x / 32) {
        int rows[2] = {16 * tile + row, 16 * tile + row + 8};
        uint32_t q[4][4];
#pragma unroll
        for (int i = 0; i < 16; ++i) {  // in the order of A's registers: row, row + 8, and both 8 columns on
            int r = rows[i % 2];
            const T* from = x.q + r * a.token_stride + i / 4 * 16 + i / 2 % 2 * 8 + pair;
            q[i / 4][i % 4] = r < length ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0u;
        }
        if (!copied) wait_for_copies<0>(), __syncthreads(), copied = true;
        float out[8][4] = {}, shift[2] = {kLowest, kLowest}, sum[2] = {};
        for (int begin = 0; begin < x.padded; begin += kStep) {
            float s[8][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bool used = begin + 16 * i < x.padded;
#pragma unroll
                for (int j = 0; j < 4; ++j) s[2 * i][j] = s[2 * i + 1][j] = used ? 0.0f : -INFINITY;
                if (used) {
#pragma unroll
                    for (int d = 0; d < 4; ++d) {
                        uint32_t b[4];
                        load_b(b, keys, begin + 16 * i, 16 * d);
                        multiply_add<T>(s[2 * i], q[d], b[0], b[1]);
                        multiply_add<T>(s[2 * i + 1], q[d], b[2], b[3]);
                    }
                }
            }
            if (begin + kStep > length) {
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    if (begin + i / 4 * 8 + pair + i % 2 >= length) s[i / 4][i % 4] = -INFINITY;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float high = -INFINITY;
#pragma unroll
                for (int i = 0; i < 8; ++i) high = fmaxf(high, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
                float higher = fmaxf(shift[r], quad_max(high) * factor);
                float shrink = exp2_approximate(shift[r] - higher);
                shift[r] = higher, sum[r] *= shrink;
#pragma unroll
                for (int i = 0; i < 8; ++i) out[i][2 * r] *= shrink, out[i][2 * r + 1] *= shrink;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (begin + 16 * i >= x.padded) break;
                float p[2][4];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    p[j / 4][j % 4] = exp2_approximate(fmaf(s[2 * i + j / 4][j % 4], factor, -shift[j / 2 % 2]));
                    sum[j / 2 % 2] += p[j / 4][j % 4];
                }
                uint32_t operand[4] = {pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
                                       pack<T>(p[1][2], p[1][3])};
#pragma unroll
                for (int d = 0; d < 4; ++d) {
                    uint32_t b[4];
                    load_b_by_depth(b, values, begin + 16 * i, 16 * d);
                    multiply_add<T>(out[2 * d], operand, b[0], b[1]);
                    multiply_add<T>(out[2 * d + 1], operand, b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] = quad_sum(sum[r]);
            if (rows[r] >= length) continue;
            T* to = static_cast<T*>(a.out) + (x.rows + rows[r]) * a.heads * kD + x.column + pair;
            float inverse = 1.0f / sum[r];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                *reinterpret_cast<uint32_t*>(to + 8 * i) =
                    pack<T>(out[i][2 * r] * inverse, out[i][2 * r + 1] * inverse);
            }
            if (lane % 4 == 0) a.lse[x.lse + rows[r]] = (shift[r] + log2f(sum[r])) * kLn2;
        }
    }
}

template <class T>
__global__ void __launch_bounds__(512) attention_short_backward_kernel(AttentionArgs a, int64_t first, int length) {
    extern __shared__ __align__(128) uint4 shared[];
    char* memory = reinterpret_cast<char*>(shared);
    Sequence<T> x(a, first, length);
    int padded = x.padded, tile_bytes = padded * kRowBytes, ds_bytes = padded * 2 * kQueries;
    uint32_t queries = 0, keys = tile_bytes, values = 2 * tile_bytes, grads = 3 * tile_bytes, ds = 4 * tile_bytes;
    float* statistics = reinterpret_cast<float*>(memory + ds + 2 * ds_bytes);  // lse log2(e), delta; each [padded]
    copy_rows(memory, queries, x.q, a.token_stride, length, padded);
    copy_rows(memory, keys, x.k, a.token_stride, length, padded);
    copy_rows(memory, values, x.v, a.token_stride, length, padded);
    commit_copies();
    const T* grad_out = static_cast<const T*>(a.grad_out) + x.rows * a.heads * kD + x.column;
    const T* out = static_cast<const T*>(a.out) + x.rows * a.heads * kD + x.column;
    for (int i = threadIdx.x; i < padded * 8; i += blockDim.x) {  // eight threads a row
        int row = i / 8, at = i % 8;
        uint4 bits{};
        float delta = 0.0f;
        if (row < length) {
            float g[8], o[8];
            bits = __ldg(reinterpret_cast<const uint4*>(grad_out + row * a.heads * kD + 8 * at));
            widen<T>(bits, g);
            widen<T>(__ldg(reinterpret_cast<const uint4*>(out + row * a.heads * kD + 8 * at)), o);
#pragma unroll
            for (int j = 0; j < 8; ++j) delta = fmaf(g[j], o[j], delta);
        }
        *reinterpret_cast<uint4*>(memory + grads + piece(row, at)) = bits;
        delta = quad_sum(delta);
        delta += __shfl_xor_sync(~0u, delta, 4);
        if (at == 0) {
            statistics[row] = row < length ? a.lse[x.lse + row] * kLog2E : INFINITY;  // probabilities of zero
            statistics[padded + row] = delta;
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    uint32_t base = uint32_t(__cvta_generic_to_shared(memory));
    uint32_t as_a = base + piece(row_of_a(), piece_of_a()), as_b = base + piece(row_of_b(), piece_of_b());
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = lane / 4;
    int pair = 2 * (lane % 4), first_key = 16 * warp;
    float factor = a.scale * kLog2E, grad_k[8][4] = {}, grad_v[8][4] = {};
    uint32_t ds_own = base + ds + narrow_piece(first_key + row, 0) + 2 * pair;
    uint32_t ds_of_a = base + ds + narrow_piece(row_of_b(), piece_of_b());
    int stride = int(a.heads) * kD;  // of the three parts of grad
    T* grad = static_cast<T*>(a.grad) + x.rows * 3 * stride + x.column + pair;
#pragma unroll 1
    for (int begin = 0, buffer = 0; begin < padded; begin += kQueries, buffer ^= 1) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {  // 16 queries at a time
            int query = begin + 16 * half;
            if (query >= padded) break;
            uint32_t of_keys[4], b[4], p[4], ds_words[4];  // the latter two in the order of A's registers
            float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                load_a(of_keys, as_a + keys, first_key, 16 * d);
                load_b(b, as_b + queries, query, 16 * d);
                multiply_add<T>(s[0], of_keys, b[0], b[1]);
                multiply_add<T>(s[1], of_keys, b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 lse = *reinterpret_cast<float2*>(statistics + query + i / 2 * 8 + pair);
                float *low = &s[i / 2][i % 2 * 2], *high = low + 1;
                *low = exp2_approximate(fmaf(*low, factor, -lse.x));
                *high = exp2_approximate(fmaf(*high, factor, -lse.y));
                p[i] = pack<T>(*low, *high);
            }
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                load_b_by_depth(b, as_a + grads, query, 16 * d);
                multiply_add<T>(grad_v[2 * d], p, b[0], b[1]);
                multiply_add<T>(grad_v[2 * d + 1], p, b[2], b[3]);
            }
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                load_a(of_keys, as_a + values, first_key, 16 * d);
                load_b(b, as_b + grads, query, 16 * d);
                multiply_add<T>(dp[0], of_keys, b[0], b[1]);
                multiply_add<T>(dp[1], of_keys, b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 delta = *reinterpret_cast<float2*>(statistics + padded + query + i / 2 * 8 + pair);
                int row_of_i = first_key + row + i % 2 * 8;
                ds_words[i] = pack<T>(s[i / 2][i % 2 * 2] * (dp[i / 2][i % 2 * 2] - delta.x),
                                      s[i / 2][i % 2 * 2 + 1] * (dp[i / 2][i % 2 * 2 + 1] - delta.y));
                if (row_of_i >= length) ds_words[i] = 0;  // whatever the padding gave, it does not reach dQ
                uint32_t to = (ds_own + buffer * ds_bytes + i % 2 * 8 * 2 * kQueries) ^ (32 * half + i / 2 * 16);
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(ds_words[i]) : "memory");
            }
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                load_b_by_depth(b, as_a + queries, query, 16 * d);
                multiply_add<T>(grad_k[2 * d], ds_words, b[0], b[1]);
                multiply_add<T>(grad_k[2 * d + 1], ds_words, b[2], b[3]);
            }
        }
        // One barrier a step: the buffer that the next step writes was last read before this one.
        __syncthreads();
#pragma unroll 1
        for (int item = warp; item < 8; item += warps) {  // 16 queries by 16 channels of dQ each
            int half = item / 4, channel = item % 4 * 16;
            if (begin + 16 * half >= padded) break;
            float dq[2][4] = {};
            for (int key = 0; key < padded; key += 16) {
                uint32_t of_ds[4], b[4];
                load_matrices<true>(of_ds, (ds_of_a + buffer * ds_bytes + key * 2 * kQueries) ^ (32 * half));
                load_b_by_depth(b, as_a + keys, key, channel);
                multiply_add<T>(dq[0], of_ds, b[0], b[1]);
                multiply_add<T>(dq[1], of_ds, b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int query = begin + 16 * half + row + 8 * (i % 2);
                if (query < length) {
                    T* to = grad + query * 3 * stride + channel + i / 2 * 8;
                    *reinterpret_cast<uint32_t*>(to) =
                        pack<T>(dq[i / 2][i % 2 * 2] * a.scale, dq[i / 2][i % 2 * 2 + 1] * a.scale);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (first_key + row + 8 * r >= length) continue;
        T* to = grad + (first_key + row + 8 * r) * 3 * stride + stride;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            *reinterpret_cast<uint32_t*>(to + 8 * i) =
                pack<T>(grad_k[i][2 * r] * a.scale, grad_k[i][2 * r + 1] * a.scale);
            *reinterpret_cast<uint32_t*>(to + stride + 8 * i) = pack<T>(grad_v[i][2 * r], grad_v[i][2 * r + 1]);
        }
    }
}

// Calls body with each group's first token, number of sequences and their length.
template <class Body>
void for_each_group(const AttentionArgs& a, Body body) {
    int64_t first = 0;
    for (int64_t i = 0; i < a.group_count; ++i) {
        int64_t count = a.groups[2 * i], length = a.groups[2 * i + 1];
        if (count && length) body(first, count, int(length));
        first += count * length;
    }
}

}  // namespace

void launch_attention_short(const AttentionArgs& a, Stream stream) {
    for_each_group(a, [&](int64_t first, int64_t count, int length) {
        int tiles = (length + 15) / 16, rounds = (tiles + 7) / 8, warps = (tiles + rounds - 1) / rounds;
        size_t shared = size_t(tiles) * 16 * 2 * kRowBytes;
        launch(a.dtype == DType::f16 ? attention_short_kernel<__half> : attention_short_kernel<__nv_bfloat16>,
               unsigned(count * a.heads), 32 * warps, shared, stream, a, first, length);
    });
}

void launch_attention_short_backward(const AttentionArgs& a, Stream stream) {
    for_each_group(a, [&](int64_t first, int64_t count, int length) {
        int tiles = (length + 15) / 16;
        size_t shared = size_t(tiles) * 16 * (4 * kRowBytes + 2 * 2 * kQueries + 2 * sizeof(float));
        launch(a.dtype == DType::f16 ? attention_short_backward_kernel<__half>
                                     : attention_short_backward_kernel<__nv_bfloat16>,
               unsigned(count * a.heads), 32 * tiles, shared, stream, a, first, length);
    });
}

}  // namespace dino::cuda
