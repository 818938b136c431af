#pragma once

#include "common/tensor.h"

namespace pyzoo {

// How the kernel slides; [0] is vertical. Padding is that of the top and left: the sizes of the tensors tell the rest.
struct Sliding {
  int64_t stride[2], padding[2], dilation[2];
};

enum class Activation { none, relu, relu6 };

// output [N, C, OH, OW] = input [N, C, H, W] convolved, channel by channel, with weight [C, 1, KH, KW] (contiguous), plus bias [C]
// (or null). Input and output are both NCHW (columns next to each other) or both NHWC (channels next to each other).
void depthwise_conv2d_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const Sliding& sliding,
                              Activation activation);
void depthwise_conv2d_fwd_cuda(const Tensor& input, const Tensor& weight, const Tensor* bias, const Tensor& output, const Sliding& sliding,
                               Activation activation);

// The gradient in the input; writes all of grad_input.
void depthwise_conv2d_bwd_input_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Sliding& sliding);
void depthwise_conv2d_bwd_input_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input, const Sliding& sliding);

// The gradients in the weight and, unless null, in the bias; writes all of grad_weight and grad_bias (contiguous).
void depthwise_conv2d_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                     const Sliding& sliding);
void depthwise_conv2d_bwd_weight_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, const Tensor* grad_bias,
                                      const Sliding& sliding);

}  // namespace pyzoo
