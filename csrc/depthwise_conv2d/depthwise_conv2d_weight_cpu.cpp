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
  if (grad_bias) check_bias(*grad_bias, "grad_bias", grad);
  if (grad_weight.numel() == 0) return;
  const Gather how = forward_gather(from, grad, grad_weight, s);
  dispatch_sums(from.dtype, [&](auto zero) {
    using A = decltype(zero);
    PZ_FOR_ISA_OF(A, template weight_gradient<A>)(how, from, grad, grad_weight, grad_bias);
  });
}

}  // namespace pyzoo
