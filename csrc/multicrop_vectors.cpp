// multicrop_vectors.h for each instruction set, and the choice among them.
#include <algorithm>

#include "multicrop.h"
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
#include "multicrop_vectors.h"
//
#include "multicrop_color_vectors.h"
#undef DINO_VECTORS
#undef DINO_BYTES
#undef DINO_TARGET
#undef DINO_ANY
#undef DINO_X86

#if defined(__x86_64__)
#define DINO_VECTORS vectors_32
#define DINO_BYTES 32
#define DINO_TARGET __attribute__((target("avx2")))
#define DINO_ANY __m256i
#define DINO_X86(op) _mm256_##op
#include "multicrop_vectors.h"
//
#include "multicrop_color_vectors.h"
#undef DINO_VECTORS
#undef DINO_BYTES
#undef DINO_TARGET
#undef DINO_ANY
#undef DINO_X86

#define DINO_VECTORS vectors_64
#define DINO_BYTES 64
#define DINO_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define DINO_ANY __m512i
#define DINO_X86(op) _mm512_##op
#include "multicrop_vectors.h"
//
#include "multicrop_color_vectors.h"
#endif

#define DINO_LOOPS(vectors)                                                                                         \
    {vectors::columns,         vectors::rows,        vectors::levels,  vectors::blur,    vectors::blend_with_level, \
     vectors::blend_with_luma, vectors::sum_of_luma, vectors::to_gray, vectors::turn_hue}

Loops widest() {
#if defined(__AVX512VNNI__) || (defined(__x86_64__) && !defined(DINO_ONE_VERSION))
    if (__builtin_cpu_supports("avx512vnni")) return DINO_LOOPS(vectors_64);
#endif
#if defined(__AVX2__) || (defined(__x86_64__) && !defined(DINO_ONE_VERSION))
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
