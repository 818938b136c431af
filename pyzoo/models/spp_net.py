"""Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition. K. He, X. Zhang, S. Ren, J. Sun. ECCV
2014, arXiv 1406.4729.

Convolutions take images of any size, only the fully connected layers do not. Between the two, in place of the last
pooling, each channel's maxima over the bins of several grids give a vector of fixed length. So one set of weights takes
images of many sizes, and trains on them; and one pass over an image serves all windows that a detector asks about.

The authors' ZF-5, and :class:`SPPNet` on any other convolutions.

Departures from the paper, each with an option for the original:
    bin i of n covers floor(i h / n) up to ceil((i + 1) h / n) always, as in the paper's detection. It trains with
    sliding windows, which differ where the map's side does not suit the grid, as 10 and 6 do: ``sliding_windows``.
    windows become regions of the map as in the authors' program; :func:`map_windows` has the paper's rule, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.ops import roi_pool, spatial_pyramid_pool2d

PYRAMID_50 = (6, 3, 2, 1)  # 50 bins, Section 3.1
PYRAMID_30 = (4, 3, 2, 1)  # 30 bins: fewer parameters than without a pyramid
SCALES = (480, 576, 688, 864, 1200)  # shorter sides of an image for detection, Section 4.1

# ------------------------------------------------------------------------------------------------- pooling, Section 2.2


def sliding_pyramid_pool2d(maps: Tensor, levels: Sequence[int]) -> Tensor:
    """[N, C, a, a] -> [N, C * bins]: for n x n bins the first n x n windows of ceil(a / n), moved by floor(a / n)."""
    side = maps.shape[2]
    if maps.shape[3] != side or side < max(levels):
        raise ValueError(
            f"sliding_pyramid_pool2d: maps must be square with sides of {max(levels)} or more, got {list(maps.shape)}"
        )
    pooled = [F.max_pool2d(maps, -(-side // n), side // n)[:, :, :n, :n].flatten(1) for n in levels]
    return torch.cat(pooled, 1)


def pool_regions(maps: Tensor, regions: Tensor | Sequence[Tensor], levels: Sequence[int] = PYRAMID_50) -> Tensor:
    """The pyramid over regions of maps, [K, C * bins]: what ``spatial_pyramid_pool2d`` makes of each, in one pass for
    each level. With a single level this is the RoI pooling of Fast R-CNN. That computes in floating point, so that of
    some sizes a bin of a 7 x 7, an 11 x 11 or a grid of 13 and more has a row too many; other grids are exact.

    Args:
        maps: [N, C, H, W].
        regions: cells (x1, y1, x2, y2), the ends exclusive, of which there is at least one: [K, 4] int64 for each map.
        levels: the grids.
    """
    regions = [regions] if isinstance(regions, Tensor) else list(regions)
    if len(regions) != len(maps):
        raise ValueError(f"pool_regions: there must be regions for each of {len(maps)} maps, got {len(regions)}")
    height, width = maps.shape[2:]
    for i, boxes in enumerate(regions):
        if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.is_floating_point():
            raise ValueError(
                f"pool_regions: regions[{i}] must be [K, 4] integers, got {list(boxes.shape)} {boxes.dtype}"
            )
        bad = (boxes[:, :2] < 0).any(1) | (boxes[:, :2] >= boxes[:, 2:]).any(1)
        bad |= (boxes[:, 2] > width) | (boxes[:, 3] > height)
        if bad.any():
            box = boxes[bad][0].tolist()
            raise ValueError(f"pool_regions: regions[{i}] must be cells of the {height} x {width} map, got {box}")
    inclusive = [
        boxes.to(torch.float64) - boxes.new_tensor([0, 0, 1, 1]) for boxes in regions
    ]  # as RoI pooling has them
    return torch.cat([roi_pool(maps, inclusive, n).flatten(1) for n in levels], 1)


# ------------------------------------------------------------------------------------------------------- ZF-5, Table 1


class LocalResponseNorm(nn.Module):
    """Within a channel: x / (1 + alpha * mean of x² over size x size)^beta."""

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75):
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x.square(), self.size, 1, self.size // 2)  # the border counts as zeros
        return x * (1 + self.alpha * mean).pow(-self.beta)


class ZF5(nn.Module):
    """The five convolutions of the released model, [N, 3, H, W] -> [N, 256, h, w]: 224 becomes 13, 180 becomes 10."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        c1, c2, c3, c4, c5 = (max(1, round(c * width)) for c in (96, 256, 384, 384, 256))
        self.conv1 = nn.Conv2d(3, c1, 7, 2, 1)
        self.conv2 = nn.Conv2d(c1, c2, 5, 2)
        self.conv3 = nn.Conv2d(c2, c3, 3, 1, 1)
        self.conv4 = nn.Conv2d(c3, c4, 3, 1, 1)
        self.conv5 = nn.Conv2d(c4, c5, 3, 1, 1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm = LocalResponseNorm()
        self.out_channels = c5

    @staticmethod
    def map_side(side: int) -> int:
        """Of conv5, for an image."""
        pooled = math.ceil(((side - 5) // 2 + 1 - 3) / 2) + 1  # conv1, pool1
        return max(0, math.ceil(((pooled - 5) // 2 + 1 - 3) / 2) + 1)  # conv2, pool2

    def forward(self, x: Tensor) -> Tensor:  # at 224:
        if min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(f"ZF5: images must have sides of {MIN_SIDE} or more, got {list(x.shape)}")
        x = self.pool(self.norm(F.relu(self.conv1(x), inplace=True)))  # [N, 96, 55, 55]
        x = self.pool(self.norm(F.relu(self.conv2(x), inplace=True)))  # [N, 256, 13, 13]
        x = F.relu(self.conv3(x), inplace=True)
        x = F.relu(self.conv4(x), inplace=True)
        return F.relu(self.conv5(x), inplace=True)


MIN_SIDE = next(side for side in count(1) if ZF5.map_side(side) > 0)


class SPPNet(nn.Module):
    """Convolutions, pyramid, three fully connected layers: [N, 3, H, W] -> logits [N, num_classes]; also a list of
    images [3, H, W] of different sizes.

    Args:
        features: the convolutions without their last pooling, [N, 3, H, W] -> [N, channels, h, w]; those of VGG, say.
        channels: of their map.
        levels: the grids, whose order is that of the inputs of fc6. None for the net without a pyramid, whose last
            pooling gives 6 x 6 and whose images thus have one size.
        num_classes: outputs.
        hidden: units of fc6 and fc7.
        sliding_windows: pool as the paper does when it trains.
    """

    def __init__(
        self,
        features: nn.Module,
        channels: int,
        levels: Sequence[int] | None = PYRAMID_50,
        *,
        num_classes: int = 1000,
        hidden: int = 4096,
        sliding_windows: bool = False,
    ):
        super().__init__()
        self.features = features
        self.levels = None if levels is None else tuple(levels)
        self.sliding_windows = sliding_windows
        bins = 36 if levels is None else sum(n * n for n in levels)
        self.fc6 = nn.Linear(channels * bins, hidden)  # of level, channel, row, column, in this order
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # paper: does not say
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def pool(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C * bins]."""
        if self.levels is not None:
            return (sliding_pyramid_pool2d if self.sliding_windows else spatial_pyramid_pool2d)(maps, self.levels)
        pooled = F.max_pool2d(maps, 3, 2)
        if pooled.shape[2:] != (6, 6):
            raise ValueError(
                f"SPPNet: without a pyramid the last pooling must give 6 x 6, as for images of 224 x 224; it gives "
                f"{pooled.shape[2]} x {pooled.shape[3]}"
            )
        return pooled.flatten(1)

    def classify(self, pooled: Tensor) -> Tensor:
        """[N, C * bins] -> logits."""
        return self.fc8(self.dropout(self.fc7_features(pooled)))

    def fc7_features(self, pooled: Tensor) -> Tensor:
        """[N, C * bins] -> [N, hidden]: what the detector's SVMs look at."""
        return F.relu(self.fc7(self.dropout(F.relu(self.fc6(pooled)))))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return self.classify(self.pool(self.features(x)))
        return self.classify(torch.cat([self.pool(self.features(image[None])) for image in x]))

    # ------------------------------------------------------------------------------------------- windows, Section 4.1

    def window_features(
        self, image: Tensor, windows: Tensor, *, scales: Sequence[int] = SCALES, side: int = 224, **rule
    ) -> Tensor:
        """The pooled features of windows of an image, [K, C * bins], by one pass over it at each scale that is needed.

        Args:
            image: [3, H, W].
            windows: [K, 4] (x1, y1, x2, y2) in its pixels, the ends exclusive.
            scales: shorter sides that the image is resized to. A window is looked at where its area is nearest to that
            side: of this side.
            rule: arguments of :func:`map_windows`.
        """
        _check_windows("window_features", windows)
        size = image.shape[1:]
        chosen = choose_scales(windows, size, scales, side)
        pooled = image.new_empty(len(windows), self.fc6.in_features)
        for i in chosen.unique().tolist():
            scaled = scaled_size(size, scales[i])
            ratio = windows.new_tensor([scaled[1] / size[1], scaled[0] / size[0]] * 2, dtype=torch.float64)
            resized = F.interpolate(image[None], scaled, mode="bilinear") if scaled != tuple(size) else image[None]
            maps = self.features(resized)
            mine = (chosen == i).nonzero()[:, 0]
            regions = map_windows(windows[mine] * ratio, tuple(maps.shape[2:]), **rule)
            pooled = pooled.index_copy(0, mine, pool_regions(maps, regions, self.levels or (6,)))
        return pooled


def scaled_size(size: Sequence[int], shorter: int) -> tuple[int, int]:
    """Height and width, in proportion, of which the smaller is ``shorter``."""
    height, width = size
    return (shorter, round(width * shorter / height)) if height <= width else (round(height * shorter / width), shorter)


def choose_scales(windows: Tensor, size: Sequence[int], scales: Sequence[int] = SCALES, side: int = 224) -> Tensor:
    """The index of the scale at which the area of a window, [K, 4], is nearest to ``side`` squared: [K]."""
    windows = windows.double()
    area = (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])
    factors = windows.new_tensor(scales) / min(size)
    return (area[:, None] * factors.square() - side * side).abs().argmin(1)


def map_windows(
    windows: Tensor,
    size: tuple[int, int],
    *,
    stride: float = 16,
    origin: float = 20,
    margin: float = 0,
    paper: bool = False,
) -> Tensor:
    """Windows of the image that the net saw -> regions of the map, (x1, y1, x2, y2) with the ends exclusive, int64.

    Args:
        windows: [K, 4] (x1, y1, x2, y2) in pixels, the ends exclusive.
        size: height and width of the map; regions are cut there, to at least a cell.
        stride: S, pixels from a cell to the next.
        origin: the pixel at the center of the first cell: 20 for ZF-5, 0 where each layer pads half of its kernel. (The
            authors count pixels from 1.)
        margin: cut from a window on each side, in pixels.
        paper: the rule of the paper's appendix, which assumes an origin of 0: from floor(first / S) + 1 to
            ceil(last / S) - 1, the cells whose centers lie inside. The authors' program rounds to the nearest cell.
    """
    _check_windows("map_windows", windows)
    first, last = windows.double()[:, :2], windows.double()[:, 2:] - 1
    if paper:
        low, high = (first / stride).floor() + 1, (last / stride).ceil() - 1
    else:
        low = ((first - origin + margin) / stride + 0.5).floor()
        high = ((last - origin - margin) / stride - 0.5).ceil()
    between = ((low + high) / 2).floor()  # for a window too small to hold a cell
    low, high = torch.where(low > high, between, low), torch.where(low > high, between, high)
    end = windows.new_tensor([size[1] - 1, size[0] - 1], dtype=torch.float64)
    low, high = (cell.clamp(min=0).minimum(end).long() for cell in (low, high))
    return torch.cat((low, high + 1), 1)


def _check_windows(function: str, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[1] != 4:
        raise ValueError(f"{function}: windows must be [K, 4], got {list(windows.shape)}")
    bad = ~(windows.isfinite().all(1) & (windows[:, :2] < windows[:, 2:]).all(1))
    if bad.any():
        raise ValueError(f"{function}: windows must be finite with x1 < x2 and y1 < y2, got {windows[bad][0].tolist()}")


# ---------------------------------------------------------------------------------------------- weights of the authors

# Their caffe models' layers, with weights [out, in, k, k] or [out, in] and biases; also fc8_pascal, of other classes.
CAFFE_NAMES = {
    **{f"conv{i}": f"features.conv{i}" for i in range(1, 6)},
    **{f"fc{i}": f"fc{i}" for i in (6, 7, 8)},
    "fc8_pascal": "fc8",
}

# ------------------------------------------------------------------------------------------------------------- registry


def zf5(levels: Sequence[int] | None = None, *, width: float = 1.0, **kwargs) -> SPPNet:
    """ZF-5 with a pyramid, or without; ``width`` multiplies the channels, the rest is for :class:`SPPNet`."""
    features = ZF5(width)
    return SPPNet(features, features.out_channels, levels, **kwargs)


for _name, _levels, _parameters, _size in (
    ("zf5", None, 62_357_608, (224, 224)),
    ("zf5_spp", PYRAMID_50, 77_037_672, (97, 130)),
    ("zf5_spp30", PYRAMID_30, 56_066_152, (97, 130)),
):
    register_model(
        _name,
        partial(zf5, _levels),
        paper="Spatial Pyramid Pooling in Deep Convolutional Networks, He et al., arXiv 1406.4729",
        task="classification",
        input="[N, 3, H, W] float, trained at 224 and 180; the authors' weights: BGR in [0, 255] minus the mean",
        parameters=_parameters,
        tiny={"width": 1 / 16, "hidden": 32, "num_classes": 5},
        size=_size,
    )
