#include "cpu/multicrop/filter.h"

#include <algorithm>
#include <cmath>

namespace dino {
namespace {

DINO_INLINE inline int32_t fixed(double weight) {
    weight *= 1 << kWeightBits;
    return int32_t(weight + (weight < 0.0 ? -0.5 : 0.5));
}

// The weights of input first[x] + tap for all outputs at once: a loop over the few taps of one would not fill a vector.
DINO_MULTIVERSION
void weigh(int64_t size, int32_t tap, double inverse, const int32_t* first, const int32_t* begin, const int32_t* end,
           const double* center, double* __restrict sum, double* __restrict exact) {
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) {
        int32_t input = first[x] + tap;
        double weight = bicubic(std::abs((double(input) - center[x] + 0.5) * inverse));
        exact[x] = input >= begin[x] && input < end[x] ? weight : 0.0;
        sum[x] += exact[x];
    }
}

DINO_MULTIVERSION
void round(int64_t size, const double* exact, const double* sum, int32_t* __restrict weights) {
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) weights[x] = fixed(exact[x] / sum[x]);
}

}  // namespace

void Filter::make(int64_t inputs, int64_t outputs, int64_t border, int64_t unit, bool flip) {
    size = outputs;
    double scale = double(inputs) / double(size), stretch = std::max(scale, 1.0), support = 2.0 * stretch;
    first = first_.fit(size);
    end = end_.fit(size);
    int32_t* begin = begin_.fit(size);
    double *center = center_.fit(size), *sum = sum_.fit(size);
    taps = 0;
    for (int64_t x = 0; x < size; ++x) {
        center[x] = (double(flip ? size - 1 - x : x) + 0.5) * scale;
        begin[x] = int32_t(std::max(center[x] - support + 0.5, 0.0));
        end[x] = int32_t(std::min(int64_t(center[x] + support + 0.5), inputs));
        first[x] = begin[x] & -int32_t(border);
        taps = std::max<int64_t>(taps, end[x] - first[x]);
        sum[x] = 0.0;
    }
    taps = (taps + unit - 1) / unit * unit;
    double* exact = exact_.fit(taps * size);
    weights = weights_.fit(taps * size);
    for (int64_t tap = 0; tap < taps; ++tap)
        weigh(size, int32_t(tap), 1.0 / stretch, first, begin, end, center, sum, exact + tap * size);
    for (int64_t tap = 0; tap < taps; ++tap) round(size, exact + tap * size, sum, weights + tap * size);
}

}  // namespace dino
