// The integer bins of RoIPool, in torchvision's arithmetic: the one copy of it. Girshick, "Fast R-CNN", 2015, section 2.1.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace pyzoo {

template <class G>
struct RoiPoolAxis {
  int64_t start = 0;
  G bin = 0;
  int64_t size;  // of the map along this axis; 0 for a box with a non-finite side: all its bins are empty

  PZ_HD RoiPoolAxis(G low, G high, G scale, int bins, int64_t map_size) : size(map_size) {
    const G limit = G(1 << 30), from = std::round(low * scale), to = std::round(high * scale);
    if (!(std::isfinite(from) && std::isfinite(to))) {
      size = 0;
      return;
    }
    const auto clamp = [limit](G v) { return int64_t(v < -limit ? -limit : v > limit ? limit : v); };
    start = clamp(from);
    const int64_t length = clamp(to) - start + 1;
    bin = G(length > 1 ? length : 1) / G(bins);
  }
  // Pixels [begin, end) of bin p.
  PZ_HD void pixels(int p, int64_t& begin, int64_t& end) const {
    const auto clip = [this](int64_t v) { return v < 0 ? 0 : v > size ? size : v; };
    begin = clip(start + int64_t(std::floor(G(p) * bin)));
    end = clip(start + int64_t(std::ceil(G(p + 1) * bin)));
  }
};

}  // namespace pyzoo
