"""What detectors do with boxes: overlap, coding relative to a reference, clipping, matching, sampling.

A box is (x1, y1, x2, y2) in pixels; x2 and y2 are exclusive, so that its width is x2 - x1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    """Areas of boxes [..., 4], [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of all pairs: [N, 4] and [M, 4] -> [N, M]. Two boxes without area have NaN, as in
    torchvision."""
    return paired_iou(boxes1[:, None], boxes2)


def paired_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """:func:`box_iou` of each box with its partner alone: [..., 4] and [..., 4], which broadcast, -> [...]."""
    top_left = torch.max(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.min(boxes1[..., 2:], boxes2[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    return intersection / (box_area(boxes1) + box_area(boxes2) - intersection)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] cut at the edges of an image of ``size`` (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), -1).flatten(-2)


def is_large(boxes: Tensor, min_size: float) -> Tensor:
    """Which of the boxes [..., 4] have both sides at least ``min_size`` long."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_size).all(-1)


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) -> (cx, cy, w, h)."""
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat((boxes[..., :2] + size / 2, size), -1)


class BoxCoder:
    """Boxes as offsets from a reference box (an anchor, a proposal): Faster R-CNN, equation 2.

        t = (wx (x - xa) / wa, wy (y - ya) / ha, ww log(w / wa), wh log(h / ha))   with centres x, y and sizes w, h

    Args:
        weights: (wx, wy, ww, wh), which make the targets about as large as each other.
        limit: log sizes are cut here when decoding, so that no exponential overflows.
    """

    def __init__(self, weights: tuple[float, float, float, float] = (1, 1, 1, 1), limit: float = math.log(1000 / 16)):
        self.weights = weights
        self.limit = limit

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        """[..., 4], [..., 4] -> [..., 4]."""
        box, reference = to_centres(boxes), to_centres(references)
        shift = (box[..., :2] - reference[..., :2]) / reference[..., 2:]
        scale = torch.log(box[..., 2:] / reference[..., 2:])
        return torch.cat((shift, scale), -1) * boxes.new_tensor(self.weights)

    def decode(self, offsets: Tensor, references: Tensor) -> Tensor:
        """[..., 4], [..., 4] -> [..., 4]; leading dimensions broadcast."""
        offsets = offsets.to(torch.promote_types(offsets.dtype, references.dtype))  # pixels need more than float16
        offsets = offsets / offsets.new_tensor(self.weights)
        reference = to_centres(references.to(offsets.dtype))
        centre = offsets[..., :2] * reference[..., 2:] + reference[..., :2]
        size = offsets[..., 2:].clamp(max=self.limit).exp() * reference[..., 2:]
        return to_corners(torch.cat((centre, size), -1))


BELOW = -1  # the best overlap is below all thresholds: background
BETWEEN = -2  # it is between them: to be ignored


def match(iou: Tensor, high: float, low: float, keep_best: bool = False) -> Tensor:
    """The object that each candidate stands for.

    Args:
        iou: [objects, candidates], at least one object.
        high: a candidate that overlaps an object as much stands for the one it overlaps most.
        low: one that overlaps all objects less is background (:data:`BELOW`), others are ignored (:data:`BETWEEN`).
        keep_best: the candidates that overlap an object most stand for something however little that is, though not
            nothing at all: an object that overlaps no candidate has none.

    Returns:
        [candidates] int64: indices of objects, or one of the negative constants.
    """
    best, matched = iou.max(0)
    found = torch.where(best < low, BELOW, torch.where(best < high, BETWEEN, matched))
    if keep_best:
        most = iou.max(1, keepdim=True).values
        is_best = ((iou == most) & (most > 0)).any(0)
        found = torch.where(is_best, matched, found)
    return found


def sample(labels: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draws at most ``count`` candidates of one image, among them at most ``positive_fraction`` positives.

    Args:
        labels: [candidates]: >= 1 positive, 0 negative, < 0 ignored.

    Returns:
        Indices of the positives and of the negatives, drawn with torch's global generator.
    """
    positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
    positives = min(len(positive), int(count * positive_fraction))
    negatives = min(len(negative), count - positives)
    order = torch.randperm(len(positive), device=labels.device)[:positives]
    positive = positive[order]
    order = torch.randperm(len(negative), device=labels.device)[:negatives]
    return positive, negative[order]
