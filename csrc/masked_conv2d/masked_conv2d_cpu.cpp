#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "channel_sum/channel_sum.h"
#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "masked_conv2d/masked_conv2d.h"
#include "masked_conv2d/masked_conv2d_taps.h"

namespace pyzoo {

namespace {

// One group of the product: `lanes` channels of the result, each a sum over the live taps and, at each of them, `depth` channels of
// the source. Forward, the result are the output channels; for the gradient of the input it is the other way round, and the taps are
// mirrored.
struct Product {
  const MaskedTaps& taps;
  bool forward;
  int64_t lanes, depth;

  Product(const MaskedTaps& taps, bool forward)
      : taps(taps),
        forward(forward),
        lanes((forward ? taps.out_channels : taps.in_channels) / taps.groups),
        depth((forward ? taps.in_channels : taps.out_channels) / taps.groups) {}

  int64_t sign() const { return forward ? 1 : -1; }
  int64_t terms() const { return taps.taps() * depth; }
  // Whether the centre tap joins a channel of the result and one of the source.
  bool joins(int64_t group, int64_t lane, int64_t k) const {
    lane += group * lanes, k += group * depth;
    return forward ? k < taps.limit(lane) : lane < taps.limit(k);
  }
  // The end of the channels from k on that the centre tap joins to the same lanes.
  int64_t same_until(int64_t group, int64_t k) const {
    const int64_t block = forward ? taps.in_channels / taps.colors : taps.out_channels / taps.gates / taps.colors;
    return std::min(depth, ((group * depth + k) / block + 1) * block - group * depth);
  }
};

// A band of rows of one group of the source, in the type of the sums: [row][column][channel], with zeros around the map. The taps of
// a row of the kernel are one long run in it.
struct Band {
  Reach reach;
  int64_t depth, width;

  Band(const Product& product, const FeatureMap& map)
      : reach(product.taps, product.sign(), map.height, map.width), depth(product.depth), width(reach.left + map.width + reach.right) {}

  int64_t row_stride() const { return width * depth; }
};

// Terms of a sum whose factors lie one after the other in the band and among the weights.
struct Run {
  int64_t offset;  // of the first one in the band, from the pixel that is computed
  int64_t term;    // its number: tap after tap, channel after channel
  int64_t depth;
  int64_t live;  // where in Panel::live its lanes are named, or -1 for all
};

// Adds a run to a list, or makes the last one longer.
inline void append(std::vector<Run>& runs, const Run& run) {
  if (!runs.empty() && run.live < 0) {
    Run& last = runs.back();
    if (last.live < 0 && last.term + last.depth == run.term && last.offset + last.depth == run.offset) {
      last.depth += run.depth;
      return;
    }
  }
  runs.push_back(run);
}

// Channels [begin, begin + count) of the result: what one tile computes.
template <class A>
struct Panel {
  int64_t begin, count;
  int vectors;
  int64_t weights = 0;  // offset of the packed weights: [term][vectors x lanes]
  std::vector<Run> runs;
  std::vector<int64_t> chunks;  // runs [chunks[c], chunks[c + 1]) are added up at a time
  std::vector<A> live;          // 1 for the lanes that a run adds to, else 0
};

// The runs of a panel, cut into chunks of at most `most` terms each, nearly equal: so many weights stay in the first-level cache.
template <class A>
void make_runs(Panel<A>& panel, const Product& product, int64_t group, const Band& band, const FeatureMap& map, int64_t lanes,
               int64_t most) {
  const MaskedTaps& taps = product.taps;
  std::vector<Run> whole;
  int64_t terms = 0;
  for (int64_t tap = taps.first; tap < taps.last; ++tap) {
    const int64_t dy = product.sign() * taps.dy(tap), dx = product.sign() * taps.dx(tap);
    if (std::abs(dy) >= map.height || std::abs(dx) >= map.width) continue;
    for (int64_t k = 0, end; k < product.depth; k = end) {
      end = taps.ordered(tap) ? product.same_until(group, k) : product.depth;
      Run run{dy * band.row_stride() + dx * band.depth + k, (tap - taps.first) * product.depth + k, end - k, -1};
      if (taps.ordered(tap)) {
        int64_t joined = 0;
        for (int64_t lane = 0; lane < panel.count; ++lane) joined += product.joins(group, panel.begin + lane, k);
        if (joined == 0) continue;
        if (joined < panel.count) {
          run.live = int64_t(panel.live.size());
          for (int64_t lane = 0; lane < lanes; ++lane)
            panel.live.push_back(lane < panel.count && product.joins(group, panel.begin + lane, k) ? A(1) : A(0));
        }
      }
      terms += run.depth;
      append(whole, run);
    }
  }
  const int64_t chunks = std::max<int64_t>((terms + most - 1) / most, 1), chunk = (terms + chunks - 1) / chunks;
  panel.chunks.push_back(0);
  int64_t room = chunk;
  for (Run run : whole)
    while (run.depth > 0) {
      if (room == 0) {
        panel.chunks.push_back(int64_t(panel.runs.size()));
        room = chunk;
      }
      Run part = run;
      part.depth = std::min(run.depth, room);
      panel.runs.push_back(part);
      run.offset += part.depth, run.term += part.depth, run.depth -= part.depth, room -= part.depth;
    }
  panel.chunks.push_back(int64_t(panel.runs.size()));
}

// The channels of a group in panels of `vectors` vectors of n lanes; the last ones may be narrower.
template <class A>
std::vector<Panel<A>> make_panels(int64_t channels, int64_t n, int vectors, int64_t terms, int64_t weights) {
  std::vector<Panel<A>> panels;
  for (int64_t begin = 0; begin < channels; begin += panels.back().count) {
    Panel<A> panel;
    panel.begin = begin;
    panel.vectors = int(std::min<int64_t>(vectors, (channels - begin + n - 1) / n));
    panel.count = std::min(channels - begin, panel.vectors * n);
    panel.weights = weights;
    weights += terms * panel.vectors * n;
    panels.push_back(panel);
  }
  return panels;
}

// A task: some rows of an image, and part of the panels of a group. Enough pixels to use the weights well, few enough for the
// second-level cache, and several tasks: by fewer rows, or, where the weights do not stay in the cache, by fewer panels.
struct Split {
  int64_t rows, bands, parts;

  Split(const Band& band, const FeatureMap& map, int64_t groups, int64_t panels, int64_t weight_bytes, int64_t element_bytes) {
    constexpr int64_t kPixels = 512, kFewPixels = 64, kBytes = 512 << 10, kTasks = 16;
    const int64_t width = std::max<int64_t>(map.width, 1), halo = band.reach.top + band.reach.bottom;
    const auto at_least_one = [](int64_t n) { return std::max<int64_t>(n, 1); };
    rows = std::min(kPixels / width, kBytes / at_least_one(band.row_stride() * element_bytes) - halo);
    rows = std::min(at_least_one(rows), map.height);
    const int64_t tasks = map.images * ((map.height + rows - 1) / rows) * groups;
    parts = weight_bytes > kBytes ? std::min((kTasks + tasks - 1) / tasks, panels) : 1;
    rows = std::min(rows, at_least_one(std::max(map.images * map.height * groups * parts / kTasks, kFewPixels / width)));
    rows = std::min(std::max(rows, halo / 2), map.height);  // what the taps reach beyond them is copied again for each band
    bands = (map.height + rows - 1) / rows;
    rows = (map.height + bands - 1) / bands;
  }
};

}  // namespace

#define PZ_KERNEL "masked_conv2d/masked_conv2d_cpu.inc"
#include "common/foreach_isa.h"

namespace {

void multiply(const FeatureMap& source, const Tensor& weight, const Tensor* bias, const FeatureMap& result, const Product& product) {
  check_weights(weight, "weight", bias, "bias", source, product.taps, DeviceType::cpu);
  const int64_t size = result.images * result.channels * result.pixels();
  if (size == 0) return;
  prefer_huge_pages(result.data, size * dtype_size(result.dtype));
  dispatch_sums(source.dtype, [&](auto zero) {
    using A = decltype(zero);
    PZ_FOR_ISA_OF(A, template masked_conv2d<A>)(source, weight, bias, result, product);
  });
}

}  // namespace

void masked_conv2d_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const ConvMask& mask) {
  const FeatureMap in(input, "input"), out(output, "output");
  const MaskedTaps taps(weight, "weight", mask);
  out.check_written("output");
  check_maps(in, out, taps);
  multiply(in, weight, bias, out, Product(taps, true));
}

void masked_conv2d_bwd_input_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const ConvMask& mask) {
  const FeatureMap grad(grad_output, "grad_output"), in(grad_input, "grad_input");
  const MaskedTaps taps(weight, "weight", mask);
  in.check_written("grad_input");
  check_maps(in, grad, taps);
  multiply(grad, weight, nullptr, in, Product(taps, false));
}

void masked_conv2d_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                  const ConvMask& mask) {
  const FeatureMap grad(grad_output, "grad_output"), in(input, "input");
  const MaskedTaps taps(grad_weight, "grad_weight", mask);
  check_weights(grad_weight, "grad_weight", grad_bias, "grad_bias", in, taps, DeviceType::cpu);
  check_maps(in, grad, taps);
  if (grad_weight.numel() == 0 || taps.taps() == 0) {
    std::fill_n(static_cast<char*>(grad_weight.data), grad_weight.numel() * dtype_size(in.dtype), char(0));
    if (grad_bias) channel_sum_cpu(grad_output, *grad_bias);
    return;
  }
  dispatch_sums(in.dtype, [&](auto zero) {
    using A = decltype(zero);
    PZ_FOR_ISA_OF(A, template masked_conv2d_weight<A>)(grad, in, grad_weight, grad_bias, Product(taps, true));
  });
}

}  // namespace pyzoo
