#include "depthwise_conv2d/depthwise_conv2d.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/memory.h"
#include "common/vec.h"
#include "depthwise_conv2d/depthwise_conv2d_geometry.h"

namespace pyzoo {

#define PZ_KERNEL "depthwise_conv2d/depthwise_conv2d_cpu.inc"
#include "common/foreach_isa.h"

namespace {

// The gathering passes: all of `to` from all of `from`.
void gather(const FeatureMap& from, const Tensor& weight, const Tensor* bias, const FeatureMap& to, const Gather& how) {
  const int64_t bytes = to.images * to.channels * to.pixels() * dtype_size(to.dtype);
  if (bytes == 0) return;
  prefer_huge_pages(to.data, bytes);
  dispatch_sums(to.dtype, [&](auto zero) {
    using A = decltype(zero);
    PZ_FOR_ISA_OF(A, template gather_all<A>)(how, from, weight, bias, to);
  });
}

}  // namespace

void depthwise_conv2d_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const Sliding& s,
                              Activation activation) {
  const FeatureMap from(input, "input"), to(output, "output");
  check_sliding(from, to, weight, "weight", s);
  to.check_written("output");
  check_dtype(weight, "weight", from.dtype);
  check_dtype(output, "output", from.dtype);
  if (bias) check_bias(*bias, "bias", from);
  gather(from, weight, bias, to, forward_gather(from, to, weight, s, activation));
}

void depthwise_conv2d_bwd_input_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Sliding& s) {
  const FeatureMap from(grad_output, "grad_output"), to(grad_input, "grad_input");
  check_sliding(to, from, weight, "weight", s);
  to.check_written("grad_input");
  check_dtype(weight, "weight", from.dtype);
  check_dtype(grad_input, "grad_input", from.dtype);
  gather(from, weight, nullptr, to, gradient_gather(from, to, weight, s));
}

}  // namespace pyzoo
