#pragma once

#include <array>
#include <optional>

#include "common/tensor_caster.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace pyzoo {

using Pair = std::array<int64_t, 2>;

inline Sliding sliding(const Pair& stride, const Pair& padding, const Pair& dilation) {
  return {{stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

inline void register_depthwise_conv2d(py::module_& m) {
  using namespace py::literals;
  m.def(
      "depthwise_conv2d_fwd_cpu",
      [](const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output, const Pair& stride,
         const Pair& padding, const Pair& dilation, int activation) {
        py::gil_scoped_release release;
        depthwise_conv2d_fwd_cpu(input, weight, bias ? &*bias : nullptr, output, sliding(stride, padding, dilation),
                                 static_cast<Activation>(activation));
      },
      "input"_a, "weight"_a, "bias"_a, "output"_a, "stride"_a, "padding"_a, "dilation"_a, "activation"_a);
  m.def(
      "depthwise_conv2d_bwd_input_cpu",
      [](const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Pair& stride, const Pair& padding,
         const Pair& dilation) {
        py::gil_scoped_release release;
        depthwise_conv2d_bwd_input_cpu(grad_output, weight, grad_input, sliding(stride, padding, dilation));
      },
      "grad_output"_a, "weight"_a, "grad_input"_a, "stride"_a, "padding"_a, "dilation"_a);
  m.def(
      "depthwise_conv2d_bwd_weight_cpu",
      [](const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const std::optional<Tensor>& grad_bias,
         const Pair& stride, const Pair& padding, const Pair& dilation) {
        py::gil_scoped_release release;
        depthwise_conv2d_bwd_weight_cpu(grad_output, input, grad_weight, grad_bias ? &*grad_bias : nullptr,
                                        sliding(stride, padding, dilation));
      },
      "grad_output"_a, "input"_a, "grad_weight"_a, "grad_bias"_a, "stride"_a, "padding"_a, "dilation"_a);
}

}  // namespace pyzoo
