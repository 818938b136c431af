"""detectron2's RoI layers and suppression: ``from pyzoo.compat.detectron2_layers import ROIAlign, batched_nms``.

The names and signatures of detectron2.layers (and of the RoIPool that its poolers take from torchvision). Unlike there,
boxes keep their dtype when the features are of a smaller one, and results keep the memory format of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyzoo import ops
from pyzoo.ops import RoIPool, nms, roi_align

__all__ = ["ROIAlign", "ROIPool", "RoIPool", "batched_nms", "nms", "roi_align"]

ROIPool = RoIPool


class ROIAlign(ops.RoIAlign):
    """:func:`pyzoo.ops.roi_align` with half-pixel alignment as the default; ``rois`` are Tensor[K, 5]."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = True
    ):
        super().__init__(output_size, spatial_scale, sampling_ratio, aligned)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        if rois.dim() != 2 or rois.shape[1] != 5:
            raise ValueError(f"ROIAlign: rois must have shape [K, 5], got {list(rois.shape)}")
        return super().forward(input, rois)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`pyzoo.ops.batched_nms` of the boxes in float32."""
    return ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)
