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

#define PZ_KERNEL "roi_pool/roi_pool_cpu.inc"
#include "common/foreach_isa.h"

namespace {

template <class G>
std::pair<RoiPoolAxis<G>, RoiPoolAxis<G>> axes(const Rois& boxes, int64_t k, double scale, const Pooled& pooled, const FeatureMap& map) {
  return {RoiPoolAxis<G>(boxes.at<G>(k, 2), boxes.at<G>(k, 4), G(scale), int(pooled.height), map.height),
          RoiPoolAxis<G>(boxes.at<G>(k, 1), boxes.at<G>(k, 3), G(scale), int(pooled.width), map.width)};
}

// The bins of every box, made when needed, and what they touch.
template <class G>
struct Boxes {
  const Rois& rois;
  const double scale;
  const Pooled& pooled;
  const FeatureMap& map;
  std::vector<TouchedPixels> touched{TouchedPixels(map)};
  double work = 0;

  Boxes(const Rois& rois, const std::vector<int32_t>& image, double scale, const Pooled& pooled, const FeatureMap& map)
      : rois(rois), scale(scale), pooled(pooled), map(map) {
    for (int64_t k = 0; k < rois.count(); ++k) {
      const auto [y, x] = axes<G>(rois, k, scale, pooled, map);
      int64_t y0, y1, x0, x1, unused;
      y.pixels(0, y0, unused), y.pixels(int(pooled.height) - 1, unused, y1);
      x.pixels(0, x0, unused), x.pixels(int(pooled.width) - 1, unused, x1);
      if (x0 < x1) touched[0].mark(map, image[k], y0, y1 - 1, x0, x1 - 1);
      work += double(pooled.channels) * double(std::max<int64_t>((y1 - y0) * (x1 - x0), pooled.bins()));
    }
  }
  template <class Bin>
  void operator()(int64_t k, std::vector<Bin>& bins) const {
    const auto [y, x] = axes<G>(rois, k, scale, pooled, map);
    bins.resize(size_t(pooled.bins()));
    Bin* bin = bins.data();
    for (int py = 0; py < pooled.height; ++py)
      for (int px = 0; px < pooled.width; ++px, ++bin) y.pixels(py, bin->y0, bin->y1), x.pixels(px, bin->x0, bin->x1);
  }
};

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

void roi_pool_fwd_cpu(const Tensor& input, const Tensor& rois, const Tensor& output, const Tensor* argmax, double spatial_scale) {
  const FeatureMap map(input, "input");
  const Pooled pooled(output, "output");
  pooled.check_written("output");
  const Rois boxes(rois);
  check_dtype(output, "output", input.dtype);
  check(pooled.rois == boxes.count() && pooled.channels == map.channels, "output must have shape [K, C, PH, PW], got " + output.shape_string());
  std::unique_ptr<Pooled> indices;
  if (argmax) {
    check_dtype(*argmax, "argmax", DType::i32);
    indices = std::make_unique<Pooled>(*argmax, "argmax");
    check(std::equal(output.shape, output.shape + 4, argmax->shape) && indices->channel_stride == pooled.channel_stride,
          "argmax must have the shape and layout of output");
  }
  const std::vector<int32_t> image = boxes.images(map.images);
  if (output.numel() == 0) return;
  prefer_huge_pages(output.data, output.numel() * dtype_size(output.dtype));
  if (argmax) prefer_huge_pages(argmax->data, argmax->numel() * dtype_size(argmax->dtype));
  dispatch(input.dtype, rois.dtype, [&](auto zero, auto g) {
    const Boxes<decltype(g)> bins(boxes, image, spatial_scale, pooled, map);
    PZ_FOR_ISA(template roi_pool_fwd<decltype(zero)>)(std::vector<FeatureMap>{map}, bins.touched, image, pooled, indices.get(), bins.work, bins);
  });
}

void roi_pool_bwd_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& rois, const Tensor& grad_input, double spatial_scale) {
  const FeatureMap map(input, "input"), grad_map(grad_input, "grad_input");
  const Pooled grad(grad_output, "grad_output");
  const Rois boxes(rois);
  check_dtype(grad_output, "grad_output", input.dtype);
  check_dtype(grad_input, "grad_input", input.dtype);
  check(std::equal(input.shape, input.shape + 4, grad_input.shape), "grad_input must have the shape of input, got " + grad_input.shape_string());
  check(grad.rois == boxes.count() && grad.channels == map.channels, "grad_output must have shape [K, C, PH, PW], got " + grad_output.shape_string());
  const std::vector<int32_t> image = boxes.images(map.images);
  const Groups groups(image, map.images);
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch(input.dtype, rois.dtype, [&](auto zero, auto g) {
    const Boxes<decltype(g)> bins(boxes, image, spatial_scale, grad, map);
    PZ_FOR_ISA(template roi_pool_bwd<decltype(zero)>)(std::vector<FeatureMap>{map}, bins.touched, groups, grad, std::vector<FeatureMap>{grad_map}, bins);
  });
}

void roi_pool_bwd_argmax_cpu(const Tensor& grad_output, const Tensor& rois, const Tensor& argmax, const Tensor& grad_input) {
  const FeatureMap map(grad_input, "grad_input");
  const Pooled grad(grad_output, "grad_output"), index(argmax, "argmax");
  const Rois boxes(rois);
  check_dtype(grad_output, "grad_output", grad_input.dtype);
  check_dtype(argmax, "argmax", DType::i32);
  check(grad.rois == boxes.count() && grad.channels == map.channels, "grad_output must have shape [K, C, PH, PW], got " + grad_output.shape_string());
  check(std::equal(grad_output.shape, grad_output.shape + 4, argmax.shape), "argmax must have the shape of grad_output, got " + argmax.shape_string());
  const Groups groups(boxes.images(map.images), map.images);
  prefer_huge_pages(grad_input.data, grad_input.numel() * dtype_size(grad_input.dtype));
  dispatch_floating(grad_input.dtype, [&](auto zero) { PZ_FOR_ISA(template roi_pool_bwd_argmax<decltype(zero)>)(map, groups, grad, index); });
}

}  // namespace pyzoo
