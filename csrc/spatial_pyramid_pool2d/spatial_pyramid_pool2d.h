#pragma once

#include <vector>

#include "common/tensor.h"

namespace pyzoo {

// Pools input [N, C, H, W] into each level's grid of bins. levels: height and width of one after the other. output [N, C * bins]: level
// after level, channel after channel, row-major bins. With `average` their mean, else their maximum; argmax (int32, like output, or
// null): its pixel y * W + x.
void spatial_pyramid_pool2d_fwd_cpu(const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const Tensor* argmax,
                                    bool average);
void spatial_pyramid_pool2d_fwd_cuda(const Tensor& input, const std::vector<int64_t>& levels, const Tensor& output, const Tensor* argmax,
                                     bool average);

// Writes all of grad_input: with argmax the gradient of the maximum, without it that of the mean.
void spatial_pyramid_pool2d_bwd_cpu(const Tensor& grad_output, const Tensor* argmax, const std::vector<int64_t>& levels,
                                    const Tensor& grad_input);
void spatial_pyramid_pool2d_bwd_cuda(const Tensor& grad_output, const Tensor* argmax, const std::vector<int64_t>& levels,
                                     const Tensor& grad_input);

}  // namespace pyzoo
