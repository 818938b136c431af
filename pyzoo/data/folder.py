"""Images for classification: a folder a class."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from pyzoo._extras import need
from pyzoo.data._common import require_layout

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUT = """\
  n01440764/n01440764_10026.JPEG ... (a folder a class, labelled 0, 1, ... in the order of the names)
  n01443537/..."""


def image_folder(folder: str | Path, *, size: int = 224, augment: bool = False) -> Dataset:
    """torchvision's ImageFolder with ImageNet's preprocessing: pairs of [3, size, size], normalised, and a label.

    Args:
        folder: has a folder of images for each class.
        size: height and width of the images that come out.
        augment: random crops, scaled to 8% .. 100% of the area, and mirror images: for training. Otherwise the shorter
            side is scaled to size · 256 / 224, and the middle is cut out.
    """
    datasets, transforms = (need(f"torchvision.{name}", "image_folder") for name in ("datasets", "transforms"))
    folder = Path(folder)
    require_layout("image_folder", folder, LAYOUT, ())
    if augment:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    try:
        return datasets.ImageFolder(folder, transform)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image_folder: {error}. Expected in {folder} is:\n{LAYOUT}") from error
