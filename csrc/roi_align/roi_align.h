#pragma once

#include <optional>
#include <vector>

#include "common/tensor.h"
#include "roi_align/roi_align_geometry.h"

namespace pyzoo {

// Pools every box of `rois` [K, 5] from the level of `inputs` ([N, C, Hi, Wi] each) that `level_map` gives it into output
// [K, C, PH, PW].
void roi_align_fwd_cpu(const std::vector<Tensor>& inputs, const Tensor& rois, const Tensor& output, const std::vector<double>& scales,
                       int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map);
void roi_align_fwd_cuda(const std::vector<Tensor>& inputs, const Tensor& rois, const Tensor& output, const std::vector<double>& scales,
                        int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map);

// The adjoint: writes all of grad_inputs. Every element sums its contributions in the order of the boxes, whatever the number of
// threads.
void roi_align_bwd_cpu(const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& grad_inputs,
                       const std::vector<double>& scales, int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map);
void roi_align_bwd_cuda(const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& grad_inputs,
                        const std::vector<double>& scales, int sampling_ratio, bool aligned, const std::optional<LevelMap>& level_map);

}  // namespace pyzoo
