#pragma once

#include "common/tensor.h"

namespace pyzoo {

// The additive coupling of one half with a function of the other (Gomez et al. 2017, equations 6 and 7), and its inverse. The tensors
// of a call have one shape; halves are views of any strides, and a result may be written over the half it comes from. Halves are
// float32 or float64; updates, what the functions return, have the same dtype or, beside float32, float16 or bfloat16.

// y = x + update
void reversible_fwd_cpu(const Tensor& x, const Tensor& update, const Tensor& y);
void reversible_fwd_cuda(const Tensor& x, const Tensor& update, const Tensor& y);

// x = y - update
void reversible_inv_cpu(const Tensor& y, const Tensor& update, const Tensor& x);
void reversible_inv_cuda(const Tensor& y, const Tensor& update, const Tensor& x);

// The same, and in one go the gradient of the function's input: grad_x = grad_y + grad_update.
void reversible_bwd_cpu(const Tensor& y, const Tensor& update, const Tensor& x, const Tensor& grad_y, const Tensor& grad_update,
                        const Tensor& grad_x);
void reversible_bwd_cuda(const Tensor& y, const Tensor& update, const Tensor& x, const Tensor& grad_y, const Tensor& grad_update,
                         const Tensor& grad_x);

}  // namespace pyzoo
