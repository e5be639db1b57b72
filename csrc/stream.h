// Writes past the caches, which would first fetch what is overwritten: for memory that nobody reads soon.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace dino {

constexpr int64_t kCached = 16 << 20;  // bytes of a result that a last-level cache may still hold for its reader

// `from` on a 16-byte border. Other threads see what was written only after finish_streams(). Without `past` it is a
// copy.
inline void stream(void* to, const void* from, int64_t bytes, bool past = true) {
#if defined(__x86_64__)
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
