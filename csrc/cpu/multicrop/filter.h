// The weights of a resize along one direction, as Pillow has them.
#pragma once

#include "cpu/multicrop/parts.h"

namespace dino {

DINO_INLINE inline double bicubic(double x) {  // a = -0.5
    double near = (1.5 * x - 2.5) * x * x + 1.0, far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// Output x is the sum of inputs first[x] <= i < end[x], each times weights[(i - first[x]) * size + x] in 2^-22. Taps
// beyond weigh 0.
struct Filter {
    int32_t *first, *end, *weights;
    int64_t size, taps;  // outputs; weights of each, a multiple of `unit`

    // first[x] is a multiple of `border`; if flipped, the outputs come in the opposite order.
    void make(int64_t inputs, int64_t outputs, int64_t border, int64_t unit, bool flip);

   private:
    BufferOf<int32_t> first_, begin_, end_, weights_;
    BufferOf<double> center_, sum_, exact_;
};

}  // namespace dino
