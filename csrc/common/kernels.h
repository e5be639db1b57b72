// Launchers of the CPU kernels, and what they share. No torch header anywhere: pointers, sizes, strides.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace dino {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int64_t width_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }  // bytes

// Compiled once for the baseline and once for each wider instruction set; the loader picks at run time,
// so that a wheel built on a new machine runs on an old one. DINO_ONE_VERSION leaves what -march says, to measure.
#if defined(DINO_ONE_VERSION)
#define DINO_MULTIVERSION
#elif defined(__x86_64__) && __GNUC__ >= 12
#define DINO_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#elif defined(__x86_64__)  // older compilers know no levels here, only single features
#define DINO_MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define DINO_MULTIVERSION
#endif

// Into a function compiled for several instruction sets everything must be inlined, to be compiled for them too.
#define DINO_INLINE __attribute__((always_inline))

// Runs body(task) for task = 0 .. tasks-1 on `threads` threads. Each thread begins with a range of its own, so
// results must not depend on which thread runs which task.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

struct DinoLossArgs {
    const void* student;  // [V*B, K], row stride student_stride elements
    const void* teacher;  // [2*B, K]
    const float* center;  // [K]
    void* grad;           // [V*B, K], dtype of the student; may be the student itself
    float* batch_center;  // [K]
    int64_t views, batch, outputs, student_stride, teacher_stride, grad_stride;
    DType student_dtype, teacher_dtype;
    float student_temp, teacher_temp;
    int threads;
};
double dino_loss(const DinoLossArgs& args);

struct DinoHeadLossArgs {
    const void *student_z, *teacher_z;  // [V*B, D], [2*B, D], contiguous as all of these
    const void *student_w, *teacher_w;  // [K, D]
    const float* center;                // [K]
    void *grad_z, *grad_w;              // [V*B, D]; [K, D], or null where it is not wanted
    float* batch_center;                // [K]
    int64_t views, batch, outputs, channels;
    DType dtype;  // of rows, weights and gradients
    float student_temp, teacher_temp;
    int threads;
};
double dino_head_loss(const DinoHeadLossArgs& args);

struct EmaArgs {
    float* const* targets;
    const void* const* sources;
    const int64_t* sizes;
    const DType* source_dtypes;
    int64_t count;
    double momentum;
    int threads;
};
void ema_update(const EmaArgs& args);

struct AdamwEmaArgs {
    float* student;  // flat, as all up to the copies
    void* grad;      // of the first `cleared` segments it becomes zero
    float *exp_avg, *exp_avg_sq, *teacher;
    void *student_16, *teacher_16;  // or null
    DType grad_dtype, student_16_dtype, teacher_16_dtype;
    const int64_t* offsets;  // [segments + 1]
    int64_t segments;
    int64_t* steps;                                                   // [segments]
    const bool *decayed, *frozen;                                     // [segments]
    double lr, weight_decay, momentum, clip_norm, beta1, beta2, eps;  // clip_norm 0: none
    // Or null: the rows [rows, channels] of a weight-normed layer, whose v is the last segment and g the one before;
    // they take the place of the last segment's copies.
    void *student_rows, *teacher_rows;
    DType rows_dtype;
    int64_t rows, channels;  // channels at most kMostChannels
    int64_t cleared;
    int threads;
};
constexpr int64_t kMostChannels = 4096;
// Whether a gradient's norm was not finite; then nothing was changed.
bool adamw_ema_step(const AdamwEmaArgs& args);

// Which of T rows a tensor has: numbers that rise.
struct RowsOf {
    const int32_t* numbers;
    int64_t count;  // negative: all rows
};

struct AddLayerNormArgs {
    const void *x, *branch;  // [T, C] and [B, C] contiguous, as all of these
    const float* scale;      // [B], or null for ones
    RowsOf branch_rows, normed_rows;
    const float *weight, *bias;
    void *total, *normed;  // [T, C] and [N, C], dtypes of x and of branch
    float *mean, *rstd;    // [N]
    int64_t tokens, channels;
    DType x_dtype, branch_dtype;
    float eps;
    int threads;
};
void add_layer_norm(const AddLayerNormArgs& args);

struct AddLayerNormBackwardArgs {
    const void *grad_total, *grad_normed;  // [T, C], may be null; [N, C]
    const void* total;                     // [T, C]
    const float *mean, *rstd;              // [N]
    const float *weight, *scale;           // [C]; [B], or null for ones
    RowsOf branch_rows, normed_rows;
    void *grad_x, *grad_branch;      // [T, C]; [B, C], null where it would equal grad_x
    float* partial;                  // [groups, 2, C]: gradients of weight and bias
    float *grad_weight, *grad_bias;  // [C], added to
    int64_t tokens, channels, groups;
    DType x_dtype, branch_dtype;
    int threads;
};
void add_layer_norm_backward(const AddLayerNormBackwardArgs& args);

struct BiasGeluArgs {
    const void* x;      // [T, C] contiguous, as all of these
    const float* bias;  // [C]
    void* out;          // [T, C]
    int64_t tokens, channels;
    DType dtype;
    int threads;
};
void bias_gelu(const BiasGeluArgs& args);

struct BiasGeluBackwardArgs {
    const void *grad_out, *x;  // [T, C]
    const float* bias;         // [C]
    void* grad_x;              // [T, C]
    float* partial;            // [groups, C]: gradients of the bias
    void* out;                 // [T, C], gelu(x + bias) once more, or null
    int64_t tokens, channels, groups;
    DType dtype;
    int threads;
};
void bias_gelu_backward(const BiasGeluBackwardArgs& args);

struct DropPathAddArgs {
    const void *x, *branch;  // [T, C] contiguous; x may be null
    const float* scale;      // [T]
    void* out;               // [T, C], dtype of x
    int64_t tokens, channels;
    DType out_dtype, branch_dtype;
    int threads;
};
void drop_path_add(const DropPathAddArgs& args);

// What multiplies in the kernels of linear layers, where all channels are multiples of 32 and everything is contiguous:
// fused multiply-adds of floats, or matrix tiles (AMX), for processors that have them.
enum class Products : int { library, floats, tiles };
// The fastest here, of f32 or bf16; the library's where the processor multiplies bfloat16 but has no tiles.
Products best_products(DType dtype);

// Which of two operands lies as panels of tokens, as the products take them.
enum class Packed { neither, grad, x };

struct AddProductArgs {
    float* into;           // [O, I] contiguous, as all of these
    const void *grad, *x;  // [T, O], [T, I]
    int64_t tokens, outputs, inputs;
    int threads;
    // The rest is for add_linear.
    DType dtype = DType::f32;  // of grad and x, or bf16
    Products products = Products::library;
    float* into_bias = nullptr;  // [O] += sums over T of grad, which then is not packed; or null
    Packed packed = Packed::neither;
};
void add_product(const AddProductArgs& args);  // of float32

struct LinearArgs {
    const void *x, *weight;  // [T, D]; [O, D], or [D, O] if transposed
    const float* bias;       // [O], or null
    void* out;               // [T, O]
    int64_t tokens, depth, outputs;
    bool transposed;
    DType dtype;  // bf16 or f32
    Products products;
    int threads;
};
void linear(const LinearArgs& args);
void add_linear(const AddProductArgs& args);

struct WeightNormProductBackwardArgs {
    const void *grad, *x;    // of logits [T, K]; [T, D]
    const float *v, *g;      // [K, D]; [K]
    float *grad_v, *grad_g;  // [K, D] and [K], added to; grad_g may be null
    bool fresh;              // grad_v is written, whatever it held
    int64_t tokens, rows, channels;
    DType dtype;        // bf16 or f32
    Products products;  // tiles: of bf16
    int threads;
};
void weight_norm_product_backward(const WeightNormProductBackwardArgs& args);

struct MlpArgs {
    const void *x, *weight1, *weight2;  // [T, C], [H, C], [C, H]
    const float *bias1, *bias2;         // [H], [C]
    void *out, *hidden;                 // [T, C]; the first product without bias [T, H], or null
    int64_t tokens, channels, hidden_channels;
    DType dtype;        // bf16 or f32
    Products products;  // tiles: of bf16
    int threads;
};
void mlp(const MlpArgs& args);

struct MlpBackwardArgs {
    const void *grad, *x, *hidden, *weight1, *weight2;  // hidden: null if the product is to be made once more
    const float* bias1;
    void* grad_x;
    float *grad_weight1, *grad_bias1, *grad_weight2, *grad_bias2;  // added to
    int64_t tokens, channels, hidden_channels;
    DType dtype;
    Products products;
    int threads;
};
void mlp_backward(const MlpBackwardArgs& args);

// into [columns] += sums of the columns of from [rows, columns]
void add_column_sums(float* into, const void* from, DType dtype, int64_t rows, int64_t columns, int threads);

// into += from
void add_to(float* into, const void* from, DType dtype, int64_t count, int threads);

struct WeightNormArgs {
    const float *v, *g;  // [K, D] contiguous, as all of these; [K]
    void* w;             // [K, D]
    int64_t rows, channels;
    DType dtype;  // of w
    int threads;
};
void weight_norm(const WeightNormArgs& args);

struct WeightNormBackwardArgs {
    const void* grad_w;      // [K, D]
    const float *v, *g;      // [K, D]; [K]
    float *grad_v, *grad_g;  // [K, D] and [K], added to; grad_g may be null
    int64_t rows, channels;
    DType dtype;  // of grad_w
    int threads;
};
void weight_norm_backward(const WeightNormBackwardArgs& args);

struct AttentionArgs {
    const void* qkv;        // [T, 3, H, D], strides below, adjacent channels
    const int32_t* bounds;  // [sequences + 1]
    void* out;              // [T, H, D] contiguous, as all that follow; read by the backward pass
    float* lse;             // [H, T]; read by the backward pass
    const void* grad_out;   // [T, H, D]; null in the forward pass
    void* grad;             // [T, 3, H, D]; null in the forward pass
    int64_t sequences, tokens, heads, channels, token_stride, part_stride, head_stride;
    DType dtype;
    float scale;
    int bf16_products;  // of bfloat16 tensors, where the processor has them: 1 pairs, 2 tiles of pairs; 0 widens them
    int threads;
};
void attention(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);

// Drawn parameters of a crop; dino_kernels/ops/multicrop.py says what they are and has the same layout.
struct Crop {
    enum : uint8_t { kBrightness, kContrast, kSaturation, kHue };
    int32_t left, top, right, bottom, size;
    float brightness, contrast, saturation, hue, blur;
    uint8_t order[4];  // of the jitter's four steps
    bool flip, jitter, grayscale, solarize;
};
static_assert(sizeof(Crop) == 48);

struct MultiCropArgs {
    const uint8_t* const* pixels;                   // [images], each [H, W, 3] with adjacent pixels
    const int64_t *heights, *widths, *row_strides;  // [images]; strides in bytes
    const Crop* crops;                              // [images, views]
    void* const* out;  // [views], each [images, 3, size, size], contiguous but for the first dimension
    const int64_t *sizes, *out_strides;  // [views]; strides in elements from image to image
    int64_t images, views;
    bool levels;  // bytes as they are, else normalized and in dtype
    DType dtype;
    int threads;
};
// Throws std::invalid_argument for a crop [images, views] that does not fit its image or output.
void check_crops(const Crop* crops, int64_t images, int64_t views, const int64_t* heights, const int64_t* widths,
                 const int64_t* sizes);
// Checks the crops before anything is written.
void multicrop(const MultiCropArgs& args);

// Denormal results become zero while it lives: each costs a hundred cycles on most CPUs, and a sharp
// softmax over many outputs is full of them.
class FlushDenormals {
#if defined(__x86_64__)
    unsigned saved = __builtin_ia32_stmxcsr();

   public:
    FlushDenormals() { __builtin_ia32_ldmxcsr(saved | 0x8040u); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
#else
   public:
    FlushDenormals() {}
#endif
};

// --- 16-bit floats -----------------------------------------------------------------------------------
// Bit arithmetic instead of F16C / AVX512-BF16 intrinsics: plain loops over it vectorise on every target.

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float bf16_to_float(uint16_t h) { return bits_as<float>(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float f) {
    uint32_t u = bits_as<uint32_t>(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

inline float half_to_float(uint16_t h) {
    // Shift exponent and mantissa into place; the product re-biases them and is exact for subnormals.
    float magnitude = bits_as<float>(uint32_t(h & 0x7fffu) << 13) * 0x1p112f;
    uint32_t u = bits_as<uint32_t>(magnitude);
    u = (h & 0x7c00u) == 0x7c00u ? u | 0x7f800000u : u;  // infinity and NaN
    return bits_as<float>(u | (uint32_t(h & 0x8000u) << 16));
}

inline uint16_t float_to_half(float f) {
    uint32_t u = bits_as<uint32_t>(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    // Subnormal halves: adding 0.5 aligns the mantissa so that the FPU does the rounding.
    uint32_t small = bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - 0x3f000000u;
    uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
    uint32_t most = 0x7c00u + (uint32_t(u > 0x7f800000u) << 9);  // infinity, or NaN for NaN
    normal = normal < most ? normal : most;
    uint32_t h = u < 0x38800000u ? small : normal;
    return uint16_t(sign | h);
}

// One value of a tensor as float, and the inverse, for loops compiled for their dtypes: see with_dtype.
template <DType D>
DINO_INLINE inline float value(const void* x, int64_t i) {
    if constexpr (D == DType::f32) return static_cast<const float*>(x)[i];
    uint16_t bits = static_cast<const uint16_t*>(x)[i];
    return D == DType::bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

template <DType D>
DINO_INLINE inline void put(void* x, int64_t i, float f) {
    if constexpr (D == DType::f32)
        static_cast<float*>(x)[i] = f;
    else
        static_cast<uint16_t*>(x)[i] = D == DType::bf16 ? float_to_bf16(f) : float_to_half(f);
}

// The value that `put` then stands for.
template <DType D>
DINO_INLINE inline float rounded(float f) {
    if constexpr (D == DType::f32) return f;
    return D == DType::bf16 ? bf16_to_float(float_to_bf16(f)) : half_to_float(float_to_half(f));
}

// body(integral constant of the dtype)
template <class Body>
DINO_INLINE inline void with_dtype(DType dtype, const Body& body) {
    if (dtype == DType::f32)
        body(std::integral_constant<DType, DType::f32>());
    else if (dtype == DType::bf16)
        body(std::integral_constant<DType, DType::bf16>());
    else
        body(std::integral_constant<DType, DType::f16>());
}

// `count` values from `offset` on, as float: float32 is returned in place, others go through `scratch`.
DINO_INLINE inline const float* load(const void* data, DType dtype, int64_t offset, int64_t count, float* scratch) {
    if (dtype == DType::f32) return static_cast<const float*>(data) + offset;
    const uint16_t* x = static_cast<const uint16_t*>(data) + offset;
    if (dtype == DType::bf16)
        for (int64_t i = 0; i < count; ++i) scratch[i] = bf16_to_float(x[i]);
    else
        for (int64_t i = 0; i < count; ++i) scratch[i] = half_to_float(x[i]);
    return scratch;
}

// The inverse of load: `count` floats to `offset`, rounded to the dtype.
DINO_INLINE inline void store(void* data, DType dtype, int64_t offset, int64_t count, const float* from) {
    if (dtype == DType::f32) {
        std::memcpy(static_cast<float*>(data) + offset, from, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    if (dtype == DType::bf16)
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(from[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
}

// exp(x) for x <= 0 within 2 ulp: 2^n * p(r), x = n ln 2 + r. Below -87 it stays at the smallest normal
// float.
DINO_INLINE inline float exp_negative(float x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low mantissa bits
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 0x1.715476p0f + kRound, n = shifted - kRound;
    float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float p = 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * bits_as<float>((bits_as<uint32_t>(shifted) - bits_as<uint32_t>(kRound) + 127u) << 23);
}

// 2^y for -126 <= y <= 0 within 2 ulp, or 8e-5, a tenth of bfloat16's rounding: 2^n * p(y - n), n = round(y).
template <DType D>
DINO_INLINE inline float exp2_negative(float y) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves n in the low mantissa bits
    float shifted = y + kRound, f = y - (shifted - kRound), p;
    if constexpr (D == DType::bf16) {
        p = 0.0551716164f;
        p = p * f + 0.242611632f;
        p = p * f + 0.693261027f;
        p = p * f + 0.999928057f;
    } else {
        p = 0x1.5bba14p-10f;
        p = p * f + 0x1.3cea88p-7f;
        p = p * f + 0x1.c6b752p-5f;
        p = p * f + 0x1.ebf9bcp-3f;
        p = p * f + 0x1.62e42ap-1f;
        p = p * f + 1.0f;
    }
    return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
}

}  // namespace dino
