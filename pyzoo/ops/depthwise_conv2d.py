"""Depthwise convolution: each channel has its own kernel. Chollet, "Xception", 2017 (https://arxiv.org/abs/1610.02357)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator
from pyzoo.ops.channel_sum import channel_sum

_fwd = Kernel("depthwise_conv2d", "depthwise_conv2d_fwd")
_bwd_input = Kernel("depthwise_conv2d", "depthwise_conv2d_bwd_input")
_bwd_weight = Kernel("depthwise_conv2d", "depthwise_conv2d_bwd_weight")

# ---------------------------------------------------------------------------------------------------------- reference


def depthwise_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """:func:`depthwise_conv2d` in plain PyTorch: the specification of the kernels. Differentiable in all tensors."""
    if input.dim() == 3:
        args = (weight, bias, stride, padding, dilation)
        return depthwise_conv2d_reference(input[None], *args, activation=activation)[0]
    kernel_height, kernel_width = weight.shape[2:]
    stride, padding, dilation = _geometry((kernel_height, kernel_width), stride, padding, dilation)
    top, bottom, left, right = padding
    height, width = _output_size(input.shape[2:], (kernel_height, kernel_width), stride, padding, dilation)
    multiplier = weight.shape[0] // max(input.shape[1], 1)
    padded = F.pad(input, (left, right, top, bottom)).repeat_interleave(multiplier, 1)
    output = input.new_zeros(()) if bias is None else bias[:, None, None]
    for ky in range(kernel_height):
        for kx in range(kernel_width):
            rows = slice(ky * dilation[0], ky * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(kx * dilation[1], kx * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            output = output + padded[:, :, rows, columns] * weight[:, :, ky, kx, None]
    return common.ACTIVATE[activation](output)


# ---------------------------------------------------------------------------------------------------------- arguments


def _pair(name: str, value, least: int) -> tuple[int, int]:
    values = common.pair("depthwise_conv2d", value, name)
    if min(values) < least:
        raise ValueError(f"depthwise_conv2d: {name} must be at least {least}, got {value}")
    return values


def _geometry(kernel, stride, padding, dilation) -> tuple[list[int], list[int], list[int]]:
    """Stride and dilation for (height, width), padding for (top, bottom, left, right)."""
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if not isinstance(padding, str):
        vertical, horizontal = _pair("padding", padding, 0)
        return [*stride], [vertical, vertical, horizontal, horizontal], [*dilation]
    if padding not in ("same", "valid"):
        raise ValueError(f"depthwise_conv2d: padding must be int, two ints, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return [*stride], [0, 0, 0, 0], [*dilation]
    if stride != (1, 1):
        raise ValueError(f"depthwise_conv2d: padding='same' needs stride 1, got stride {stride}")
    padding = []
    for size, step in zip(kernel, dilation, strict=True):
        total = step * (size - 1)
        padding += [total // 2, total - total // 2]
    return [*stride], padding, [*dilation]


def _output_size(size, kernel, stride, padding, dilation) -> list[int]:
    return [
        (n + before + after - step * (k - 1) - 1) // s + 1
        for n, k, s, before, after, step in zip(
            size, kernel, stride, padding[::2], padding[1::2], dilation, strict=True
        )
    ]


def _check_pair(op: str, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    for name, t in ((x_name, x), (y_name, y)):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, got shape {list(t.shape)}")
        common.check_floating(op, name, t)
    if x.dtype != y.dtype:
        raise TypeError(f"{op}: {y_name} must have the dtype of {x_name}, {x.dtype}, got {y.dtype}")
    common.check_same_device(op, x_name, x, y_name, y)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(
            f"depthwise_conv2d: weight must have shape [C * multiplier, 1, KH, KW], got {list(weight.shape)}"
        )


def _check_channels(op: str, channels: int, name: str, t: Tensor) -> None:
    """The channels of ``t`` are a multiple of ``channels``, none only of none."""
    count = t.shape[0] if name == "weight" else t.shape[1]
    if count % max(channels, 1) or (count == 0) != (channels == 0):
        raise ValueError(
            f"{op}: the channels of {name} must be a multiple of the input's {channels}, got {name} of shape "
            f"{list(t.shape)}"
        )


# --------------------------------------------------------------------------------------------------------- the kernel


def _prepared(x: Tensor, channels_last: bool, multiplier: int = 1) -> Tensor:
    """``x`` in strides that the core reads, each channel ``multiplier`` times."""
    if multiplier != 1 and channels_last:
        pixels = x.permute(0, 2, 3, 1).unsqueeze(-1).expand(-1, -1, -1, -1, multiplier)
        return pixels.flatten(3).permute(0, 3, 1, 2)
    if multiplier != 1:
        return x.unsqueeze(2).expand(-1, -1, multiplier, -1, -1).flatten(1, 2)
    if x.stride(1) == 1 and x.shape[1] > 1 if channels_last else x.stride(3) == 1 and x.shape[3] > 1:
        return x
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _multiplier(channels: int, more: int) -> int:
    return more // channels if channels else 1


def _fake(input, weight, bias, stride, padding, dilation, activation):
    op = "depthwise_conv2d"
    _check_weight(weight)
    _check_pair(op, "input", input, "weight", weight)
    _check_channels(op, input.shape[1], "weight", weight)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.dtype != input.dtype:
            raise TypeError(f"{op}: bias must have the dtype of input, {input.dtype}, got {bias.dtype}")
        common.check_same_device(op, "input", input, "bias", bias)
    if min(weight.shape[2:]) < 1:
        raise ValueError(f"{op}: the kernel must be at least 1 x 1, got weight of shape {list(weight.shape)}")
    height, width = _output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(height, width, *input.shape[2:]) < 1:
        raise ValueError(
            f"{op}: input must be at least as large as the kernel, got input of shape {list(input.shape)} with "
            f"padding {list(padding)} and weight of shape {list(weight.shape)} with dilation {list(dilation)}"
        )
    return common.empty((input.shape[0], weight.shape[0], height, width), input, common.prefers_channels_last(input))


def _impl(input, weight, bias, stride, padding, dilation, activation):
    output = _fake(input, weight, bias, stride, padding, dilation, activation)
    multiplier = _multiplier(input.shape[1], weight.shape[0])
    _fwd(
        input.device,
        _prepared(input, common.prefers_channels_last(input), multiplier),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        output,
        stride,
        padding[::2],
        dilation,
        activation,
    )
    return output


def _vmap(info, in_dims, input, weight, bias, *rest):
    size, (x, w, b) = info.batch_size, in_dims[:3]
    if w is None and b is None:
        return common._unfold(_depthwise_conv2d.op(common._fold_batch(input, x, size), weight, bias, *rest), 0, size)
    if bias is not None:
        bias = common._fold_batch(bias, b, size)
    output = _depthwise_conv2d.op(
        common._fold_channels(input, x, size), common._fold_batch(weight, w, size), bias, *rest
    )
    return common._unfold(output, 1, size)


_depthwise_conv2d = Operator(
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, SymInt[] padding, int[] dilation,"
    " int activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    vmap=_vmap,
    autocast=True,
)


def _grad_input_fake(grad_output, weight, channels, size, stride, padding, dilation, channels_last):
    op = "_depthwise_conv2d_grad_input"
    _check_pair(op, "grad_output", grad_output, "weight", weight)
    _check_channels(op, channels, "weight", weight)
    expected = [grad_output.shape[0], weight.shape[0], *_output_size(size, weight.shape[2:], stride, padding, dilation)]
    if list(grad_output.shape) != expected:
        raise ValueError(f"{op}: grad_output must have shape {expected}, got {list(grad_output.shape)}")
    return common.empty((grad_output.shape[0], channels, *size), grad_output, channels_last)


def _grad_input_impl(grad_output, weight, channels, size, stride, padding, dilation, channels_last):
    grad_input = _grad_input_fake(grad_output, weight, channels, size, stride, padding, dilation, channels_last)
    multiplier = _multiplier(channels, weight.shape[0])
    grads = grad_input  # of the repeated input, before they are summed
    if multiplier != 1:
        grads = common.empty((grad_output.shape[0], weight.shape[0], *size), grad_output, channels_last)
    grad_output = _prepared(grad_output, channels_last)
    _bwd_input(grad_output.device, grad_output, weight.contiguous(), grads, stride, padding[::2], dilation)
    if multiplier != 1:
        torch.sum(grads.unflatten(1, (channels, multiplier)), 2, out=grad_input)
    return grad_input


def _grad_input_vmap(info, in_dims, grad_output, weight, channels, *rest):
    size, (g, w) = info.batch_size, in_dims[:2]
    if w is None:
        grad_output = common._fold_batch(grad_output, g, size)
        return common._unfold(_depthwise_conv2d_grad_input.op(grad_output, weight, channels, *rest), 0, size)
    grad_output, weight = common._fold_channels(grad_output, g, size), common._fold_batch(weight, w, size)
    return common._unfold(_depthwise_conv2d_grad_input.op(grad_output, weight, size * channels, *rest), 1, size)


_depthwise_conv2d_grad_input = Operator(
    "_depthwise_conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt channels, SymInt[] size, int[] stride,"
    " SymInt[] padding, int[] dilation, bool channels_last) -> Tensor",
    impl=_grad_input_impl,
    fake=_grad_input_fake,
    vmap=_grad_input_vmap,
    autocast=True,
)


def _grad_weight_fake(grad_output, input, kernel_size, stride, padding, dilation, with_bias):
    op = "_depthwise_conv2d_grad_weight"
    _check_pair(op, "grad_output", grad_output, "input", input)
    _check_channels(op, input.shape[1], "grad_output", grad_output)
    expected = [
        input.shape[0],
        grad_output.shape[1],
        *_output_size(input.shape[2:], kernel_size, stride, padding, dilation),
    ]
    if list(grad_output.shape) != expected:
        raise ValueError(f"{op}: grad_output must have shape {expected}, got {list(grad_output.shape)}")
    channels = grad_output.shape[1]
    return input.new_empty((channels, 1, *kernel_size)), input.new_empty(channels if with_bias else 0)


def _grad_weight_impl(grad_output, input, kernel_size, stride, padding, dilation, with_bias):
    outputs = _grad_weight_fake(grad_output, input, kernel_size, stride, padding, dilation, with_bias)
    last = common.prefers_channels_last(input)
    multiplier = _multiplier(input.shape[1], grad_output.shape[1])
    grad_weight, grad_bias = outputs[0], outputs[1] if with_bias else None
    grad_output, input = _prepared(grad_output, last), _prepared(input, last, multiplier)
    _bwd_weight(grad_output.device, grad_output, input, grad_weight, grad_bias, stride, padding[::2], dilation)
    return outputs


def _grad_weight_vmap(info, in_dims, grad_output, input, *rest):
    size, (g, x) = info.batch_size, in_dims[:2]
    grad_output, input = common._fold_channels(grad_output, g, size), common._fold_channels(input, x, size)
    outputs, dims = common._unfold(_depthwise_conv2d_grad_weight.op(grad_output, input, *rest), 0, size)
    return tuple(outputs), tuple(dims)


_depthwise_conv2d_grad_weight = Operator(
    "_depthwise_conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, int[] stride,"
    " SymInt[] padding, int[] dilation, bool with_bias) -> (Tensor, Tensor)",
    impl=_grad_weight_impl,
    fake=_grad_weight_fake,
    vmap=_grad_weight_vmap,
    autocast=True,
)


# -------------------------------------------------------------------------------------------------------- derivatives
# The convolution and its two gradients are linear in each of their two tensors, and the derivatives of one are the
# other two. So any order closes. The gradient in the weight brings that in the bias along: one reading of the maps.


def _convolve(input, weight, geometry, bias=None):
    return _depthwise_conv2d(input, weight, bias, *geometry, 0)


def _grad_input(grad_output, weight, like, geometry):
    last = common.prefers_channels_last(like)
    return _depthwise_conv2d_grad_input(grad_output, weight, like.shape[1], like.shape[2:], *geometry, last)


def _grad_weight(grad_output, input, like, geometry, with_bias=False):
    return _depthwise_conv2d_grad_weight(grad_output, input, like.shape[2:], *geometry, with_bias)


def _grad_weight_alone(grad_output, input, rest):
    return _depthwise_conv2d_grad_weight(grad_output, input, *rest[:-1], False)[0]


def _final_gradients(grad_output, input, weight, wants, *sliding):
    """Those of input, weight and bias that are wanted, straight from the kernels: on small maps the operators take as
    long as these. ``sliding``: stride, padding and dilation, each (vertical, horizontal)."""
    device, last = input.device, common.prefers_channels_last(input)
    grads, grad_output = [None] * 3, _prepared(grad_output, last)
    if wants[0]:
        grads[0] = common.empty(input.shape, input, last)
        _bwd_input(device, grad_output, weight.contiguous(), grads[0], *sliding)
    if wants[2]:
        grads[2] = weight.new_empty(weight.shape[:1])
    if wants[1]:
        grads[1] = weight.new_empty(weight.shape)
        _bwd_weight(device, grad_output, _prepared(input, last), *grads[1:], *sliding)
    elif wants[2]:
        grads[2] = channel_sum(grad_output)
    return grads


class _DepthwiseConv2d(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *rest):
        output = _depthwise_conv2d.below_autograd(input, weight, bias, *rest)
        *ctx.geometry, ctx.activation = rest
        ctx.output_shape = output.shape
        saved = input, weight, output if ctx.activation else None
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, output = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = wants = ctx.needs_input_grad[:3]
        grad = common.where_active(grad, output, ctx.activation)
        if weight.shape[0] == input.shape[1] and common.is_final((grad, input, weight)):
            stride, padding, dilation = ctx.geometry
            return *_final_gradients(grad, input, weight, wants, stride, padding[::2], dilation), *[None] * 4
        grad_input = _grad_input(grad, weight, input, ctx.geometry) if wants_input else None
        grad_weight = grad_bias = None
        if wants_weight:
            grad_weight, grad_bias = _grad_weight(grad, input, weight, ctx.geometry, wants_bias)
        elif wants_bias:
            grad_bias = channel_sum(grad)
        return grad_input, grad_weight, grad_bias if wants_bias else None, *[None] * 4

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight, output = ctx.saved_tensors
        tangent = common.bilinear_jvp(_convolve, input, weight, input_tangent, weight_tangent, ctx.geometry)
        if bias_tangent is not None:
            bias_tangent = bias_tangent[:, None, None]
            tangent = bias_tangent.expand(ctx.output_shape) if tangent is None else tangent + bias_tangent
        return common.where_active(tangent, output, ctx.activation)


class _DepthwiseConv2dGradInput(Function):
    @staticmethod
    def forward(ctx, grad_output, weight, channels, size, *rest):
        ctx.save_for_backward(grad_output, weight)
        ctx.save_for_forward(grad_output, weight)
        ctx.rest = channels, size, *rest
        ctx.geometry = rest[:3]
        return _depthwise_conv2d_grad_input.below_autograd(grad_output, weight, *ctx.rest)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        return (
            _convolve(grad, weight, ctx.geometry) if ctx.needs_input_grad[0] else None,
            _grad_weight(grad_output, grad, weight, ctx.geometry)[0] if ctx.needs_input_grad[1] else None,
            *[None] * 6,
        )

    @staticmethod
    def jvp(ctx, grad_tangent, weight_tangent, *_):
        tangents = grad_tangent, weight_tangent
        return common.bilinear_jvp(_depthwise_conv2d_grad_input, *ctx.saved_tensors, *tangents, *ctx.rest)


class _DepthwiseConv2dGradWeight(Function):
    @staticmethod
    def forward(ctx, grad_output, input, *rest):
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)
        ctx.rest = rest
        *ctx.geometry, ctx.with_bias = rest[1:]
        return _depthwise_conv2d_grad_weight.below_autograd(grad_output, input, *rest)

    @staticmethod
    def backward(ctx, grad, grad_of_bias):
        grad_output, input = ctx.saved_tensors
        bias = grad_of_bias if ctx.with_bias else None
        return (
            _convolve(input, grad, ctx.geometry, bias) if ctx.needs_input_grad[0] else None,
            _grad_input(grad_output, grad, input, ctx.geometry) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, *_):
        tangents = grad_tangent, input_tangent
        weight_tangent = common.bilinear_jvp(_grad_weight_alone, *ctx.saved_tensors, *tangents, ctx.rest)
        wants_bias = ctx.with_bias and grad_tangent is not None
        return weight_tangent, channel_sum(grad_tangent) if wants_bias else None


_depthwise_conv2d.differentiate(_DepthwiseConv2d)
_depthwise_conv2d_grad_input.differentiate(_DepthwiseConv2dGradInput)
_depthwise_conv2d_grad_weight.differentiate(_DepthwiseConv2dGradWeight)


@specified_by(depthwise_conv2d_reference)
def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Convolves each channel with kernels of its own, as ``F.conv2d(..., groups=C)``; optionally adds a bias and
    applies a ReLU in the same pass.

    Differentiable in all tensors any number of times; deterministic; the same bits for any number of threads; sums are
    kept in float32 or better. Under autocast the tensors are cast as those of ``F.conv2d`` are.

    Args:
        input: Tensor[N, C, H, W] or [C, H, W] of any strides; float32, float64, float16 or bfloat16.
        weight: Tensor[C * multiplier, 1, KH, KW]; output channel o sees input channel o // multiplier.
        bias: Tensor[C * multiplier] or None.
        stride: int, or (vertical, horizontal).
        padding: zeros around the input: int, (vertical, horizontal), "valid" for none, or, with stride 1, "same" for as
            many as keep the size; an odd number has the greater half below and to the right.
        dilation: distance of the kernel's taps: int, or (vertical, horizontal).
        activation: None, "relu" or "relu6", applied to the sum.

    Returns:
        Tensor[N, C * multiplier, OH, OW] (without N for an input without) in the dtype and memory format (contiguous or
        channels_last) of ``input``.

    Raises:
        TypeError: a tensor is not of a floating dtype, not dense or not of the input's dtype; an argument that must be
            integer is not.
        ValueError: a shape, device or size does not fit; the padded input is smaller than the kernel.
    """
    common.check_tensor("depthwise_conv2d", "input", input)
    common.check_tensor("depthwise_conv2d", "weight", weight)
    if bias is not None:
        common.check_tensor("depthwise_conv2d", "bias", bias)
    kind = common.activation_index("depthwise_conv2d", activation)
    if input.dim() not in (3, 4):
        raise ValueError(f"depthwise_conv2d: input must have shape [N, C, H, W] or [C, H, W], got {list(input.shape)}")
    _check_weight(weight)
    geometry = _geometry(weight.shape[2:], stride, padding, dilation)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    output = _depthwise_conv2d(batch, weight, bias, *geometry, kind)
    return output if input.dim() == 4 else output.squeeze(0)


class DepthwiseConv2d(nn.Conv2d):
    """An ``nn.Conv2d(channels, channels * multiplier, ..., groups=channels)`` that runs :func:`depthwise_conv2d`.

    Parameters and state dicts are those of the ``nn.Conv2d``. What the kernels do not take (other devices and dtypes)
    goes to ``F.conv2d``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Tensor:
        if input.device.type not in ("cpu", "meta") or input.dtype not in common._FLOATS:
            return common.ACTIVATE[activation](super()._conv_forward(input, weight, bias))
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return depthwise_conv2d(input, weight, bias, self.stride, padding, self.dilation, activation=activation)
