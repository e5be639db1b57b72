// The loops of the resize over pairs of 16-bit numbers; included after vectors.h, where they are needed.
namespace DINO_VECTORS {

// to[i] = half a level and the sum over pairs of weights times from[pair * stride + i], for i < kLanes
DINO_TARGET DINO_INLINE inline void block(const int32_t* from, int64_t stride, const Weights& w, int64_t output,
                                          int32_t* to) {
    constexpr int64_t kWidth = sizeof(Units) / sizeof(int32_t), kVectors = 3;
    const int64_t pairs = (w.end[output] - w.first[output] + 1) / 2;
    for (int64_t i = 0; i < kLanes; i += kVectors * kWidth) {
        Units high[kVectors] = {}, low[kVectors];
        for (Units& sum : low) sum = Units{} + (1u << (kWeightBits - 1));
        for (int64_t pair = 0; pair < pairs; ++pair) {
            Units weight_high = Units{} + uint32_t(w.high[pair * w.size + output]);
            Units weight_low = Units{} + uint32_t(w.low[pair * w.size + output]);
            for (int64_t v = 0; v < kVectors; ++v) {
                Units x = load(from + pair * stride + i + v * kWidth);
                high[v] += pair_products(x, weight_high);
                low[v] += pair_products(x, weight_low);
            }
        }
        for (int64_t v = 0; v < kVectors; ++v) store((high[v] << kLowBits) + low[v], to + i + v * kWidth);
    }
}

DINO_TARGET void columns(const int32_t* from, int64_t start, const Weights& w, int64_t x, int64_t n, bool flip,
                         int32_t* to) {
    for (int64_t i = 0; i < n; ++i)
        block(from + (w.first[x + i] - start) / 2 * kLanes, kLanes, w, x + i, to + (flip ? n - 1 - i : i) * kLanes);
}

DINO_TARGET void rows(const int32_t* from, int64_t width, const Weights& w, int64_t y, int32_t* to) {
    for (int64_t i = 0; i < width; i += kLanes) block(from + i, width, w, y, to + i);
}

DINO_TARGET void levels(const int32_t* sums, int64_t n, uint8_t* to) {
    using Signed __attribute__((vector_size(DINO_BYTES))) = int32_t;
    constexpr int kWidth = sizeof(Units) / sizeof(int32_t), kParts = sizeof(Units) / 16;
    for (int64_t i = 0; i < n; i += 4 * kWidth) {
        Units x[4], ordered;
        for (int v = 0; v < 4; ++v) x[v] = (Units)((Signed)load(sums + i + v * kWidth) >> kWeightBits);
        Units packed = pack_16(pack_32(x[0], x[1]), pack_32(x[2], x[3]));  // 16 bytes of each in turn
        for (int u = 0; u < kWidth; ++u) ordered[u] = packed[u % kParts * 4 + u / kParts];
        if (n - i >= int64_t(sizeof ordered))
            store(ordered, to + i);
        else
            std::memcpy(to + i, &ordered, size_t(n - i));
    }
}

}  // namespace DINO_VECTORS
