// A convolution whose kernel is one pixel, of float32 maps in NHWC order: a product of matrices. A block of pixels at a time, so that
// what goes before and after finds the block in the cache.
#pragma once

#include "common/tensor.h"

namespace pyzoo {

struct Pointwise {
  const float* input;   // [pixels, inputs]
  const float* weight;  // [outputs, inputs]
  int64_t inputs, outputs;
};

Pointwise checked_pointwise(const Tensor& input, const Tensor& weight, const Tensor& output);

// A map of float32 in NHWC order, of the shape of another.
float* checked_like(const Tensor& map, const Tensor& like, const char* name);

// What makes outputs of inputs (`turned`), or gradients of inputs of those of outputs: to [rows, columns] = from [rows, depth] * a matrix.
struct Product {
  int64_t depth, columns;
  const float* panels;  // the matrix: valid until the next one is made by this thread

  Product(const Pointwise& conv, bool turned);
  void operator()(int64_t rows, const float* from, float* to) const;
};

// grad_weight = grad^T input, the sum over the pixels.
void sum_outer(const Pointwise& conv, const float* grad, int64_t pixels, float* grad_weight);

// Numbers in a weight of `outputs` x `inputs` channels once packed.
int64_t pointwise_weight_size(int64_t outputs, int64_t inputs);

// What pointwise_conv_cpu takes, of a weight [K, C, 1, 1].
void pointwise_weight_cpu(const Tensor& weight, const Tensor& packed);

// output [N, K, H, W] = activation(input [N, C, H, W] * weight + bias [K] + residual), where activations are those of batch_norm_act.
void pointwise_conv_cpu(const Tensor& input, const Tensor& packed, const Tensor* bias, const Tensor* residual, const Tensor& output,
                        int activation);

}  // namespace pyzoo
