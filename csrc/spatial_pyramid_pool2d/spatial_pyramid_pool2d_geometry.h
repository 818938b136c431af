// Where the bins of adaptive pooling lie. Shared by all devices.
#pragma once

#include <cstdint>

#include "common/feature_map.h"

namespace pyzoo {

// Bin i of `bins` along an axis of `size` pixels is [bin_begin, bin_end): never empty, and where sizes do not divide, neighbours share a
// pixel. (bins + 1) * size must fit Int.
template <class Int>
constexpr PZ_HD Int bin_begin(Int i, Int bins, Int size) {
  return i * size / bins;
}
template <class Int>
constexpr PZ_HD Int bin_end(Int i, Int bins, Int size) {
  return ((i + 1) * size + bins - 1) / bins;
}

// Whether each bin of a level is the union of bins of a finer one, as floor(i * H / h) = floor(i * k * H / (h * k)). The maximum does not
// mind that these may overlap by a pixel; the mean does.
inline bool is_union(int64_t height, int64_t width, int64_t finer_height, int64_t finer_width, const FeatureMap& map, bool average) {
  if (average && (map.height % finer_height != 0 || map.width % finer_width != 0)) return false;
  return finer_height % height == 0 && finer_width % width == 0;
}

inline void check_levels(const std::vector<int64_t>& sizes) {
  PZ_CHECK(!sizes.empty() && sizes.size() % 2 == 0, "levels must be pairs of height and width");
  for (const int64_t size : sizes) PZ_CHECK(size >= 1 && size <= INT32_MAX, "levels must be positive and below 2^31");
}

// output, grad_output and argmax: [N, C * bins], contiguous.
inline void check_features(const Tensor& t, const char* name, const FeatureMap& map, int64_t bins, DeviceType device = DeviceType::cpu) {
  check_tensor(t, name, 2);
  check_device(t, name, device);
  PZ_CHECK(t.shape[0] == map.images && t.shape[1] == map.channels * bins,
           std::string(name) + " must have shape [N, C * bins], got " + t.shape_string());
  check_contiguous(t, name);
}

}  // namespace pyzoo
