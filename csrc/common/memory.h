// Huge pages, and buffers that a thread keeps from task to task.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dino {

constexpr size_t kHugePage = 2 << 20;  // bytes

// Asks for huge pages where [data, data + bytes) holds whole ones: tens of MiB of new memory cost more in faults of
// 4 KiB pages than in arithmetic.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
    uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory that only grows, aligned to a cache line or, from 2 MiB on, to a huge page.
template <class T>
class BufferOf {
    std::unique_ptr<T, decltype(&std::free)> data_{nullptr, &std::free};
    int64_t size_ = 0;

   public:
    T* fit(int64_t size) {  // what it held is lost if it grows
        if (size > size_) {
            size = (size + 63) / 64 * 64;
            size_ = 0;  // unless there is memory
            size_t bytes = size_t(size) * sizeof(T), border = bytes < kHugePage ? 64 : kHugePage;
            bytes = (bytes + border - 1) / border * border;
            data_.reset(static_cast<T*>(std::aligned_alloc(border, bytes)));
            if (!data_) throw std::bad_alloc();
            use_huge_pages(data_.get(), bytes);
            size_ = size;
        }
        return data_.get();
    }
};

using Buffer = BufferOf<float>;

}  // namespace dino
