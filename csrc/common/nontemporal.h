// Non-temporal (streaming) stores for results that nobody reads soon: they do not fetch the lines that they overwrite.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dino {

constexpr int64_t kCached = 16 << 20;  // bytes of a result that a last-level cache may still hold for its reader

#if defined(__x86_64__)
// Whole cache lines at a time: parts of a line may leave the core one by one.
__attribute__((target("avx512f"))) inline void stream_lines(char* to, const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
#endif

// A copy with streaming stores if `nontemporal` and `to` is aligned to 16 bytes; `from` is. Other threads see it only
// after finish_streaming().
inline void stream_store(void* to, const void* from, int64_t bytes, bool nontemporal = true) {
#if defined(__x86_64__)
    static const bool lines = __builtin_cpu_supports("avx512f");
    if (nontemporal && lines && reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0)
        return stream_lines(static_cast<char*>(to), static_cast<const char*>(from), bytes);
    if (nontemporal && reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
        for (int64_t i = 0; i < bytes / 16; ++i)
            _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
        return;
    }
#endif
    std::memcpy(to, from, size_t(bytes));
}

inline void finish_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace dino
