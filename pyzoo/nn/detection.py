"""The contract of detectors: what they take, as torchvision's do, and images of many sizes in one batch.

A detector is called with a list of images [3, H, W], any sizes. In training it also takes a target for each image, a
dict of ``boxes`` [n, 4], ``labels`` [n] from 1 up (0 is background) and, for some, ``masks`` [n, H, W].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def check_images(model: str, images: Sequence[Tensor]) -> None:
    """Raises where ``images`` is no list of images."""
    if not isinstance(images, (list, tuple)) or not all(isinstance(image, Tensor) for image in images):
        raise TypeError(f"{model}: images must be a list of tensors [3, H, W], got {_kind(images)}")
    if not images:
        raise ValueError(f"{model}: images must hold at least one image")
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"{model}: images[{i}] must have shape [3, H, W], got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"{model}: images[{i}] must be of a floating dtype, in [0, 1], got {image.dtype}")


def check_targets(
    model: str,
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]] | None,
    num_classes: int,
    masks: bool = False,
) -> None:
    """Raises where the targets do not fit the images, or where an object has no area or no class."""
    if targets is None:
        raise ValueError(f"{model}: targets must be given in training")
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"{model}: targets must be a list of dicts, got {_kind(targets)}")
    if len(targets) != len(images):
        raise ValueError(f"{model}: targets must be one for each of the {len(images)} images, got {len(targets)}")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        for key in ("boxes", "labels", "masks") if masks else ("boxes", "labels"):
            if not isinstance(target, Mapping) or not isinstance(target.get(key), Tensor):
                raise TypeError(f"{model}: targets[{i}] must have a tensor {key!r}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{model}: boxes of targets[{i}] must have shape [n, 4], got {list(boxes.shape)}")
        if not boxes.is_floating_point():
            raise TypeError(f"{model}: boxes of targets[{i}] must be of a floating dtype, got {boxes.dtype}")
        if labels.dtype != torch.int64:
            raise TypeError(f"{model}: labels of targets[{i}] must be int64, got {labels.dtype}")
        if labels.shape != boxes.shape[:1]:
            raise ValueError(f"{model}: labels of targets[{i}] must be {len(boxes)}, got {list(labels.shape)}")
        bad = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        if bad.any():
            j = int(bad.nonzero()[0])
            box = boxes[j].tolist()
            raise ValueError(f"{model}: boxes of targets[{i}] must be finite, with x1 < x2, y1 < y2; box {j} is {box}")
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) < num_classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"{model}: labels of targets[{i}] must be from 1 to {num_classes - 1}, got {found}")
        if "masks" in target and target["masks"].shape != (len(boxes), *image.shape[1:]):
            want, got = [len(boxes), *image.shape[1:]], list(target["masks"].shape)
            raise ValueError(f"{model}: masks of targets[{i}] must have shape {want}, got {got}")


def _kind(x) -> str:
    return f"{list(x.shape)} in one tensor" if isinstance(x, Tensor) else type(x).__name__


class Batch(NamedTuple):
    """Images of many sizes in one tensor."""

    images: Tensor  # [N, 3, H, W], channels_last; each image at the top left, zeros beside and below it
    sizes: list[tuple[int, int]]  # height and width of each
    scales: list[float]  # how much larger it is than it came


class InputTransform:
    """Images to one batch and back.

    Args:
        min_size: what the shorter side of an image becomes; in training one of several, drawn, if there are several.
        max_size: what the longer side must not exceed.
        mean, std: of each channel; they become 0 and 1.
        bgr: turn the channels around, after that.
        divisor: the batch is padded to multiples of this, and to 32 at least.
    """

    def __init__(
        self,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        bgr: bool = False,
        divisor: int = 32,
    ):
        self.min_sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        self.max_size, self.mean, self.std, self.bgr, self.divisor = max_size, mean, std, bgr, divisor

    def batch(self, images: Sequence[Tensor], training: bool) -> Batch:
        """Resizes, normalises, pads."""
        resized, scales = [], []
        for image in images:
            size = image.shape[1:]
            # Drawn as in torchvision, from the same random numbers.
            choice = int(torch.empty(1).uniform_(0, len(self.min_sizes))) if training else -1
            scale = min(self.min_sizes[choice] / min(size), self.max_size / max(size))
            new = tuple(max(int(side * scale), 1) for side in size)
            if new != tuple(size):
                image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
            resized.append(image)
            scales.append(scale)
        sizes = [tuple(image.shape[1:]) for image in resized]
        height, width = (-(-max(32, *side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        first = resized[0]
        out = first.new_zeros(len(images), height, width, 3).permute(0, 3, 1, 2)
        mean, std = (first.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        for row, image, (h, w) in zip(out, resized, sizes, strict=True):
            image = (image - mean) / std
            row[:, :h, :w] = image.flip(0) if self.bgr else image
        return Batch(out, sizes, scales)


def resize_boxes(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes [..., 4] of an image of size ``old`` (height, width) in one of size ``new``."""
    y, x = torch.tensor(new, dtype=torch.float32) / torch.tensor(old, dtype=torch.float32)
    return boxes * torch.stack((x, y, x, y)).to(boxes)


def rename_keys(state_dict: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """Keys that begin with ``prefix`` and an old name get the new one, unless they have it already."""
    for old, new in names.items():
        for what in ("weight", "bias"):
            if prefix + old + what in state_dict:
                state_dict[prefix + new + what] = state_dict.pop(prefix + old + what)
