"""1x1 and depthwise convolutions in training with the batch norm, addition and ReLU that follow: one function forward,
one backward. For float32 on the CPU.

The product of matrices that a 1x1 convolution is, is done a block of pixels at a time; the statistics are gathered, and
the gradients of the normalisation taken, where the block lies in the cache. That is for channels_last and maps of a few
megabytes: for 32 images a training step of MobileNetV2 would take an eighth more, where oneDNN's products are faster
than these and make up for the passes over the map. Of a depthwise convolution the kernels run one after the other, at
once: for one image, half of the time goes into calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from pyzoo._backend import Kernel, runs_on_core
from pyzoo.ops import _common as common
from pyzoo.ops.batch_norm_act import _batch_norm_act_grad, _can_overwrite, _counts, _counts_alone
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d, _final_gradients, _output_size

_pointwise_fwd = Kernel("batch_norm_act", "pointwise_bn_act_fwd")
_pointwise_bwd = Kernel("batch_norm_act", "pointwise_bn_act_bwd")
_depthwise_fwd = Kernel("depthwise_conv2d", "depthwise_conv2d_fwd")
_norm_fwd = Kernel("batch_norm_act", "batch_norm_act_fwd")
_norm_bwd = Kernel("batch_norm_act", "batch_norm_act_bwd")

MOST = 2 << 20  # numbers in both maps of a 1x1 convolution


def suits(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether ``conv(x)``, of plain float32 tensors, is one that this computes, and faster than one operator after the
    other."""
    if conv._parameters["bias"] is not None or not runs_on_core(x.device) or not _pointwise_fwd.exists(x.device):
        return False
    images, channels, height, width = x.shape
    if channels != conv.in_channels:
        return False
    if type(conv) is DepthwiseConv2d:
        return (
            conv.out_channels == channels
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and min(size := _size(conv, height, width)) > 0
            and images * size[0] * size[1] > 1
        )
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and 1 < images * height * width <= MOST // (channels + conv.out_channels)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _size(conv: nn.Conv2d, height: int, width: int) -> list[int]:
    """Height and width of the output."""
    y, x = conv.padding
    return _output_size((height, width), conv.kernel_size, conv.stride, (y, y, x, x), conv.dilation)


class _ConvBNAct(common.Function):
    @staticmethod
    def forward(ctx, x, kernel, weight, bias, residual, conv, statistics, eps, activation):
        channels = len(weight)
        ctx.depthwise = type(conv) is DepthwiseConv2d
        ctx.geometry = conv.stride, conv.padding, conv.dilation
        last = not ctx.depthwise or common.prefers_channels_last(x)
        size = (len(x), channels, *_size(conv, *x.shape[2:]))
        raw, output = common.empty(size, x, last), common.empty(size, x, last)
        mean, var = torch.empty(channels), torch.empty(channels)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        norm = weight, bias, residual, output, mean, var, *statistics, eps, activation
        if ctx.depthwise:
            kernel = kernel.contiguous()
            _depthwise_fwd(x.device, x, kernel, None, raw, *ctx.geometry, 0)
            _norm_fwd(x.device, raw, *norm)
        else:
            kernel = kernel.contiguous(memory_format=torch.channels_last)
            _pointwise_fwd(x.device, x, kernel, raw, *norm)
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
            stride, padding, dilation = ctx.geometry
            groups = len(kernel) if ctx.depthwise else 1
            again = F.conv2d(x, kernel, None, stride, padding, dilation, groups)
            grads = _batch_norm_act_grad(grad, again, weight, bias, *rest, *ctx.rest)
            geometry = None, stride, padding, dilation, False, (0, 0), groups
            first = torch.ops.aten.convolution_backward(grads[0], x, kernel, *geometry, (*wants[:2], False))
            of_residual = grad if keeps else grads[3] if ctx.adds else None
            return *first[:2], *grads[1:3], of_residual, None, None, None, None
        alone = not keeps and _can_overwrite(grad, raw) and _counts(grad) == _counts_alone()
        if not alone:
            grad = grad.contiguous(memory_format=torch.channels_last if raw.stride(1) == 1 else torch.contiguous_format)
        of_raw = grad if alone else torch.empty_like(raw)
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        of_residual = None if output is None else torch.empty_like(raw)
        norm = grad, raw, weight, bias, *rest, of_raw, of_weight, of_bias, of_residual, *ctx.rest
        if ctx.depthwise:
            _norm_bwd(x.device, *norm)
            of_x, of_kernel, _ = _final_gradients(of_raw, x, kernel, (*wants[:2], False), *ctx.geometry)
        else:
            of_x = torch.empty_like(x) if wants[0] else None
            of_kernel = torch.empty_like(kernel) if wants[1] else None
            _pointwise_bwd(x.device, x, kernel, of_x, of_kernel, *norm)
        return of_x, of_kernel, of_weight, of_bias, grad if keeps else of_residual, None, None, None, None


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    residual: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, float],
    activation: str | None,
) -> Tensor:
    """``activation(norm(conv(x)) + residual)`` with the statistics of the batch, which move running mean and variance
    as far as ``statistics`` says; differentiable."""
    kind = common.activation_index("conv_bn_act", activation)
    kernel, (weight, bias) = conv._parameters["weight"], norm._parameters.values()
    output = _ConvBNAct.apply(x, kernel, weight, bias, residual, conv, statistics, norm.eps, kind)
    if statistics[0] is not None:
        increment_version(statistics[:2])  # who keeps what was made of them is to notice
    return output
