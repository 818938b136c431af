"""What a detector is given: images, and in training their objects. Wrong ones are refused, with their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_images(model: str, images: Sequence[Tensor]) -> None:
    """Images must be a list of at least one [3, H, W] of a floating dtype.

    Raises:
        TypeError, ValueError: they are not; the message begins with the name of the ``model``.
    """
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"{model}: images must be a list of tensors [3, H, W], got {_what(images)}")
    if not images:
        raise ValueError(f"{model}: images must have at least one image, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"{model}: images[{i}] must be a tensor [3, H, W], got {_what(image)}")
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"{model}: images[{i}] must be [3, H, W] with pixels, got shape {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"{model}: images[{i}] must be floating, with values in [0, 1], got {image.dtype}")


def check_targets(model: str, images: Sequence[Tensor], targets, num_classes: int) -> None:
    """Targets must be a dict for each image: ``boxes`` [n, 4] of a floating dtype, finite and not empty; ``labels`` [n]
    of int64 from 1 to ``num_classes - 1``; and if they have ``masks``, [n, H, W] of the image.

    Raises:
        TypeError, ValueError: they are not; the message begins with the name of the ``model``.
    """
    if not isinstance(targets, (list, tuple)) or len(targets) != len(images):
        raise ValueError(f"{model}: targets must be a list of {len(images)} dicts, one an image, got {_what(targets)}")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
            got = sorted(map(str, target)) if isinstance(target, dict) else _what(target)
            raise ValueError(f"{model}: targets[{i}] must be a dict with boxes and labels, got {got}")
        for key in ("boxes", "labels", "masks"):
            if key in target and not isinstance(target[key], Tensor):
                raise TypeError(f"{model}: targets[{i}]: {key} must be a tensor, got {_what(target[key])}")
        boxes, labels, masks = target["boxes"], target["labels"], target.get("masks")
        where = f"{model}: targets[{i}]:"
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{where} boxes must be [n, 4], got shape {list(boxes.shape)}")
        if not boxes.is_floating_point():
            raise TypeError(f"{where} boxes must be floating, got {boxes.dtype}")
        if labels.shape != boxes.shape[:1]:
            raise ValueError(f"{where} labels must be [{len(boxes)}] as there are boxes, got {list(labels.shape)}")
        if labels.dtype != torch.int64:
            raise TypeError(f"{where} labels must be int64, got {labels.dtype}")
        bad = ~(boxes.isfinite().all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1))
        if bad.any():
            n = int(bad.nonzero()[0])
            raise ValueError(f"{where} boxes[{n}] must be finite with x1 < x2 and y1 < y2, got {boxes[n].tolist()}")
        bad = (labels < 1) | (labels >= num_classes)
        if bad.any():
            n = int(bad.nonzero()[0])
            raise ValueError(f"{where} labels[{n}] must be in 1 .. {num_classes - 1}, got {int(labels[n])}")
        if masks is not None and masks.shape != (len(boxes), *image.shape[1:]):
            size = [len(boxes), *image.shape[1:]]
            raise ValueError(f"{where} masks must be {size} as boxes and image are, got {list(masks.shape)}")


def _what(x) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    return f"{len(x)} elements" if isinstance(x, (list, tuple)) else type(x).__name__
