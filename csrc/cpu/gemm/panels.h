// What the products of linear layers share, whatever instructions compute them: panels of 32 columns of the result. The
// class P of templates is a policy, AmxOperands or F32Operands. README.md explains all of it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/units.h"

namespace dino {
namespace {

constexpr int64_t kPanel = 32;   // columns of a product at a time
constexpr int64_t kBlock = 128;  // tokens a task, at most
constexpr int64_t kPiece = 4;    // rows of a panel's sums that vector work takes at a time

inline int64_t whole(int64_t rows) { return (rows + 31) / 32 * 32; }

template <class Value>
constexpr DType kDTypeOf = std::is_same_v<Value, float> ? DType::f32 : DType::bf16;

// Prefetches rows of the panel that comes next: hardware prefetchers do not follow such strides.
template <class Value>
inline void next_panel(const Value* x, int64_t rows, int64_t stride, bool to_write) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = kPanel; j < 2 * kPanel; j += 64 / sizeof(Value))
            if (to_write)
                __builtin_prefetch(x + i * stride + j, 1);
            else
                __builtin_prefetch(x + i * stride + j, 0);
}

// to [rows, 32] = c [rows, 32] + bias, rounded
template <DType D>
DINO_INLINE inline void finish_values(const float* c, int64_t rows, const float* bias, void* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, c += kPanel)
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) put<D>(to, i * stride + j, bias ? c[j] + bias[j] : c[j]);
}

DINO_MULTIVERSION inline void finish(const float* c, int64_t rows, const float* bias, float* to, int64_t stride) {
    finish_values<DType::f32>(c, rows, bias, to, stride);
}

DINO_MULTIVERSION inline void finish(const float* c, int64_t rows, const float* bias, uint16_t* to, int64_t stride) {
    finish_values<DType::bf16>(c, rows, bias, to, stride);
}

// sums [columns] += the rows of x, `stride` apart; of floats in double precision: where a bias' gradient cancels, AdamW
// scales up what rounding left.
DINO_MULTIVERSION inline void add_rows_to(float* sums, const uint16_t* x, int64_t rows, int64_t columns,
                                          int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) sums[j] += bf16_to_float(x[j]);
}

DINO_MULTIVERSION inline void add_rows_to(double* sums, const float* x, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride)
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) sums[j] += x[j];
}

template <class Value>
using SumOf = std::conditional_t<std::is_same_v<Value, float>, double, float>;

// Pieces of vector work interleaved with the steps of an AMX product: the processor runs both at the same time, but
// only instructions that are close together.
template <class Piece>
struct Interleave {
    const Piece& piece;
    int64_t pieces, steps, done = 0, due = 0;

    void operator()() {
        for (due += pieces; due >= steps && done < pieces; due -= steps) piece(done++);
    }
    void rest() {
        while (done < pieces) piece(done++);
    }
};

// Whether a packed operand of that many floats takes more than half of a second-level cache of 2 MiB.
inline bool exceeds_half_l2(int64_t floats) { return floats > 1 << 18; }

// multiply(panel, interleave) for one panel after another, each interleaved with finish(panel, row), by kPiece rows, of
// the panel before it.
template <class Multiply, class Finish>
inline void for_each_panel(int64_t panels, int64_t rows, int64_t steps, const Multiply& multiply,
                           const Finish& finish) {
    for (int64_t i = 0; i <= panels; ++i) {
        auto piece = [&](int64_t j) { finish(i - 1, j * kPiece); };
        Interleave<decltype(piece)> interleave{piece, i ? (rows + kPiece - 1) / kPiece : 0, steps};
        if (i < panels) multiply(i, interleave);
        interleave.rest();
    }
}

// The sums of the panel that for_each_panel multiplies and of the one that it finishes.
struct Sums {
    Buffer buffer;
    float* of(int64_t panel, int64_t row = 0) {
        return buffer.fit(2 * kBlock * kPanel) + (panel % 2 * kBlock + row) * kPanel;
    }
};

// All panels of the weights: [outputs / 32, P::floats(depth), 32]
template <class P>
void pack_weights(const void* weights, int64_t depth, int64_t outputs, bool transposed, int threads, float* to) {
    parallel_for(outputs / kPanel, threads, [&](int64_t i) {
        P::pack(static_cast<const typename P::Value*>(weights), depth, outputs, transposed, i * kPanel,
                to + i * kPanel * P::floats(depth));
    });
}

}  // namespace
}  // namespace dino
