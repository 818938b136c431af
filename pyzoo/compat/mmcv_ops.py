"""mmcv.ops's RoI operators and suppression: ``from pyzoo.compat.mmcv_ops import RoIAlign, batched_nms``.

The names, signatures and results of mmcv 2, from its published sources. Two things differ from torchvision there: an
overlap is compared with the threshold rounded to float32, and RoIPool does not round boxes to whole pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyzoo import ops
from pyzoo.ops import _common as common

__all__ = ["RoIAlign", "RoIPool", "batched_nms", "nms", "roi_align", "roi_pool"]


def nms(
    boxes: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
):
    """Keeps the best boxes, as :func:`pyzoo.ops.nms`, and returns them with their scores.

    Args:
        boxes: [N, 4], Tensor or array.
        scores: [N].
        iou_threshold: overlap above which a box is suppressed.
        offset: 0, or 1 where x2 and y2 are the last pixel inside: the width of a box is x2 - x1 + offset.
        score_threshold: if positive, only boxes of a higher score take part.
        max_num: if positive, keep at most so many.

    Returns:
        (dets [n, 5] of (x1, y1, x2, y2, score), indices [n]), arrays if ``boxes`` is one.

    Raises:
        TypeError, ValueError: as :func:`pyzoo.ops.nms`; also for another ``offset``.
    """
    if isinstance(boxes, np.ndarray):
        dets, keep = nms(
            torch.from_numpy(boxes), torch.as_tensor(scores), iou_threshold, offset, score_threshold, max_num
        )
        return dets.numpy(), keep.numpy()
    keep = _kept(boxes, scores, None, iou_threshold, offset, score_threshold, max_num)
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict | None, class_agnostic: bool = False):
    """:func:`nms` of each class by itself.

    As in mmcv, fewer than ``split_thr`` boxes have class i moved by i * (boxes.max() + 1); more have their classes
    compared.

    Args:
        boxes: Tensor[N, 4].
        scores: Tensor[N].
        idxs: Tensor[N] of classes.
        nms_cfg: arguments of :func:`nms`, with iou_thr as another name of iou_threshold; also ``type`` ("nms"),
            ``split_thr`` (10000) and ``class_agnostic``. None: only sort by score.
        class_agnostic: take all boxes as of one class.

    Returns:
        (dets [n, 5], indices [n]) by descending score.

    Raises:
        TypeError, ValueError: as :func:`nms`; also for another ``type``.
    """
    if nms_cfg is None:
        scores, keep = scores.sort(descending=True)
        return torch.cat([boxes[keep], scores[:, None]], dim=1), keep
    cfg = dict(nms_cfg)
    kind = cfg.pop("type", "nms")
    if kind not in ("nms", nms):
        raise ValueError(f"batched_nms: nms_cfg['type'] must be 'nms', got {kind!r}")
    if "iou_thr" in cfg:
        cfg["iou_threshold"] = cfg.pop("iou_thr")
    split = len(boxes) >= cfg.pop("split_thr", 10000)
    moved, classes = boxes, None
    if not cfg.pop("class_agnostic", class_agnostic) and len(boxes):
        moved = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
        classes = idxs if split else None
    keep = _kept(moved, scores, classes, **cfg)
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def _kept(boxes, scores, idxs, iou_threshold, offset=0, score_threshold=0, max_num=-1) -> Tensor:
    if offset not in (0, 1):
        raise ValueError(f"nms: offset must be 0 or 1, got {offset}")
    indices = None
    if score_threshold > 0:
        indices = (scores > score_threshold).nonzero()[:, 0]
        boxes, scores, idxs = boxes[indices], scores[indices], None if idxs is None else idxs[indices]
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, 1, 1])
    iou_threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    max_output = min(max_num, len(boxes)) if max_num > 0 else len(boxes)
    if idxs is None:
        keep, count = ops.nms(boxes, scores, iou_threshold, max_output=max_output)
    else:
        keep, count = ops.batched_nms(boxes, scores, idxs, iou_threshold, max_output=max_output)
    keep = keep[:count]
    return keep if indices is None else indices[keep]


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """:func:`pyzoo.ops.roi_align` with mmcv's defaults, and ``pool_mode`` "max": the largest sample of a bin.

    Raises:
        TypeError, ValueError: as :func:`pyzoo.ops.roi_align`; also for another ``pool_mode``, and for "max" with
            ``sampling_ratio`` <= 0, where each box has another number of samples.
    """
    if pool_mode == "avg":
        return ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)
    if pool_mode != "max":
        raise ValueError(f"roi_align: pool_mode must be 'avg' or 'max', got {pool_mode!r}")
    if sampling_ratio <= 0:
        raise ValueError(f"roi_align: pool_mode 'max' needs sampling_ratio > 0, got {sampling_ratio}")
    height, width = common.pair("roi_align", output_size)
    sizes = height * sampling_ratio, width * sampling_ratio
    samples = ops.roi_align(input, rois, sizes, spatial_scale, 1, aligned)  # one sample is one bin
    return nn.functional.max_pool2d(samples, sampling_ratio)


class RoIAlign(nn.Module):
    """See :func:`roi_align`. ``use_torchvision`` is taken and changes nothing: the results are the same."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
        use_torchvision: bool = False,
    ):
        super().__init__()
        self.output_size = tuple(common.pair("RoIAlign", output_size))
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = use_torchvision

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.pool_mode, self.aligned
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, pool_mode={self.pool_mode}, aligned={self.aligned}, "
            f"use_torchvision={self.use_torchvision}"
        )


def roi_pool(input: Tensor, rois: Tensor, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Max-pools each box into a grid of bins that are cut at fractions of a pixel, as in mmcv: neighbours share pixels.

    A box reaches from x1 * spatial_scale to (x2 + 1) * spatial_scale; bin p of width w takes the pixels from
    floor(x1 * spatial_scale + p * w) to ceil(x1 * spatial_scale + (p + 1) * w). An empty bin gives 0. Differentiable in
    ``input``.

    Args:
        input: Tensor[N, C, H, W].
        rois: Tensor[K, 5] of (index of the image, x1, y1, x2, y2).
        output_size: bins as (height, width), or one int for both.
        spatial_scale: what box coordinates are multiplied by to become pixels of ``input``.

    Returns:
        Tensor[K, C, height, width].

    Raises:
        TypeError, ValueError: as :func:`pyzoo.ops.roi_pool`.
    """
    height, width = common.pair("roi_pool", output_size)
    common.check_tensor("roi_pool", "input", input)
    common.check_tensor("roi_pool", "rois", rois)
    common.check_features_and_boxes("roi_pool", "input", input, rois)
    common.check_pooling("roi_pool", spatial_scale, height, width)
    boxes = rois.to(torch.promote_types(torch.promote_types(input.dtype, rois.dtype), torch.float32))
    left, right = _bins(boxes[:, 1], boxes[:, 3], width, spatial_scale, input.shape[3])
    top, bottom = _bins(boxes[:, 2], boxes[:, 4], height, spatial_scale, input.shape[2])
    # Each bin is a box of its own, of whole pixels.
    image, left, top, right, bottom = torch.broadcast_tensors(
        boxes[:, 0, None, None], left[:, None], top[:, :, None], right[:, None], bottom[:, :, None]
    )
    bins = torch.stack([image, left, top, right, bottom], dim=-1).reshape(-1, 5)
    pooled = ops.roi_pool(input, bins, 1)
    return pooled.reshape(len(rois), height, width, input.shape[1]).permute(0, 3, 1, 2).contiguous()


def _bins(low: Tensor, high: Tensor, bins: int, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """First and last pixel [K, bins] of each bin along one axis; of empty bins, a pixel that is not on the map."""
    low, high = low * scale, (high + 1) * scale
    step = ((high - low) / bins)[:, None]
    p = torch.arange(bins, dtype=low.dtype, device=low.device)
    begin = (p * step + low[:, None]).floor().clamp(0, size)
    end = ((p + 1) * step + low[:, None]).ceil().clamp(0, size)
    empty = ~((begin < end) & (step > 0))  # written so that NaN is empty
    return torch.where(empty, -2, begin), torch.where(empty, -2, end - 1)


class RoIPool(nn.Module):
    """See :func:`roi_pool`."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float = 1.0):
        super().__init__()
        self.output_size = tuple(common.pair("RoIPool", output_size))
        self.spatial_scale = float(spatial_scale)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
