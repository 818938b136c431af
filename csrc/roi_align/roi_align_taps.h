// The taps of every box, made once and used for all channels. RoIAlign's weights are separable: the mean over the samples of a bin
// is sum_y sum_x wy[y] * wx[x] * map[y][x], and samples that share a pixel merge into one tap.
#pragma once

#include <utility>
#include <vector>

#include "common/feature_map.h"
#include "common/parallel.h"
#include "roi_align/roi_align_geometry.h"

namespace pyzoo {

template <class A>
struct Tap {
  int32_t at;
  A weight;
};

// One axis of one box as a sparse matrix. Forward, row i is a bin and its taps [begin[i], begin[i + 1]) are at pixels; the adjoint is
// the transpose: row i is pixel[i] and its taps are at bins. `first` and `last` bound the pixels.
template <class A>
struct AxisTaps {
  const Tap<A>* taps;
  const int32_t* begin;
  const int32_t* pixel;
  int32_t rows, first, last;
};

template <class A>
struct RoiTaps {
  AxisTaps<A> y, x;
  bool empty() const { return y.first > y.last || x.first > x.last; }
};

struct RoiAlignOptions {
  std::vector<double> scales;
  RoiSampling sampling;
  LevelMap level_map;
  int levels;
  bool adjoint;
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
        const RoiBox<G> box(boxes.at<G>(k, 1), boxes.at<G>(k, 2), boxes.at<G>(k, 3), boxes.at<G>(k, 4), options.level_map, options.levels,
                            options.sampling, [&](int level) { return options.scales[level]; });
        level[k] = box.level;
        const FeatureMap& map = maps[box.level];
        rois[k].y = arena.append(box.y, options.sampling.bins_y, box.pools ? map.height : 0, G(1) / box.samples, options.adjoint);
        rois[k].x = arena.append(box.x, options.sampling.bins_x, box.pools ? map.width : 0, G(1), options.adjoint);
      }
      arena.settle(rois.data() + k0, rois.data() + k1);
    });
  }

 private:
  struct Arena {  // the axes of a chunk of boxes, one after the other
    std::vector<Tap<A>> taps;
    std::vector<int32_t> begins, pixels;

    template <class G>
    AxisTaps<A> append(const RoiAxis<G>& axis, int bins, int64_t size, G factor, bool adjoint) {
      const size_t first_tap = taps.size(), first_begin = begins.size();
      AxisTaps<A> out{nullptr, nullptr, nullptr, bins, INT32_MAX, -1};
      begins.push_back(0);
      for (int p = 0; p < bins; ++p) {
        const size_t bin_begin = taps.size();
        const auto add = [&](int32_t at, G weight) {
          for (size_t i = taps.size(); i > bin_begin && i + 2 > taps.size(); --i)  // samples ascend: only the last two can match
            if (taps[i - 1].at == at) {
              taps[i - 1].weight += A(weight);
              return;
            }
          taps.push_back({at, A(weight)});
          out.first = std::min(out.first, at);
          out.last = std::max(out.last, at);
        };
        for_each_weight(axis, p, size, 0, size - 1, [&](int32_t at, G weight) { add(at, weight * factor); });
        begins.push_back(int32_t(taps.size() - first_tap));
      }
      if (adjoint) transpose(out, first_tap, first_begin);
      return out;
    }

    // Turns the axis that was appended last into its transpose.
    void transpose(AxisTaps<A>& axis, size_t first_tap, size_t first_begin) {
      const std::vector<Tap<A>> by_bin(taps.begin() + first_tap, taps.end());
      const std::vector<int32_t> bin_begin(begins.begin() + first_begin, begins.end());
      const int32_t range = by_bin.empty() ? 0 : axis.last - axis.first + 1;
      std::vector<int32_t> count(size_t(range) + 1);
      for (const Tap<A>& tap : by_bin) ++count[tap.at - axis.first];
      begins.resize(first_begin);
      axis.rows = 0;
      int32_t next = 0;
      for (int32_t i = 0; i < range; ++i) {
        if (const int32_t taps_here = std::exchange(count[i], next)) {
          pixels.push_back(axis.first + i);
          begins.push_back(next);
          next += taps_here;
          ++axis.rows;
        }
      }
      begins.push_back(next);
      for (int32_t bin = 0; bin < int32_t(bin_begin.size()) - 1; ++bin)
        for (int32_t t = bin_begin[bin]; t < bin_begin[bin + 1]; ++t)
          taps[first_tap + count[by_bin[t].at - axis.first]++] = {bin, by_bin[t].weight};
    }

    // The vectors have stopped growing: hand out pointers.
    void settle(RoiTaps<A>* begin, RoiTaps<A>* end) const {
      const Tap<A>* tap = taps.data();
      const int32_t *row = begins.data(), *pixel = pixels.data();
      for (RoiTaps<A>* roi = begin; roi < end; ++roi)
        for (AxisTaps<A>* axis : {&roi->y, &roi->x}) {
          axis->taps = tap;
          axis->begin = row;
          axis->pixel = pixel;
          tap += row[axis->rows];
          row += axis->rows + 1;
          if (!pixels.empty()) pixel += axis->rows;
        }
    }
  };
  std::vector<Arena> arenas_;
};

}  // namespace pyzoo
