// What fresh memory costs, and where in it a cache line begins.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

namespace {

// Asks for pages of 2 MiB. Fresh memory is given page by page, and each fault costs more than clearing its 4
// KiB; large matrices that are read once a step wait for address translation besides. Where the system does
// not give them, nothing changes.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// A thread's workspace between calls. A fresh one is given page by page, each cleared by the system, which
// takes longer than a short call's work. Large ones are not kept. AUFAST_FRESH_WORKSPACE=1 keeps none, so
// that tests can fill new memory with NaN.
class KeptWorkspace {
 public:
  // Null where the caller must bring memory of its own.
  void* get(int64_t bytes) {
    static const bool fresh = std::getenv("AUFAST_FRESH_WORKSPACE") != nullptr;
    if (fresh || bytes > kMost) return nullptr;
    if (bytes <= size_) return memory_.get();
    memory_.reset();
    size_ = (bytes + kPage - 1) / kPage * kPage;
    memory_.reset(std::aligned_alloc(kPage, size_));
    if (memory_ == nullptr) {
      size_ = 0;
      return nullptr;
    }
    prefer_huge_pages(memory_.get(), size_);
    return memory_.get();
  }

 private:
  static constexpr int64_t kMost = 16 << 20, kPage = 1 << 21;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// The same as elements; NaN in memory of the caller's own where none is kept.
template <class T>
T* workspace(KeptWorkspace& kept, std::vector<T>& own, int64_t count) {
  if (void* memory = kept.get(count * sizeof(T))) return static_cast<T*>(memory);
  own.assign(count, std::numeric_limits<T>::quiet_NaN());
  return own.data();
}

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

// The first place in a buffer from which the element `offset` further on begins a cache line.
template <class T>
T* on_lines(T* buffer, int64_t offset = 0) {
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffer + offset) / sizeof(T) % kLine<T>);
  return buffer + (kLine<T> - past) % kLine<T>;
}

}  // namespace
