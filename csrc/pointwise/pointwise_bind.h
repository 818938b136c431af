#pragma once

#include <optional>

#include "common/tensor_caster.h"
#include "pointwise/pointwise.h"

namespace pyzoo {

inline void register_pointwise(py::module_& m) {
  using namespace py::literals;
  m.def("pointwise_weight_size", &pointwise_weight_size, "outputs"_a, "inputs"_a);
  m.def("pointwise_weight_cpu", &pointwise_weight_cpu, "weight"_a, "packed"_a, ReleaseGil());
  m.def(
      "pointwise_conv_cpu",
      [](const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
         const Tensor& output, int activation) {
        py::gil_scoped_release release;
        pointwise_conv_cpu(input, packed, bias ? &*bias : nullptr, residual ? &*residual : nullptr, output, activation);
      },
      "input"_a, "packed"_a, "bias"_a, "residual"_a, "output"_a, "activation"_a);
}

}  // namespace pyzoo
