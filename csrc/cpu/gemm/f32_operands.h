// The policy of linear layers' products by float32 multiply-adds; bfloat16 is widened as it is packed.
#pragma once

#include "cpu/gemm/panels.h"

namespace dino {
namespace {

constexpr int64_t kWidened = 16;  // rows widened at a time

DINO_MULTIVERSION inline void widen(const uint16_t* from, int64_t rows, int64_t columns, int64_t stride, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += columns)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[j] = bf16_to_float(from[j]);
}

inline void widen(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to) {
    for (int64_t i = 0; i < rows; ++i) copy(from + i * stride, columns * 4, to + i * columns);
}

// The transpose of [rows, columns], both multiples of 16
inline void transpose_values(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    transpose(from, rows, columns, to, to_row);
}

inline void transpose_values(const uint16_t* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    static thread_local Buffer buffer;
    float* wide = buffer.fit(kWidened * columns);
    for (int64_t i = 0; i < rows; i += kWidened, from += kWidened * columns) {
        widen(from, kWidened, columns, columns, wide);
        transpose(wide, kWidened, columns, to + i, to_row);
    }
}

template <class V>
struct F32Operands {
    using Value = V;
    static constexpr bool kPrefetch = false;  // panels of tokens are read in order: the hardware prefetches them
    static constexpr int64_t kChunk = 256;    // tokens at a time in a gradient of weights
    static constexpr int64_t kDepth = 128;    // values of the contraction at a time: 16 KiB of a panel

    struct Scope {
        Scope() {}
    };
    static int64_t floats(int64_t values) { return values; }
    static int64_t block(int64_t) { return kBlock; }  // tokens a task
    static int64_t whole(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

    static const float* rows(const Value* x, int64_t count, int64_t depth, Buffer& copy) {
        if (std::is_same_v<Value, float> && count == whole(count)) return reinterpret_cast<const float*>(x);
        float* to = copy.fit(whole(count) * depth);
        widen(x, 1, count * depth, 0, to);
        std::fill(to + count * depth, to + whole(count) * depth, 0.0f);
        return to;
    }

    template <class Work>
    static void multiply(const float* x, int64_t rows, int64_t depth, const float* panel, float* c, bool add, bool,
                         Work&& interleave) {
        static const Microkernel kernel = microkernel_for(DType::f32, Products::f32);
        static const int64_t vectors = std::min<int64_t>(kernel.vectors, kPanel / kLanes);
        for (int64_t k = 0; k < depth; k += kDepth) {
            Product p{std::min(kDepth, depth - k), depth, 1, kPanel, kPanel, add || k > 0};
            for (int64_t i = 0; i < rows; i += kTile) {
                for (int64_t j = 0; j < kPanel; j += vectors * kLanes)
                    kernel.tile(vectors, p, x + i * depth + k, panel + k * kPanel + j, c + i * kPanel + j);
                interleave();
            }
        }
    }
    static int64_t steps(int64_t rows, int64_t depth) { return rows / kTile * ((depth + kDepth - 1) / kDepth); }

    static void finish(const float* c, int64_t rows, const float* bias, Value* to, int64_t stride) {
        dino::finish(c, rows, bias, to, stride);
    }

    static void finish_tokens(const float* c, int64_t rows, float* to) { std::copy_n(c, rows * kPanel, to); }

    static void pack(const Value* weights, int64_t depth, int64_t outputs, bool transposed, int64_t first, float* to) {
        if (transposed)
            widen(weights + first, depth, kPanel, outputs, to);
        else
            transpose_values(weights + first * depth, kPanel, depth, to, kPanel);
    }

    static void pack_tokens(const Value* x, int64_t stride, int64_t rows, int64_t room, float* to) {
        rows = std::max<int64_t>(rows, 0);
        next_panel(x, rows, stride, false);
        widen(x, rows, kPanel, stride, to);
        std::fill(to + rows * kPanel, to + room * kPanel, 0.0f);
    }
    static int64_t token_offset(int64_t row) { return row * kPanel; }

    static void pack_transposed(const Value* x, int64_t count, int64_t narrow, float* to) {
        static thread_local BufferOf<Value> buffer;
        int64_t even = count / 16 * 16, left = count - even;
        transpose_values(x, even, narrow, to, dino::whole(count));
        if (even == dino::whole(count)) return;
        Value* rest = buffer.fit(32 * narrow);
        std::copy_n(x + even * narrow, left * narrow, rest);
        std::fill(rest + left * narrow, rest + 32 * narrow, Value(0));
        transpose_values(rest, dino::whole(count) - even, narrow, to + even, dino::whole(count));
    }
};

}  // namespace
}  // namespace dino
