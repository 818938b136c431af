// The taps of every box, made once and used for all channels. RoIAlign's weights are separable: the mean over the samples of a bin
// is sum_y sum_x wy[y] * wx[x] * map[y][x], and samples that share a pixel merge into one tap.
#pragma once

#include <vector>

#include "common/feature_map.h"
#include "common/parallel.h"
#include "roi_align/roi_align_geometry.h"

namespace pyzoo {

template <class A>
struct Tap {
  int32_t at;    // row or column of the map
  int32_t slot;  // which of the box's distinct rows or columns, in order of first use
  A weight;
};

// One axis of one box: bin p has the taps [begin[p], begin[p + 1]); `first` and `last` bound all of them.
template <class A>
struct AxisTaps {
  const Tap<A>* taps;
  const int32_t* begin;
  int32_t slots, first, last;
};

template <class A>
struct RoiTaps {
  AxisTaps<A> y, x;
  bool empty() const { return y.first > y.last || x.first > x.last; }
};

struct RoiAlignOptions {
  std::vector<double> scales;
  int bins_y, bins_x, sampling_ratio;
  bool aligned;
  const LevelMap* level_map;  // null: one level
};

template <class A>
class RoiAlignTaps {
 public:
  std::vector<RoiTaps<A>> rois;
  std::vector<int32_t> level;

  // G: the type of the geometry, double as soon as the boxes or the features are.
  template <class G>
  void build(const Rois& boxes, const std::vector<FeatureMap>& maps, const RoiAlignOptions& options) {
    constexpr int64_t kChunk = 32;
    const int64_t count = boxes.count(), chunks = (count + kChunk - 1) / kChunk;
    rois.resize(count);
    level.resize(count);
    arenas_.resize(chunks);
    parallel_for(chunks, double(count) * 500, [&](int64_t chunk) {
      Arena& arena = arenas_[chunk];
      const int64_t k0 = chunk * kChunk, k1 = std::min(count, k0 + kChunk);
      for (int64_t k = k0; k < k1; ++k) {
        const G x1 = boxes.at<G>(k, 1), y1 = boxes.at<G>(k, 2), x2 = boxes.at<G>(k, 3), y2 = boxes.at<G>(k, 4);
        level[k] = options.level_map ? options.level_map->level(x1, y1, x2, y2, int(maps.size())) : 0;
        const FeatureMap& map = maps[level[k]];
        const G scale = G(options.scales[level[k]]);
        const RoiAxis<G> y(y1, y2, scale, options.aligned, options.bins_y, options.sampling_ratio);
        const RoiAxis<G> x(x1, x2, scale, options.aligned, options.bins_x, options.sampling_ratio);
        const bool finite = y.finite() && x.finite();
        const G samples = std::max(y.grid * x.grid, G(1));
        rois[k].y = arena.append(y, options.bins_y, finite ? map.height : 0, G(1) / samples);
        rois[k].x = arena.append(x, options.bins_x, finite ? map.width : 0, G(1));
      }
      arena.settle(rois.data() + k0, rois.data() + k1, options.bins_y, options.bins_x);
    });
  }

 private:
  struct Arena {  // the taps of a chunk of boxes, one after the other
    std::vector<Tap<A>> taps;
    std::vector<int32_t> begins;

    template <class G>
    AxisTaps<A> append(const RoiAxis<G>& axis, int bins, int64_t size, G factor) {
      AxisTaps<A> out{nullptr, nullptr, 0, INT32_MAX, -1};
      const size_t origin = taps.size();
      begins.push_back(0);
      for (int p = 0; p < bins; ++p) {
        const size_t bin_begin = taps.size();
        const auto add = [&](int32_t at, G weight) {
          for (size_t i = taps.size(); i > bin_begin && i + 2 > taps.size(); --i)  // samples ascend: only the last two can match
            if (taps[i - 1].at == at) {
              taps[i - 1].weight += A(weight);
              return;
            }
          int32_t slot = -1;
          for (size_t i = taps.size(); i > origin && i + 4 > taps.size() && slot < 0; --i)
            if (taps[i - 1].at == at) slot = taps[i - 1].slot;
          if (slot < 0) slot = out.slots++;
          taps.push_back({at, slot, A(weight)});
          out.first = std::min(out.first, at);
          out.last = std::max(out.last, at);
        };
        int64_t i, end;
        axis.range(p, size, i, end);
        if (size == 0) end = 0;
        for (; i < end; ++i) {
          int32_t low, high;
          G weight_low, weight_high;
          if (!interpolate(axis.sample(p, i), size, low, high, weight_low, weight_high)) continue;
          add(low, weight_low * factor);
          add(high, weight_high * factor);
        }
        begins.push_back(int32_t(taps.size() - origin));
      }
      return out;
    }

    // The vectors have stopped growing: hand out pointers.
    void settle(RoiTaps<A>* begin, RoiTaps<A>* end, int bins_y, int bins_x) const {
      const Tap<A>* tap = taps.data();
      const int32_t* bin = begins.data();
      for (RoiTaps<A>* roi = begin; roi < end; ++roi)
        for (auto [axis, bins] : {std::pair{&roi->y, bins_y}, std::pair{&roi->x, bins_x}}) {
          axis->taps = tap;
          axis->begin = bin;
          tap += bin[bins];
          bin += bins + 1;
        }
    }
  };
  std::vector<Arena> arenas_;
};

}  // namespace pyzoo
