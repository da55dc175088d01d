// Memory for weights and scratch: aligned to cache lines, and in large pages if it is large.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gru {

// An array of zeros with a fixed size. Throws std::bad_alloc.
template <typename T>
class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(int64_t size) {
        if (size <= 0) return;
        const std::size_t large = std::size_t(1) << 21, needed = std::size_t(size) * sizeof(T);
        const std::size_t alignment = needed >= large / 2 ? large : 64;
        const std::size_t bytes = (needed + alignment - 1) / alignment * alignment;
        data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        // Prefetchers stop at the end of a page, so large pages are faster. If the system refuses, nothing breaks.
        if (alignment == large) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
        std::memset(static_cast<void*>(data_), 0, bytes);
        size_ = size;
    }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    T* get() { return data_; }
    const T* get() const { return data_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return size_; }

   private:
    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    T* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace gru
