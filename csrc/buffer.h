// Memory that a thread keeps from task to task, on a cache line's border.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dino {

template <class T>
class BufferOf {
    std::unique_ptr<T, decltype(&std::free)> data_{nullptr, &std::free};
    int64_t size_ = 0;

   public:
    T* fit(int64_t size) {  // what it held is lost if it grows
        if (size > size_) {
            size_ = (size + 63) / 64 * 64;
            data_.reset(static_cast<T*>(std::aligned_alloc(64, size_t(size_) * sizeof(T))));
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }
};

using Buffer = BufferOf<float>;

}  // namespace dino
