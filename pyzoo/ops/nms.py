"""Non-maximum suppression, for one set of boxes and for boxes of many classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyzoo._backend import Kernel, runs_on_core, specified_by
from pyzoo._ext import C
from pyzoo.ops import _common as common
from pyzoo.ops._common import Operator

_kernel = Kernel("nms", "nms")

# ---------------------------------------------------------------------------------------------------------- reference


def nms_reference(boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_output: int | None = None):
    """:func:`nms` in plain PyTorch: the specification of the kernels."""
    if boxes.dim() == 3:
        return _reference_of_each(nms_reference, (boxes, scores), iou_threshold, max_output)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    order = scores.sort(descending=True, stable=True).indices  # NaN first
    boxes = boxes[order]
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    keep = []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        keep.append(i)
        # The comparisons are std::max's and std::min's: with NaN they return their first argument.
        left, top = torch.where(x1[i] < x1, x1, x1[i]), torch.where(y1[i] < y1, y1, y1[i])
        right, bottom = torch.where(x2 < x2[i], x2, x2[i]), torch.where(y2 < y2[i], y2, y2[i])
        width, height = right - left, bottom - top
        inter = torch.where(width > 0, width, 0) * torch.where(height > 0, height, 0)
        overlap = inter / (area[i] + area - inter)
        alive &= ~(overlap.double() > iou_threshold)
    return _padded(order[keep], max_output)


def batched_nms_reference(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_output: int | None = None
):
    """:func:`batched_nms` in plain PyTorch: the specification of the kernels."""
    if boxes.dim() == 3:
        return _reference_of_each(batched_nms_reference, (boxes, scores, idxs), iou_threshold, max_output)
    if boxes.numel() and _shifts_classes(boxes):
        shift = idxs.to(boxes) * (boxes.max() + 1)
        return nms_reference(boxes + shift[:, None], scores, iou_threshold, max_output=max_output)
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in idxs.unique():
        members = (idxs == i).nonzero()[:, 0]
        kept[members[nms_reference(boxes[members], scores[members], iou_threshold)]] = True
    kept = kept.nonzero()[:, 0]
    return _padded(kept[scores[kept].sort(descending=True, stable=True).indices], max_output)


def _padded(keep: Tensor, max_output: int | None):
    if max_output is None:
        return keep
    count = min(len(keep), max_output)
    return torch.nn.functional.pad(keep[:count], (0, max_output - count), value=-1), keep.new_tensor(count)


def _reference_of_each(reference, args, iou_threshold: float, max_output: int):
    entries = [reference(*entry, iou_threshold, max_output=max_output) for entry in zip(*args, strict=True)]
    keep = [keep for keep, _ in entries] or [args[0].new_empty(max_output, dtype=torch.int64)]
    count = [count for _, count in entries] or [args[0].new_empty((), dtype=torch.int64)]
    return torch.stack(keep)[: len(entries)], torch.stack(count)[: len(entries)]


# ---------------------------------------------------------------------------------------------------------------- nms


def _check(op, boxes, scores, iou_threshold, *, batched=False):
    size = scores.shape
    if (
        len(size) == 1
        and boxes.shape == (*size, 4)
        and boxes.dtype is scores.dtype is torch.float32
        and boxes.is_cpu
        and scores.is_cpu
        and iou_threshold == iou_threshold
    ):
        return  # what nearly every call is, said sooner
    if boxes.dim() not in ((2, 3) if batched else (2,)) or boxes.shape[-1] != 4:
        allowed = "[N, 4] or [B, N, 4]" if batched else "[N, 4] ([B, N, 4] needs max_output)"
        raise ValueError(f"{op}: boxes must have shape {allowed}, got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:-1]:
        raise ValueError(f"{op}: scores must have shape {list(boxes.shape[:-1])}, got {list(scores.shape)}")
    common.check_floating(op, "boxes", boxes)
    common.check_floating(op, "scores", scores)
    common.check_same_device(op, "boxes", boxes, "scores", scores)
    if math.isnan(iou_threshold):
        raise ValueError(f"{op}: iou_threshold must not be NaN")


def _check_idxs(op, boxes, idxs):
    if idxs.dtype is torch.int64 and idxs.shape == boxes.shape[:-1] and idxs.device == boxes.device:
        return  # the same here
    if idxs.shape != boxes.shape[:-1]:
        raise ValueError(f"{op}: idxs must have shape {list(boxes.shape[:-1])}, got {list(idxs.shape)}")
    if idxs.is_complex():
        raise TypeError(f"{op}: idxs must be integers, got {idxs.dtype}")
    common.check_same_device(op, "boxes", boxes, "idxs", idxs)


def _check_max_output(op, max_output):
    if max_output < 0:
        raise ValueError(f"{op}: max_output must not be negative, got {max_output}")


def _detached(x):
    return x.detach() if x.requires_grad else x


def _kept(boxes, scores, idxs, iou_threshold, shift_classes):
    if boxes.requires_grad or scores.requires_grad:
        boxes, scores = boxes.detach(), scores.detach()
    if runs_on_core(boxes.device):
        return C.nms_cpu(boxes, scores, idxs, iou_threshold, None, shift_classes)
    keep = boxes.new_empty(boxes.shape[0], dtype=torch.int64)
    count = _kernel(boxes.device, boxes, scores, idxs, iou_threshold, keep, shift_classes)
    return keep.resize_(int(count))


def _kept_padded(boxes, scores, idxs, iou_threshold, max_output, shift_classes):
    keep = torch.empty((*boxes.shape[:-2], max_output), dtype=torch.int64, device=boxes.device)
    count = _kernel(boxes.device, _detached(boxes), _detached(scores), idxs, iou_threshold, keep, shift_classes)
    return keep, torch.as_tensor(count, dtype=torch.int64, device=boxes.device)


def _fake_kept(boxes):
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return boxes.new_empty(count, dtype=torch.int64)


def _fake_kept_padded(boxes, max_output):
    batch = boxes.shape[:-2]
    return boxes.new_empty((*batch, max_output), dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError("nms: how many boxes are kept depends on the data, so under vmap give max_output=k")


def _fold(info, in_dims, tensors):
    """[N, ...] or [B, N, ...] with V somewhere -> [V, N, ...] or [V * B, N, ...]; and how to undo that."""
    size = info.batch_size
    tensors = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=False)
    ]
    if tensors[0].dim() == 3:
        return tensors, lambda outputs: (outputs, (0, 0))
    tensors = [x.flatten(0, 1) for x in tensors]
    return tensors, lambda outputs: (tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in outputs), (0, 0))


def _nms_impl(boxes, scores, iou_threshold):
    _check("nms", boxes, scores, iou_threshold)
    return _kept(boxes, scores, None, iou_threshold, False)


def _nms_fake(boxes, scores, iou_threshold):
    _check("nms", boxes, scores, iou_threshold)
    return _fake_kept(boxes)


def _nms_padded_impl(boxes, scores, iou_threshold, max_output):
    _check("nms", boxes, scores, iou_threshold, batched=True)
    _check_max_output("nms", max_output)
    return _kept_padded(boxes, scores, None, iou_threshold, max_output, False)


def _nms_padded_fake(boxes, scores, iou_threshold, max_output):
    _check("nms", boxes, scores, iou_threshold, batched=True)
    _check_max_output("nms", max_output)
    return _fake_kept_padded(boxes, max_output)


def _nms_padded_vmap(info, in_dims, boxes, scores, *rest):
    tensors, unfold = _fold(info, in_dims, (boxes, scores))
    return unfold(_nms_padded.op(*tensors, *rest))


# Called as operators: without a derivative the dispatcher takes less than the questions whether it may be passed by.
_nms = Operator(  # torchvision's schema
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    impl=_nms_impl,
    fake=_nms_fake,
    vmap=_no_vmap,
)
_nms_padded = Operator(
    "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, SymInt max_output) -> (Tensor, Tensor)",
    impl=_nms_padded_impl,
    fake=_nms_padded_fake,
    vmap=_nms_padded_vmap,
)


@specified_by(nms_reference)
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_output: int | None = None):
    """Keeps the best boxes: each kept box suppresses those of lower score that overlap it by IoU > ``iou_threshold``.

    Boxes are taken by score descending, NaN first, equal scores by index. The overlap is inter / (area + area - inter)
    in the dtype of ``boxes``, float16 and bfloat16 widened to float32, and is compared in double. On equal input the
    kept indices are torchvision's; they do not depend on the number of threads.

    Args:
        boxes: Tensor[N, 4] of (x1, y1, x2, y2); float32, float64, float16 or bfloat16. With ``max_output`` also
            [B, N, 4]: B independent problems in one call.
        scores: Tensor[N] (or [B, N]), any floating dtype.
        iou_threshold: overlap above which a box is suppressed.
        max_output: keep at most so many boxes and return tensors of static shape: for ``torch.export``, CUDA graphs,
            ``vmap``.

    Returns:
        int64 Tensor[n] of the kept indices by descending score. With ``max_output=k``, (Tensor[k] padded with -1,
        number kept), or (Tensor[B, k], Tensor[B]).

    Raises:
        TypeError: ``boxes`` or ``scores`` are not of a floating dtype.
        ValueError: shapes or devices do not fit, or ``iou_threshold`` is NaN.
    """
    common.check_tensor("nms", "boxes", boxes)
    common.check_tensor("nms", "scores", scores)
    if max_output is None:
        return _nms.op(boxes, scores, iou_threshold)
    return _nms_padded.op(boxes, scores, iou_threshold, max_output)


# -------------------------------------------------------------------------------------------------------- batched_nms


def _shifts_classes(boxes: Tensor) -> bool:
    return boxes.shape[-2] * 4 <= 4000 and boxes.dtype in (torch.float32, torch.float64)


def _class_indices(op: str, idxs: Tensor) -> Tensor:
    """idxs as int64; torchvision takes whole numbers of any dtype."""
    if idxs.dtype == torch.int64 or (idxs.is_floating_point() and idxs.device.type != "cpu"):
        return idxs  # elsewhere to check them would be to wait, and classes may be any numbers
    whole = idxs.long()
    if idxs.is_floating_point() and not torch.equal(whole.to(idxs.dtype), idxs):
        raise ValueError(f"{op}: idxs must be whole numbers")
    return whole


def _batched_nms_impl(boxes, scores, idxs, iou_threshold):
    _check("batched_nms", boxes, scores, iou_threshold)
    _check_idxs("batched_nms", boxes, idxs)
    return _kept(boxes, scores, _class_indices("batched_nms", idxs), iou_threshold, _shifts_classes(boxes))


def _batched_nms_fake(boxes, scores, idxs, iou_threshold):
    _check("batched_nms", boxes, scores, iou_threshold)
    _check_idxs("batched_nms", boxes, idxs)
    return _fake_kept(boxes)


def _batched_nms_padded_impl(boxes, scores, idxs, iou_threshold, max_output):
    _check("batched_nms", boxes, scores, iou_threshold, batched=True)
    _check_idxs("batched_nms", boxes, idxs)
    _check_max_output("batched_nms", max_output)
    idxs = _class_indices("batched_nms", idxs)
    return _kept_padded(boxes, scores, idxs, iou_threshold, max_output, _shifts_classes(boxes))


def _batched_nms_padded_fake(boxes, scores, idxs, iou_threshold, max_output):
    _check("batched_nms", boxes, scores, iou_threshold, batched=True)
    _check_idxs("batched_nms", boxes, idxs)
    _check_max_output("batched_nms", max_output)
    return _fake_kept_padded(boxes, max_output)


def _batched_nms_padded_vmap(info, in_dims, boxes, scores, idxs, *rest):
    tensors, unfold = _fold(info, in_dims, (boxes, scores, idxs))
    return unfold(_batched_nms_padded.op(*tensors, *rest))


_batched_nms = Operator(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    impl=_batched_nms_impl,
    fake=_batched_nms_fake,
    vmap=_no_vmap,
)
_batched_nms_padded = Operator(
    "batched_nms_padded(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, SymInt max_output)"
    " -> (Tensor, Tensor)",
    impl=_batched_nms_padded_impl,
    fake=_batched_nms_padded_fake,
    vmap=_batched_nms_padded_vmap,
)


@specified_by(batched_nms_reference)
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, max_output: int | None = None):
    """:func:`nms` of each class by itself: boxes of different ``idxs`` never suppress each other.

    On equal input the kept indices are torchvision's, rounding included: for up to 1000 float32 or float64 boxes
    torchvision moves class i by i * (boxes.max() + 1) and runs one nms, and an overlap of moved boxes can round to the
    other side of the threshold. So this does the same there, and compares classes otherwise. float16 and bfloat16
    boxes, which torchvision does not take on the CPU, always have their classes compared. Equal scores are in the order
    of their indices; beyond 1000 boxes torchvision's sort is unstable and leaves them in any order.

    Args:
        boxes, scores, iou_threshold, max_output: as in :func:`nms`.
        idxs: Tensor[N] (or [B, N]) of classes, whole numbers of any dtype.

    Returns:
        As :func:`nms`.

    Raises:
        TypeError, ValueError: as :func:`nms`; also when ``idxs`` are not whole numbers or not of the shape of
            ``scores``.
    """
    common.check_tensor("batched_nms", "boxes", boxes)
    common.check_tensor("batched_nms", "scores", scores)
    common.check_tensor("batched_nms", "idxs", idxs)
    if max_output is None:
        return _batched_nms.op(boxes, scores, idxs, iou_threshold)
    return _batched_nms_padded.op(boxes, scores, idxs, iou_threshold, max_output)
