// What vec.inc and the kernels need from outside the target regions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"
#include "isa.h"
#include "parallel.h"
#include "transpose.h"

#define PZ_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define PZ_APART __attribute__((noinline))
#else
#define PZ_APART __attribute__((noinline, noclone))
#endif
#define PZ_LAMBDA __attribute__((always_inline))  // [&](...) PZ_LAMBDA { }

// PZ_SHUFFLE(integer vector type, a, b, indices...)
#if defined(__clang__) || __GNUC__ >= 12
#define PZ_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PZ_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

namespace pyzoo {

// Calls f with a value of the type that sums over the floating dtype are kept in. Kernels of that type read and write the dtype's elements
// through with_storage: what does not depend on them is compiled once for float and the 16-bit types.
template <class F>
auto dispatch_sums(DType t, F&& f) {
  return t == DType::f64 ? f(double{}) : f(float{});
}

template <class A, class F>
PZ_INLINE void with_storage(DType t, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) f(double{});
  else if (t == DType::f16) f(Half{});
  else if (t == DType::bf16) f(BFloat16{});
  else f(float{});
}

template <class A>
bool stored_as_sums(DType t) {
  return dtype_size(t) == sizeof(A);
}

}  // namespace pyzoo
