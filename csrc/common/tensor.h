// The plain view of a tensor that every kernel receives. Knows nothing of Python or torch.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"

namespace pyzoo {

constexpr int kMaxDims = 6;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

enum class DeviceType : int32_t { cpu = 1, cuda = 2 };  // DLPack's numbers; there are others

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  DeviceType device_type = DeviceType::cpu;
  int32_t device_id = 0;
  void* stream = nullptr;  // that its owner works in: where kernels for a GPU are launched
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};                                                   // in elements; may be 0 or negative
  std::shared_ptr<void> owner;                                                     // keeps an exported (not borrowed) buffer alive
  const void* exporter = nullptr;                                                  // what it came through
  std::shared_ptr<void> (*allocate)(const Tensor& like, int64_t bytes) = nullptr;  // memory beside it, from who owns it

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  // Uninitialised memory for n elements on the same device; kernels launched so far in its stream may use it after it is let go.
  template <class T>
  std::shared_ptr<T> scratch(int64_t n) const {
    if (!allocate) throw std::runtime_error("a tensor of this type cannot provide scratch memory: use torch tensors");
    return std::static_pointer_cast<T>(allocate(*this, n * int64_t(sizeof(T))));
  }
  std::string shape_string() const {
    std::string s = "[";
    for (int i = 0; i < ndim; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
  }
};

template <class T>
std::string text(const T& x) {
  if constexpr (std::is_same_v<T, Tensor>) return x.shape_string();
  else if constexpr (std::is_arithmetic_v<T>) return std::to_string(x);
  else return x;
}

// The checks here guard memory only; the friendly ones are in Python, once per op. A message comes in parts, which become text only
// when it is needed: strings made for every check were a tenth of a call on small input.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string() + ... + text(parts)));
}
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

inline void check_tensor(const Tensor& t, const char* name, int ndim) {
  check(t.ndim == ndim, name, " must have ", ndim, " dimensions, got shape ", t);
}

inline void check_device(const Tensor& t, const char* name, DeviceType device) {
  check(t.device_type == device, name, " must be on ", device == DeviceType::cpu ? "the CPU" : "a CUDA device");
}
inline void check_cpu(const Tensor& t, const char* name) { check_device(t, name, DeviceType::cpu); }

inline void check_dtype(const Tensor& t, const char* name, DType dtype) {
  check(t.dtype == dtype, name, " must be ", dtype_name(dtype), ", got ", dtype_name(t.dtype));
}

inline void check_floating(const Tensor& t, const char* name) {
  check(is_floating(t.dtype), name, " must be float32, float64, float16 or bfloat16, got ", dtype_name(t.dtype));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    check(t.shape[i] == 1 || t.stride[i] == stride || t.numel() == 0, name, " must be contiguous");
    stride *= t.shape[i];
  }
}

}  // namespace pyzoo
