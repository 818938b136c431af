// Boxes, their order and what suppression takes. Shared by all devices.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "common/tensor.h"

namespace pyzoo {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

template <class T>
PZ_HD T area_of(const Box<T>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

// Whether a kept box suppresses another one. These operations in this order define the overlap: with NaN, std::max and std::min return
// their first argument, and here that is the kept box's.
template <class T>
PZ_HD bool suppresses(const Box<T>& kept, T kept_area, const Box<T>& b, T area, T threshold) {
  const T width = (b.x2 < kept.x2 ? b.x2 : kept.x2) - (kept.x1 < b.x1 ? b.x1 : kept.x1);
  const T height = (b.y2 < kept.y2 ? b.y2 : kept.y2) - (kept.y1 < b.y1 ? b.y1 : kept.y1);
  const T inter = (T(0) < width ? width : T(0)) * (T(0) < height ? height : T(0));
  return inter / (kept_area + area - inter) > threshold;
}

// The largest T that is not above x: overlap > one exactly when overlap > the other.
template <class T>
inline T round_down(double x) {
  const T y = static_cast<T>(x);
  return double(y) > x ? std::nextafter(y, -std::numeric_limits<T>::infinity()) : y;
}

// Ascending keys for descending scores: NaN first, -0 equal to 0.
PZ_HD inline uint32_t descending_key(float score) {
  score += 0.0f;
  uint32_t u;
  std::memcpy(&u, &score, 4);
  return score != score ? 0 : u >> 31 ? u : ~u & 0x7fffffffu;
}
PZ_HD inline uint64_t descending_key(double score) {
  score += 0.0;
  uint64_t u;
  std::memcpy(&u, &score, 8);
  return score != score ? 0 : u >> 63 ? u : ~u & 0x7fffffffffffffffu;
}

inline void check_shape(const Tensor& t, const char* name, const Tensor& boxes, const char* form) {
  bool ok = t.ndim == boxes.ndim - 1;
  for (int i = 0; ok && i < t.ndim; ++i) ok = t.shape[i] == boxes.shape[i];
  PZ_CHECK(ok,
           std::string(name) + " must have shape " + form + " for boxes of shape " + boxes.shape_string() + ", got " + t.shape_string());
}

inline void check_nms(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, const Tensor& keep, DeviceType device) {
  PZ_CHECK((boxes.ndim == 2 || boxes.ndim == 3) && boxes.shape[boxes.ndim - 1] == 4,
           "boxes must have shape [N, 4] or [B, N, 4], got " + boxes.shape_string());
  check_device(boxes, "boxes", device), check_floating(boxes, "boxes");
  PZ_CHECK(boxes.numel() <= std::numeric_limits<int32_t>::max(),  // box indices have 32 bits here
           "boxes must have fewer than 2^31 elements, got shape " + boxes.shape_string());
  const char* form = boxes.ndim == 2 ? "[N]" : "[B, N]";
  check_shape(scores, "scores", boxes, form);
  check_device(scores, "scores", device), check_floating(scores, "scores");
  if (idxs) {
    check_shape(*idxs, "idxs", boxes, form);
    check_device(*idxs, "idxs", device);
    if (device == DeviceType::cpu || !is_floating(idxs->dtype)) check_dtype(*idxs, "idxs", DType::i64);
  }
  PZ_CHECK(keep.ndim == boxes.ndim - 1 && (keep.ndim == 1 || keep.shape[0] == boxes.shape[0]),
           std::string("keep must have shape ") + (boxes.ndim == 2 ? "[M]" : "[B, M]") + " for boxes of shape " + boxes.shape_string() +
               ", got " + keep.shape_string());
  check_device(keep, "keep", device), check_dtype(keep, "keep", DType::i64);
}

}  // namespace pyzoo
