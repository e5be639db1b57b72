// Products of float32 matrices whose sums stay in registers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace dino {
namespace {

constexpr int64_t kLanes = 16;  // floats a vector; wider than some machines have, which then take several

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Floats on a cache line's border, zero at first.
class Buffer {
    std::unique_ptr<float, decltype(&std::free)> data_{nullptr, &std::free};

   public:
    explicit Buffer(int64_t size) {
        data_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(padded(size + 1)) * sizeof(float))));
        if (!data_) throw std::bad_alloc();
        std::fill_n(data_.get(), size, 0.0f);
    }
    float* operator+(int64_t offset) const { return data_.get() + offset; }
};

using Vector __attribute__((vector_size(64))) = float;

// C[M, 16 N] (+)= A[M, depth] B[depth, 16 N]; C stays in registers. A has any strides, rows of B and C are aligned.
template <int M, int N>
__attribute__((always_inline)) inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                                                const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    Vector sum[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sum[i][j] = add ? *reinterpret_cast<Vector*>(c + i * c_row + j * kLanes) : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector row[N];
        for (int j = 0; j < N; ++j) row[j] = *reinterpret_cast<const Vector*>(b + k * b_row + j * kLanes);
        for (int i = 0; i < M; ++i) {
            float factor = a[i * a_row + k * a_column];
            for (int j = 0; j < N; ++j) sum[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) *reinterpret_cast<Vector*>(c + i * c_row + j * kLanes) = sum[i][j];
}

template <int N>
__attribute__((always_inline)) inline void panel(int64_t rows, int64_t depth, const float* a, int64_t a_row,
                                                 int64_t a_column, const float* b, int64_t b_row, float* c,
                                                 int64_t c_row, bool add) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8)
        tile<8, N>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
    for (; i < rows; ++i) tile<1, N>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns], columns a multiple of 16. Inlined into kernels that have
// a version for each instruction set.
__attribute__((always_inline)) inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a,
                                                   int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                                                   float* c, int64_t c_row, bool add) {
    int64_t j = 0;  // 24 sums of 16 floats fill the registers of AVX-512
    for (; j + 3 * kLanes <= columns; j += 3 * kLanes)
        panel<3>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
    for (; j < columns; j += kLanes) panel<1>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
}

}  // namespace
}  // namespace dino
