// The plain view of a tensor that every kernel receives. Knows nothing of Python or torch.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

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

// The checks here guard memory only; the friendly ones are in Python, once per op. A macro, so that the message is made only where it is
// needed: to make those of a call takes longer than some kernels.
#define PZ_CHECK(ok, ...) ((ok) ? void() : throw std::invalid_argument(__VA_ARGS__))

inline void check_tensor(const Tensor& t, const char* name, int ndim) {
  PZ_CHECK(t.ndim == ndim, std::string(name) + " must have " + std::to_string(ndim) + " dimensions, got shape " + t.shape_string());
}

inline void check_device(const Tensor& t, const char* name, DeviceType device) {
  PZ_CHECK(t.device_type == device, std::string(name) + " must be on " + (device == DeviceType::cpu ? "the CPU" : "a CUDA device"));
}
inline void check_cpu(const Tensor& t, const char* name) { check_device(t, name, DeviceType::cpu); }

inline void check_dtype(const Tensor& t, const char* name, DType dtype) {
  PZ_CHECK(t.dtype == dtype, std::string(name) + " must be " + dtype_name(dtype) + ", got " + dtype_name(t.dtype));
}

inline void check_floating(const Tensor& t, const char* name) {
  PZ_CHECK(is_floating(t.dtype), std::string(name) + " must be float32, float64, float16 or bfloat16, got " + dtype_name(t.dtype));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    PZ_CHECK(t.shape[i] == 1 || t.stride[i] == stride || t.numel() == 0, std::string(name) + " must be contiguous");
    stride *= t.shape[i];
  }
}

}  // namespace pyzoo
