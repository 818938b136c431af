"""The digits in three parts: to learn from, to choose settings on, and to measure on once these are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from pyzoo.data import digits

SIZES = {"train": 1137, "validation": 300, "test": 360}


def digit_parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of each part. Always the same digits, of all writers, whatever the seed of a run."""
    order = torch.randperm(sum(SIZES.values()), generator=torch.Generator().manual_seed(0))
    parts = zip(*(tensor[order].split(list(SIZES.values())) for tensor in digits()), strict=True)
    return dict(zip(SIZES, parts, strict=True))
