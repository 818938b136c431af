#pragma once

#include "common/tensor.h"

namespace pyzoo {

// output [K, C, PH, PW]: the maximum of each bin; argmax (int32, same shape, or null): its pixel y * W + x, -1 for none.
// positions (uint8, [K, PH * PW, C], or null; not with argmax): its place among the pixels of its bin, row-major, 255 for none. Returns
// false, and has not written them, when a bin has too many pixels for that.
bool roi_pool_fwd_cpu(const Tensor& input, const Tensor& rois, const Tensor& output, const Tensor* argmax, const Tensor* positions,
                      double spatial_scale);

// The same, but positions are int32 pixels y * W + x, -1 for none, so that they are always written.
bool roi_pool_fwd_cuda(const Tensor& input, const Tensor& rois, const Tensor& output, const Tensor* argmax, const Tensor* positions,
                       double spatial_scale);

// Adds each gradient to the pixel its maximum came from, in the order of the boxes; writes all of grad_input. Without the positions of
// the forward pass, finds the maxima of `input` again; with them, input may be null.
void roi_pool_bwd_cpu(const Tensor& grad_output, const Tensor* input, const Tensor& rois, const Tensor& grad_input, const Tensor* positions,
                      double spatial_scale);
void roi_pool_bwd_cuda(const Tensor& grad_output, const Tensor* input, const Tensor& rois, const Tensor& grad_input,
                       const Tensor* positions, double spatial_scale);

// The same from the argmax of the forward pass.
void roi_pool_bwd_argmax_cpu(const Tensor& grad_output, const Tensor& rois, const Tensor& argmax, const Tensor& grad_input);

}  // namespace pyzoo
