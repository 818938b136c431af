"""What the datasets in folders share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from pyzoo._extras import need


def detection_collate(samples: Iterable[tuple]) -> tuple[list, list]:
    """Pairs of an image and its target -> a list of images, which may differ in size, and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def require_layout(what: str, folder: Path, layout: str, paths: Sequence[Path]) -> None:
    """Raises FileNotFoundError, with the layout that is expected, where a file or folder is missing."""
    if missing := [path for path in (folder, *paths) if not path.exists()]:
        raise FileNotFoundError(f"{what}: there is no {missing[0]}; expected in {folder} is:\n{layout}")


def to_image(picture) -> Tensor:
    """A PIL image -> [3, H, W] of float in [0, 1], RGB."""
    functional = need("torchvision.transforms.functional", "pyzoo.data")
    return functional.pil_to_tensor(picture.convert("RGB")).float() / 255


def keep_sound(target: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Cuts boxes off at the edges of the image, and drops the objects whose boxes then have no area."""
    boxes = target["boxes"]
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    sound = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {name: value[sound] for name, value in target.items()}
