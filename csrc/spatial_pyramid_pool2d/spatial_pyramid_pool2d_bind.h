#pragma once

#include <optional>
#include <string>

#include "common/tensor_caster.h"
#include "spatial_pyramid_pool2d/spatial_pyramid_pool2d.h"

namespace pyzoo {

inline void register_spatial_pyramid_pool2d(py::module_& m) {
  using namespace py::literals;
  const auto register_device = [&m](const std::string& device, auto fwd, auto bwd) {
    m.def(("spatial_pyramid_pool2d_fwd_" + device).c_str(),
          [fwd](const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const std::optional<Tensor>& argmax,
                bool average) {
            py::gil_scoped_release release;
            fwd(input, levels, output, argmax ? &*argmax : nullptr, average);
          },
          "input"_a, "levels"_a, "output"_a, "argmax"_a, "average"_a);
    m.def(("spatial_pyramid_pool2d_bwd_" + device).c_str(),
          [bwd](const Tensor& grad_output, const std::optional<Tensor>& argmax, const std::vector<int64_t>& levels,
                const Tensor& grad_input) {
            py::gil_scoped_release release;
            bwd(grad_output, argmax ? &*argmax : nullptr, levels, grad_input);
          },
          "grad_output"_a, "argmax"_a, "levels"_a, "grad_input"_a);
  };
  register_device("cpu", spatial_pyramid_pool2d_fwd_cpu, spatial_pyramid_pool2d_bwd_cpu);
#ifdef PYZOO_CUDA_ARCHS
  register_device("cuda", spatial_pyramid_pool2d_fwd_cuda, spatial_pyramid_pool2d_bwd_cuda);
#endif
}

}  // namespace pyzoo
