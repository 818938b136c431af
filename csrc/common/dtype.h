// Element types, and the switch from a run-time dtype to a compile-time one.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define PZ_HD __host__ __device__
#else
#define PZ_HD
#endif

namespace pyzoo {

enum class DType : uint8_t { f32, f64, f16, bf16, i32, i64, u8 };

// Storage of the 16-bit types: arithmetic always happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr bool is_floating(DType t) { return t <= DType::bf16; }

constexpr const char* dtype_name(DType t) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8"};
  return names[static_cast<int>(t)];
}

constexpr int64_t dtype_size(DType t) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(t)];
}

PZ_HD inline float to_float(BFloat16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

PZ_HD inline float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  uint32_t u;
  float f;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact in float
    f = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

PZ_HD inline float to_float(float x) { return x; }
PZ_HD inline double to_float(double x) { return x; }

template <class T>
PZ_HD inline T from_float(float x) {
  return static_cast<T>(x);
}

template <>
PZ_HD inline BFloat16 from_float<BFloat16>(float x) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 64)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <>
PZ_HD inline Half from_float<Half>(float x) {  // round to nearest even; NaN stays NaN; beyond 65520 becomes inf
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};
  if (u < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa, the float adder rounds
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {uint16_t(sign | (u - 0x3f000000u))};
  }
  return {uint16_t(sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - 0x1c000))};
#endif
}

// From the accumulation type back to the storage type.
template <class T, class A>
PZ_HD inline T from_acc(A x) {
  if constexpr (sizeof(T) == 8) return x;
  else return from_float<T>(x);
}

// The type that sums are kept in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

// Calls f with a value of the C++ type that the floating dtype names.
template <class F>
auto dispatch_floating(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(double{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
    default: return f(float{});
  }
}

// Element i of a buffer of any dtype, as G.
template <class G>
PZ_HD inline G load_as(const void* data, DType t, int64_t i) {
  switch (t) {
    case DType::f64: return static_cast<G>(static_cast<const double*>(data)[i]);
    case DType::f16: return static_cast<G>(to_float(static_cast<const Half*>(data)[i]));
    case DType::bf16: return static_cast<G>(to_float(static_cast<const BFloat16*>(data)[i]));
    case DType::i32: return static_cast<G>(static_cast<const int32_t*>(data)[i]);
    case DType::i64: return static_cast<G>(static_cast<const int64_t*>(data)[i]);
    default: return static_cast<G>(static_cast<const float*>(data)[i]);
  }
}

}  // namespace pyzoo
