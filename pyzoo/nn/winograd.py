"""3x3 convolutions with a quarter of the products: F(4x4, 3x3) of A. Lavin and S. Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308, forward and backward. For float32 on the CPU.

Rounding is about that of a direct convolution: the points of the transform are chosen for it. What is not finite
spreads over the tiles of 4x4 outputs that it is an input of, as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyzoo._backend import Kernel, runs_on_core
from pyzoo._ext import C
from pyzoo.ops._common import empty
from pyzoo.ops.channel_sum import channel_sum

_conv = Kernel("winograd", "winograd_conv")
_bwd_weight = Kernel("winograd", "winograd_conv_bwd_weight")
_weight = Kernel("winograd", "winograd_weight")


def suits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether ``conv(x)`` is one that this computes, and faster than directly."""
    if not (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), (1, 1), (2, 2))
        and runs_on_core(x.device)
        and _conv.exists(x.device)
    ):
        return False
    images, channels, height, width = x.shape
    height, width = height + 2 * conv.padding[0] - 2, width + 2 * conv.padding[0] - 2
    # Products that are saved, against those done twice as slowly, the weight to transform, and the maps.
    tiles = images * -(-height // 4) * -(-width // 4)
    pays = 8 * (tiles + 16) <= images * height * width
    return pays and channels * conv.out_channels >= 16 * (channels + conv.out_channels)


def transform(weight: Tensor) -> Tensor:
    """What :func:`run` makes of a weight first: four times as large."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = weight.new_empty(C.winograd_weight_size(*weight.shape[:2]))
    _weight(weight.device, weight, out, False)
    return out


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: int,
    padding: int,
    *,
    relu: bool = False,
    turned: bool = False,
) -> Tensor:
    """The convolution, and then ReLU. The weight is what :func:`transform` gave, or one of ``channels`` outputs; with
    ``turned`` it is the one whose output the gradient ``x`` is of, and ``channels`` are its inputs."""
    images, _, height, width = x.shape
    out = empty((images, channels, height + 2 * padding - 2, width + 2 * padding - 2), x, True)
    _conv(x.device, x, weight, x.new_empty(0) if bias is None else bias, out, padding, turned, relu)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, padding, relu):
        raw = weight.contiguous(memory_format=torch.channels_last)
        out = run(x, raw, bias, len(weight), padding, relu=relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.padding = padding
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, out = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        if torch.is_grad_enabled():  # it is differentiated again
            geometry = (1, 1), (ctx.padding,) * 2, (1, 1), False, (0, 0), 1
            grads = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *geometry, wants)
            return *grads, None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        raw = weight.contiguous(memory_format=torch.channels_last)
        dx = dw = db = None
        if wants[0]:
            dx = run(grad, raw, None, x.shape[1], 2 - ctx.padding, turned=True)
        if wants[1]:
            dw = empty(weight.shape, weight, True)
            _bwd_weight(grad.device, grad, x, dw, ctx.padding)
        if wants[2]:
            db = channel_sum(grad)
        return dx, dw, db, None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, relu: bool = False) -> Tensor:
    """``F.conv2d``, and then ReLU; differentiable."""
    return _Conv.apply(x, weight, bias, padding, relu)
