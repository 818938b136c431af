"""MobileNetV2: Inverted Residuals and Linear Bottlenecks. M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen.
CVPR 2018, arXiv 1801.04381.

Few channels suffice to carry what a layer has found, but a ReLU among few channels destroys it. So a block widens its
input, filters each channel by itself, and projects back without a ReLU; shortcuts join the thin ends, which makes the
residual an "inverted" one. The wide map in between can be computed part by part.

Parameter names are torchvision's.

Departures from the paper:
    He's initialisation and PyTorch's batch norm, as torchvision's weights want.
    TensorFlow's padding at stride 2, which depends on the size, is not here: pad 1 on all sides.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.models._registry import register_model
from pyzoo.nn.conv import conv_bn, fold
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d, depthwise_conv2d

# Table 2. Expansion t, channels c, blocks n, stride s of the first block; the map that comes in, of 224 x 224 pixels
TABLE_2 = (
    (1, 16, 1, 1),  # 112 x 112 x 32
    (6, 24, 2, 2),  # 112 x 112 x 16
    (6, 32, 3, 2),  # 56 x 56 x 24
    (6, 64, 4, 2),  # 28 x 28 x 32
    (6, 96, 3, 1),  # 14 x 14 x 64
    (6, 160, 3, 2),  # 14 x 14 x 96
    (6, 320, 1, 1),  # 7 x 7 x 160
)
STEM, LAST = 32, 1280  # channels before the blocks, and after them


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple, but never less than nine tenths."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


# --------------------------------------------------------------------------------------------------------------- blocks


class ConvBNReLU6(nn.Sequential):
    """Convolution, batch norm, min(max(x, 0), 6)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return conv_bn(x, conv, norm, "relu6")


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class InvertedResidual(nn.Module):
    """Table 1: [N, c, h, w] -> [N, c', h / s, w / s], over t * c channels.

    Args:
        in_channels, out_channels: c and c'.
        stride: s, of the depthwise convolution.
        expansion: t; 1 leaves the first convolution out.
        linear: no ReLU6 after the projection (Section 3.2). Figure 6a compares.
        split: in how many parts the wide map is computed in eval mode without gradients (Section 5.1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 6,
        *,
        linear: bool = True,
        split: int = 1,
    ):
        super().__init__()
        if split < 1:
            raise ValueError(f"InvertedResidual: split must be at least 1, got {split}")
        wide = expansion * in_channels
        expand = [] if expansion == 1 else [ConvBNReLU6(conv1x1(in_channels, wide))]
        depthwise = ConvBNReLU6(DepthwiseConv2d(wide, 3, stride, 1, bias=False))
        self.conv = nn.Sequential(*expand, depthwise, conv1x1(wide, out_channels), nn.BatchNorm2d(out_channels))
        self.residual = stride == 1 and in_channels == out_channels
        self.activation = None if linear else "relu6"
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        if self.split > 1 and not self.training and not torch.is_grad_enabled():
            return self._in_parts(x)
        *layers, project, norm = self.conv
        wide = x
        for layer in layers:
            wide = layer(wide)  # [N, t * c, h, w], then [N, t * c, h / s, w / s]
        if self.activation is None:
            return conv_bn(wide, project, norm, residual=x if self.residual else None)
        out = conv_bn(wide, project, norm, self.activation)
        return x + out if self.residual else out

    def _in_parts(self, x: Tensor) -> Tensor:
        """Equation 6: the sum over groups of wide channels, of which one at a time is in memory."""
        *expand, (depthwise, norm), project, norm_out = self.conv
        weight, shift = fold(project, norm_out)
        kernel, bias = fold(depthwise, norm)
        out = shift[:, None, None]
        for part in torch.arange(len(kernel), device=x.device).tensor_split(min(self.split, len(kernel))):
            if expand:
                expand_weight, expand_bias = (t[part] for t in fold(*expand[0]))
                wide = F.relu6(F.conv2d(x, expand_weight, expand_bias), inplace=True)
            else:
                wide = x[:, part]
            wide = depthwise_conv2d(wide, kernel[part], bias[part], depthwise.stride, 1, activation="relu6")
            out = F.conv2d(wide, weight[:, part]) + out
        out = out if self.activation is None else F.relu6(out, inplace=True)
        return x + out if self.residual else out


# ---------------------------------------------------------------------------------------------------------------- model


class MobileNetV2(nn.Module):
    """[N, 3, H, W] -> logits [N, num_classes].

    Args:
        num_classes: outputs.
        width: all channels are so many times those of Table 2, rounded to multiples of 8; those before the classifier
            do not become fewer.
        dropout: before the classifier.
        linear, split: of each :class:`InvertedResidual`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        dropout: float = 0.2,
        linear: bool = True,
        split: int = 1,
    ):
        super().__init__()
        if width <= 0:
            raise ValueError(f"MobileNetV2: width must be above 0, got {width}")
        channels, last = make_divisible(STEM * width), make_divisible(LAST * max(1.0, width))
        layers: list[nn.Module] = [ConvBNReLU6(nn.Conv2d(3, channels, 3, 2, 1, bias=False))]
        for t, c, n, s in TABLE_2:
            out = make_divisible(c * width)
            for i in range(n):
                layers.append(InvertedResidual(channels, out, s if i == 0 else 1, t, linear=linear, split=split))
                channels = out
        layers.append(ConvBNReLU6(conv1x1(channels, last)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
            raise ValueError(f"MobileNetV2: images must have pixels and shape [N, 3, H, W], got {list(x.shape)}")
        x = self.features(x.contiguous(memory_format=torch.channels_last))  # [N, 1280, H / 32, W / 32]
        return self.classifier(x.mean((2, 3)))


def init_weights(model: nn.Module) -> None:
    """He's normal initialisation of the convolutions, N(0, 0.01) for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- registry

PAPER = "MobileNetV2: Inverted Residuals and Linear Bottlenecks, Sandler et al., arXiv 1801.04381"
INPUT = "[N, 3, H, W] float, RGB, mean (0.485, 0.456, 0.406), deviation (0.229, 0.224, 0.225); trained at 224"

# width: parameters
WIDTHS = {1.0: 3_504_872, 1.4: 6_108_776, 1.3: 5_386_792, 0.75: 2_636_424, 0.5: 1_968_680, 0.35: 1_677_128}


for _width, _parameters in WIDTHS.items():
    register_model(
        "mobilenet_v2" if _width == 1 else f"mobilenet_v2_{_width:g}",
        partial(MobileNetV2, width=_width),
        paper=PAPER,
        task="classification",
        input=INPUT,
        parameters=_parameters,
        tiny={"width": 0.1, "num_classes": 5},
        size=(65, 96),
    )
