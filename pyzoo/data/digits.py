"""Scikit-learn's 1797 handwritten digits, and scenes composed of them: boxes, labels and exact masks, no download."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pyzoo._extras import need

SPLITS = {"train": slice(0, 1437), "test": slice(1437, None)}
INK = 0.4  # what is darker than this, of the darkest, is part of the digit
VISIBLE = 0.5  # the least part of a digit's ink that later digits must leave
TRIES = 20  # places that are tried for a digit before it is left out


@cache
def _digits() -> tuple[Tensor, Tensor]:
    bunch = need("sklearn.datasets", "pyzoo.data.digits").load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 16, torch.from_numpy(bunch.target).long()


def digits(split: str = "all") -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of float in [0, 1] with bright ink, and labels [n] of int64, 0..9.

    Args:
        split: "all" 1797, the first 1437 ("train"), or the other 360 ("test").
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f"digits: split must be 'all', 'train' or 'test', got {split!r}")
    images, labels = _digits()
    part = SPLITS.get(split, slice(None))
    return images[part].clone(), labels[part].clone()


class DigitScenes(Dataset):
    """Digits of random sizes, colors and places on textured, noisy ground: ``scenes[i]`` is (image, target).

    The image is [3, H, W] of float in [0, 1]. The target has ``boxes`` [n, 4] (x1, y1, x2, y2 with the ends exclusive,
    tight around what is visible), ``labels`` [n] (the digit + 1), ``masks`` [n, H, W] of uint8 (what is visible) and
    ``image_id``. Later digits cover earlier ones. A scene depends on its index and the arguments alone.

    Args:
        count: scenes.
        size: height and width of the images.
        seed: another one gives other scenes.
        objects: the least and the most digits in a scene. A digit for which there is no place is left out, but never
            the first.
        scale: the least and the most pixels of a digit's side, log-uniform in between. Its box is about as high, and
            mostly narrower.
        max_overlap: how much of the smaller of two boxes the other one may cover.
        split: "train" or "test"; the two have no digit in common.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int] = (96, 96),
        *,
        seed: int = 0,
        objects: tuple[int, int] = (1, 4),
        scale: tuple[float, float] = (16, 40),
        max_overlap: float = 0.3,
        split: str = "train",
    ):
        def require(valid: bool, name: str, value, allowed: str) -> None:
            if not valid:
                raise ValueError(f"DigitScenes: {name} must be {allowed}, got {value!r}")

        require(count >= 0, "count", count, "at least 0")
        require(seed >= 0, "seed", seed, "at least 0")
        require(len(objects) == 2 and 0 <= objects[0] <= objects[1], "objects", objects, "(least, most), from 0 up")
        fits = len(size) == 2 and min(size) >= 8
        require(fits, "size", size, "(height, width), 8 or more each")
        # The ink of a digit, padded and upscaled, may be a little larger than the side.
        allowed = f"(least, most), from 6 to {min(size) * 0.8:g}, 0.8 of the shorter side of the image"
        require(len(scale) == 2 and 6 <= scale[0] <= scale[1] <= min(size) * 0.8, "scale", scale, allowed)
        require(0 <= max_overlap <= 1, "max_overlap", max_overlap, "in [0, 1]")
        require(split in SPLITS, "split", split, "'train' or 'test'")
        self.count, self.size, self.seed, self.split = count, tuple(size), seed, split
        self.objects, self.scale, self.max_overlap = objects, scale, max_overlap
        images, self.labels = digits(split)
        self.ink = F.pad(images, (1, 1, 1, 1))[:, None]  # [digits, 1, 1, 10, 10]; strokes at the edge end smoothly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        index = int(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"DigitScenes: index {index} of {self.count} scenes")
        index %= self.count
        rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), index))

        height, width = self.size
        color = rng.uniform(0.3, 0.7, (3, 1, 1))
        image = torch.from_numpy(color).float() + texture(rng, height, width)
        digits, boxes, masks = [], [], torch.zeros(0, height, width, dtype=torch.bool)
        inks = torch.zeros(0)  # pixels of each digit before others covered it
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            digit, alpha = self._digit(rng)
            place = self._place(rng, alpha > INK, boxes, masks, inks)
            paint = torch.from_numpy(contrasting(rng, color)).float()  # drawn whether or not there is a place
            if place is None:
                continue
            (x, y), masks = place
            h, w = alpha.shape
            window = image[:, y : y + h, x : x + w]
            # Half transparent where the mask ends, so that edges are smooth
            window += (paint - window) * ((alpha - INK) * 2.5 + 0.5).clamp(0, 1)
            digits.append(digit)
            boxes.append((x, y, x + w, y + h))
            inks = torch.cat([inks, masks[-1:].sum((1, 2))])
        image += torch.from_numpy(rng.standard_normal((3, height, width), dtype=np.float32)) * 0.03
        target = {
            "boxes": torch.tensor([tight_box(mask) for mask in masks], dtype=torch.float32).reshape(-1, 4),
            "labels": self.labels[digits] + 1,
            "masks": masks.to(torch.uint8),
            "image_id": index,
        }
        return image.clamp_(0, 1), target

    def _digit(self, rng: np.random.Generator) -> tuple[int, Tensor]:
        """Which digit, and its ink in [0, 1], cropped to the box of what is part of it."""
        digit = int(rng.integers(len(self.ink)))
        side = round(np.exp(rng.uniform(*np.log(self.scale))) * 10 / 8)
        alpha = F.interpolate(self.ink[digit], (side, side), mode="bicubic")[0, 0]
        alpha /= alpha.max()
        x1, y1, x2, y2 = tight_box(alpha > INK)
        return digit, alpha[y1:y2, x1:x2]

    def _place(self, rng, mask: Tensor, boxes: list, masks: Tensor, inks: Tensor):
        """A free corner for the mask and the masks with it in front, or None."""
        h, w = mask.shape
        for x, y in rng.integers(0, (self.size[1] - w + 1, self.size[0] - h + 1), (TRIES, 2)).tolist():
            if any(covered((x, y, x + w, y + h), box) > self.max_overlap for box in boxes):
                continue
            new = torch.zeros(1, *self.size, dtype=torch.bool)
            new[0, y : y + h, x : x + w] = mask
            left = masks & ~new
            if (left.sum((1, 2)) >= inks * VISIBLE).all():
                return (x, y), torch.cat([left, new])
        return None


def texture(rng: np.random.Generator, height: int, width: int) -> Tensor:
    """[3, height, width] around 0: smooth noise, coarse and fine."""
    total = torch.zeros(1, 3, height, width)
    for pixels, amplitude in ((32, 0.3), (8, 0.15)):
        noise = rng.random((1, 3, height // pixels + 2, width // pixels + 2), dtype=np.float32) - 0.5
        total += F.interpolate(torch.from_numpy(noise * amplitude), (height, width), mode="bicubic")
    return total[0]


def contrasting(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """A color that is darker, or lighter, than the one given in all three channels."""
    share = rng.uniform(0.6, 1, color.shape)
    return color + share * (1 - color) if rng.random() < 0.5 else color - share * color


def covered(a: tuple, b: tuple) -> float:
    """Intersection over the area of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def tight_box(mask: Tensor) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around what is set, the ends exclusive."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
