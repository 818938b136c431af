#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "roi_pool/roi_pool.h"
#include "roi_pool/roi_pool_geometry.h"

namespace pyzoo {

namespace {

constexpr int kMostPositions = 255;  // pixels of a bin whose positions fit a byte, and leave 255 for none

struct Span {
  int32_t begin, end;
  int32_t size() const { return end - begin; }
};

// The bins of a box along one axis, as pixels.
struct AxisBins {
  const Span* spans;
  int count;

  const Span& operator[](int p) const { return spans[p]; }
  Span all() const { return {spans[0].begin, spans[count - 1].end}; }
};

struct BoxBins {
  AxisBins y, x;
};

// The bins of all boxes, made once and used for all channels, and what follows from them.
struct BinTable {
  int bins_y, bins_x;
  std::vector<Span> spans;  // box after box: bins_y, then bins_x
  double work = 0;
  int64_t largest_bin = 0;  // in pixels
  BoxOrder order;

  BoxBins box(int64_t k) const {
    const Span* y = spans.data() + k * (bins_y + bins_x);
    return {{y, bins_y}, {y + bins_y, bins_x}};
  }

  template <class G>
  BinTable(G, const Rois& rois, const std::vector<int32_t>& image, double scale, const Pooled& pooled, const FeatureMap& map)
      : bins_y(int(pooled.height)),
        bins_x(int(pooled.width)),
        spans(make_spans<G>(rois, scale, pooled, map)),
        order(image, map.images, [this](int64_t k) { return std::pair{box(k).y[0].begin, box(k).x[0].begin}; }) {
    for (int64_t k = 0; k < rois.count(); ++k) {
      const BoxBins b = box(k);
      const auto longest = [](const AxisBins& axis) {
        int32_t pixels = 0;
        for (int p = 0; p < axis.count; ++p) pixels = std::max(pixels, axis[p].size());
        return pixels;
      };
      largest_bin = std::max(largest_bin, int64_t(longest(b.y)) * longest(b.x));
      work += double(pooled.channels) * double(std::max(int64_t(b.y.all().size()) * b.x.all().size(), pooled.bins()));
    }
  }

  TouchedPixels touched(const FeatureMap& map, const std::vector<int32_t>& image) const {
    TouchedPixels pixels(map);
    for (size_t k = 0; k < image.size(); ++k) {
      const Span y = box(int64_t(k)).y.all(), x = box(int64_t(k)).x.all();
      if (y.size() && x.size()) pixels.mark(map, image[k], y.begin, y.end - 1, x.begin, x.end - 1);
    }
    return pixels;
  }

 private:
  // G: the type of the geometry, double as soon as the boxes or the features are.
  template <class G>
  std::vector<Span> make_spans(const Rois& rois, double scale, const Pooled& pooled, const FeatureMap& map) {
    std::vector<Span> out(size_t(rois.count() * (bins_y + bins_x)));
    Span* at = out.data();
    for (int64_t k = 0; k < rois.count(); ++k) {
      const RoiPoolAxis<G> y(rois.at<G>(k, 2), rois.at<G>(k, 4), G(scale), bins_y, map.height);
      const RoiPoolAxis<G> x(rois.at<G>(k, 1), rois.at<G>(k, 3), G(scale), bins_x, map.width);
      const auto append = [&](const RoiPoolAxis<G>& axis, int bins) {
        for (int p = 0; p < bins; ++p) {
          int64_t begin, end;
          axis.pixels(p, begin, end);
          at[p] = {int32_t(begin), int32_t(end)};
        }
        at += bins;
      };
      append(y, bins_y);
      append(x, bins_x);
    }
    return out;
  }
};

}  // namespace

#define PZ_KERNEL "roi_pool/roi_pool_cpu.inc"
#include "common/foreach_isa.h"

namespace {

void check_positions(const Tensor& t, const Pooled& pooled) {
  check_tensor(t, "positions", 3);
  check_dtype(t, "positions", DType::u8);
  const int64_t bins = pooled.bins(), channels = pooled.channels;
  PZ_CHECK(t.shape[0] == pooled.rois && t.shape[1] == bins && t.shape[2] == channels &&
               (t.numel() == 0 || (t.stride[2] == 1 && t.stride[1] == channels && t.stride[0] == bins * channels)),
           "positions must be contiguous [K, PH * PW, C], got " + t.shape_string());
}

// Calls f with zeros of the features' type and of the geometry's: double as soon as the boxes or the features are.
template <class F>
void dispatch(DType features, DType boxes, F&& f) {
  dispatch_floating(features, [&](auto zero) {
    if (features == DType::f64 || boxes == DType::f64) {
      f(zero, double{});
    } else {
      f(zero, float{});
    }
  });
}

}  // namespace

bool roi_pool_fwd_cpu(const Tensor& input, const Tensor& rois, const Tensor& output, const Tensor* argmax, const Tensor* positions,
                      double spatial_scale) {
  const FeatureMap map(input, "input");
  const Pooled pooled(output, "output");
  pooled.check_written("output");
  const Rois boxes(rois);
  check_dtype(output, "output", input.dtype);
  PZ_CHECK(pooled.rois == boxes.count() && pooled.channels == map.channels,
           "output must have shape [K, C, PH, PW], got " + output.shape_string());
  std::unique_ptr<Pooled> indices;
  if (argmax) {
    check_dtype(*argmax, "argmax", DType::i32);
    indices = std::make_unique<Pooled>(*argmax, "argmax");
    PZ_CHECK(std::equal(output.shape, output.shape + 4, argmax->shape) && std::equal(output.stride, output.stride + 4, argmax->stride),
             "argmax must have the shape and layout of output");
  }
  PZ_CHECK(!argmax || !positions, "argmax and positions exclude each other");
  if (positions) check_positions(*positions, pooled);
  const std::vector<int32_t> image = boxes.images(map.images);
  if (output.numel() == 0) return true;
  prefer_huge_pages(output.data, output.numel() * dtype_size(output.dtype));
  if (argmax) prefer_huge_pages(argmax->data, argmax->numel() * dtype_size(argmax->dtype));
  bool has_positions = true;
  dispatch(input.dtype, rois.dtype, [&](auto zero, auto g) {
    using T = decltype(zero);
    const std::vector<FeatureMap> maps{map};
    const BinTable table(g, boxes, image, spatial_scale, pooled, map);
    has_positions = table.largest_bin <= kMostPositions;
    PZ_FOR_ISA_OF(T, template roi_pool_fwd<T>)(maps, table, image, pooled, positions && has_positions ? positions->ptr<uint8_t>() : nullptr,
                                               argmax ? argmax->ptr<int32_t>() : nullptr);
  });
  return has_positions;
}

void roi_pool_bwd_cpu(const Tensor& grad_output, const Tensor* input, const Tensor& rois, const Tensor& grad_input, const Tensor* positions,
                      double spatial_scale) {
  PZ_CHECK(input || positions, "input or positions must be given");
  const FeatureMap grad_map(grad_input, "grad_input"), map = input ? FeatureMap(*input, "input") : grad_map;
  const Pooled grad(grad_output, "grad_output");
  const Rois boxes(rois);
  grad_map.check_written("grad_input");
  check_dtype(grad_output, "grad_output", map.dtype);
  check_dtype(grad_input, "grad_input", map.dtype);
  PZ_CHECK(!input || std::equal(input->shape, input->shape + 4, grad_input.shape),
           "grad_input must have the shape of input, got " + grad_input.shape_string());
  PZ_CHECK(grad.rois == boxes.count() && grad.channels == map.channels,
           "grad_output must have shape [K, C, PH, PW], got " + grad_output.shape_string());
  if (positions) check_positions(*positions, grad);
  const std::vector<int32_t> image = boxes.images(map.images);
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch(map.dtype, rois.dtype, [&](auto zero, auto g) {
    const BinTable table(g, boxes, image, spatial_scale, grad, map);
    const uint8_t* stored = positions ? positions->ptr<uint8_t>() : nullptr;
    PZ_CHECK(!stored || table.largest_bin <= kMostPositions, "positions: a bin has too many pixels for them");
    PZ_FOR_ISA_OF(decltype(zero), template roi_pool_bwd<decltype(zero)>)(std::vector<FeatureMap>{map}, table, image, grad,
                                                                         std::vector<FeatureMap>{grad_map}, stored);
  });
}

void roi_pool_bwd_argmax_cpu(const Tensor& grad_output, const Tensor& rois, const Tensor& argmax, const Tensor& grad_input) {
  const FeatureMap map(grad_input, "grad_input");
  const Pooled grad(grad_output, "grad_output"), index(argmax, "argmax");
  const Rois boxes(rois);
  map.check_written("grad_input");
  check_dtype(grad_output, "grad_output", grad_input.dtype);
  check_dtype(argmax, "argmax", DType::i32);
  PZ_CHECK(grad.rois == boxes.count() && grad.channels == map.channels,
           "grad_output must have shape [K, C, PH, PW], got " + grad_output.shape_string());
  PZ_CHECK(std::equal(grad_output.shape, grad_output.shape + 4, argmax.shape),
           "argmax must have the shape of grad_output, got " + argmax.shape_string());
  const BoxOrder order(boxes.images(map.images), map.images, [](int64_t) { return std::pair{0, 0}; });
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch_floating(grad_input.dtype, [&](auto zero) {
    PZ_FOR_ISA_OF(decltype(zero), template roi_pool_bwd_argmax<decltype(zero)>)(map, order, grad, index);
  });
}

}  // namespace pyzoo
