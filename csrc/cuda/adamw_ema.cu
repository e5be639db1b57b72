// Clip, AdamW, the teacher's average and 16-bit copies in one pass: dino_kernels/ops/adamw_ema.py has the formulas.
//
// 1. norm_kernel: the sum of squares of each block of 4096 gradients.
// 2. segment_kernel: a block a segment adds those up, in order, and computes the factors of its update. Where segments
//    are clipped together, square_kernel has added them up before, and it adds up its group's.
// 3. update_kernel: each block of weights, moments, teacher and copies; clears the gradient it has read.
// 4. rows_kernel: a warp a row of the weight-normed last layer of both nets.
// The segments' offsets are kernel parameters (12 bytes a segment, up to kMost a launch): nothing is uploaded or kept,
// and a captured graph holds them in its nodes. A block finds its segment by bisection in the constant
// cache. Bytes: 4 an element for the norms, 36 for the update, with 16-bit copies 40, 4 less where nothing is cleared.
#include "cuda/common.cuh"

namespace dino::cuda {
namespace {

constexpr int kThreads = 256, kBlock = 4096, kRowWarps = 8;
constexpr int kMost = 1024;

struct Segments {
    int base, count;  // number of the first; how many
    int blocks_before;
    int first[kMost + 1];        // block of each
    int64_t offsets[kMost + 1];  // and element
};

struct Place {
    int segment;
    int64_t begin;  // element
    int count;      // at most kBlock
    bool starts;    // whether it is its segment's first block

    __device__ explicit Place(const Segments& s) {
        int i = owner(s.count, blockIdx.x, [&](int i) { return s.first[i]; });
        segment = s.base + i, starts = int(blockIdx.x) == s.first[i];
        begin = s.offsets[i] + int64_t(blockIdx.x - s.first[i]) * kBlock;
        count = int(min(s.offsets[i + 1] - begin, int64_t(kBlock)));
    }
};

template <class Grad>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(AdamwEmaArgs a, const __grid_constant__ Segments segments, bool vectors) {
    __shared__ float shared[kThreads / 32];
    Place place(segments);
    float sum = 0.0f;
    if (!a.frozen[place.segment]) {
        const Grad* grad = static_cast<const Grad*>(a.grad) + place.begin;
        int whole = vectors && place.begin % 4 == 0 ? place.count / 4 * 4 : 0;
#pragma unroll 4
        for (int i = 4 * threadIdx.x; i < whole; i += 4 * kThreads) {
            float4 g = load4(grad + i);
            sum = fmaf(g.x, g.x, fmaf(g.y, g.y, fmaf(g.z, g.z, fmaf(g.w, g.w, sum))));
        }
        for (int i = whole + threadIdx.x; i < place.count; i += kThreads) {
            sum = fmaf(float(grad[i]), float(grad[i]), sum);
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) a.partials[segments.blocks_before + blockIdx.x] = sum;
    if (threadIdx.x == 0 && blockIdx.x == 0 && segments.base == 0) *a.nonfinite = 0;
}

// The square of the norm of segment blockIdx.x, in thread 0.
__device__ float square_of_segment(const AdamwEmaArgs& a, const Segments& segments, float* shared) {
    float sum = 0.0f;
    for (int i = segments.first[blockIdx.x] + threadIdx.x; i < segments.first[blockIdx.x + 1]; i += kThreads) {
        sum += a.partials[segments.blocks_before + i];
    }
    return block_sum(sum, shared);
}

__global__ void __launch_bounds__(kThreads) square_kernel(AdamwEmaArgs a, const __grid_constant__ Segments segments) {
    __shared__ float shared[kThreads / 32];
    float square = square_of_segment(a, segments, shared);
    if (threadIdx.x == 0) a.squares[segments.base + blockIdx.x] = square;
}

__device__ float square_of_group(const AdamwEmaArgs& a, int64_t group, float* shared) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < a.segments; i += kThreads) sum += a.clip_groups[i] == group ? a.squares[i] : 0.0f;
    return block_sum(sum, shared);
}

__global__ void __launch_bounds__(kThreads) segment_kernel(AdamwEmaArgs a, const __grid_constant__ Segments segments) {
    __shared__ float shared[kThreads / 32];
    int segment = segments.base + blockIdx.x;
    float sum =
        a.clip_groups ? square_of_group(a, a.clip_groups[segment], shared) : square_of_segment(a, segments, shared);
    if (threadIdx.x == 0) {
        float norm = sqrtf(sum);
        if (!isfinite(norm)) *a.nonfinite = 1;
        double n = double(a.steps[segment] + 1), lr = read(a.lr);
        if (a.lr_scale) lr *= a.lr_scale[segment];
        float4 factors;
        factors.x = a.clip_norm > 0 ? fminf(float(a.clip_norm) / (norm + 1e-6f), 1.0f) : 1.0f;
        factors.y = float(lr / -expm1(n * log(a.beta1)));
        factors.z = float(1.0 / sqrt(-expm1(n * log(a.beta2))));
        factors.w = a.decayed[segment] ? float(1.0 - lr * read(a.weight_decay)) : 1.0f;
        store4(a.factors + 4 * segment, factors);
    }
}

struct Rates {
    float4 factors;
    float2 momentum;
    float beta1, beta2, rest1, rest2, eps;
    bool frozen;

    __device__ void update(float& s, float g, float& m1, float& m2, float& t) const {
        if (!frozen) {
            g *= factors.x;
            m1 = fmaf(beta1, m1, rest1 * g);
            m2 = fmaf(beta2, m2, rest2 * g * g);
            float root, step;  // within 2 units in the last place
            asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(m2));
            asm("div.full.f32 %0, %1, %2;" : "=f"(step) : "f"(factors.y * m1), "f"(fmaf(root, factors.z, eps)));
            s = fmaf(s, factors.w, -step);
        }
        t = fmaf(momentum.x, t, momentum.y * s);
    }
};

__device__ void store_copy(void* copy, DType dtype, int64_t at, float x) {
    if (copy && dtype == DType::f16) static_cast<__half*>(copy)[at] = __float2half_rn(x);
    if (copy && dtype == DType::bf16) static_cast<__nv_bfloat16*>(copy)[at] = __float2bfloat16_rn(x);
}
__device__ void store_copy(void* copy, DType dtype, int64_t at, float4 x) {
    if (copy && dtype == DType::f16) store4(static_cast<__half*>(copy) + at, x);
    if (copy && dtype == DType::bf16) store4(static_cast<__nv_bfloat16*>(copy) + at, x);
}

template <class Grad>
__global__ void __launch_bounds__(kThreads)
    update_kernel(AdamwEmaArgs a, const __grid_constant__ Segments segments, bool vectors) {
    Place place(segments);
    bool refused = *a.nonfinite, cleared = place.segment < a.cleared;
    Grad* grad = static_cast<Grad*>(a.grad);
    if (refused && !cleared) return;
    // Rates of a refused step are not used; its loop only clears.
    Rates rates{load4(a.factors + 4 * place.segment),
                blend(a.momentum),
                float(a.beta1),
                float(a.beta2),
                float(1 - a.beta1),
                float(1 - a.beta2),
                float(a.eps),
                a.frozen[place.segment]};
    if (a.rows && place.segment == a.segments - 1) a.student_16 = a.teacher_16 = nullptr;
    int whole = vectors && place.begin % 4 == 0 ? place.count / 4 * 4 : 0;
    for (int i = 4 * threadIdx.x; i < whole; i += 4 * kThreads) {
        int64_t at = place.begin + i;
        if (!refused) {
            float4 s = load4(a.student + at), t = load4(a.teacher + at), m1{}, m2{}, g{};
            if (!rates.frozen) g = load4(grad + at), m1 = load4(a.exp_avg + at), m2 = load4(a.exp_avg_sq + at);
            rates.update(s.x, g.x, m1.x, m2.x, t.x), rates.update(s.y, g.y, m1.y, m2.y, t.y);
            rates.update(s.z, g.z, m1.z, m2.z, t.z), rates.update(s.w, g.w, m1.w, m2.w, t.w);
            if (!rates.frozen) store4(a.student + at, s), store4(a.exp_avg + at, m1), store4(a.exp_avg_sq + at, m2);
            store4(a.teacher + at, t);
            store_copy(a.student_16, a.student_16_dtype, at, s), store_copy(a.teacher_16, a.teacher_16_dtype, at, t);
        }
        if (cleared) store4(grad + at, float4{});
    }
    for (int i = whole + threadIdx.x; i < place.count; i += kThreads) {
        int64_t at = place.begin + i;
        if (!refused) {
            float s = a.student[at], t = a.teacher[at], m1 = 0.0f, m2 = 0.0f, g = 0.0f;
            if (!rates.frozen) g = float(grad[at]), m1 = a.exp_avg[at], m2 = a.exp_avg_sq[at];
            rates.update(s, g, m1, m2, t);
            if (!rates.frozen) a.student[at] = s, a.exp_avg[at] = m1, a.exp_avg_sq[at] = m2;
            a.teacher[at] = t;
            store_copy(a.student_16, a.student_16_dtype, at, s), store_copy(a.teacher_16, a.teacher_16_dtype, at, t);
        }
        if (cleared) grad[at] = Grad(0.0f);
    }
    if (threadIdx.x == 0 && place.starts && !refused && !rates.frozen) ++a.steps[place.segment];
}

// blockIdx.y: student or teacher.
template <class T>
__global__ void __launch_bounds__(32 * kRowWarps) rows_kernel(AdamwEmaArgs a, int64_t v_begin, int64_t g_begin) {
    const float* weights = blockIdx.y ? a.teacher : a.student;
    T* out = static_cast<T*>(blockIdx.y ? a.teacher_rows : a.student_rows);
    int64_t row = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (row >= a.rows) return;
    const float* v = weights + v_begin + row * a.channels;
    bool vectors = aligned(v) && a.channels % 4 == 0 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0;
    int lane = threadIdx.x % 32, channels = int(a.channels), whole = vectors ? channels : 0;
    float sum = 0.0f;
    for (int i = 4 * lane; i < whole; i += 128) {
        float4 x = load4(v + i);
        sum = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, sum))));
    }
    for (int i = whole + lane; i < channels; i += 32) sum = fmaf(v[i], v[i], sum);
    float scale = weights[g_begin + row] / sqrtf(warp_sum(sum));
    out += row * a.channels;
    for (int i = 4 * lane; i < whole; i += 128) {
        float4 x = load4(v + i);
        store4(out + i, {x.x * scale, x.y * scale, x.z * scale, x.w * scale});
    }
    for (int i = whole + lane; i < channels; i += 32) out[i] = narrow<T>(v[i] * scale);
}

// Calls body with the segments, at most kMost at a time, and their number of blocks.
template <class Body>
void in_parts(const AdamwEmaArgs& a, Body body) {
    Segments part;
    part.blocks_before = 0;
    for (part.base = 0; part.base < a.segments; part.base += part.count) {
        part.count = int(std::min<int64_t>(a.segments - part.base, kMost));
        part.first[0] = 0, part.offsets[0] = a.offsets[part.base];
        for (int i = 0; i < part.count; ++i) {
            part.offsets[i + 1] = a.offsets[part.base + i + 1];
            part.first[i + 1] = part.first[i] + int((part.offsets[i + 1] - part.offsets[i] + kBlock - 1) / kBlock);
        }
        body(part, part.first[part.count]);
        part.blocks_before += part.first[part.count];
    }
}

}  // namespace

void launch_adamw_ema_step(const AdamwEmaArgs& a, Stream stream) {
    bool vectors = true;
    for (const void* x :
         {static_cast<const void*>(a.student), static_cast<const void*>(a.grad), static_cast<const void*>(a.exp_avg),
          static_cast<const void*>(a.exp_avg_sq), static_cast<const void*>(a.teacher),
          static_cast<const void*>(a.student_16), static_cast<const void*>(a.teacher_16)}) {
        vectors = vectors && aligned(x);
    }
    with_type(a.grad_dtype, [&](auto* type) {
        using Grad = std::remove_reference_t<decltype(*type)>;
        // Every norm before the first update: one that is not finite refuses all of them.
        in_parts(a, [&](const Segments& part, int64_t blocks) {
            launch(norm_kernel<Grad>, blocks, kThreads, 0, stream, a, part, vectors);
        });
        if (a.clip_groups) {
            in_parts(a, [&](const Segments& part, int64_t) {
                launch(square_kernel, part.count, kThreads, 0, stream, a, part);
            });
        }
        in_parts(a, [&](const Segments& part, int64_t) {
            launch(segment_kernel, part.count, kThreads, 0, stream, a, part);
        });
        in_parts(a, [&](const Segments& part, int64_t blocks) {
            launch(update_kernel<Grad>, blocks, kThreads, 0, stream, a, part, vectors);
        });
    });
    if (a.rows) {
        int64_t v_begin = a.offsets[a.segments - 1], g_begin = a.offsets[a.segments - 2];
        dim3 grid(unsigned((a.rows + kRowWarps - 1) / kRowWarps), 2);
        with_type(a.rows_dtype, [&](auto* type) {
            using T = std::remove_reference_t<decltype(*type)>;
            launch(rows_kernel<T>, grid, 32 * kRowWarps, 0, stream, a, v_begin, g_begin);
        });
    }
}

}  // namespace dino::cuda
