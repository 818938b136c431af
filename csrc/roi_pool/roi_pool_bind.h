#pragma once

#include <optional>

#include "common/tensor_caster.h"
#include "roi_pool/roi_pool.h"

namespace pyzoo {

template <auto fwd, auto bwd>
void register_roi_pool(py::module_& m, const char* fwd_name, const char* bwd_name) {
  using namespace py::literals;
  m.def(
      fwd_name,
      [](const Tensor& input, const Tensor& rois, const Tensor& output, const std::optional<Tensor>& argmax, double spatial_scale,
         const std::optional<Tensor>& positions) {
        py::gil_scoped_release release;
        return fwd(input, rois, output, argmax ? &*argmax : nullptr, positions ? &*positions : nullptr, spatial_scale);
      },
      "input"_a, "rois"_a, "output"_a, "argmax"_a, "spatial_scale"_a, "positions"_a = py::none());
  m.def(
      bwd_name,
      [](const Tensor& grad_output, const std::optional<Tensor>& input, const Tensor& rois, const Tensor& grad_input, double spatial_scale,
         const std::optional<Tensor>& positions) {
        py::gil_scoped_release release;
        bwd(grad_output, input ? &*input : nullptr, rois, grad_input, positions ? &*positions : nullptr, spatial_scale);
      },
      "grad_output"_a, "input"_a, "rois"_a, "grad_input"_a, "spatial_scale"_a, "positions"_a = py::none());
}

inline void register_roi_pool(py::module_& m) {
  using namespace py::literals;
  register_roi_pool<roi_pool_fwd_cpu, roi_pool_bwd_cpu>(m, "roi_pool_fwd_cpu", "roi_pool_bwd_cpu");
#ifdef PYZOO_CUDA_ARCHS
  register_roi_pool<roi_pool_fwd_cuda, roi_pool_bwd_cuda>(m, "roi_pool_fwd_cuda", "roi_pool_bwd_cuda");
#endif
  m.def("roi_pool_bwd_argmax_cpu", &roi_pool_bwd_argmax_cpu, "grad_output"_a, "rois"_a, "argmax"_a, "grad_input"_a, ReleaseGil());
}

}  // namespace pyzoo
