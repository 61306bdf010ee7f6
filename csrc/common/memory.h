// Zeroed, aligned memory, in huge pages where the system grants them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace kvspn {

// Not zeroed: each thread is the first to touch its own.
template <class T>
std::unique_ptr<T[]> scratch(size_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

constexpr size_t kHugePage = size_t(2) << 20;

// Whole pages between the two ends, huge from the next time that they are touched, where the system grants
// it.
inline void prefer_huge_pages(void* data, size_t bytes) {
    const uintptr_t page = 4096, begin = (uintptr_t(data) + page - 1) / page * page,
                    end = (uintptr_t(data) + bytes) / page * page;
    if (begin + kHugePage <= end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes, bool zeroed = true) {
        size_t align = bytes >= kHugePage ? kHugePage : 64;
        bytes_ = (bytes + align - 1) / align * align;
        if (!bytes_) return;
        data_ = std::aligned_alloc(align, bytes_);
        if (!data_) throw std::bad_alloc();
        prefer_huge_pages(data_, bytes_);
        if (zeroed) std::memset(data_, 0, bytes_);
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

// Many pieces that live equally long, side by side: even small ones lie in huge pages.
class Arena {
  public:
    // Zeroed, aligned to 64 bytes.
    template <class T>
    T* take(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > left_) {
            left_ = std::max(bytes, kChunk);
            chunks_.emplace_back(left_, false);
            next_ = chunks_.back().as<char>();
        }
        char* piece = next_;
        next_ += bytes, left_ -= bytes;
        return static_cast<T*>(std::memset(piece, 0, bytes));
    }
    void clear() { chunks_.clear(), left_ = 0; }

  private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kChunk = 0;  // each piece between guards of its own
#else
    static constexpr size_t kChunk = 32 * kHugePage;  // of addresses: memory follows when it is touched
#endif
    std::vector<Memory> chunks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace kvspn
