#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/feature_map.h"
#include "common/memory.h"
#include "common/vec.h"
#include "roi_align/roi_align.h"
#include "roi_align/roi_align_taps.h"

namespace pyzoo {

#define PZ_KERNEL "roi_align/roi_align_cpu.inc"
#include "common/foreach_isa.h"

namespace {

std::vector<FeatureMap> feature_maps(const std::vector<Tensor>& tensors, const char* name, const Pooled& pooled, size_t scales) {
  check(!tensors.empty(), std::string(name) + ": at least one feature map is needed");
  check(scales == tensors.size(), "one spatial scale is needed for each feature map");
  std::vector<FeatureMap> maps;
  for (const Tensor& t : tensors) {
    maps.emplace_back(t, name);
    const FeatureMap &map = maps.back(), &first = maps.front();
    check(map.dtype == first.dtype && map.dtype == pooled.dtype,
          std::string(name) + ": all feature maps and the pooled tensor must share a dtype");
    check(map.images == first.images && map.channels == pooled.channels,
          std::string(name) + ": all feature maps must have the same batch size and channels");
  }
  return maps;
}

template <class A>
RoiAlignTaps<A> make_taps(const Rois& boxes, const std::vector<FeatureMap>& maps, const Pooled& pooled, const std::vector<double>& scales,
                          int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map, bool adjoint) {
  check(boxes.count() == pooled.rois, "boxes and the pooled tensor must have the same number of rows");
  RoiAlignTaps<A> table;
  const RoiSampling sampling{int(pooled.height), int(pooled.width), sampling_ratio, aligned};
  const RoiAlignOptions options{scales, sampling, level_map.value_or(LevelMap{}), level_map ? int(maps.size()) : 1, adjoint};
  if (boxes.dtype == DType::f64 || maps[0].dtype == DType::f64) {
    table.template build<double>(boxes, maps, options);
  } else {
    table.template build<float>(boxes, maps, options);
  }
  return table;
}

template <class A>
BoxOrder order_boxes(const RoiAlignTaps<A>& table, const std::vector<int32_t>& image, const std::vector<FeatureMap>& maps) {
  std::vector<int32_t> group(image);
  for (size_t k = 0; k < group.size(); ++k) group[k] += int32_t(table.level[k] * maps[0].images);
  return BoxOrder(group, int64_t(maps.size()) * maps[0].images, [&](int64_t k) {
    const RoiTaps<A>& roi = table.rois[k];
    return roi.empty() ? std::pair{0, 0} : std::pair{roi.y.first, roi.x.first};
  });
}

}  // namespace

void roi_align_fwd_cpu(const std::vector<Tensor>& inputs, const Tensor& rois, const Tensor& output, const std::vector<double>& scales,
                       int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map) {
  const Pooled pooled(output, "output");
  pooled.check_written("output");
  const std::vector<FeatureMap> maps = feature_maps(inputs, "input", pooled, scales.size());
  const Rois boxes(rois);
  const std::vector<int32_t> image = boxes.images(maps[0].images);
  if (output.numel() == 0) return;
  dispatch_floating(output.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto table = make_taps<acc_t<T>>(boxes, maps, pooled, scales, sampling_ratio, aligned, level_map, false);
    prefer_huge_pages(output.data, output.numel() * int64_t(sizeof(T)));
    PZ_FOR_ISA_OF(T, template roi_align_fwd<T>)(maps, table, image, order_boxes(table, image, maps), pooled);
  });
}

void roi_align_bwd_cpu(const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& grad_inputs,
                       const std::vector<double>& scales, int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map) {
  const Pooled grad(grad_output, "grad_output");
  const std::vector<FeatureMap> maps = feature_maps(grad_inputs, "grad_input", grad, scales.size());
  for (const FeatureMap& map : maps) map.check_written("grad_input");
  const Rois boxes(rois);
  const std::vector<int32_t> image = boxes.images(maps[0].images);
  dispatch_floating(grad.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto table = make_taps<acc_t<T>>(boxes, maps, grad, scales, sampling_ratio, aligned, level_map, true);
    for (const Tensor& t : grad_inputs) prefer_huge_pages(t.data, t.numel() * int64_t(sizeof(T)));
    PZ_FOR_ISA_OF(T, template roi_align_bwd<T>)(maps, table, order_boxes(table, image, maps), grad);
  });
}

}  // namespace pyzoo
