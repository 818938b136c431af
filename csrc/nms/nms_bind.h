#pragma once

#include <algorithm>

#include "common/tensor_caster.h"
#include "nms/nms.h"

namespace pyzoo {

inline void register_nms(pybind11::module_& m) {
  using namespace py::literals;
  m.def(
      "nms_cpu",
      [](const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold,
         const std::optional<Tensor>& keep, bool shift_classes) -> py::object {
        std::vector<int64_t> counts;
        Tensor to;
        if (keep) {
          to = *keep;
        } else {
          to.dtype = DType::i64, to.ndim = 1, to.shape[0] = boxes.ndim == 2 ? boxes.shape[0] : -1, to.stride[0] = 1;
          to.owner = std::shared_ptr<int64_t[]>(new int64_t[std::max<int64_t>(to.shape[0], 0)]);
          to.data = to.owner.get();
        }
        {
          py::gil_scoped_release release;
          counts = nms_cpu(boxes, scores, idxs ? &*idxs : nullptr, iou_threshold, to, shift_classes);
        }
        if (!keep) {
          auto [object, kept] = new_tensor(boxes, {dlpack::kInt, 64, 1}, 1, counts.data());
          std::copy_n(to.ptr<int64_t>(), counts[0], kept.ptr<int64_t>());
          return object;
        }
        if (boxes.ndim == 2) return py::int_(counts[0]);
        return py::cast(counts);
      },
      "boxes"_a, "scores"_a, "idxs"_a.none(true), "iou_threshold"_a, "keep"_a.none(true), "shift_classes"_a,
      "Writes the kept indices to keep (padded with -1); returns their number, or a list of numbers for [B, N, 4] boxes. "
      "Without keep, returns the indices as a torch tensor.");
#ifdef PYZOO_CUDA_ARCHS
  m.def(
      "nms_cuda",
      [](const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold, const Tensor& keep,
         bool shift_classes) {
        auto [object, count] = new_tensor(boxes, {dlpack::kInt, 64, 1}, keep.ndim - 1, keep.shape);
        {
          py::gil_scoped_release release;
          nms_cuda(boxes, scores, idxs ? &*idxs : nullptr, iou_threshold, keep, shift_classes, count);
        }
        return object;
      },
      "boxes"_a, "scores"_a, "idxs"_a.none(true), "iou_threshold"_a, "keep"_a, "shift_classes"_a,
      "As nms_cpu, but returns the number or numbers as a tensor on the device of the boxes.");
#endif
}

}  // namespace pyzoo
