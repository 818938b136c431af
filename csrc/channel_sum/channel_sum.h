#pragma once

#include "common/tensor.h"

namespace pyzoo {

// output [C]: the sums of map [N, C, H, W], the gradient of a bias.
void channel_sum_cpu(const Tensor& map, const Tensor& output);
void channel_sum_cuda(const Tensor& map, const Tensor& output);

}  // namespace pyzoo
