#pragma once

#include <optional>

#include "common/tensor_caster.h"
#include "roi_pool/roi_pool.h"

namespace pyzoo {

inline void register_roi_pool(py::module_& m) {
  using namespace py::literals;
  m.def(
      "roi_pool_fwd_cpu",
      [](const Tensor& input, const Tensor& rois, const Tensor& output, const std::optional<Tensor>& argmax, double spatial_scale,
         const std::optional<Tensor>& positions) {
        py::gil_scoped_release release;
        return roi_pool_fwd_cpu(input, rois, output, argmax ? &*argmax : nullptr, positions ? &*positions : nullptr, spatial_scale);
      },
      "input"_a, "rois"_a, "output"_a, "argmax"_a, "spatial_scale"_a, "positions"_a = py::none());
  m.def(
      "roi_pool_bwd_cpu",
      [](const Tensor& grad_output, const std::optional<Tensor>& input, const Tensor& rois, const Tensor& grad_input, double spatial_scale,
         const std::optional<Tensor>& positions) {
        py::gil_scoped_release release;
        roi_pool_bwd_cpu(grad_output, input ? &*input : nullptr, rois, grad_input, positions ? &*positions : nullptr, spatial_scale);
      },
      "grad_output"_a, "input"_a, "rois"_a, "grad_input"_a, "spatial_scale"_a, "positions"_a = py::none());
  m.def("roi_pool_bwd_argmax_cpu", &roi_pool_bwd_argmax_cpu, "grad_output"_a, "rois"_a, "argmax"_a, "grad_input"_a, ReleaseGil());
}

}  // namespace pyzoo
