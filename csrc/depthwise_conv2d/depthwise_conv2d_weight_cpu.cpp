#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/memory.h"
#include "common/vec.h"
#include "depthwise_conv2d/depthwise_conv2d.h"
#include "depthwise_conv2d/depthwise_conv2d_geometry.h"

namespace pyzoo {

#define PZ_KERNEL "depthwise_conv2d/depthwise_conv2d_weight_cpu.inc"
#include "common/foreach_isa.h"

void depthwise_conv2d_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                     const Sliding& s) {
  const FeatureMap grad(grad_output, "grad_output"), from(input, "input");
  check_sliding(from, grad, grad_weight, "grad_weight", s);
  check_dtype(grad_output, "grad_output", from.dtype);
  check_dtype(grad_weight, "grad_weight", from.dtype);
  if (grad_bias) {
    check_cpu(*grad_bias, "grad_bias");
    check_contiguous(*grad_bias, "grad_bias");
    check_dtype(*grad_bias, "grad_bias", from.dtype);
    check(grad_bias->ndim == 1 && grad_bias->shape[0] == grad.channels, "grad_bias must have shape [C], got " + grad_bias->shape_string());
  }
  if (grad_weight.numel() == 0) return;
  const int64_t kh = grad_weight.shape[2], kw = grad_weight.shape[3];
  const Gather how{forward_axis(from.height, grad.height, kh, s.stride[0], s.padding[0], s.dilation[0]),
                   forward_axis(from.width, grad.width, kw, s.stride[1], s.padding[1], s.dilation[1]), kh, kw, Activation::none};
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    PZ_FOR_ISA_OF(A, template weight_gradient<A>)(how, from, grad, grad_weight, grad_bias);
  };
  from.dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace pyzoo
