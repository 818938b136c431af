#pragma once

#include <tuple>

#include "common/tensor_caster.h"
#include "roi_align/roi_align.h"

namespace pyzoo {

using LevelMapTuple = std::optional<std::tuple<int, double, double, double>>;

std::optional<LevelMap> level_map_from(const LevelMapTuple& t) {
  if (!t) return std::nullopt;
  return LevelMap{std::get<0>(*t), std::get<1>(*t), std::get<2>(*t), std::get<3>(*t)};
}

template <auto fwd, auto bwd>
void register_roi_align(py::module_& m, const char* fwd_name, const char* bwd_name) {
  using namespace py::literals;
  m.def(
      fwd_name,
      [](const std::vector<Tensor>& inputs, const Tensor& rois, const Tensor& output, const std::vector<double>& scales, int sampling_ratio,
         bool aligned, const LevelMapTuple& level_map) {
        py::gil_scoped_release release;
        fwd(inputs, rois, output, scales, sampling_ratio, aligned, level_map_from(level_map));
      },
      "inputs"_a, "rois"_a, "output"_a, "scales"_a, "sampling_ratio"_a, "aligned"_a, "level_map"_a);
  m.def(
      bwd_name,
      [](const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& grad_inputs, const std::vector<double>& scales,
         int sampling_ratio, bool aligned, const LevelMapTuple& level_map) {
        py::gil_scoped_release release;
        bwd(grad_output, rois, grad_inputs, scales, sampling_ratio, aligned, level_map_from(level_map));
      },
      "grad_output"_a, "rois"_a, "grad_inputs"_a, "scales"_a, "sampling_ratio"_a, "aligned"_a, "level_map"_a);
}

inline void register_roi_align(py::module_& m) {
  register_roi_align<roi_align_fwd_cpu, roi_align_bwd_cpu>(m, "roi_align_fwd_cpu", "roi_align_bwd_cpu");
#ifdef PYZOO_CUDA_ARCHS
  register_roi_align<roi_align_fwd_cuda, roi_align_bwd_cuda>(m, "roi_align_fwd_cuda", "roi_align_bwd_cuda");
#endif
}

}  // namespace pyzoo
