"""Filters of a :class:`pyzoo.models.neural_style.StyleNet`: at random, or from a file; and scaled to pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.checkpoint import load_weights
from pyzoo.models.vgg import layer_index, prepare


def randomize(net: nn.Module, seed: int) -> None:
    """Orthogonal filters, for those who have no weights."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            random = torch.empty(layer.weight.shape)
            layer.weight.copy_(nn.init.orthogonal_(random, 2**0.5, generator=generator))
            nn.init.zeros_(layer.bias)


def load(net: nn.Module, path: str | Path) -> None:
    """From a file with the names of torchvision's VGG-19, or Caffe's; the net then wants that one's input."""
    convs = {name: f"features.{i}" for name, i in layer_index(net.features).items()}
    seen = set()

    def rename(name: str) -> str | None:
        layer, _, what = name.rpartition(".")
        seen.add(layer)
        if layer.startswith(("classifier.", "fc")):
            return None
        return f"{convs[layer]}.{what}" if layer in convs else name

    load_weights(net, path, rename=rename)
    net.inputs = "caffe" if "conv1_1" in seen else "torchvision"


@torch.no_grad()
def rescale(net: nn.Module, images: Iterable[Tensor], *, compensate: bool = True, floor: float = 0.1) -> None:
    """Section 2: divides each filter by its mean activation over images and positions, which then is 1.

    Args:
        net: is changed.
        images: [3, H, W]; large ones are looked at in small.
        compensate: the weights of the next layer make up for it, so that a map is what it was, divided by the means.
            Otherwise, for random filters, the next layer sees the scaled maps, and filters are first shifted to a mean
            of zero before the ReLU: else deep maps are nearly constant, and say little.
        floor: a filter that is hardly ever active is divided by this part of the layer's average.
    """
    maps = [prepare(_shrink(image[None], 512), net.inputs) for image in images]
    before = None
    for layer in net.features:
        if not isinstance(layer, (nn.Conv2d, nn.ReLU)):
            maps = [x for x in maps if min(x.shape[2:]) > 1]
            if not maps:
                return  # nothing is known of deeper layers, nor wanted
        if compensate and before is not None and isinstance(layer, nn.Conv2d):
            layer.weight *= before[:, None, None]
        maps = [layer(x) for x in maps]
        if isinstance(layer, nn.Conv2d):
            positions = sum(x[0, 0].numel() for x in maps)
            if not compensate:
                center = sum(x.sum((0, 2, 3)) for x in maps) / positions
                layer.bias -= center
                maps = [x - center[:, None, None] for x in maps]
            mean = sum(x.relu().sum((0, 2, 3)) for x in maps) / positions
            mean = mean.clamp(min=floor * mean.mean().item())
            before = torch.where(mean > 0, mean, 1)
            layer.weight /= before[:, None, None, None]
            layer.bias /= before
            maps = [x / before[:, None, None] for x in maps]


def _shrink(images: Tensor, longest: int) -> Tensor:
    scale = longest / max(images.shape[2:])
    return resize(images, [max(1, round(side * scale)) for side in images.shape[2:]]) if scale < 1 else images


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)
