"""1x1 convolutions in inference with the addition and ReLU that follow, for float32 on the CPU and large outputs.

The products take as long as those of oneDNN. But memory that a large output gets from the system has no pages yet, and
to fault them in one by one takes several times as long as the convolution: these kernels ask for large pages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyzoo._backend import Kernel, runs_on_core
from pyzoo._ext import C
from pyzoo.ops._common import activation_index, empty

_conv = Kernel("pointwise", "pointwise_conv")
_weight = Kernel("pointwise", "pointwise_weight")

LARGE = 32 << 20  # bytes, from which malloc always asks the system


def suits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether ``conv(x)`` is one that this computes, and faster than the library of convolutions."""
    images, channels, height, width = x.shape
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and channels == conv.in_channels
        and images * height * width * conv.out_channels * x.itemsize >= LARGE
        and runs_on_core(x.device)
        and _conv.exists(x.device)
    )


def transform(weight: Tensor) -> Tensor:
    """What :func:`run` makes of a weight first."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = weight.new_empty(C.pointwise_weight_size(*weight.shape[:2]))
    _weight(weight.device, weight, out)
    return out


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, residual: Tensor | None, activation: str | None
) -> Tensor:
    """``activation(conv(x) + residual)`` by a weight of ``channels`` outputs that :func:`transform` gave."""
    out = empty((len(x), channels, *x.shape[2:]), x, True)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    _conv(x.device, x, weight, bias, residual, out, activation_index("conv_bn", activation))
    return out
