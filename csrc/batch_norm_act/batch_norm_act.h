#pragma once

#include "common/tensor.h"

namespace pyzoo {

// Batch norm with the statistics of the batch, an addition, and an activation. Maps [N, C, H, W] of one shape and dtype lie all in NCHW
// or all in NHWC order without gaps. Tensors [C] are contiguous, float32, or float64 if the maps are. Activations are those of the
// depthwise convolution: none, relu, relu6.

// Writes output = activation((input - mean) * rstd * weight + bias [+ residual]), where rstd = (var + eps)^-1/2, and mean and var [C],
// those of the batch (not the estimate for more than it). Running statistics [C] move towards them, momentum of the way.
void batch_norm_act_fwd_cpu(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor* residual, const Tensor& output,
                            const Tensor& mean, const Tensor& var, const Tensor* running_mean, const Tensor* running_var, double momentum,
                            double eps, int activation);

// The gradients; grad_input may lie where grad_output does. With a residual and an activation, output says where that was closed, and
// grad_residual takes its gradient; else they are null, and the gradient of a residual is grad_output.
void batch_norm_act_bwd_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor* output,
                            const Tensor& mean, const Tensor& var, const Tensor& grad_input, const Tensor& grad_weight,
                            const Tensor& grad_bias, const Tensor* grad_residual, double eps, int activation);

// The same with the convolution in front whose kernel is one pixel: input = conv_input * conv_weight [K, C, 1, 1] is written, too. float32,
// all channels_last.
void pointwise_bn_act_fwd_cpu(const Tensor& conv_input, const Tensor& conv_weight, const Tensor& input, const Tensor& weight,
                              const Tensor& bias, const Tensor* residual, const Tensor& output, const Tensor& mean, const Tensor& var,
                              const Tensor* running_mean, const Tensor* running_var, double momentum, double eps, int activation);

// Its gradients; those of the convolution, where they are not null, besides.
void pointwise_bn_act_bwd_cpu(const Tensor& conv_input, const Tensor& conv_weight, const Tensor* grad_conv_input,
                              const Tensor* grad_conv_weight, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& bias, const Tensor* output, const Tensor& mean, const Tensor& var, const Tensor& grad_input,
                              const Tensor& grad_weight, const Tensor& grad_bias, const Tensor* grad_residual, double eps, int activation);

}  // namespace pyzoo
