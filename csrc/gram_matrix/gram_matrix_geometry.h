// What the Gram matrix is taken of, and matrices of its shape. Shared by all devices.
#pragma once

#include <algorithm>
#include <string>

#include "common/feature_map.h"

namespace pyzoo {

// [N, C, M] as [N, C, 1, M].
inline Tensor with_rows(const Tensor& t) {
  if (t.ndim != 3) return t;
  Tensor out = t;
  out.ndim = 4;
  out.shape[3] = t.shape[2], out.shape[2] = 1;
  out.stride[3] = t.stride[2], out.stride[2] = t.shape[2] * t.stride[2];
  return out;
}

// Square matrices [N, C, C], or one for all images, of any dtype and strides.
struct Matrices {
  void* data;
  DType dtype;
  int64_t channels, image_stride, row_stride, column_stride;

  Matrices(const Tensor& t, const char* name, const FeatureMap& map, bool broadcast, DeviceType device = DeviceType::cpu) {
    check_device(t, name, device);
    check_floating(t, name);
    PZ_CHECK(t.ndim == 3 || (broadcast && t.ndim == 2), std::string(name) + " must have shape [N, C, C], got " + t.shape_string());
    const int at = t.ndim - 2;
    const bool shared = at == 0 || (broadcast && t.shape[0] == 1);
    PZ_CHECK(t.shape[at] == map.channels && t.shape[at + 1] == map.channels && (shared || t.shape[0] == map.images),
             std::string(name) + " must have a row and a column for each channel of features, got shape " + t.shape_string());
    data = t.data, dtype = t.dtype;
    channels = map.channels, row_stride = t.stride[at], column_stride = t.stride[at + 1];
    image_stride = shared ? 0 : t.stride[0];
  }
  template <class T>
  T* at(int64_t image) const {
    return static_cast<T*>(data) + image * image_stride;
  }
};

inline double gram_scale(const FeatureMap& map, bool normalize) {
  return normalize ? 1 / std::max(1.0, double(map.channels) * double(map.pixels())) : 1;
}

inline void check_matrices(const Tensor& t, const char* name, const FeatureMap& map, DeviceType device = DeviceType::cpu) {
  check_tensor(t, name, 3);
  check_device(t, name, device);
  const int64_t c = map.channels;
  PZ_CHECK(t.shape[0] == map.images && t.shape[1] == c && t.shape[2] == c,
           std::string(name) + " must have shape [N, C, C], got " + t.shape_string());
  PZ_CHECK(t.numel() == 0 || ((c == 1 || (t.stride[2] == 1 && t.stride[1] == c)) && (map.images == 1 || t.stride[0] == c * c)),
           std::string(name) + " must be contiguous");
}

// Checks what gram_matrix_bwd is called with.
struct GramBackward {
  FeatureMap map, grad;
  Matrices matrices;

  GramBackward(const Tensor& grad_gram, const Tensor& features, const Tensor& grad_features, DeviceType device)
      : map(with_rows(features), "features", device),
        grad(with_rows(grad_features), "grad_features", device),
        matrices(grad_gram, "grad_gram", map, false, device) {
    grad.check_written("grad_features");
    PZ_CHECK((grad_gram.dtype == DType::f64) == (features.dtype == DType::f64),
             "grad_gram must be float64 where features are, and only there");
    check_dtype(grad_features, "grad_features", features.dtype);
    PZ_CHECK(features.ndim == grad_features.ndim && std::equal(features.shape, features.shape + features.ndim, grad_features.shape),
             "grad_features must have the shape of features, got " + grad_features.shape_string());
  }
};

// Checks what gram_loss_fwd is called with.
struct GramLoss {
  FeatureMap map;
  Matrices targets;

  GramLoss(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, DeviceType device)
      : map(with_rows(features), "features", device), targets(target, "target", map, true, device) {
    check_matrices(difference, "difference", map, device);
    const DType sums = features.dtype == DType::f64 ? DType::f64 : DType::f32;
    check_dtype(difference, "difference", sums);
    check_dtype(loss, "loss", sums);
    check_device(loss, "loss", device);
    PZ_CHECK(loss.numel() == 1, "loss must be one number, got shape " + loss.shape_string());
  }
};

}  // namespace pyzoo
