// Where RoIAlign samples: the one copy of this arithmetic, in exactly torchvision's order of operations, since the grid size and
// the edge of the image are discontinuous in it. He et al., "Mask R-CNN", 2017, section 3.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/feature_map.h"

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
  // All pixels, of `size`, that the samples of all bins reach; perhaps a few more on each side.
  PZ_HD PixelRange reach(int bins, int64_t size) const {
    const auto pixel = [&](G x) { return x > 0 ? x < G(size) ? int32_t(x) : int32_t(size) : 0; };
    const G end = start + G(bins) * bin;
    return end < start ? PixelRange{pixel(end - G(1)), pixel(start + G(3))} : PixelRange{pixel(start - G(1)), pixel(end + G(3))};
  }
  // The samples of a bin that may lie in [low, high]: of very many, not much more than these.
  PZ_HD void range(int p, int64_t low, int64_t high, int64_t& begin, int64_t& end) const {
    begin = 0, end = grid > 0 ? int64_t(grid) : 0;
    if (end <= 2 * (high - low) + 64 || !(bin > 0)) return;
    const double step = double(bin) / double(grid), origin = double(start) + double(p) * double(bin);
    const double slack = 2 + 1e-6 * (std::fabs(origin) / step + double(grid));
    const double lo = (double(low) - origin) / step - slack, hi = (double(high) - origin) / step + slack;
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

// Calls add(pixel, weight) for both pixels of each sample of bin p on an axis of `size` pixels: for all that reach the pixels from
// first to last, and perhaps for others.
template <class G, class Add>
PZ_HD inline void for_each_weight(const RoiAxis<G>& axis, int p, int64_t size, int64_t first, int64_t last, Add&& add) {
  int64_t i, end;
  axis.range(p, first - 1, last + 1, i, end);
  if (size == 0) end = 0;
  for (; i < end; ++i) {
    int32_t low, high;
    G weight_low, weight_high;
    if (!interpolate(axis.sample(p, i), size, low, high, weight_low, weight_high)) continue;
    add(low, weight_low);
    add(high, weight_high);
  }
}

struct RoiSampling {
  int bins_y, bins_x, ratio;
  bool aligned;
};

// A box on its level. One that does not pool has no samples.
template <class G>
struct RoiBox {
  int level;
  bool pools;
  RoiAxis<G> y, x;
  G samples;  // in a bin, by which the sum is divided

  // scale_of(level): what coordinates are multiplied by.
  template <class ScaleOf>
  PZ_HD RoiBox(G x1, G y1, G x2, G y2, const LevelMap& level_map, int levels, const RoiSampling& sampling, ScaleOf&& scale_of)
      : level(levels > 1 ? level_map.level(x1, y1, x2, y2, levels) : 0),
        y(y1, y2, G(scale_of(level)), sampling.aligned, sampling.bins_y, sampling.ratio),
        x(x1, x2, G(scale_of(level)), sampling.aligned, sampling.bins_x, sampling.ratio) {
    const bool has_level = levels == 1 || (x2 - x1) * (y2 - y1) >= 0;  // torchvision finds none for a box with one negative side
    pools = y.finite() && x.finite() && has_level;
    samples = y.grid * x.grid > G(1) ? y.grid * x.grid : G(1);
  }
};

}  // namespace pyzoo
