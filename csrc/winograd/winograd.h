#pragma once

#include "common/tensor.h"

namespace pyzoo {

// 3x3 convolutions of stride 1 by F(4x4, 3x3) of Winograd and Lavin: 36 products for 16 outputs instead of 144. All maps are float32 and
// channels_last, all weights [K, C, 3, 3] in channels_last order.

// Numbers in a weight of `outputs` x `inputs` channels once transformed.
int64_t winograd_weight_size(int64_t outputs, int64_t inputs);

// What winograd_conv_cpu makes of a weight first. turned: of the convolution that takes gradients of its output back to the input.
void winograd_weight_cpu(const Tensor& weight, const Tensor& transformed, bool turned);

// output [N, K, H + 2 padding - 2, ..] = input [N, C, H, W] * weight + bias, below zero zero with `relu`. The weight is one of 4
// dimensions, then turned or not, or transformed. bias [K] may have no elements.
void winograd_conv_cpu(const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& output, int64_t padding, bool turned,
                       bool relu);

// The gradient of the weight.
void winograd_conv_bwd_weight_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight, int64_t padding);

}  // namespace pyzoo
