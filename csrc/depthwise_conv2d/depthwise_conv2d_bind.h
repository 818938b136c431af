#pragma once

#include <array>
#include <optional>
#include <string>

#include "common/tensor_caster.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace pyzoo {

using Pair = std::array<int64_t, 2>;

inline Sliding sliding(const Pair& stride, const Pair& padding, const Pair& dilation) {
  return {{stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

inline void register_depthwise_conv2d(py::module_& m) {
  using namespace py::literals;
  const auto register_device = [&m](const std::string& device, auto fwd, auto bwd_input, auto bwd_weight) {
    m.def(("depthwise_conv2d_fwd_" + device).c_str(),
          [fwd](const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output, const Pair& stride,
                const Pair& padding, const Pair& dilation, int activation) {
            py::gil_scoped_release release;
            fwd(input, weight, bias ? &*bias : nullptr, output, sliding(stride, padding, dilation), static_cast<Activation>(activation));
          },
          "input"_a, "weight"_a, "bias"_a, "output"_a, "stride"_a, "padding"_a, "dilation"_a, "activation"_a);
    m.def(("depthwise_conv2d_bwd_input_" + device).c_str(),
          [bwd_input](const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Pair& stride, const Pair& padding,
                      const Pair& dilation) {
            py::gil_scoped_release release;
            bwd_input(grad_output, weight, grad_input, sliding(stride, padding, dilation));
          },
          "grad_output"_a, "weight"_a, "grad_input"_a, "stride"_a, "padding"_a, "dilation"_a);
    m.def(("depthwise_conv2d_bwd_weight_" + device).c_str(),
          [bwd_weight](const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const std::optional<Tensor>& grad_bias,
                       const Pair& stride, const Pair& padding, const Pair& dilation) {
            py::gil_scoped_release release;
            bwd_weight(grad_output, input, grad_weight, grad_bias ? &*grad_bias : nullptr, sliding(stride, padding, dilation));
          },
          "grad_output"_a, "input"_a, "grad_weight"_a, "grad_bias"_a, "stride"_a, "padding"_a, "dilation"_a);
  };
  register_device("cpu", depthwise_conv2d_fwd_cpu, depthwise_conv2d_bwd_input_cpu, depthwise_conv2d_bwd_weight_cpu);
#ifdef PYZOO_CUDA_ARCHS
  register_device("cuda", depthwise_conv2d_fwd_cuda, depthwise_conv2d_bwd_input_cuda, depthwise_conv2d_bwd_weight_cuda);
#endif
}

}  // namespace pyzoo
