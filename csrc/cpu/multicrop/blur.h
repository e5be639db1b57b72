// A Gaussian blur as Pillow has it: three box filters along rows, then three along columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/multicrop/parts.h"

namespace dino {

constexpr int kPasses = 3;
constexpr int64_t kReach = 2;  // pixels that a box reaches to each side at most

inline Box box_of(float sigma) {               // three passes of it are about a Gaussian
    float variance = sigma * sigma / kPasses;  // float and double where Pillow has them
    float length = float(std::sqrt(12.0 * variance + 1.0)), l = float(std::floor((length - 1.0) / 2.0));
    float a = (2 * l + 1) * (l * (l + 1) - 3 * variance);
    a /= 6 * (variance - (l + 1) * (l + 1));
    float width = l + a;
    int64_t radius = int64_t(width);
    uint32_t whole = uint32_t(float(1 << 24) / (width * 2 + 1));
    return {radius, whole, ((1u << 24) - uint32_t(2 * radius + 1) * whole) / 2};
}

// A plane with kReach more on every side, so that a pass is one long loop; what it leaves in these is replaced.
template <class T>
struct Bordered {
    int64_t size, row;

    void fit(int64_t side) {
        size = side;
        row = size + 2 * kReach;
        x_ = buffers_[0].fit(row * row + kSlack);
        y_ = buffers_[1].fit(row * row + kSlack);
    }
    T* inside() { return x_ + kReach * row + kReach; }

    // pass(box, x, step, n, to): to[i] = the box around x[i], of numbers a step apart
    template <class Pass>
    void blur(const Box& box, Pass pass) {
        int64_t inner = kReach * row, n = size * row;  // from the first to the last row of the plane
        for (int i = 0; i < kPasses; ++i, std::swap(x_, y_)) {
            repeat_sides(x_);
            pass(box, x_ + inner, 1, n, y_ + inner);
        }
        for (int i = 0; i < kPasses; ++i, std::swap(x_, y_)) {
            repeat_ends(x_);
            pass(box, x_ + inner, row, n, y_ + inner);
        }
    }

   private:
    BufferOf<T> buffers_[2];
    T *x_, *y_;

    void repeat_sides(T* x) const {
        for (int64_t y = 0; y < size; ++y) {
            T* line = x + (y + kReach) * row;
            line[0] = line[1] = line[kReach];
            line[row - 2] = line[row - 1] = line[row - 1 - kReach];
        }
    }
    void repeat_ends(T* x) const {
        for (int64_t i = 0; i < kReach; ++i) {
            std::copy_n(x + kReach * row, row, x + i * row);
            std::copy_n(x + (row - 1 - kReach) * row, row, x + (row - 1 - i) * row);
        }
    }
};

}  // namespace dino
