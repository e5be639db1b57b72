// Memory that a thread keeps from task to task, on a cache line's border.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dino {

constexpr size_t kHuge = 2 << 20;  // bytes of a huge page

template <class T>
class BufferOf {
    std::unique_ptr<T, decltype(&std::free)> data_{nullptr, &std::free};
    int64_t size_ = 0;

   public:
    T* fit(int64_t size) {  // what it held is lost if it grows
        if (size > size_) {
            size = (size + 63) / 64 * 64;
            size_ = 0;  // unless there is memory
            size_t bytes = size_t(size) * sizeof(T), border = bytes < kHuge ? 64 : kHuge;
            bytes = (bytes + border - 1) / border * border;
            data_.reset(static_cast<T*>(std::aligned_alloc(border, bytes)));
            if (!data_) throw std::bad_alloc();
#if defined(__linux__)
            if (border == kHuge) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // fewer address translations
#endif
            size_ = size;
        }
        return data_.get();
    }
};

using Buffer = BufferOf<float>;

}  // namespace dino
