// Weighted sums of the resize; multicrop_resample.cpp includes this once for each instruction set, with DINO_SUMS its
// namespace, DINO_SUMS_BYTES the width of its vectors and DINO_SUMS_TARGET its attribute.
//
// A unit of 32 bits is the levels of two neighbors as 16-bit numbers, and a processor multiplies and adds such pairs in
// one instruction. A weight, of 24 bits, takes two: its bits above the lowest kLowBits, and these.
namespace DINO_SUMS {

using Units __attribute__((vector_size(DINO_SUMS_BYTES))) = int32_t;

DINO_SUMS_TARGET DINO_INLINE inline Units pair_products(Units a, Units b) {
#if !defined(__x86_64__)
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#elif DINO_SUMS_BYTES == 64
    return (Units)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif DINO_SUMS_BYTES == 32
    return (Units)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return (Units)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

// to[i] = half a level and the sum over pairs of weights times from[pair * stride + i], for i < kLanes
DINO_SUMS_TARGET DINO_INLINE inline void block(const int32_t* from, int64_t stride, const Filter& f, int64_t output,
                                               int32_t* to) {
    constexpr int64_t kWidth = sizeof(Units) / sizeof(int32_t), kVectors = 3;
    for (int64_t i = 0; i < kLanes; i += kVectors * kWidth) {
        Units high[kVectors] = {}, low[kVectors];
        for (Units& sum : low) sum = Units{} + (1 << (kWeightBits - 1));
        for (int64_t pair = 0; pair < f.pairs[output]; ++pair) {
            Units weight_high = Units{} + f.high[pair * f.size + output];
            Units weight_low = Units{} + f.low[pair * f.size + output];
            for (int64_t v = 0; v < kVectors; ++v) {
                Units x;
                std::memcpy(&x, from + pair * stride + i + v * kWidth, sizeof x);
                high[v] += pair_products(x, weight_high);
                low[v] += pair_products(x, weight_low);
            }
        }
        for (int64_t v = 0; v < kVectors; ++v) {
            Units sum = (high[v] << kLowBits) + low[v];
            std::memcpy(to + i + v * kWidth, &sum, sizeof sum);
        }
    }
}

// Sums [n, kLanes] of outputs x .. x + n - 1, the other way round if flipped, from columns that begin with pixel
// `start`
DINO_SUMS_TARGET void columns(const int32_t* from, int64_t start, const Filter& f, int64_t x, int64_t n, bool flip,
                              int32_t* to) {
    for (int64_t i = 0; i < n; ++i)
        block(from + (f.first[x + i] - start) / 2 * kLanes, kLanes, f, x + i, to + (flip ? n - 1 - i : i) * kLanes);
}

// Sums [width] of output row y
DINO_SUMS_TARGET void rows(const int32_t* from, int64_t width, const Filter& f, int64_t y, int32_t* to) {
    for (int64_t i = 0; i < width; i += kLanes) block(from + i, width, f, y, to + i);
}

}  // namespace DINO_SUMS
