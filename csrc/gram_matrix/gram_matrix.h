#pragma once

#include "common/tensor.h"

namespace pyzoo {

// features [N, C, H, W] or [N, C, M] of any strides, gram [N, C, C] contiguous: F F^T of each image, divided by C * M if normalize.
void gram_matrix_fwd_cpu(const Tensor& features, const Tensor& gram, bool normalize);
void gram_matrix_fwd_cuda(const Tensor& features, const Tensor& gram, bool normalize);

// grad_features, contiguous or channels_last: (S + S^T) F of each image, divided like the Gram matrix. S is grad_gram [N, C, C] of any
// strides, float64 if features are, else of any other floating dtype.
void gram_matrix_bwd_cpu(const Tensor& grad_gram, const Tensor& features, const Tensor& grad_features, bool normalize);
void gram_matrix_bwd_cuda(const Tensor& grad_gram, const Tensor& features, const Tensor& grad_features, bool normalize);

// difference [N, C, C], contiguous, float64 for float64 features, else float32: the Gram matrices minus target, which is [N, C, C],
// [1, C, C] or [C, C] of any floating dtype and strides. loss, one number of that dtype: the mean of its squares.
void gram_loss_fwd_cpu(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, bool normalize);
void gram_loss_fwd_cuda(const Tensor& features, const Tensor& target, const Tensor& difference, const Tensor& loss, bool normalize);

}  // namespace pyzoo
