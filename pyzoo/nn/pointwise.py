"""1x1 convolutions in training with the batch norm, addition and ReLU that follow: one function forward, one backward.

The product of matrices is that of a convolution, done a block of pixels at a time; the statistics are gathered, and the
gradients of the normalisation taken, where the block lies in the cache. For float32 and channels_last on the CPU, and
maps of a few megabytes: with 2 threads a training step of MobileNetV2 takes an eighth less for one image, but for 32
an eighth more, where oneDNN's products are faster than these and make up for the passes over the map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo._backend import Kernel, runs_on_core
from pyzoo.ops import _common as common
from pyzoo.ops.batch_norm_act import _batch_norm_act_grad, _can_overwrite, _counts, _counts_alone, _update

_fwd = Kernel("batch_norm_act", "pointwise_bn_act_fwd")
_bwd = Kernel("batch_norm_act", "pointwise_bn_act_bwd")


MOST = 2 << 20  # numbers in both maps


def suits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether ``conv(x)`` is one that this computes, and faster than one operator after the other."""
    images, channels, height, width = x.shape
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
        and 1 < images * height * width <= MOST // (channels + conv.out_channels)
        and runs_on_core(x.device)
        and _fwd.exists(x.device)
    )


def _empty(size, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)


class _ConvBNAct(common.Function):
    @staticmethod
    def forward(ctx, x, kernel, weight, bias, residual, statistics, eps, activation):
        images, _, height, width = x.shape
        channels = len(weight)
        raw, output = (_empty((images, channels, height, width), x) for _ in range(2))
        mean, var = torch.empty(2, channels).unbind()
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        _fwd(x.device, x, kernel, raw, weight, bias, residual, output, mean, var, eps, activation)
        if statistics is not None:
            _update(raw, mean, var, *statistics)
        ctx.adds, ctx.rest = residual is not None, (eps, activation)
        kept = output if activation and ctx.adds else None  # else where the activation was open is computed again
        ctx.save_for_backward(x, kernel, raw, weight, bias, kept, mean, var)
        return output

    @staticmethod
    def backward(ctx, grad):
        x, kernel, raw, weight, bias, output, mean, var = ctx.saved_tensors
        wants, rest = ctx.needs_input_grad, (output, mean, var)
        keeps = ctx.adds and output is None  # the gradient, which is the residual's, too
        if torch.is_grad_enabled():  # it is differentiated again
            grads = _batch_norm_act_grad(grad, F.conv2d(x, kernel), weight, bias, *rest, *ctx.rest)
            geometry = (1, 1), (0, 0), (1, 1), False, (0, 0), 1
            first = torch.ops.aten.convolution_backward(grads[0], x, kernel, None, *geometry, (*wants[:2], False))
            of_residual = grad if keeps else grads[3] if ctx.adds else None
            return *first[:2], *grads[1:3], of_residual, None, None, None
        alone = not keeps and _can_overwrite(grad, raw) and _counts(grad) == _counts_alone()
        if not alone:
            grad = grad.contiguous(memory_format=torch.channels_last)
        of_raw = grad if alone else torch.empty_like(raw)
        of_x = torch.empty_like(x) if wants[0] else None
        of_kernel = torch.empty_like(kernel) if wants[1] else None
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        of_residual = None if output is None else torch.empty_like(raw)
        into = of_raw, of_weight, of_bias, of_residual
        _bwd(x.device, x, kernel, of_x, of_kernel, grad, raw, weight, bias, *rest, *into, *ctx.rest)
        of_residual = grad if keeps else of_residual
        return of_x, of_kernel, of_weight, of_bias, of_residual, None, None, None


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor, float] | None,
    activation: str | None,
) -> Tensor:
    """``activation(norm(conv(x)) + residual)`` with the statistics of the batch, which move running mean and variance
    as far as ``statistics`` says; differentiable."""
    kind = common.activation_index("conv_bn_act", activation)
    return _ConvBNAct.apply(x, conv.weight, norm.weight, norm.bias, residual, statistics, norm.eps, kind)
