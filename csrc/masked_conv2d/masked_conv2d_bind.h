#pragma once

#include <optional>

#include "common/tensor_caster.h"
#include "masked_conv2d/masked_conv2d.h"

namespace pyzoo {

inline void register_masked_conv2d(py::module_& m) {
  using namespace py::literals;
  m.def(
      "masked_conv2d_fwd_cpu",
      [](const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output, const std::string& mask,
         int64_t colors, int64_t gates, int64_t groups, int64_t dilation_y, int64_t dilation_x) {
        py::gil_scoped_release release;
        masked_conv2d_fwd_cpu(input, weight, bias ? &*bias : nullptr, output, {mask, colors, gates, groups, dilation_y, dilation_x});
      },
      "input"_a, "weight"_a, "bias"_a, "output"_a, "mask"_a, "colors"_a, "gates"_a, "groups"_a, "dilation_y"_a, "dilation_x"_a);
  m.def(
      "masked_conv2d_bwd_input_cpu",
      [](const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const std::string& mask, int64_t colors, int64_t gates,
         int64_t groups, int64_t dilation_y, int64_t dilation_x) {
        py::gil_scoped_release release;
        masked_conv2d_bwd_input_cpu(grad_output, weight, grad_input, {mask, colors, gates, groups, dilation_y, dilation_x});
      },
      "grad_output"_a, "weight"_a, "grad_input"_a, "mask"_a, "colors"_a, "gates"_a, "groups"_a, "dilation_y"_a, "dilation_x"_a);
  m.def(
      "masked_conv2d_bwd_weight_cpu",
      [](const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const std::string& mask, int64_t colors, int64_t gates,
         int64_t groups, int64_t dilation_y, int64_t dilation_x) {
        py::gil_scoped_release release;
        masked_conv2d_bwd_weight_cpu(grad_output, input, grad_weight, {mask, colors, gates, groups, dilation_y, dilation_x});
      },
      "grad_output"_a, "input"_a, "grad_weight"_a, "mask"_a, "colors"_a, "gates"_a, "groups"_a, "dilation_y"_a, "dilation_x"_a);
}

}  // namespace pyzoo
