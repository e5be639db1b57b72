// Writes past the caches, which would first fetch what is overwritten: for memory that nobody reads soon.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dino {

constexpr int64_t kCached = 16 << 20;  // bytes of a result that a last-level cache may still hold for its reader

#if defined(__x86_64__)
// Whole lines at a time, which otherwise may leave a core in parts.
__attribute__((target("avx512f"))) inline void stream_lines(char* to, const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
#endif

// `from` on a 16-byte border. Other threads see what was written only after finish_streams(). Without `past` it is a
// copy.
inline void stream(void* to, const void* from, int64_t bytes, bool past = true) {
#if defined(__x86_64__)
    static const bool lines = __builtin_cpu_supports("avx512f");
    if (past && lines && reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0)
        return stream_lines(static_cast<char*>(to), static_cast<const char*>(from), bytes);
    if (past && reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
        for (int64_t i = 0; i < bytes / 16; ++i)
            _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
        return;
    }
#endif
    std::memcpy(to, from, size_t(bytes));
}

inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace dino
