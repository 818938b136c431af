// The coupling as a kernel walks over it. Shared by all devices.
#pragma once

#include <algorithm>
#include <string>

#include "common/memory.h"
#include "common/tensor.h"

namespace pyzoo {

struct Operand {
  void* data;
  int64_t step;              // between the elements of a row
  int64_t stride[kMaxDims];  // between rows, by outer dimension
};

// out = base +- update as rows of `columns` elements: dimensions that lie behind one another in all three tensors are merged.
struct Coupling {
  Operand base, update, out;
  DType half, update_type;
  bool minus;
  int outer = 0;  // dimensions over the rows
  int64_t shape[kMaxDims], columns = 1, numel;

  Coupling(const Tensor& b, const Tensor& u, const Tensor& o, bool minus)
      : base{b.data}, update{u.data}, out{o.data}, half(b.dtype), update_type(u.dtype), minus(minus), numel(o.numel()) {
    int order[kMaxDims], n = 0;  // dimensions by falling stride of out
    for (int d = 0; d < o.ndim; ++d) {
      if (o.shape[d] == 1) continue;
      int i = n++;
      for (; i > 0 && o.stride[order[i - 1]] < o.stride[d]; --i) order[i] = order[i - 1];
      order[i] = d;
    }
    const Tensor* tensors[] = {&b, &u, &o};
    Operand* operands[] = {&base, &update, &out};
    for (int i = 0; i < n; ++i) {  // from the outermost: each dimension is merged into the one before it or follows it
      const int d = order[i];
      const bool merge = i > 0 && std::all_of(tensors, tensors + 3,
                                              [&](const Tensor* t) { return t->stride[order[i - 1]] == t->shape[d] * t->stride[d]; });
      if (!merge) ++outer;
      shape[outer - 1] = merge ? shape[outer - 1] * o.shape[d] : o.shape[d];
      for (int t = 0; t < 3; ++t) operands[t]->stride[outer - 1] = tensors[t]->stride[d];
    }
    if (outer > 0) columns = shape[--outer];
    for (Operand* operand : operands) operand->step = n > 0 ? operand->stride[outer] : 1;
  }
};

inline Coupling coupling_of(const Tensor& base, const char* base_name, const Tensor& update, const char* update_name, const Tensor& out,
                            const char* out_name, bool minus, DeviceType device = DeviceType::cpu) {
  PZ_CHECK(base.dtype == DType::f32 || base.dtype == DType::f64,
           std::string(base_name) + " must be float32 or float64, got " + dtype_name(base.dtype));
  PZ_CHECK(update.dtype == base.dtype || (base.dtype == DType::f32 && is_floating(update.dtype) && update.dtype != DType::f64),
           std::string(update_name) + " must be " + dtype_name(base.dtype) + (base.dtype == DType::f32 ? " or narrower" : "") + ", got " +
               dtype_name(update.dtype));
  check_dtype(out, out_name, base.dtype);
  const auto check_shape = [&](const Tensor& t, const char* name) {
    check_device(t, name, device);
    PZ_CHECK(t.ndim == base.ndim && std::equal(t.shape, t.shape + t.ndim, base.shape),
             std::string(name) + " must have shape " + base.shape_string() + ", got " + t.shape_string());
  };
  check_shape(base, base_name), check_shape(update, update_name), check_shape(out, out_name);
  for (int d = 0; d < out.ndim; ++d) PZ_CHECK(out.shape[d] < 2 || out.stride[d] != 0, std::string(out_name) + " must not be expanded");
  if (device == DeviceType::cpu && out.data != base.data) prefer_huge_pages(out.data, out.numel() * dtype_size(out.dtype));
  return Coupling(base, update, out, minus);
}

}  // namespace pyzoo
