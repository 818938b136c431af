"""CIFAR-10 and MNIST in a local folder, in the files that their authors give out."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from pyzoo._extras import need
from pyzoo.data._common import require_layout

CIFAR10_LAYOUT = """\
  cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch, batches.meta"""
MNIST_LAYOUT = """\
  MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"""
MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def cifar10(folder: str | Path, split: str = "train", *, augment: bool = False, download: bool = False) -> Dataset:
    """torchvision's CIFAR10: pairs of [3, 32, 32] of float in [0, 1], and a label 0..9.

    Args:
        folder: has cifar-10-batches-py in it, the "python version", as unpacked. Its files are pickles, which can run
            code: those whose checksums are not the originals' are refused.
        split: "train", 50000 images, or "test", 10000.
        augment: pad by 4 pixels, crop at random, mirror every other image: for training.
        download: get the files if they are not in the folder; nothing is downloaded otherwise.
    """
    transforms = need("torchvision.transforms", "cifar10")
    flips = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if augment else []
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    paths = [Path(folder) / "cifar-10-batches-py" / name for name in names]
    return _open("cifar10", "CIFAR10", folder, split, CIFAR10_LAYOUT, paths, flips, download)


def mnist(folder: str | Path, split: str = "train", *, download: bool = False) -> Dataset:
    """torchvision's MNIST: pairs of [1, 28, 28] of float in [0, 1] with bright ink, and a label 0..9.

    Args:
        folder: has MNIST/raw in it, with the four files, unpacked.
        split: "train", 60000 images, or "test", 10000.
        download: get the files if they are not in the folder; nothing is downloaded otherwise.
    """
    paths = [Path(folder) / "MNIST" / "raw" / name for name in MNIST_FILES]
    return _open("mnist", "MNIST", folder, split, MNIST_LAYOUT, paths, [], download)


def _open(what: str, name: str, folder: str | Path, split: str, layout: str, paths, augment, download: bool) -> Dataset:
    datasets, transforms = (need(f"torchvision.{module}", what) for module in ("datasets", "transforms"))
    if split not in ("train", "test"):
        raise ValueError(f"{what}: split must be 'train' or 'test', got {split!r}")
    if not download:
        require_layout(what, Path(folder), layout, paths)
    make = getattr(datasets, name)
    transform = transforms.Compose([*augment, transforms.ToTensor()])
    if download:
        make(folder, download=True)
    try:
        data = make(folder, split == "train", transform)
    except Exception as error:  # whatever damaged files provoke
        raise ValueError(f"{what}: the files in {folder} are not those of {name}: {error!r}") from error
    if len(data.data) != len(data.targets):
        raise ValueError(f"{what}: the files in {folder} have {len(data.data)} images, {len(data.targets)} labels")
    return data
