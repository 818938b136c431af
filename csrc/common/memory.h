// Where kernels keep what they work on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyzoo {

// Asks the operating system to back a large, fresh buffer with huge pages. Without it, first writing 50 MB costs 15 ms of page
// faults on Linux, more than RoIAlign itself; where pages exist already it changes nothing.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (end > begin + 2 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Scratch memory for vectors: begins at a cache line, since a vector that straddles two costs twice as much to read and more to write.
// Not initialised.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <class T>
using Scratch = std::vector<T, LineAllocator<T>>;

// Room for n elements; what was there is lost.
template <class T>
T* room(Scratch<T>& scratch, int64_t n) {
  if (int64_t(scratch.size()) < n) {
    scratch.clear();
    scratch.resize(size_t(n));
    prefer_huge_pages(scratch.data(), n * int64_t(sizeof(T)));
  }
  return scratch.data();
}

}  // namespace pyzoo
