// Transposing a matrix. Elements are moved as 2, 4 or 8 bytes, never converted: types of one size share one function, and all kernels.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyzoo {

template <int kBytes>
struct __attribute__((may_alias)) Raw {
  std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>> bits;
};

template <class T>  // a Raw
void transpose_raw(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows, int64_t columns, bool fetch);

// dst[j * dst_stride + i] = src[i * src_stride + j] for i < rows, j < columns. fetch: src is not expected in the caches.
template <class T>
void transpose(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows, int64_t columns, bool fetch = false) {
  using R = Raw<sizeof(T)>;
  transpose_raw(reinterpret_cast<const R*>(src), src_stride, reinterpret_cast<R*>(dst), dst_stride, rows, columns, fetch);
}

}  // namespace pyzoo
