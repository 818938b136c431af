"""Small detectors on digit scenes, for the claims of several papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models.faster_rcnn import (
    RPN,
    FasterRCNN,
    FastRCNNPredictor,
    RoIHeads,
    TwoMLPHead,
    align_levels,
    anchor_cells,
)
from pyzoo.models.fpn import FPN
from pyzoo.models.mask_rcnn import MaskHead, MaskPredictor, MaskRCNN, MaskRoIHeads
from pyzoo.nn.boxes import box_iou
from pyzoo.nn.conv import conv_bn
from pyzoo.train import fit

CLASSES = 11  # ten digits and background


class Trunk(nn.Module):
    """Images -> maps at each stride from 4 on: convolutions of 3x3, the first of each stride has it."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList()
        for before, after in zip((3, *widths), widths, strict=False):
            layers = ((before, after, 2), (after, after, 1))
            self.blocks.append(
                nn.ModuleList(
                    nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
                    for i, o, stride in layers
                )
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            for conv, bn in block:
                x = F.relu(conv_bn(x, conv, bn))
            maps.append(x)
        return maps[1:]


class LastMap(nn.Module):
    """Only the coarsest map of a trunk, with ``channels``."""

    def __init__(self, trunk: Trunk, width: int, channels: int):
        super().__init__()
        self.trunk, self.project = trunk, nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.relu(self.project(self.trunk(x)[-1]))]


class Pyramid(nn.Module):
    """A pyramid on a trunk, without the coarsest level."""

    def __init__(self, trunk: Trunk, widths: Sequence[int], channels: int, paths: str = "both"):
        super().__init__()
        self.trunk, self.fpn = trunk, FPN(widths, channels, paths=paths)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.fpn(self.trunk(x))[:-1]


def detector(
    backbone: nn.Module,
    channels: int,
    strides: Sequence[int],
    anchor_sizes: Sequence[Sequence[float]],
    *,
    size: int,
    masks: bool = False,
    pool: Callable[..., Tensor] | None = None,
    hidden: int = 128,
) -> FasterRCNN:
    """Faster R-CNN, or Mask R-CNN, of parts in proportion to images of ``size``."""
    rpn = RPN(
        channels,
        [anchor_cells(sizes) for sizes in anchor_sizes],
        samples=64,
        before_nms=(300, 300),
        after_nms=(100, 100),
    )
    # A box belongs to the level on which it is about 5 pixels large.
    align = partial(align_levels, strides=strides, canonical=(20, 2))
    parts = pool or align, TwoMLPHead(channels * 49, hidden), FastRCNNPredictor(hidden, CLASSES)
    options: dict[str, Any] = {"samples": 32, "positive_fraction": 0.5}
    model, heads = FasterRCNN, RoIHeads
    if masks:
        model, heads = MaskRCNN, MaskRoIHeads
        options["mask_head"] = MaskHead(channels, channels, layers=2)
        options["mask_predictor"] = MaskPredictor(channels, channels, CLASSES)
    input = {"min_size": size, "max_size": 2 * size, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return model(backbone, rpn, heads(*parts, **options), CLASSES, **input)


def train(model: nn.Module, scenes, steps: int, seed: int, lr: float = 2e-3, batch_size: int = 8) -> list[dict]:
    """Adam, warmed up, a tenth of the rate for the last quarter."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    rate = partial(_rate, steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return fit(
        model,
        scenes,
        optimizer=optimizer,
        schedule=schedule,
        batch_size=batch_size,
        steps=steps,
        every=steps,
        clip_norm=10,
        seed=seed,
    )


def _rate(step: int, steps: int) -> float:
    return min(1, (step + 1) / 30) * (1 if step < steps * 0.75 else 0.1)


@torch.no_grad()
def detect(model: nn.Module, scenes) -> list[dict[str, Tensor]]:
    model.eval()
    return [found for i in range(0, len(scenes), 8) for found in model([image for image, _ in scenes[i : i + 8]])]


@torch.no_grad()
def recall(model: FasterRCNN, scenes, top: int, small: float = 12) -> tuple[float, float, float]:
    """Of the objects, what the first ``top`` proposals find: the share at IoU 0.5, the mean of the shares at 0.5, 0.55,
    .., 0.95, and that for small objects alone, the root of whose area is below ``small``."""
    model.eval()
    best, sides = [], []
    for i in range(0, len(scenes), 8):
        part = scenes[i : i + 8]
        for boxes, (_, target) in zip(model.propose([image for image, _ in part]), part, strict=True):
            if len(target["boxes"]):
                best.append(F.pad(box_iou(target["boxes"], boxes[:top]), (0, 1)).max(1).values)
                sides.append((target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1).sqrt())
    best, sides = torch.cat(best), torch.cat(sides)
    reached = best[:, None] >= torch.arange(0.5, 0.99, 0.05)
    return (
        float((best >= 0.5).float().mean()),
        float(reached.float().mean()),
        float(reached[sides < small].float().mean()),
    )
