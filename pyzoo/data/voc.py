"""Pascal VOC's detection data in a local folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from pyzoo._extras import need
from pyzoo.data._common import keep_sound, require_layout, to_image

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LAYOUT = """\
  VOCdevkit/VOC{year}/JPEGImages/2007_000027.jpg ...
  VOCdevkit/VOC{year}/Annotations/2007_000027.xml ...
  VOCdevkit/VOC{year}/ImageSets/Main/{split}.txt"""


class VocDetection(Dataset):
    """Images [3, H, W] of float in [0, 1], and targets.

    A target has ``boxes`` [n, 4] (x1, y1, x2, y2 from 0, the ends exclusive; in the files from 1, the ends included),
    ``labels`` [n] (1..20, in the order of ``CLASSES``), ``area``, ``iscrowd`` [n] and ``image_id`` (the index).

    Args:
        folder: has VOCdevkit in it.
        year: "2007" or "2012".
        split: "train", "val" or "trainval"; of 2007 also "test".
        difficult: keep the objects that are marked difficult, as ``iscrowd``: for evaluation, which then counts them
            neither as missed nor as found.
        transform: ``transform(image, target)`` gives those to use instead.
    """

    def __init__(
        self,
        folder: str | Path,
        year: str = "2012",
        split: str = "train",
        *,
        difficult: bool = False,
        transform: Callable | None = None,
    ):
        folder = Path(folder)
        base = folder / "VOCdevkit" / f"VOC{year}"
        paths = (base / "JPEGImages", base / "Annotations", base / "ImageSets" / "Main" / f"{split}.txt")
        require_layout("VocDetection", folder, LAYOUT.format(year=year, split=split), paths)
        datasets = need("torchvision.datasets", "VocDetection")
        self.dataset = datasets.VOCDetection(folder, year, split)
        self.difficult, self.transform = difficult, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        picture, annotation = self.dataset[index]
        objects = annotation["annotation"].get("object", [])
        if not self.difficult:
            objects = [o for o in objects if not int(o.get("difficult", 0))]
        if unknown := {o["name"] for o in objects} - {*CLASSES}:
            raise ValueError(f"VocDetection: {self.dataset.annotations[index]} has the class {min(unknown)!r}")
        image = to_image(picture)
        corners = [[float(o["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
        boxes[:, :2] -= 1
        target = {
            "boxes": boxes,
            "labels": torch.tensor([CLASSES.index(o["name"]) + 1 for o in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([int(o.get("difficult", 0)) for o in objects], dtype=torch.int64),
        }
        target = keep_sound(target, *image.shape[1:])
        target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1)
        target["image_id"] = index
        return self.transform(image, target) if self.transform else (image, target)
