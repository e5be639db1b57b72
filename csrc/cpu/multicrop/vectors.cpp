// The loops of multicrop for each instruction set, and the choice among them.
#include <algorithm>

#include "cpu/multicrop/parts.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dino {
namespace {

#define DINO_VECTORS vectors_16
#define DINO_BYTES 16
#define DINO_TARGET
#define DINO_ANY __m128i
#define DINO_X86(op) _mm_##op
#include "cpu/multicrop/vectors.h"
#include "cpu/multicrop/vectors_color.h"
#include "cpu/multicrop/vectors_pairs.h"
#undef DINO_VECTORS
#undef DINO_BYTES
#undef DINO_TARGET
#undef DINO_ANY
#undef DINO_X86

#if DINO_HAS_AVX2
#define DINO_VECTORS vectors_32
#define DINO_BYTES 32
#define DINO_TARGET __attribute__((target("avx2")))
#define DINO_ANY __m256i
#define DINO_X86(op) _mm256_##op
#include "cpu/multicrop/vectors.h"
#include "cpu/multicrop/vectors_color.h"
#include "cpu/multicrop/vectors_pairs.h"
#undef DINO_VECTORS
#undef DINO_BYTES
#undef DINO_TARGET
#undef DINO_ANY
#undef DINO_X86
#endif

#if DINO_HAS_QUADS
#define DINO_VECTORS vectors_64
#define DINO_BYTES 64
#define DINO_TARGET DINO_QUADS
#define DINO_ANY __m512i
#define DINO_X86(op) _mm512_##op
#include "cpu/multicrop/vectors.h"
#include "cpu/multicrop/vectors_color.h"
#endif

#define DINO_COLORS(v) v::blur, v::blend_with_level, v::blend_with_luma, v::sum_of_luma, v::to_gray, v::turn_hue
#define DINO_LOOPS(v) {v::columns, v::rows, v::levels, DINO_COLORS(v)}

Loops widest() {
#if DINO_HAS_QUADS
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        return {nullptr, nullptr, nullptr, DINO_COLORS(vectors_64)};
#endif
#if DINO_HAS_AVX2
    if (__builtin_cpu_supports("avx2")) return DINO_LOOPS(vectors_32);
#endif
    return DINO_LOOPS(vectors_16);
}

}  // namespace

const Loops& widest_loops() {
    static const Loops loops = widest();
    return loops;
}

}  // namespace dino
