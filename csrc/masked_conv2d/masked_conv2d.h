#pragma once

#include <string>

#include "common/tensor.h"

namespace pyzoo {

// Which weights count, and where they reach; see pyzoo/ops/masked_conv2d.py.
struct ConvMask {
  std::string name;       // "A", "B", "vertical_a", "vertical_b", "horizontal_a" or "horizontal_b"
  int64_t colors, gates;  // order of the channels at the centre tap
  int64_t groups, dilation_y, dilation_x;
};

// output [N, OC, H, W] = bias + the live taps of weight [OC, IC / groups, KH, KW] on input [N, IC, H, W]; bias may be null.
void masked_conv2d_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const ConvMask& mask);
void masked_conv2d_fwd_cuda(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const ConvMask& mask);

// The derivatives; each writes all of its last tensors. Weights that the mask covers get zero. grad_bias may be null.
void masked_conv2d_bwd_input_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const ConvMask& mask);
void masked_conv2d_bwd_input_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const ConvMask& mask);
void masked_conv2d_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                  const ConvMask& mask);
void masked_conv2d_bwd_weight_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                   const ConvMask& mask);

}  // namespace pyzoo
