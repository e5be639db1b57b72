// The DINO loss with its gradient: dino_kernels/ops/dino_loss.py has the formulas.
//
// 1. teacher_kernel: a block of 256 columns of all teacher rows: their mean, and each row's (maximum, sum) over them.
// 2. target_kernel: the teacher's probabilities q1, q0, q0 + q1 of an image, what views 0, 1 and the others learn from,
//    are computed once and stored (float16 times 2^14 for 16-bit students), not once a student row.
// 3. student_kernel: a block of 1024 threads an SM takes rows in turn. A row is read from global memory once: it stays
//    in a ring of shared memory between the pass for its log-sum-exp and the one for its gradient, while the space
//    that the second pass leaves is filled with the next row. 65536 logits of 16 bits are 128 of the 160 KiB (sm_80) or
//    224 KiB (from sm_90 on) of the ring; a longer row passes through it twice. A thread reads only what it has
//    copied itself, so the copies need no barrier, and the gradient may overwrite the logits.
// Exponentials: 9/8 an element for the log-sum-exp, 1 for the gradient, 2 a teacher's element. Sums have a fixed order.
#include "cuda/common.cuh"

namespace dino::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Of a logarithm of base 2 that nothing has been seen of: finite, so that differences are no NaN.
constexpr float kLowest = -1e30f;
constexpr int kColumns = 256, kTeacherWarps = 8;
constexpr int kTargetThreads = 256, kTargetColumns = 8192;
constexpr int kThreads = 1024, kSlotBytes = 16 * kThreads;
constexpr int slots_of(int major) { return major >= 9 ? 14 : 10; }
#ifdef __CUDA_ARCH__
constexpr int kSlots = slots_of(__CUDA_ARCH__ / 100);
#endif

template <class Student>
using Target = std::conditional_t<sizeof(Student) == 4, float, __half>;
template <class Student>
constexpr float kTargetScale = sizeof(Student) == 4 ? 1.0f : 16384.0f;

// Eight values from column k on; `fill` beyond the row's end.
template <class T>
__device__ void load8(const T* row, int k, int outputs, bool vectors, float fill, float (&x)[8]) {
    if (vectors && k + 8 <= outputs) {
        if constexpr (sizeof(T) == 4) {
            float4 low = load4(row + k), high = load4(row + k + 4);
            x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
            x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        } else {
            unpack<T>(*reinterpret_cast<const uint4*>(row + k), x);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = k + j < outputs ? float(row[k + j]) : fill;
    }
}

template <class T>
__global__ void __launch_bounds__(32 * kTeacherWarps) teacher_kernel(DinoLossArgs a, bool vectors) {
    __shared__ float sums[kTeacherWarps][kColumns];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int k = blockIdx.x * kColumns + 8 * lane, outputs = int(a.outputs), batch = int(a.batch);
    float scale = kLog2E / float(read(a.teacher_temp));
    float c[8], mean[8] = {};
    bool center_vectors = aligned(a.center, a.center_stride * int64_t(sizeof(float)));
    for (int view = 0; view < 2; ++view) {
        load8(a.center + view * a.center_stride, k, outputs, center_vectors, 0.0f, c);
#pragma unroll 2
        for (int row = view * batch + warp; row < (view + 1) * batch; row += kTeacherWarps) {
            float t[8];
            load8(static_cast<const T*>(a.teacher) + row * a.teacher_stride, k, outputs, vectors, 0.0f, t);
            float high = kLowest, sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                mean[j] += t[j];
                t[j] = k + j < outputs ? t[j] - c[j] : -INFINITY;
                high = fmaxf(high, t[j]);
            }
            // Rounded once and then used by all: x scale - shift is exact but for its own rounding.
            float shift = fmaxf(warp_max(high) * scale, kLowest);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += exp2_approximate(fmaf(t[j], scale, -shift));
            sum = warp_sum(sum);
            if (lane == 0) {
                float* partial = a.partials + int64_t(row) * 2 * gridDim.x + blockIdx.x;
                partial[0] = shift, partial[gridDim.x] = sum;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[warp][8 * lane + j] = mean[j];
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < kTeacherWarps; ++i) total += sums[i][threadIdx.x];
    if (blockIdx.x * kColumns + threadIdx.x < outputs) {
        a.batch_center[blockIdx.x * kColumns + threadIdx.x] = total / (2 * batch);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.arrived = 0;
}

struct Statistics {
    float shift, sum;  // of 2^(x - shift)

    __device__ void add(float other_shift, float other_sum) {
        float higher = fmaxf(shift, other_shift);
        sum = sum * exp2_approximate(shift - higher) + other_sum * exp2_approximate(other_shift - higher);
        shift = higher;
    }
};

// Those of a block's threads together, the same in all of them; shared: for each warp. The caller synchronizes before
// it is used again.
__device__ Statistics block_statistics(Statistics mine, Statistics* shared) {
    auto over_warp = [](Statistics s) {
        float shift = warp_max(s.shift);
        return Statistics{shift, warp_sum(s.sum * exp2_approximate(s.shift - shift))};
    };
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    mine = over_warp(mine);
    if (lane == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    return over_warp(lane < warps ? shared[lane] : Statistics{kLowest, 0.0f});
}

// blockIdx.x: columns; blockIdx.y: image.
template <class T, class Student>
__global__ void __launch_bounds__(kTargetThreads) target_kernel(DinoLossArgs a, bool vectors, int chunks) {
    __shared__ Statistics shared[2][kTargetThreads / 32];
    int64_t image = blockIdx.x / chunks;
    int outputs = int(a.outputs), blocks = (outputs + kColumns - 1) / kColumns;
    float scale = kLog2E / float(read(a.teacher_temp)), shift[2], weight[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
        const float* partial = a.partials + (u * a.batch + image) * 2 * blocks;
        Statistics mine{kLowest, 0.0f};
        for (int i = threadIdx.x; i < blocks; i += kTargetThreads) mine.add(partial[i], partial[blocks + i]);
        mine = block_statistics(mine, shared[u]);
        shift[u] = mine.shift, weight[u] = kTargetScale<Student> / mine.sum;
    }
    const T* first = static_cast<const T*>(a.teacher) + image * a.teacher_stride;
    const T* second = first + a.batch * a.teacher_stride;
    int64_t padded = (a.outputs + 7) / 8 * 8;
    auto* targets = static_cast<Target<Student>*>(a.targets) + image * padded;
    bool center_vectors = aligned(a.center, a.center_stride * int64_t(sizeof(float)));
    int begin = blockIdx.x % chunks * kTargetColumns;
#pragma unroll 1
    for (int k = begin + 8 * threadIdx.x; k < min(begin + kTargetColumns, outputs); k += 8 * kTargetThreads) {
        float c[8], x[8], q[3][8];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            load8(a.center + u * a.center_stride, k, outputs, center_vectors, 0.0f, c);
            load8(u ? second : first, k, outputs, vectors, -INFINITY, x);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                q[1 - u][j] = exp2_approximate(fmaf(x[j] - c[j], scale, -shift[u])) * weight[u];
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) q[2][j] = q[0][j] + q[1][j];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            if (i == 2 && a.views == 2) break;
            auto* to = reinterpret_cast<uint4*>(targets + i * a.batch * padded + k);
            if constexpr (sizeof(Student) == 4) {
                to[0] = narrow<float>({q[i][0], q[i][1], q[i][2], q[i][3]});
                to[1] = narrow<float>({q[i][4], q[i][5], q[i][6], q[i][7]});
            } else {
                to[0] = narrow<__half>(q[i]);
            }
        }
    }
}

#ifdef __CUDA_ARCH__
// The rows of a block, copied ahead of their use: pieces of a vector a thread, each of which fills a slot. A row that
// does not fit is copied for each of two passes; the second begins at the end, which is still in a cache.
template <class T>
class Ring {
    static constexpr int kColumns = kThreads * kWidth<T>;  // of a piece
    const DinoLossArgs& a_;
    char* memory_;
    bool vectors_;
    int row_, rows_, left_, column_, step_, slot_ = 0;  // of the next copy; left: pieces of its pass
    const T* from_;

    __device__ void begin_pass(bool second) {
        const T* row = static_cast<const T*>(a_.student) + (rows_ - 1 - row_) * a_.student_stride;
        left_ = pieces, step_ = second ? -kColumns : kColumns;
        column_ = first_column(second), from_ = row + column_;
    }

   public:
    const int pieces;  // a row's
    const bool resident;

    __device__ Ring(const DinoLossArgs& a, uint4* memory, bool vectors, int rows)
        : a_(a),
          memory_(reinterpret_cast<char*>(memory + threadIdx.x)),
          vectors_(vectors),
          row_(blockIdx.x),
          rows_(rows),
          pieces((int(a.outputs) + kColumns - 1) / kColumns),
          resident(pieces <= kSlots) {
        begin_pass(false);
        for (int i = 0; i < kSlots; ++i) copy_next();
    }

    // This thread's first column in a pass, and the way to the next.
    __device__ int first_column(bool second) const {
        return (second ? (pieces - 1) * kColumns : 0) + int(threadIdx.x) * kWidth<T>;
    }
    __device__ int step(bool second) const { return second ? -kColumns : kColumns; }

    __device__ static int next(int slot) { return slot + kSlotBytes == kSlots * kSlotBytes ? 0 : slot + kSlotBytes; }

    __device__ void copy_next() {
        if (row_ < rows_) {
            T* to = reinterpret_cast<T*>(memory_ + slot_);
            int count = int(a_.outputs) - column_;
            if (vectors_ && count >= kWidth<T>) {
                copy_async(to, from_);
            } else {
                for (int j = 0; j < kWidth<T>; ++j) to[j] = j < count ? from_[j] : narrow<T>(-INFINITY);
            }
            slot_ = next(slot_);
            column_ += step_, from_ += step_;
            if (--left_ == 0) {
                bool second = !resident && step_ > 0;
                if (!second) row_ += gridDim.x;
                begin_pass(second);
            }
        }
        commit_copies();  // an empty group at the end: the number of later groups is always the same
    }

    // Of a slot whose copy is kSlots - 1 groups old.
    __device__ uint4 take(int slot) {
        wait_for_copies<kSlots - 1>();
        return *reinterpret_cast<const uint4*>(memory_ + slot);
    }
};
#endif

template <class T>
__device__ float largest(uint4 bits) {
    float x[kWidth<T>];
    if constexpr (sizeof(T) == 4) {
        unpack(bits, x);
        return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    } else {
        using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        auto two = [](uint32_t& word) { return reinterpret_cast<Two&>(word); };
        Two high = __hmax2(__hmax2(two(bits.x), two(bits.y)), __hmax2(two(bits.z), two(bits.w)));
        return fmaxf(float(high.x), float(high.y));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    student_kernel(DinoLossArgs a, bool vectors, bool grad_vectors, float norm) {
#ifdef __CUDA_ARCH__
    extern __shared__ uint4 memory[];
    __shared__ Statistics warps[kThreads / 32];
    __shared__ float dots[kThreads / 32];
    __shared__ bool last;
    constexpr int kN = kWidth<T>;
    int rows = int(a.views * a.batch), batch = int(a.batch), outputs = int(a.outputs);
    int64_t padded = (a.outputs + 7) / 8 * 8;
    float scale = 1.0f / float(read(a.student_temp)), log2_scale = scale * kLog2E, factor = scale * norm;
    Ring<T> ring(a, memory, vectors, rows);
    int slot = 0;  // of the row's first piece, and then of the next
    for (int i = blockIdx.x; i < rows; i += gridDim.x) {
        int row = rows - 1 - i, view = row / batch, image = row % batch;
        float pairs = view < 2 ? 1.0f : 2.0f;
        Statistics mine{kLowest, 0.0f};
        int ahead = slot, k = ring.first_column(false);
#pragma unroll 1
        for (int left = ring.pieces; left; --left, k += ring.step(false)) {
            uint4 bits = ring.take(ahead);
            ahead = ring.next(ahead);
            if (k < outputs) {
                float x[kN], shift = fmaxf(mine.shift, largest<T>(bits) * log2_scale);
                widen<T>(bits, x);
                mine.sum *= exp2_approximate(mine.shift - shift);
#pragma unroll
                for (int j = 0; j < kN; ++j) mine.sum += exp2_approximate(fmaf(x[j], log2_scale, -shift));
                mine.shift = shift;
            }
            if (ring.resident) {
                commit_copies();
            } else {
                ring.copy_next();
            }
        }
        if (!ring.resident) slot = ahead;
        mine = block_statistics(mine, warps);
        float weight = pairs / mine.sum * factor, target_weight = factor / kTargetScale<T>, dot = 0.0f;
        k = ring.first_column(!ring.resident);
        int step = ring.step(!ring.resident);
        auto* target = static_cast<const Target<T>*>(a.targets) + (int64_t(min(view, 2)) * batch + image) * padded + k;
        T* grad = static_cast<T*>(a.grad) + row * a.grad_stride + k;
        auto load_target = [&] { return k < outputs ? __ldg(reinterpret_cast<const uint4*>(target)) : uint4{}; };
        uint4 q_bits = load_target();
#pragma unroll 1
        for (int left = ring.pieces; left; --left) {
            int count = outputs - k;
            float x[kN], q[kN], g[kN];
            widen<Target<T>>(q_bits, q);
            k += step, target += step;
            if (left > 1) q_bits = load_target();
            uint4 bits = ring.take(slot);
            slot = ring.next(slot);
            widen<T>(bits, x);
            if (count >= kN && grad_vectors) {
#pragma unroll
                for (int j = 0; j < kN; ++j) {
                    dot = fmaf(q[j], x[j], dot);
                    g[j] = fmaf(exp2_approximate(fmaf(x[j], log2_scale, -mine.shift)), weight, -q[j] * target_weight);
                }
                __stcs(reinterpret_cast<uint4*>(grad), narrow<T>(g));  // not read again here
            } else {
#pragma unroll
                for (int j = 0; j < kN; ++j) {
                    if (j >= count) continue;
                    dot = fmaf(q[j], x[j], dot);
                    grad[j] = narrow<T>(
                        fmaf(exp2_approximate(fmaf(x[j], log2_scale, -mine.shift)), weight, -q[j] * target_weight));
                }
            }
            grad += step;
            ring.copy_next();
        }
        dot = block_sum(dot, dots) / kTargetScale<T>;
        float lse = (mine.shift + log2f(mine.sum)) * kLn2;
        if (threadIdx.x == 0) a.losses[row] = (pairs * lse - dot * scale) * norm;
    }
    wait_for_copies<0>();
    // The count tells which block is the last; that one adds the losses up, in the order of the rows.
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(a.arrived, 1) == int(gridDim.x) - 1;
        __threadfence();
    }
    __syncthreads();
    if (last) {
        float sum = 0.0f;
        for (int row = threadIdx.x; row < rows; row += kThreads) sum += __ldcg(a.losses + row);
        sum = block_sum(sum, dots);
        if (threadIdx.x == 0) *a.loss = sum;
    }
#endif
}

template <class T>
__global__ void __launch_bounds__(256) scale_kernel(DinoLossScaleArgs a, bool vectors) {
    float factor = float(read(a.upstream));
    if (factor == 1.0f) return;
    constexpr int kN = kWidth<T>;
    int64_t per_row = (a.outputs + kN - 1) / kN;
    for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < a.rows * per_row; i += int64_t(gridDim.x) * 256) {
        int64_t k = i % per_row * kN;
        T* grad = static_cast<T*>(a.grad) + i / per_row * a.stride + k;
        if (vectors && k + kN <= a.outputs) {
            float x[kN];
            widen<T>(*reinterpret_cast<uint4*>(grad), x);
#pragma unroll
            for (int j = 0; j < kN; ++j) x[j] *= factor;
            *reinterpret_cast<uint4*>(grad) = narrow<T>(x);
        } else {
            for (int j = 0; j < min(int64_t(kN), a.outputs - k); ++j) grad[j] = narrow<T>(float(grad[j]) * factor);
        }
    }
}

}  // namespace

void launch_dino_loss(const DinoLossArgs& a, Stream stream) {
    int64_t rows = a.views * a.batch, blocks = (a.outputs + kColumns - 1) / kColumns;
    int chunks = int((a.outputs + kTargetColumns - 1) / kTargetColumns);
    bool wide = a.student_dtype == DType::f32;
    with_type(a.teacher_dtype, [&](auto* type) {
        using T = std::remove_reference_t<decltype(*type)>;
        bool vectors = aligned(a.teacher, a.teacher_stride * int64_t(sizeof(T)));
        launch(teacher_kernel<T>, blocks, 32 * kTeacherWarps, 0, stream, a, vectors);
        launch(wide ? target_kernel<T, float> : target_kernel<T, __half>, chunks * a.batch, kTargetThreads, 0, stream,
               a, vectors, chunks);
    });
    int64_t programs = std::min<int64_t>(rows, device_attribute(cudaDevAttrMultiProcessorCount));
    size_t shared = size_t(slots_of(device_attribute(cudaDevAttrComputeCapabilityMajor))) * kSlotBytes;
    float norm = float(1.0 / ((2 * a.views - 2) * a.batch));
    with_type(a.student_dtype, [&](auto* type) {
        using T = std::remove_reference_t<decltype(*type)>;
        bool vectors = aligned(a.student, a.student_stride * int64_t(sizeof(T)));
        bool grad_vectors = aligned(a.grad, a.grad_stride * int64_t(sizeof(T)));
        launch(student_kernel<T>, programs, kThreads, shared, stream, a, vectors, grad_vectors, norm);
    });
}

void launch_dino_loss_scale(const DinoLossScaleArgs& a, Stream stream) {
    with_type(a.dtype, [&](auto* type) {
        using T = std::remove_reference_t<decltype(*type)>;
        int64_t vectors = a.rows * ((a.outputs + kWidth<T> - 1) / kWidth<T>);
        int64_t blocks = std::min<int64_t>((vectors + 255) / 256, 8 * device_attribute(cudaDevAttrMultiProcessorCount));
        bool whole = aligned(a.grad, a.stride * int64_t(sizeof(T)));
        launch(scale_kernel<T>, blocks, 256, 0, stream, a, whole);
    });
}

}  // namespace dino::cuda
