#pragma once

#include <optional>

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
  const auto def_bwd = [&](const char* name, decltype(&masked_conv2d_bwd_input_cpu) bwd, const char* other, const char* gradient) {
    m.def(
        name,
        [bwd](const Tensor& grad_output, const Tensor& other, const Tensor& gradient, const std::string& mask, int64_t colors,
              int64_t gates, int64_t groups, int64_t dilation_y, int64_t dilation_x) {
          py::gil_scoped_release release;
          bwd(grad_output, other, gradient, {mask, colors, gates, groups, dilation_y, dilation_x});
        },
        "grad_output"_a, py::arg(other), py::arg(gradient), "mask"_a, "colors"_a, "gates"_a, "groups"_a, "dilation_y"_a, "dilation_x"_a);
  };
  def_fwd("masked_conv2d_fwd_cpu", masked_conv2d_fwd_cpu);
  def_bwd("masked_conv2d_bwd_input_cpu", masked_conv2d_bwd_input_cpu, "weight", "grad_input");
  def_bwd("masked_conv2d_bwd_weight_cpu", masked_conv2d_bwd_weight_cpu, "input", "grad_weight");
#ifdef PYZOO_CUDA_ARCHS
  def_fwd("masked_conv2d_fwd_cuda", masked_conv2d_fwd_cuda);
  def_bwd("masked_conv2d_bwd_input_cuda", masked_conv2d_bwd_input_cuda, "weight", "grad_input");
  def_bwd("masked_conv2d_bwd_weight_cuda", masked_conv2d_bwd_weight_cuda, "input", "grad_weight");
#endif
}

}  // namespace pyzoo
