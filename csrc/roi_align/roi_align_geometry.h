// Where RoIAlign samples: the one copy of this arithmetic, in exactly torchvision's order of operations, since the grid size and
// the edge of the image are discontinuous in it. He et al., "Mask R-CNN", 2017, section 3.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace pyzoo {

// FPN level of a box (Lin et al. 2017, equation 1): floor(canonical_level + log2(sqrt(area) / canonical_scale) + eps), counted
// from k_min and clamped to the levels there are.
struct LevelMap {
  int k_min;
  double canonical_scale, canonical_level, eps;

  template <class G>
  PZ_HD int level(G x1, G y1, G x2, G y2, int levels) const {
    const G size = std::sqrt((x2 - x1) * (y2 - y1));
    const G k = std::floor(G(canonical_level) + std::log2(size / G(canonical_scale)) + G(eps)) - G(k_min);
    return k >= G(levels - 1) ? levels - 1 : k > 0 ? int(k) : 0;  // NaN: the first level
  }
};

// One axis of one box: `bins` bins of `grid` samples each.
template <class G>
struct RoiAxis {
  G start, bin, grid;

  PZ_HD RoiAxis(G low, G high, G scale, bool aligned, int bins, int sampling_ratio) {
    const G offset = aligned ? G(0.5) : G(0);
    start = low * scale - offset;
    G size = (high * scale - offset) - start;
    if (!aligned && size < G(1)) size = G(1);
    bin = size / G(bins);
    grid = sampling_ratio > 0 ? G(sampling_ratio) : std::ceil(bin);
  }
  // Boxes with a non-finite side, or one of more than 2^31 samples, pool to zero.
  PZ_HD bool finite() const { return std::isfinite(start) && std::isfinite(bin) && grid < G(2147483648.0); }
  PZ_HD G sample(int p, int64_t i) const { return start + G(p) * bin + G(float(i) + 0.5f) * bin / grid; }
  // Only samples in [-1, size] count. Of a bin of very many samples, walk just the range that can lie there.
  PZ_HD void range(int p, int64_t size, int64_t& begin, int64_t& end) const {
    begin = 0, end = grid > 0 ? int64_t(grid) : 0;
    if (end <= 2 * size + 64 || !(bin > 0)) return;
    const double step = double(bin) / double(grid), origin = double(start) + double(p) * double(bin);
    const double slack = 2 + 1e-6 * (std::fabs(origin) / step + double(grid));
    const double lo = (-1 - origin) / step - slack, hi = (double(size) - origin) / step + slack;
    begin = lo > 0 ? (lo < double(end) ? int64_t(lo) : end) : 0;
    end = hi < double(end) ? (hi > double(begin) ? int64_t(hi) + 1 : begin) : end;
  }
};

// Linear interpolation at one coordinate of an axis of `size` pixels: false when the sample lies outside and counts as zero.
template <class G>
PZ_HD inline bool interpolate(G x, int64_t size, int32_t& low, int32_t& high, G& weight_low, G& weight_high) {
  if (!(x >= G(-1) && x <= G(size))) return false;  // written so that NaN is outside
  if (x <= 0) x = 0;
  low = int32_t(x);
  if (low >= size - 1) {
    low = high = int32_t(size - 1);
    x = G(low);
  } else {
    high = low + 1;
  }
  weight_high = x - G(low);
  weight_low = G(1) - weight_high;
  return true;
}

}  // namespace pyzoo
