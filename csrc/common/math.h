// Elementary functions that vectorize, and the mode of the floating-point unit.
#pragma once

#include "common/dtype.h"

namespace dino {

// Flushes denormals to zero: each costs about a hundred cycles, and a sharp softmax is full of them. Returns the mode
// to restore.
DINO_INLINE inline unsigned flush_denormals() {
#if defined(__x86_64__)
    unsigned mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode | 0x8040u);
    return mode;
#else
    return 0;
#endif
}

DINO_INLINE inline void restore_denormals([[maybe_unused]] unsigned mode) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(mode);
#endif
}

// Flushes them while it lives.
class FlushDenormals {
    unsigned mode = flush_denormals();

   public:
    FlushDenormals() {}
    ~FlushDenormals() { restore_denormals(mode); }
};

// exp(x) for x <= 0 within 2 ulp: 2^n * p(r), x = n ln 2 + r. Below -87 it is the smallest normal float.
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
