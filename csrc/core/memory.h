// Zeroed, aligned memory, in huge pages where the system grants them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace kvspn {

// Not zeroed: each thread is the first to touch its own.
template <class T>
std::unique_ptr<T[]> scratch(size_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes) {
        constexpr size_t kHugePage = size_t(2) << 20;
        size_t align = bytes >= kHugePage ? kHugePage : 64;
        bytes_ = (bytes + align - 1) / align * align;
        if (!bytes_) return;
        data_ = std::aligned_alloc(align, bytes_);
        if (!data_) throw std::bad_alloc();
        if (align == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
        std::memset(data_, 0, bytes_);
    }
    Memory(Memory&& other) noexcept { swap(other); }
    Memory& operator=(Memory&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Memory() { std::free(data_); }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }

  private:
    void swap(Memory& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace kvspn
