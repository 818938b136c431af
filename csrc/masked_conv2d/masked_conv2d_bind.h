#pragma once

#include <optional>

#include "channel_sum/channel_sum.h"
#include "common/tensor_caster.h"
#include "masked_conv2d/masked_conv2d.h"

namespace pyzoo {

inline void register_masked_conv2d(py::module_& m) {
  using namespace py::literals;
  const auto def_fwd = [&](const char* name, decltype(&masked_conv2d_fwd_cpu) fwd) {
    m.def(
        name,
        [fwd](const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output, const std::string& mask,
              int64_t colors, int64_t gates, int64_t groups, int64_t dilation_y, int64_t dilation_x) {
          py::gil_scoped_release release;
          fwd(input, weight, bias ? &*bias : nullptr, output, {mask, colors, gates, groups, dilation_y, dilation_x});
        },
        "input"_a, "weight"_a, "bias"_a, "output"_a, "mask"_a, "colors"_a, "gates"_a, "groups"_a, "dilation_y"_a, "dilation_x"_a);
  };
  const auto def_bwd = [&](const char* name, decltype(&masked_conv2d_bwd_input_cpu) bwd_input,
                           decltype(&masked_conv2d_bwd_weight_cpu) bwd_weight, decltype(&channel_sum_cpu) bwd_bias) {
    using Maybe = std::optional<Tensor>;
    m.def(
        name,
        [=](const Tensor& grad_output, const Maybe& input, const Maybe& weight, const Maybe& grad_input, const Maybe& grad_weight,
            const Maybe& grad_bias, const std::string& mask, int64_t colors, int64_t gates, int64_t groups, int64_t dilation_y,
            int64_t dilation_x) {
          py::gil_scoped_release release;
          const ConvMask config{mask, colors, gates, groups, dilation_y, dilation_x};
          PZ_CHECK((weight || !grad_input) && (input || !grad_weight), "grad_input needs weight, grad_weight needs input");
          if (grad_input) bwd_input(grad_output, *weight, *grad_input, config);
          if (grad_weight) bwd_weight(grad_output, *input, *grad_weight, grad_bias ? &*grad_bias : nullptr, config);
          else if (grad_bias) bwd_bias(grad_output, *grad_bias);
        },
        "grad_output"_a, "input"_a, "weight"_a, "grad_input"_a, "grad_weight"_a, "grad_bias"_a, "mask"_a, "colors"_a, "gates"_a, "groups"_a,
        "dilation_y"_a, "dilation_x"_a);
  };
  def_fwd("masked_conv2d_fwd_cpu", masked_conv2d_fwd_cpu);
  def_bwd("masked_conv2d_bwd_cpu", masked_conv2d_bwd_input_cpu, masked_conv2d_bwd_weight_cpu, channel_sum_cpu);
#ifdef PYZOO_CUDA_ARCHS
  def_fwd("masked_conv2d_fwd_cuda", masked_conv2d_fwd_cuda);
  def_bwd("masked_conv2d_bwd_cuda", masked_conv2d_bwd_input_cuda, masked_conv2d_bwd_weight_cuda, channel_sum_cuda);
#endif
}

}  // namespace pyzoo
