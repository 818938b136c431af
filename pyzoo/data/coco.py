"""COCO's detection data in a local folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pyzoo._extras import need
from pyzoo.data._common import keep_sound, require_layout, to_image

LAYOUT = """\
  {split}/000000000139.jpg ...
  annotations/instances_{split}.json"""


class CocoDetection(Dataset):
    """Images [3, H, W] of float in [0, 1], and targets as torchvision's reference makes them.

    A target has ``boxes`` [n, 4] (x1, y1, x2, y2, inside the image; objects without an area are dropped), ``labels``
    [n] (COCO's category ids, 1..90), ``masks`` [n, H, W] of uint8, ``area`` and ``iscrowd`` [n], and ``image_id``.

    Args:
        folder: has the images and annotations, as unpacked.
        split: names the folder of images and the file of annotations: "train2017", "val2017".
        crowds: keep the regions of crowds: for evaluation, which then ignores what is found in them.
        transform: ``transform(image, target)`` gives those to use instead.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train2017",
        *,
        crowds: bool = False,
        transform: Callable | None = None,
    ):
        folder = Path(folder)
        images, file = folder / split, folder / "annotations" / f"instances_{split}.json"
        require_layout("CocoDetection", folder, LAYOUT.format(split=split), (images, file))
        datasets = need("torchvision.datasets", "CocoDetection")
        need("pycocotools", "CocoDetection")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says how long it took
                self.dataset = datasets.CocoDetection(images, file)
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"CocoDetection: {file} has no annotations as COCO's: {error!r}") from error
        self.crowds, self.transform = crowds, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        picture, objects = self.dataset[index]
        if not self.crowds:
            objects = [o for o in objects if not o.get("iscrowd", 0)]
        image = to_image(picture)
        height, width = image.shape[1:]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.array([self.dataset.coco.annToMask(o) for o in objects], dtype=np.uint8)
        target = {
            "boxes": boxes,
            "labels": torch.tensor([o["category_id"] for o in objects], dtype=torch.int64),
            "masks": torch.from_numpy(masks.reshape(-1, height, width)),
            "area": torch.tensor([o["area"] for o in objects], dtype=torch.float32),
            "iscrowd": torch.tensor([o.get("iscrowd", 0) for o in objects], dtype=torch.int64),
        }
        target = {**keep_sound(target, height, width), "image_id": self.dataset.ids[index]}
        return self.transform(image, target) if self.transform else (image, target)
