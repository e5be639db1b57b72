// The loops of multicrop over pairs of 16-bit numbers, which processors multiply and add in one instruction that
// compilers do not find. vectors.cpp includes this once for each instruction set, with DINO_VECTORS its
// namespace, DINO_BYTES the width of its vectors, DINO_TARGET its attribute and DINO_X86(op) the name of an intrinsic.
namespace DINO_VECTORS {

using Bytes __attribute__((vector_size(DINO_BYTES))) = uint8_t;
using Units __attribute__((vector_size(DINO_BYTES))) = uint32_t;  // two 16-bit numbers, or a 32-bit one

// Each works on 16 bytes, or on every 16 bytes of wider vectors: widening and packing undo each other.
#if defined(__x86_64__)
using Any = DINO_ANY;
#define DINO_OP(name, op) \
    DINO_TARGET DINO_INLINE inline Units name(Units a, Units b) { return (Units)DINO_X86(op)((Any)a, (Any)b); }
DINO_OP(zip_low_bytes, unpacklo_epi8)
DINO_OP(zip_high_bytes, unpackhi_epi8)
DINO_OP(zip_low, unpacklo_epi16)  // of 16-bit numbers
DINO_OP(zip_high, unpackhi_epi16)
DINO_OP(add_16, add_epi16)
DINO_OP(pair_products, madd_epi16)
DINO_OP(pack_32, packs_epi32)   // to 16 bits, saturated
DINO_OP(pack_16, packus_epi16)  // to bytes, saturated
#undef DINO_OP
#else  // any processor with vectors of 16 bytes
using Shorts __attribute__((vector_size(16))) = int16_t;
using Ints __attribute__((vector_size(16))) = int32_t;
inline Units zip_low_bytes(Units a, Units b) {
    return (Units)DINO_SHUFFLE(Bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Units zip_high_bytes(Units a, Units b) {
    return (Units)DINO_SHUFFLE(Bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Units zip_low(Units a, Units b) { return (Units)DINO_SHUFFLE(Shorts, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Units zip_high(Units a, Units b) { return (Units)DINO_SHUFFLE(Shorts, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Units add_16(Units a, Units b) { return (Units)((Shorts)a + (Shorts)b); }
inline Units pair_products(Units a, Units b) {
    Ints x = (Ints)a, y = (Ints)b;
    return (Units)((x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16));
}
// No number here needs more than 16 bits.
inline Units pack_32(Units a, Units b) { return (Units)DINO_SHUFFLE(Shorts, a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
inline Shorts saturated(Units a) {
    Shorts x = (Shorts)a & ~((Shorts)a >> 15);
    return x | (Shorts)(x > 255);
}
inline Units pack_16(Units a, Units b) {
    return (Units)DINO_SHUFFLE(Bytes, saturated(a), saturated(b), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                               30);
}
#endif

#if DINO_BYTES == 64
DINO_TARGET DINO_INLINE inline Units add_products(Units sum, Units a, Units b) {
    return (Units)_mm512_dpwssd_epi32((Any)sum, (Any)a, (Any)b);
}
#else
DINO_TARGET DINO_INLINE inline Units add_products(Units sum, Units a, Units b) { return sum + pair_products(a, b); }
#endif

DINO_TARGET DINO_INLINE inline Units load(const void* from) {
    Units x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

DINO_TARGET DINO_INLINE inline void store(Units x, void* to) { std::memcpy(to, &x, sizeof x); }

// --- blur --------------------------------------------------------------------------------------------

// A pixel from the sums of those that count whole and of those that count in part: weights of 24 bits in two halves.
DINO_TARGET DINO_INLINE inline Units weighted(Units pair, Units high, Units low) {
    return add_products(add_products(Units{} + (1u << 23), pair, low) >> 12, pair, high) >> 12;
}

DINO_TARGET void blur(const Box& box, const int16_t* x, int64_t step, int64_t n, int16_t* to) {
    const Units high = Units{} + (box.whole >> 12 | box.part >> 12 << 16),
                low = Units{} + ((box.whole & 0xfffu) | (box.part & 0xfffu) << 16);
    for (int64_t i = 0; i < n; i += int64_t(sizeof(Units) / sizeof *x)) {
        Units whole = load(x + i), part = add_16(load(x + i - step), load(x + i + step));
        if (box.radius == 1) {
            whole = add_16(whole, part);
            part = add_16(load(x + i - 2 * step), load(x + i + 2 * step));
        }
        store(pack_32(weighted(zip_low(whole, part), high, low), weighted(zip_high(whole, part), high, low)), to + i);
    }
}

}  // namespace DINO_VECTORS
