"""Pixel Recurrent Neural Networks. A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu. ICML 2016, arXiv 1601.06759: the
PixelCNN.

An image is generated value by value: p(x) is the product of p(x_i | x_1 ... x_i-1), row by row, pixel by pixel, red
before green before blue, all of them from one pass of masked convolutions, each a softmax over 256 levels.

What the paper leaves open: levels are scaled to [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.ops import MaskedConv2d
from pyzoo.ops.masked_conv2d import live_weights
from pyzoo.ops.pixelcnn_sample import _UNKNOWN, _draw, _draws_and_start

# ----------------------------------------------------------------------------------------------------------- likelihood


def bits_per_dim(logits: Tensor, x: Tensor) -> Tensor:
    """-log2 p(x) over the number of values: the loss. ``logits`` [N, C, K, H, W] of levels ``x`` [N, C, H, W]."""
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(0, 1).long()) / math.log(2)


class Autoregressive(nn.Module):
    """``model(x, h)``: images [N, C, H, W] of integers 0 ... K - 1 -> logits [N, C, K, H, W], each made of the values
    that come before its own, and of ``h``, if the model is conditional.

    A subclass has ``logits(image, s)``: of the scaled image, and of what :meth:`condition_map` makes of h.
    """

    def __init__(self, channels: int, levels: int):
        super().__init__()
        if channels < 1 or levels < 2:
            name = type(self).__name__
            raise ValueError(f"{name}: channels must be at least 1 and levels 2, got {channels} and {levels}")
        self.channels, self.levels = channels, levels

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        image = self.scale(x)
        return self.logits(image, self.condition_map(h, (len(x), *x.shape[2:])))

    def scale(self, x: Tensor) -> Tensor:
        """Levels 0 ... K - 1 as numbers from -1 to 1, in the dtype of the weights."""
        name, parameter = type(self).__name__, next(self.parameters())
        if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: x must be a tensor of integers, the levels, got {got}")
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{name}: x must have shape [N, {self.channels}, H, W], got {list(x.shape)}")
        if not torch.compiler.is_compiling() and x.numel():
            least, most = (int(value) for value in x.aminmax())
            if least < 0 or most >= self.levels:
                raise ValueError(f"{name}: x must be in [0, {self.levels}), got {least if least < 0 else most}")
        return x.to(parameter.dtype) * (2 / (self.levels - 1)) - 1

    def condition_map(self, h: Tensor | None, size: Sequence[int]) -> Tensor | None:
        """What ``logits`` sees of h, for images of this (N, H, W); a conditional model has its own."""
        if h is not None:
            raise ValueError(f"{type(self).__name__}: h must be None, as the model has no condition")
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def sample(self, size: Sequence[int], h: Tensor | None = None, **options) -> Tensor:
        """Images [N, C, H, W] for ``size`` (N, H, W), by a full pass for each value.

        Args:
            size: (N, H, W).
            h: of each image, as in training.
            options: ``generator``, ``temperature``, ``uniforms``; ``image`` and ``known``, a bool mask: what is known
                is kept. As of :func:`pyzoo.ops.pixelcnn_sample`.
        """
        uniforms, start = _draws_and_start(type(self).__name__, self, size, **options)
        s, temperature, x = self.condition_map(h, size), options.get("temperature", 1.0), start.clamp(min=0)
        _, channels, height, width = x.shape
        for i, j, c in product(range(height), range(width), range(channels)):
            logits = self.logits(self.scale(x), s)[:, c, :, i, j]
            drawn = _draw(logits, uniforms[:, c, i, j], temperature)
            x[:, c, i, j] = torch.where(start[:, c, i, j] == _UNKNOWN, drawn, x[:, c, i, j])
        return x


# -------------------------------------------------------------------------------------------------------------- the net


def init_weights(model: nn.Module) -> None:
    """LeCun's normal initialisation, 1 / sqrt(n) of the n weights that count, and no bias: gates shrink what they get,
    and with PyTorch's, which counts what is masked, they would learn slower still."""
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            with torch.device("cpu"):
                live = live_weights(m.gates * m.colors, m.colors, m.kernel_size, m.mask, colors=m.colors, gates=m.gates)
            fan_in = int(live.sum()) / len(live) * m.in_channels / m.colors
            nn.init.normal_(m.weight, std=max(fan_in, 1) ** -0.5)
            nn.init.zeros_(m.bias)


def make_head(width: int, hidden: int, channels: int, levels: int) -> nn.Sequential:
    """Two 1x1 convolutions, each after a ReLU: [N, width, H, W] -> [N, channels * levels, H, W]."""
    conv = partial(MaskedConv2d, kernel_size=1, mask="B", colors=channels)
    return nn.Sequential(nn.ReLU(), conv(width, hidden), nn.ReLU(), conv(hidden, channels * levels))


class Residual(nn.Module):
    """1x1 to half of the maps, a masked convolution, 1x1 back, each after a ReLU; and the input."""

    def __init__(self, width: int, kernel: int, colors: int):
        super().__init__()
        conv = partial(MaskedConv2d, mask="B", colors=colors)
        self.conv1 = conv(2 * width, width, 1)
        self.conv2 = conv(width, width, kernel)
        self.conv3 = conv(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x.relu()).relu()).relu())


class PixelCNN(Autoregressive):
    """``model(x)``: images [N, C, H, W] of integers 0 ... K - 1 -> logits [N, C, K, H, W]. Not conditional.

    What is in its window before the pixel, but right of it, it sees in part only: of the row above,
    ``first_kernel // 2`` columns.

    Args:
        width: half of the maps between blocks; a multiple of ``channels``. paper: 128, which three does not divide.
        layers: residual blocks.
        channels: C, colors that are generated one after the other.
        levels: K.
        kernel: of the blocks, odd.
        first_kernel: of the convolution before them, odd.
        head: maps between the last two convolutions.
    """

    def __init__(
        self,
        channels: int = 3,
        levels: int = 256,
        *,
        width: int = 129,
        layers: int = 15,
        kernel: int = 3,
        first_kernel: int = 7,
        head: int = 1023,
    ):
        super().__init__(channels, levels)
        self.first = MaskedConv2d(channels, 2 * width, first_kernel, mask="A", colors=channels)
        self.blocks = nn.Sequential(*(Residual(width, kernel, channels) for _ in range(layers)))
        self.head = make_head(2 * width, head, channels, levels)
        init_weights(self)

    def logits(self, image: Tensor, s: None = None) -> Tensor:
        return self.head(self.blocks(self.first(image))).unflatten(1, (self.channels, self.levels))


# ------------------------------------------------------------------------------------------------------------- registry

# Of models that draw images: what they are listed with, and what makes them small.
ABOUT = {"task": "generation", "input": "[N, 3, H, W] integers, RGB 0 .. 255", "size": (6, 9)}
TINY = {"levels": 4, "width": 6, "layers": 2, "kernel": 3, "first_kernel": 3, "head": 6}

register_model(
    "pixelcnn",
    PixelCNN,
    paper="Pixel Recurrent Neural Networks, van den Oord et al., arXiv 1601.06759",
    parameters=2_558_865,
    tiny=TINY,
    **ABOUT,
)
