"""Deep Residual Learning for Image Recognition. K. He, X. Zhang, S. Ren, J. Sun. CVPR 2016, arXiv 1512.03385.

A block learns what to add to its input, y = ReLU(F(x) + x), so that more layers cannot do worse for want of an
identity. Plain nets, the same without the addition, are here too: at 56 layers they train worse than at 20.

Two families: for ImageNet (Table 1), with the parameter names of torchvision, and for CIFAR-10 (Section 4.2), with
those of the widely shared checkpoints.

Departures from the paper, each with an option for the original:
    a bottleneck strides in its 3x3 convolution, as torchvision's weights want; ``stride_in_1x1=True`` is the paper's.
    option A pads half of the new channels before and half after, as the shared CIFAR weights want; ``pad="end"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.nn.conv import conv_bn

# ------------------------------------------------------------------------------------------------------------ shortcuts


class Subsample(nn.Module):
    """Shortcut A: every ``stride``-th pixel, and zeros for the channels that are new. It has no parameters."""

    def __init__(self, new_channels: int, stride: int, pad: str = "both"):
        super().__init__()
        self.stride = stride
        before = {"both": new_channels // 2, "end": 0}[pad]
        self.pad = (0, 0, 0, 0, before, new_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class Projection(nn.Sequential):
    """Shortcuts B and C: a 1x1 convolution and its batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_layer: Callable[..., nn.Module]):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return conv_bn(x, self[0], self[1])


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int, norm_layer, pad: str):
    """What is added to the residual: the input itself (None), or what gives it the residual's shape."""
    changes = stride != 1 or in_channels != out_channels
    if option == "C" or (option == "B" and changes):
        return Projection(in_channels, out_channels, stride, norm_layer)
    return Subsample(out_channels - in_channels, stride, pad) if changes else None


# --------------------------------------------------------------------------------------------------------------- blocks


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Figure 5, left. ``shortcut=None`` leaves a plain block: nothing is added."""

    expansion = 1

    def __init__(self, in_channels, width, stride, shortcut: str | None, norm_layer, stride_in_1x1=False, pad="both"):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = norm_layer(width)
        self.residual = shortcut is not None
        self.downsample = make_shortcut(shortcut, in_channels, width, stride, norm_layer, pad) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1, "relu")
        return conv_bn(out, self.conv2, self.bn2, "relu", shortcut_of(x, self))


class Bottleneck(nn.Module):
    """Figure 5, right: 1x1 to fewer channels, 3x3 on them, 1x1 back to four times as many."""

    expansion = 4

    def __init__(self, in_channels, width, stride, shortcut: str | None, norm_layer, stride_in_1x1=False, pad="both"):
        super().__init__()
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.residual = shortcut is not None
        self.downsample = (
            make_shortcut(shortcut, in_channels, out_channels, stride, norm_layer, pad) if shortcut else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1, "relu")
        out = conv_bn(out, self.conv2, self.bn2, "relu")
        return conv_bn(out, self.conv3, self.bn3, "relu", shortcut_of(x, self))


def shortcut_of(x: Tensor, block: BasicBlock | Bottleneck) -> Tensor | None:
    """S(x) of y = ReLU(F(x) + S(x)), equations 1 and 2; a plain block has none."""
    if not block.residual:
        return None
    return x if block.downsample is None else block.downsample(x)


def make_stage(block, in_channels: int, width: int, blocks: int, stride: int, **options) -> nn.Sequential:
    """Blocks on maps of one size; the first one has the stride."""
    out_channels = width * block.expansion
    first = block(in_channels, width, stride, **options)
    return nn.Sequential(first, *(block(out_channels, width, 1, **options) for _ in range(1, blocks)))


def init_weights(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He's normal initialisation; with ``zero_init_residual`` each block begins as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight)


# ------------------------------------------------------------------------------------------------ for ImageNet, Table 1


class ResNet(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes]; ``features`` are C2..C5, at strides 4, 8, 16 and 32.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: how many in each of conv2_x .. conv5_x.
        num_classes: outputs.
        width: channels of the first stage; each later one has twice as many.
        shortcut: "A", "B" or "C" of Section 4.1, or None for a plain net.
        stride_in_1x1: bottlenecks stride in their first convolution.
        zero_init_residual: the last batch norm of each block starts at zero.
        norm_layer: called with a number of channels; ``pyzoo.nn.FrozenBatchNorm2d`` for detection.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        width: int = 64,
        shortcut: str | None = "B",
        stride_in_1x1: bool = False,
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        stage = partial(make_stage, block, shortcut=shortcut, norm_layer=norm_layer, stride_in_1x1=stride_in_1x1)
        out = [width * 2**i * block.expansion for i in range(4)]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(width, width, blocks[0], 1)
        self.layer2 = stage(out[0], width * 2, blocks[1], 2)
        self.layer3 = stage(out[1], width * 4, blocks[2], 2)
        self.layer4 = stage(out[2], width * 8, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(out[3], num_classes)
        self.out_channels = out
        init_weights(self, zero_init_residual)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(conv_bn(x, self.conv1, self.bn1, "relu"))  # [N, 64, H/4, W/4]
        c2 = self.layer1(x)  # [N, 256, H/4, W/4]
        c3 = self.layer2(c2)  # [N, 512, H/8, W/8]
        c4 = self.layer3(c3)  # [N, 1024, H/16, W/16]
        c5 = self.layer4(c4)  # [N, 2048, H/32, W/32]
        return [c2, c3, c4, c5]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)[-1]).flatten(1))


IMAGENET = "[N, 3, H, W] float, RGB in [0, 1] minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225); trained at 224"

# depth: block, blocks of each stage, parameters
TABLE_1 = {
    18: (BasicBlock, (2, 2, 2, 2), 11_689_512),
    34: (BasicBlock, (3, 4, 6, 3), 21_797_672),
    50: (Bottleneck, (3, 4, 6, 3), 25_557_032),
    101: (Bottleneck, (3, 4, 23, 3), 44_549_160),
    152: (Bottleneck, (3, 8, 36, 3), 60_192_808),
}
PLAIN = {18: 11_515_688, 34: 21_623_848}

# -------------------------------------------------------------------------------------------- for CIFAR-10, Section 4.2


class CifarResNet(nn.Module):
    """[N, in_channels, H, W] -> logits [N, num_classes], with 6n + 2 layers: three stages of n blocks.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110, 1202.
        num_classes: outputs.
        widths: channels of the stages.
        in_channels: of the images.
        shortcut: "A" (the paper's), "B", "C", or None for the plain net, which has as many parameters as with "A".
        pad: where shortcut A puts the new channels: "both" sides or the "end".
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        widths: tuple[int, int, int] = (16, 32, 64),
        in_channels: int = 3,
        shortcut: str | None = "A",
        pad: str = "both",
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6n + 2, as 20, 32 or 56, got {depth}")
        stage = partial(
            make_stage, BasicBlock, blocks=(depth - 2) // 6, shortcut=shortcut, norm_layer=nn.BatchNorm2d, pad=pad
        )
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(widths[0], widths[0], stride=1)
        self.layer2 = stage(widths[0], widths[1], stride=2)
        self.layer3 = stage(widths[1], widths[2], stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn(x, self.conv1, self.bn1, "relu")  # [N, 16, 32, 32]
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 64, 8, 8]
        return self.linear(x.mean((2, 3)))


CIFAR = "[N, 3, 32, 32] float, the mean image of the training set subtracted"

# depth: parameters, with or without shortcuts of option A
SECTION_4_2 = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}

# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "Deep Residual Learning for Image Recognition, He et al., arXiv 1512.03385"
ABOUT = {"paper": PAPER, "task": "classification"}

for _depth, (_block, _blocks, _parameters) in TABLE_1.items():
    _about = {**ABOUT, "input": IMAGENET, "tiny": {"width": 4, "num_classes": 5}, "size": (65, 96)}
    _build = partial(ResNet, _block, _blocks)
    register_model(f"resnet{_depth}", _build, parameters=_parameters, **_about)
    if _depth in PLAIN:
        register_model(f"plain{_depth}", partial(_build, shortcut=None), parameters=PLAIN[_depth], **_about)

for _depth, _parameters in SECTION_4_2.items():
    _about = {**ABOUT, "input": CIFAR, "tiny": {"depth": 14, "widths": (4, 6, 8), "num_classes": 5}, "size": (12, 16)}
    register_model(f"resnet{_depth}_cifar", partial(CifarResNet, depth=_depth), parameters=_parameters, **_about)
    register_model(
        f"plain{_depth}_cifar", partial(CifarResNet, depth=_depth, shortcut=None), parameters=_parameters, **_about
    )
