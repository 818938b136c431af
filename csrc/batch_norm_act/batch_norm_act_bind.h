#pragma once

#include <optional>

#include "batch_norm_act/batch_norm_act.h"
#include "common/tensor_caster.h"

namespace pyzoo {

inline void register_batch_norm_act(py::module_& m) {
  using namespace py::literals;
  m.def(
      "batch_norm_act_fwd_cpu",
      [](const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual, const Tensor& output,
         const Tensor& mean, const Tensor& var, const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
         double momentum, double eps, int activation) {
        py::gil_scoped_release release;
        batch_norm_act_fwd_cpu(input, weight, bias, residual ? &*residual : nullptr, output, mean, var,
                               running_mean ? &*running_mean : nullptr, running_var ? &*running_var : nullptr, momentum, eps, activation);
      },
      "input"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a, "mean"_a, "var"_a, "running_mean"_a, "running_var"_a, "momentum"_a,
      "eps"_a, "activation"_a);
  m.def(
      "batch_norm_act_bwd_cpu",
      [](const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& output,
         const Tensor& mean, const Tensor& var, const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias,
         const std::optional<Tensor>& grad_residual, double eps, int activation) {
        py::gil_scoped_release release;
        batch_norm_act_bwd_cpu(grad_output, input, weight, bias, output ? &*output : nullptr, mean, var, grad_input, grad_weight, grad_bias,
                               grad_residual ? &*grad_residual : nullptr, eps, activation);
      },
      "grad_output"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "mean"_a, "var"_a, "grad_input"_a, "grad_weight"_a, "grad_bias"_a,
      "grad_residual"_a, "eps"_a, "activation"_a);
  m.def(
      "pointwise_bn_act_fwd_cpu",
      [](const Tensor& conv_input, const Tensor& conv_weight, const Tensor& input, const Tensor& weight, const Tensor& bias,
         const std::optional<Tensor>& residual, const Tensor& output, const Tensor& mean, const Tensor& var,
         const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, double momentum, double eps, int activation) {
        py::gil_scoped_release release;
        pointwise_bn_act_fwd_cpu(conv_input, conv_weight, input, weight, bias, residual ? &*residual : nullptr, output, mean, var,
                                 running_mean ? &*running_mean : nullptr, running_var ? &*running_var : nullptr, momentum, eps, activation);
      },
      "conv_input"_a, "conv_weight"_a, "input"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a, "mean"_a, "var"_a, "running_mean"_a,
      "running_var"_a, "momentum"_a, "eps"_a, "activation"_a);
  m.def(
      "pointwise_bn_act_bwd_cpu",
      [](const Tensor& conv_input, const Tensor& conv_weight, const std::optional<Tensor>& grad_conv_input,
         const std::optional<Tensor>& grad_conv_weight, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
         const Tensor& bias, const std::optional<Tensor>& output, const Tensor& mean, const Tensor& var, const Tensor& grad_input,
         const Tensor& grad_weight, const Tensor& grad_bias, const std::optional<Tensor>& grad_residual, double eps, int activation) {
        py::gil_scoped_release release;
        pointwise_bn_act_bwd_cpu(conv_input, conv_weight, grad_conv_input ? &*grad_conv_input : nullptr,
                                 grad_conv_weight ? &*grad_conv_weight : nullptr, grad_output, input, weight, bias,
                                 output ? &*output : nullptr, mean, var, grad_input, grad_weight, grad_bias,
                                 grad_residual ? &*grad_residual : nullptr, eps, activation);
      },
      "conv_input"_a, "conv_weight"_a, "grad_conv_input"_a, "grad_conv_weight"_a, "grad_output"_a, "input"_a, "weight"_a, "bias"_a,
      "output"_a, "mean"_a, "var"_a, "grad_input"_a, "grad_weight"_a, "grad_bias"_a, "grad_residual"_a, "eps"_a, "activation"_a);
}

}  // namespace pyzoo
