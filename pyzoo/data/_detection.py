"""What the detection datasets share: the target, and how samples become a batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def detection_collate(samples: Iterable[tuple]) -> tuple[list, list]:
    """Pairs of an image and its target -> a list of images, which may differ in size, and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes [n, 4] (x1, y1, x2, y2) have an area: annotations have some without, and no loss likes them."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def require_layout(what: str, layout: str, *paths: Path) -> None:
    """Raises FileNotFoundError, with the layout that is expected, where a file or folder is missing."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{what}: there is no {path}; expected is\n{layout}")
