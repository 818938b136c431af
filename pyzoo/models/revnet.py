"""The Reversible Residual Network: Backpropagation Without Storing Activations. A. N. Gomez, M. Ren, R. Urtasun,
R. B. Grosse. NIPS 2017, arXiv 1707.04585.

A residual block on two halves of the channels can be undone: y1 = x1 + F(x2), y2 = x2 + G(y1). So the backward pass
rebuilds the input of each block from its output, and nothing is stored for it: memory does not grow with depth. Only
the first unit of a stage, which changes the size of the maps, keeps its input.

Widths, strides and what is stored are those of the authors' code. Departures from it, each with the original:
    strided convolutions and the pooling pad both sides alike; ``same_padding=True`` pads as TensorFlow does, which the
    authors' weights want (:func:`from_tensorflow`).
    an average pool over a map of odd size keeps the last row and column, and thus fits any image.
``reversible=False`` stores all activations: the same network, with more memory and in less time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyzoo.models._registry import register_model
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.reversible import ReversibleBlock, ReversibleSequential
from pyzoo.ops import _common as common
from pyzoo.ops.reversible import reversible_reference

# ------------------------------------------------------------------------------------------- residual functions F and G


class BasicResidual(nn.Module):
    """Two times batch norm, ReLU and a 3x3 convolution. What is ``activated`` already skips the first two."""

    def __init__(self, in_channels, out_channels, stride, conv, norm_layer, activated=False):
        super().__init__()
        self.bn1 = None if activated else norm_layer(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = norm_layer(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.bn1 is None else F.relu(self.bn1(x), inplace=True)
        out = F.relu(conv_bn(out, self.conv1, self.bn2), inplace=True)
        return conv_bn(out, self.conv2)


class BottleneckResidual(nn.Module):
    """The same three times: 1x1 to a quarter of the channels, 3x3 on them, 1x1 to all. The first one strides."""

    def __init__(self, in_channels, out_channels, stride, conv, norm_layer, activated=False):
        super().__init__()
        width = out_channels // 4
        self.bn1 = None if activated else norm_layer(in_channels)
        self.conv1 = conv(in_channels, width, 1, stride)
        self.bn2 = norm_layer(width)
        self.conv2 = conv(width, width, 3)
        self.bn3 = norm_layer(width)
        self.conv3 = conv(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.bn1 is None else F.relu(self.bn1(x), inplace=True)
        out = F.relu(conv_bn(out, self.conv1, self.bn2), inplace=True)
        out = F.relu(conv_bn(out, self.conv2, self.bn3), inplace=True)
        return conv_bn(out, self.conv3)


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's "SAME": what is odd goes to the bottom and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(same_pad(x, self.kernel_size[0], self.stride[0]), self.weight, stride=self.stride)


def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:]]
    return F.pad(x, [pad for t in reversed(total) for pad in (t // 2, t - t // 2)])


def make_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, same_padding: bool) -> nn.Conv2d:
    layer = SameConv2d if same_padding and stride > 1 else nn.Conv2d
    return layer(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


# --------------------------------------------------------------------------------------------- stages, and their memory


class PooledShortcut(nn.Module):
    """Of basic units: the mean of stride x stride pixels, and zeros before and after for the channels that are new."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.pad = (0, 0, 0, 0, new_channels // 2, new_channels - new_channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)  # paper: "VALID", for maps that the stride divides
        return F.pad(x, self.pad)


class FirstUnit(nn.Module):
    """Of a stage: y1 = S1(x1) + F(x2), y2 = S2(x2) + G(y1), where F and the shortcuts have the stride and the change
    of width. It cannot be undone."""

    def __init__(self, in_channels, out_channels, stride, residual, conv, norm_layer, activated):
        super().__init__()
        self.f = residual(in_channels, out_channels, stride, conv, norm_layer, activated)
        self.g = residual(out_channels, out_channels, 1, conv, norm_layer)
        if residual is BasicResidual:
            self.shortcut1, self.shortcut2 = (PooledShortcut(out_channels - in_channels, stride) for _ in range(2))
        else:
            self.shortcut1, self.shortcut2 = (conv(in_channels, out_channels, 1, stride) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = self.shortcut1(x1) + self.f(x2)
        y2 = self.shortcut2(x2) + self.g(y1)
        return torch.cat([y1, y2], 1)


class Stage(nn.Module):
    """Units on maps of one size. Of all of them, the input of the first and the output of the last are stored."""

    def __init__(self, units: int, in_channels, out_channels, stride, residual, conv, norm_layer, activated):
        super().__init__()
        self.first = FirstUnit(in_channels, out_channels, stride, residual, conv, norm_layer, activated)
        make = partial(residual, out_channels, out_channels, 1, conv, norm_layer)
        self.rest = ReversibleSequential(*(ReversibleBlock(make(), make()) for _ in range(1, units)))

    def forward(self, x: Tensor, reversible: bool = True) -> Tensor:
        if reversible:
            return self.rest(run_again(self.first, x))
        return reversible_reference([f for block in self.rest for f in (block.f, block.g)], self.first(x))


def run_again(unit: nn.Module, x: Tensor) -> Tensor:
    """``unit(x)``, of which x alone is stored; the backward pass runs the unit again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or common._functorch_active():
        return unit(x)
    return checkpoint(unit, x, use_reentrant=False, context_fn=lambda: (nullcontext(), OnCopies(unit)))


class OnCopies:
    """Within this, a module changes copies of its buffers: the second run must not update the statistics again."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        owners = [m._buffers for m in self.module.modules()]
        self.own = [(owner, key, b) for owner in owners for key, b in owner.items() if b is not None]
        for owner, key, b in self.own:
            owner[key] = b.clone()

    def __exit__(self, *_):
        for owner, key, b in self.own:
            owner[key] = b


# ---------------------------------------------------------------------------------------------------------- the network


BATCH_NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class RevNet(nn.Module):
    """[N, in_channels, H, W] -> logits [N, num_classes].

    Args:
        units: how many in each stage. Each stage after the first halves the height and width.
        widths: channels of the stem, then of each stage (with ``bottleneck`` a quarter of them), of both halves
            together.
        num_classes: outputs.
        bottleneck: units of six convolutions instead of four.
        large: a stem for ImageNet, which strides by 4, instead of one for CIFAR.
        in_channels: of the images.
        reversible: rebuild activations in the backward pass; an attribute, which may be changed at any time.
        same_padding: pad as TensorFlow does.
        norm_layer: called with a number of channels.

    Raises:
        ValueError: there is not one width more than there are stages, or a stage has no unit, or a width cannot be
            split.
    """

    def __init__(
        self,
        units: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int = 10,
        *,
        bottleneck: bool = False,
        large: bool = False,
        in_channels: int = 3,
        reversible: bool = True,
        same_padding: bool = False,
        norm_layer: Callable[[int], nn.Module] = BATCH_NORM,
    ):
        super().__init__()
        if len(widths) != len(units) + 1 or not units:
            raise ValueError(f"RevNet: widths must be one more than units, {len(units) + 1}, got {tuple(widths)}")
        if min(units) < 1:
            raise ValueError(f"RevNet: units must be 1 or more in each stage, got {tuple(units)}")
        if any(width < 2 or width % 2 for width in widths):
            raise ValueError(f"RevNet: widths must be even, to be split into halves, got {tuple(widths)}")
        self.reversible, self.large, self.same_padding = reversible, large, same_padding
        conv = partial(make_conv, same_padding=same_padding)
        residual, expansion = (BottleneckResidual, 4) if bottleneck else (BasicResidual, 1)
        self.init_conv = conv(in_channels, widths[0], 7, 2) if large else conv(in_channels, widths[0], 3)
        self.init_bn = norm_layer(widths[0])
        halves = [widths[0] // 2, *(width * expansion // 2 for width in widths[1:])]
        self.stages = nn.ModuleList(
            Stage(n, halves[i], halves[i + 1], 2 if i else 1, residual, conv, norm_layer, activated=i == 0)
            for i, n in enumerate(units)
        )
        self.final_bn = norm_layer(2 * halves[-1])
        self.logit = nn.Linear(2 * halves[-1], num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / (module.out_channels * module.weight[0, 0].numel()))
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        bound = math.sqrt(3 / self.logit.in_features)
        nn.init.uniform_(self.logit.weight, -bound, bound)
        nn.init.zeros_(self.logit.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.init_conv.in_channels or 0 in x.shape[2:]:
            allowed = f"[N, {self.init_conv.in_channels}, H, W], with pixels"
            raise ValueError(f"RevNet: x must have shape {allowed}, got {list(x.shape)}")
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(conv_bn(x, self.init_conv, self.init_bn), inplace=True)  # [N, 32, 32, 32]; large: [N, 128, 112, 112]
        if self.large:
            x = F.max_pool2d(same_pad(x, 3, 2), 3, 2) if self.same_padding else F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = stage(x, self.reversible)
        x = F.relu(self.final_bn(x), inplace=True)  # [N, 112, 8, 8]; large: [N, 3328, 7, 7]
        return self.logit(x.mean((2, 3)))


# ------------------------------------------------------------------------------------------------- the authors' weights

TENSORFLOW = [
    (r"^unit_last/", ""),
    (r"^init/", ""),
    (
        r"^unit_(\d+)_(\d+)/",
        lambda m: f"stages.{int(m[1]) - 1}." + (f"rest.{int(m[2]) - 1}." if int(m[2]) else "first."),
    ),
    (r"x(\d)_bottleneck/project/", r"shortcut\1/"),
    (r"sub\d/", ""),
    (r"/(w|gamma)$", "/weight"),
    (r"/(b|beta)$", "/bias"),
    (r"/ema_", "/running_"),
    (r"/", "."),
]


def from_tensorflow(arrays: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict, for a model with ``same_padding=True``, of the variables of the authors' checkpoints.

    Args:
        arrays: by name, as ``unit_1_0/f/sub1/conv1/w``. The optimizer's, and the number of steps, are left out.
    """
    state = {}
    for name, array in arrays.items():
        if name == "global_step" or name.endswith("/Momentum"):
            continue
        for pattern, replacement in TENSORFLOW:
            name = re.sub(pattern, replacement, name)
        tensor = torch.as_tensor(array)
        # HWIO -> OIHW; in x out -> out x in
        state[name] = tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.T if tensor.dim() == 2 else tensor
        if name.endswith("running_mean"):
            state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return state


# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "The Reversible Residual Network, Gomez et al., arXiv 1707.04585"
CIFAR = "[N, 3, 32, 32] float, RGB in [0, 1]"
IMAGENET = "[N, 3, H, W] float, RGB in [-1, 1]; trained at 224"

# Depth: units, widths, bottleneck, parameters; from the authors' code. The depth counts 4 convolutions a unit, with
# bottleneck 6, the stem and the last layer.
CONFIGURATIONS = {
    38: ((3, 3, 3), (32, 32, 64, 112), False, 464_890),
    110: ((9, 9, 9), (32, 32, 64, 128), False, 1_729_194),
    164: ((9, 9, 9), (32, 32, 64, 128), True, 1_748_778),
    56: ((2, 2, 3, 2), (128, 128, 256, 512, 832), True, 27_553_128),
    104: ((2, 2, 11, 2), (128, 128, 256, 512, 832), True, 45_428_072),
}

for _depth, (_units, _widths, _bottleneck, _parameters) in CONFIGURATIONS.items():
    _large = len(_units) == 4
    register_model(
        f"revnet{_depth}" if _large else f"revnet{_depth}_cifar",
        partial(
            RevNet,
            units=_units,
            widths=_widths,
            num_classes=1000 if _large else 10,
            bottleneck=_bottleneck,
            large=_large,
        ),
        paper=PAPER,
        task="classification",
        input=IMAGENET if _large else CIFAR,
        parameters=_parameters,
        tiny={"units": (1, 2, 2), "widths": (8, 8, 12, 16), "num_classes": 5},
        size=(65, 96) if _large else (13, 18),
    )
