#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace pyzoo {

// One gated layer of width p over ci channels. All tensors are contiguous and of one dtype, float32 or float64. The 2p outputs of the
// link and of the horizontal convolution, and their condition, are ordered by color: of each color the tanh half, then the sigmoid half.
struct PixelCNNLayer {
  Tensor vertical_weight, vertical_bias;      // [2p, ci, r, n]: the rows above and, but for the first layer, the row itself
  Tensor horizontal_weight, horizontal_bias;  // [2p, ci, 1, n / 2 + 1]: the columns on the left and the pixel itself
  Tensor link_weight, link_bias;              // [2p, 2p, 1, 1]: from the vertical stack to the horizontal
  Tensor output_weight, output_bias;          // [p, p, 1, 1]
  std::optional<Tensor> vertical_condition, horizontal_condition;  // [B, H, W, 2p], the last axis contiguous
  bool residual;

  int64_t width() const { return output_weight.shape[0]; }
  int64_t inputs() const { return vertical_weight.shape[1]; }
};

using PixelCNNHead = std::vector<std::pair<Tensor, Tensor>>;  // weights [q, p, 1, 1] and biases [q], each after a ReLU

// What `samples` holds where a value is to be drawn.
constexpr int64_t kUnknownSample = INT64_MIN;

// Fills in the unknown values of `samples`, int64 [B, C, H, W], one uniform (float64, same shape) each; `logits` [B, C, K, H, W] or null.
void pixelcnn_sample_cpu(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                         const Tensor* logits, double temperature);
void pixelcnn_sample_cuda(const std::vector<PixelCNNLayer>& layers, const PixelCNNHead& head, const Tensor& uniforms, const Tensor& samples,
                          const Tensor* logits, double temperature);

}  // namespace pyzoo
