"""The operators on NumPy arrays: inference only, no torch needed. Signatures and results are those of :mod:`pyzoo.ops`.

Arrays may be read-only and of any strides, byte order and alignment; only an odd one of the last two costs a copy.
Boxes and scores may also be integers, or nested lists: they count as float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyzoo._ext import C

__all__ = ["batched_nms", "nms", "roi_align", "roi_pool"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))
_EXPORTS_READ_ONLY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


def nms(boxes: ArrayLike, scores: ArrayLike, iou_threshold: float, *, max_output: int | None = None):
    """Keeps the best boxes: each kept box suppresses those of lower score that overlap it by IoU > ``iou_threshold``.

    Boxes are taken by score descending, NaN first, equal scores by index. The overlap is inter / (area + area - inter)
    in the dtype of ``boxes``, float16 widened to float32, and is compared in double.

    Args:
        boxes: [N, 4] of (x1, y1, x2, y2). With ``max_output`` also [B, N, 4]: B independent problems in one call.
        scores: [N] (or [B, N]).
        iou_threshold: overlap above which a box is suppressed.
        max_output: keep at most so many boxes and return arrays of known shape.

    Returns:
        int64 array [n] of the kept indices by descending score. With ``max_output=k``, (array [k] padded with -1,
        number kept), or (array [B, k], array [B]).

    Raises:
        TypeError: ``boxes`` or ``scores`` are not numbers.
        ValueError: shapes do not fit, ``iou_threshold`` is NaN or ``max_output`` negative.
    """
    return _nms("nms", boxes, scores, None, iou_threshold, max_output)


def batched_nms(
    boxes: ArrayLike, scores: ArrayLike, idxs: ArrayLike, iou_threshold: float, *, max_output: int | None = None
):
    """:func:`nms` of each class by itself: boxes of different ``idxs`` never suppress each other.

    As in torchvision, up to 1000 float32 or float64 boxes have class i moved by i * (boxes.max() + 1) instead, so that
    overlaps round as there.

    Args:
        boxes, scores, iou_threshold, max_output: as in :func:`nms`.
        idxs: [N] (or [B, N]) of classes, whole numbers of any dtype.

    Returns:
        As :func:`nms`.

    Raises:
        TypeError, ValueError: as :func:`nms`; also when ``idxs`` are not whole numbers or not shaped like ``scores``.
    """
    return _nms("batched_nms", boxes, scores, _whole("batched_nms", "idxs", idxs), iou_threshold, max_output)


def roi_align(
    input: NDArray,
    boxes: ArrayLike | Sequence[ArrayLike],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> NDArray:
    """Average-pools each box on a regular grid of bilinear samples (Mask R-CNN); torchvision's signature and semantics.

    Args:
        input: features [N, C, H, W]; float32, float64 or float16. A channels-last view,
            ``nhwc.transpose(0, 3, 1, 2)``, is used as such.
        boxes: [K, 5] of (index of the image, x1, y1, x2, y2), or a list with one [L, 4] for each image.
        output_size: bins as (height, width), or one int for both.
        spatial_scale: what box coordinates are multiplied by to become pixels of ``input``.
        sampling_ratio: samples per bin and axis; if <= 0, ceil(size of the bin in pixels).
        aligned: shift the boxes by half a pixel (detectron2), so that pixel centres lie at integers plus one half.

    Returns:
        Array [K, C, height, width] in the dtype and layout of ``input``.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: a shape, scale or size does not fit, or an image index is out of range.
    """
    input, boxes, output = _pooling("roi_align", input, boxes, output_size, spatial_scale)
    if output.size:  # NumPy gives empty arrays strides that mean nothing
        C.roi_align_fwd_cpu([input], boxes, output, [spatial_scale], sampling_ratio, aligned, None)
    return output


def roi_pool(
    input: NDArray,
    boxes: ArrayLike | Sequence[ArrayLike],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> NDArray:
    """Max-pools each box, rounded to whole pixels, into a grid of bins (Fast R-CNN), as torchvision does.

    Arguments, result and errors are those of :func:`roi_align`.
    """
    input, boxes, output = _pooling("roi_pool", input, boxes, output_size, spatial_scale)
    if output.size:
        C.roi_pool_fwd_cpu(input, boxes, output, None, spatial_scale)
    return output


# --------------------------------------------------------------------------------------------------------------- checks


def _exportable(x: NDArray) -> NDArray:
    """``x``, or a copy where DLPack cannot describe it: odd byte order or alignment, or read-only in old NumPy."""
    whole_strides = all(stride % x.itemsize == 0 for stride in x.strides)
    if x.dtype.isnative and x.flags.aligned and whole_strides and (x.flags.writeable or _EXPORTS_READ_ONLY):
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="K")


def _numbers(op: str, name: str, x: ArrayLike) -> NDArray:
    """Boxes or scores: floating as they are, integers as float64."""
    x = np.asarray(x)
    if x.dtype.newbyteorder("=") in _FLOATS:
        return _exportable(x)
    if x.dtype.kind in "iu":
        return x.astype(np.float64)
    raise TypeError(f"{op}: {name} must be float32, float64, float16 or integer, got {x.dtype}")


def _whole(op: str, name: str, x: ArrayLike) -> NDArray:
    x = np.asarray(x)
    if x.dtype.kind not in "iufb":
        raise TypeError(f"{op}: {name} must be whole numbers, got {x.dtype}")
    if x.dtype.kind == "f" and not np.array_equal(x, np.trunc(x)):
        raise ValueError(f"{op}: {name} must be whole numbers")
    return _exportable(x.astype(np.int64, copy=False))


def _nms(op: str, boxes, scores, idxs: NDArray | None, iou_threshold: float, max_output: int | None):
    boxes, scores = _numbers(op, "boxes", boxes), _numbers(op, "scores", scores)
    if boxes.size == 0 and boxes.ndim == 1:
        boxes = boxes.reshape(0, 4)  # what an empty list becomes
    if boxes.ndim not in ((2,) if max_output is None else (2, 3)) or boxes.shape[-1] != 4:
        allowed = "[N, 4] ([B, N, 4] needs max_output)" if max_output is None else "[N, 4] or [B, N, 4]"
        raise ValueError(f"{op}: boxes must have shape {allowed}, got {list(boxes.shape)}")
    for name, x in (("scores", scores), ("idxs", idxs)):
        if x is not None and x.shape != boxes.shape[:-1]:
            raise ValueError(f"{op}: {name} must have shape {list(boxes.shape[:-1])}, got {list(x.shape)}")
    if math.isnan(iou_threshold):
        raise ValueError(f"{op}: iou_threshold must not be NaN")
    if max_output is not None and max_output < 0:
        raise ValueError(f"{op}: max_output must not be negative, got {max_output}")
    # As in pyzoo.ops.nms:
    shift_classes = idxs is not None and boxes.shape[-2] * 4 <= 4000 and boxes.dtype != np.float16
    keep = np.empty((*boxes.shape[:-2], boxes.shape[-2] if max_output is None else max_output), np.int64)
    count = C.nms_cpu(boxes, scores, idxs, iou_threshold, keep, shift_classes)
    if max_output is None:
        return keep[:count].copy()  # not a view: few are kept of many
    return keep, np.asarray(count, np.int64) if boxes.ndim == 3 else count


def _pooling(op: str, input, boxes, output_size, spatial_scale) -> tuple[NDArray, NDArray, NDArray]:
    """Features, boxes [K, 5] and an empty output, after all checks."""
    if not isinstance(input, np.ndarray):
        raise TypeError(f"{op}: input must be a numpy.ndarray, got {type(input).__name__}")
    if input.dtype.newbyteorder("=") not in _FLOATS:
        raise TypeError(f"{op}: input must be float32, float64 or float16, got {input.dtype}")
    if input.ndim != 4:
        raise ValueError(f"{op}: input must have shape [N, C, H, W], got {list(input.shape)}")
    if not 0 < spatial_scale < math.inf:
        raise ValueError(f"{op}: spatial_scale must be positive and finite, got {spatial_scale}")
    boxes = _rois(op, boxes)
    height, width = _pair(op, output_size)
    input = _exportable(input)
    channels = input.shape[1]
    channels_last = channels > 1 and input.strides[1] == input.itemsize and not input.flags.c_contiguous
    if channels_last:
        output = np.empty((len(boxes), height, width, channels), input.dtype).transpose(0, 3, 1, 2)
    else:
        output = np.empty((len(boxes), channels, height, width), input.dtype)
    return input, boxes, output


def _rois(op: str, boxes) -> NDArray:
    if isinstance(boxes, np.ndarray) or not _is_list_of_boxes(boxes):
        boxes = _numbers(op, "boxes", boxes)
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(f"{op}: boxes must have shape [K, 5], or be a list of [L, 4], got {list(boxes.shape)}")
        return boxes
    parts = []
    for i, each in enumerate(boxes):
        each = _numbers(op, f"boxes[{i}]", each)
        if each.size == 0 and each.ndim == 1:
            each = each.reshape(0, 4)
        if each.ndim != 2 or each.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{i}] must have shape [L, 4], got {list(each.shape)}")
        if len(each):  # an empty list would count as float64
            parts.append(np.insert(each.astype(np.result_type(each.dtype, np.float32), copy=False), 0, i, axis=1))
    return np.concatenate(parts) if parts else np.empty((0, 5), np.float32)


def _is_list_of_boxes(boxes) -> bool:
    """Whether ``boxes`` is a list with an array (or nested list) for each image, not a nested list of rows of five."""
    return isinstance(boxes, (list, tuple)) and all(np.ndim(each) != 1 or np.size(each) == 0 for each in boxes)


def _pair(op: str, output_size) -> tuple[int, int]:
    """(height, width) from an int or from a sequence of one or two."""
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,)
    if not 1 <= len(sizes) <= 2:
        raise ValueError(f"{op}: output_size must be an int or two ints, got {len(sizes)} values")
    if not all(hasattr(size, "__index__") for size in sizes):
        raise TypeError(f"{op}: output_size must be an int or two ints, got {output_size!r}")
    if min(sizes) < 1:
        raise ValueError(f"{op}: output_size must be at least 1 x 1, got {sizes[0]} x {sizes[-1]}")
    return sizes[0], sizes[-1]
