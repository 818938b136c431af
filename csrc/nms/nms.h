// Non-maximum suppression: greedy, exact, independent of the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor.h"

namespace pyzoo {

// Writes the indices of the kept boxes of each batch entry to `keep`, ordered by score descending (NaN first), then index
// ascending, pads with -1, and returns the number of kept boxes of each entry. A kept box suppresses every later one whose
// overlap is > iou_threshold.
//
// boxes [N, 4] or [B, N, 4], any floating dtype: x1, y1, x2, y2. Overlap is computed in double for double, else in float.
// scores [N] or [B, N], any floating dtype.
// idxs   null, or int64 like scores: boxes of different idxs do not suppress each other.
// keep   int64 [M] or [B, M]: at most M boxes are kept.
// shift_classes: separate the idxs as torchvision does for few boxes, by adding idxs * (boxes.max() + 1) to the boxes, with
//         all the rounding that brings.
std::vector<int64_t> nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold, const Tensor& keep,
                             bool shift_classes);

// The same, but for a CUDA device, which nobody waits for: count is int64 [] or [B]. idxs may be whole numbers of a floating type.
void nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold, const Tensor& keep, bool shift_classes,
              const Tensor& count);

}  // namespace pyzoo
