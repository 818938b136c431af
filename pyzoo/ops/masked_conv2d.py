"""Masked convolution. van den Oord et al., "Pixel Recurrent Neural Networks", 2016, section 3.4
(https://arxiv.org/abs/1601.06759); the stacks: "Conditional Image Generation with PixelCNN Decoders", 2016, section 2.2
(https://arxiv.org/abs/1606.05328)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator
from pyzoo.ops.channel_sum import channel_sum

MASKS = ("A", "B", "vertical_a", "vertical_b", "horizontal_a", "horizontal_b")
ALIASES = {"vertical": "vertical_b", "horizontal": "horizontal_b"}

_fwd = Kernel("masked_conv2d", "masked_conv2d_fwd")
_bwd = Kernel("masked_conv2d", "masked_conv2d_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def live_weights(
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, int],
    mask: str,
    *,
    colors: int = 1,
    gates: int = 1,
    groups: int = 1,
) -> Tensor:
    """Which weights of :func:`masked_conv2d` count: bool [out_channels, in_channels / groups, *kernel_size]."""
    mask = ALIASES.get(mask, mask)
    row, column = (size // 2 for size in kernel_size)
    taps = torch.zeros(kernel_size, dtype=torch.bool)
    if not mask.startswith("horizontal"):
        taps[:row] = True
    if not mask.startswith("vertical"):
        taps[row, :column] = True
    if mask == "vertical_b":
        taps[row] = True
    live = taps.repeat(out_channels, in_channels // groups, 1, 1)
    if not mask.startswith("vertical"):
        per_gate = out_channels // gates
        out_color = torch.arange(out_channels) % per_gate // max(per_gate // colors, 1)
        in_color = torch.arange(in_channels) // max(in_channels // colors, 1)
        seen = torch.less if mask in ("A", "horizontal_a") else torch.less_equal
        own = seen(in_color, out_color[:, None]).unflatten(1, (groups, -1))  # [out, group, in]
        group = torch.arange(out_channels) // max(out_channels // groups, 1)
        live[:, :, row, column] = own[torch.arange(out_channels), group]
    return live


def masked_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str,
    colors: int = 1,
    gates: int = 1,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """:func:`masked_conv2d` in plain PyTorch: the specification of the kernels. What is masked takes no part, so that
    not even NaN gets through."""
    dilation = common.pair("masked_conv2d_reference", dilation, "dilation")
    out_channels, _, *kernel = weight.shape
    images, in_channels, height, width = input.shape
    live = live_weights(out_channels, in_channels, kernel, mask, colors=colors, gates=gates, groups=groups)
    pad_y, pad_x = (size // 2 * step for size, step in zip(kernel, dilation, strict=True))
    padded = F.pad(input, (pad_x, pad_x, pad_y, pad_y)).unflatten(1, (groups, in_channels // groups))
    # Empty, but differentiable in all where no tap is live.
    outputs = [input.new_zeros(images, 0, height, width) + input[:0].sum() + weight[:0].sum()]
    for o in range(out_channels):
        source = padded[:, o * groups // out_channels]
        total = input.new_zeros(images, height, width) + (0 if bias is None else bias[o])
        for y, x in live[o].any(0).nonzero().tolist():
            seen = live[o, :, y, x]
            window = source[:, seen, y * dilation[0] :, x * dilation[1] :][:, :, :height, :width]
            total = total + (weight[o, seen, y, x, None, None] * window).sum(1)
        outputs.append(total[:, None])
    return torch.cat(outputs, 1)


# ---------------------------------------------------------------------------------------------------------- operators
# The convolution is linear in the input and in the weight: its derivatives are _input and _weight, and theirs are made
# of the three again. `config` is what all end with: mask, colors, gates, groups, dilation_y, dilation_x.

_CONFIG = "str mask, int colors, int gates, int groups, int dilation_y, int dilation_x"


def _check_config(op: str, out_channels, in_channels, kernel, mask, colors, gates, groups, dilation_y, dilation_x):
    if mask not in MASKS:
        allowed = ", ".join(map(repr, (*MASKS, *ALIASES)))
        raise ValueError(f"{op}: mask must be one of {allowed}, got {mask!r}")
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"{op}: the kernel must have odd height and width, got {kernel[0]} x {kernel[1]}")
    for name, value in (("colors", colors), ("gates", gates), ("groups", groups)):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    if dilation_y < 1 or dilation_x < 1:
        raise ValueError(f"{op}: dilation must be at least 1, got {dilation_y} x {dilation_x}")
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{op}: groups must divide the channels of input and output, got groups={groups} for {in_channels} and "
            f"{out_channels}"
        )
    if in_channels % colors or out_channels % (colors * gates):
        raise ValueError(
            f"{op}: colors must divide the channels of the input, and colors x gates those of the output, got "
            f"colors={colors}, gates={gates} for {in_channels} and {out_channels}"
        )
    if colors > 1 and mask.startswith("vertical"):
        raise ValueError(f"{op}: colors must be 1 for mask {mask!r}, whose rows have no order of colors, got {colors}")


def _check_map(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W], got {list(x.shape)}")
    common.check_floating(op, name, x)
    if x.dtype != other.dtype:
        raise TypeError(f"{op}: {name} and {other_name} must have one dtype, got {x.dtype} and {other.dtype}")
    common.check_same_device(op, name, x, other_name, other)


def _check_weight(op: str, name: str, x: Tensor, weight: Tensor, is_input: bool, config: tuple) -> None:
    """``x``, called ``name``, is what the convolution takes or what it gives."""
    _check_map(op, name, x, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have shape [OC, IC / groups, KH, KW], got {list(weight.shape)}")
    groups, channels = config[3], x.shape[1]
    expected = weight.shape[1] * groups if is_input else weight.shape[0]
    _check_config(op, weight.shape[0], weight.shape[1] * groups, weight.shape[2:], *config)
    if channels != expected:
        raise ValueError(
            f"{op}: {name} must have {expected} channels for weight {list(weight.shape)} and groups={groups}, got "
            f"{channels}"
        )


def _fake(input, weight, bias, *config):
    op = "masked_conv2d"
    _check_weight(op, "input", input, weight, True, config)
    out_channels = weight.shape[0]
    if bias is not None:
        if bias.shape != (out_channels,):
            raise ValueError(f"{op}: bias must have shape [{out_channels}], got {list(bias.shape)}")
        if bias.dtype != input.dtype:
            raise TypeError(f"{op}: input and bias must have one dtype, got {input.dtype} and {bias.dtype}")
        common.check_same_device(op, "input", input, "bias", bias)
    shape = (input.shape[0], out_channels, *input.shape[2:])
    return common.empty(shape, input, common.prefers_channels_last(input))


def _impl(input, weight, bias, *config):
    output = _fake(input, weight, bias, *config)
    _fwd(input.device, input, weight.contiguous(), None if bias is None else bias.contiguous(), output, *config)
    return output


def _input_fake(grad_output, weight, channels_last, *config):
    _check_weight("_masked_conv2d_input", "grad_output", grad_output, weight, False, config)
    shape = (grad_output.shape[0], weight.shape[1] * config[3], *grad_output.shape[2:])
    return common.empty(shape, grad_output, channels_last)


def _input_impl(grad_output, weight, channels_last, *config):
    grad_input = _input_fake(grad_output, weight, channels_last, *config)
    _bwd(grad_output.device, grad_output, None, weight.contiguous(), grad_input, None, None, *config)
    return grad_input


def _weight_fake(grad_output, input, kernel_height, kernel_width, *config):
    op, groups = "_masked_conv2d_weight", config[3]
    _check_map(op, "grad_output", grad_output, "input", input)
    _check_map(op, "input", input, "grad_output", grad_output)
    out_channels, in_channels = grad_output.shape[1], input.shape[1]
    if (grad_output.shape[0], *grad_output.shape[2:]) != (input.shape[0], *input.shape[2:]):
        raise ValueError(
            f"{op}: grad_output and input must have the same images and pixels, got {list(grad_output.shape)} and "
            f"{list(input.shape)}"
        )
    _check_config(op, out_channels, in_channels, (kernel_height, kernel_width), *config)
    return input.new_empty((out_channels, in_channels // groups, kernel_height, kernel_width))


def _weight_impl(grad_output, input, *rest):
    grad_weight = _weight_fake(grad_output, input, *rest)
    _bwd(grad_output.device, grad_output, input, None, None, grad_weight, None, *rest[2:])
    return grad_weight


def _vmap_over_images(operator):
    """The vmap rule: a map that alone has the extra dimension folds it into its images; else one call for each."""

    def rule(info, in_dims, *args):
        count = operator().count
        if in_dims[0] is not None and all(d is None for d in in_dims[1:count]):
            folded = args[0].movedim(in_dims[0], 0).flatten(0, 1)
            return operator().op(folded, *args[1:]).unflatten(0, (info.batch_size, -1)), 0
        return _one_by_one(operator(), info, in_dims, args), 0

    return rule


def _one_by_one(operator, info, in_dims, args):
    def entry(i):
        return [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]

    return torch.stack([operator.op(*entry(i)) for i in range(info.batch_size)])


def _weight_vmap(info, in_dims, *args):
    return _one_by_one(_masked_conv2d_weight, info, in_dims, args), 0


_masked_conv2d = Operator(
    f"masked_conv2d(Tensor input, Tensor weight, Tensor? bias, {_CONFIG}) -> Tensor",
    impl=_impl,
    fake=_fake,
    vmap=_vmap_over_images(lambda: _masked_conv2d),
    autocast=True,
)
_masked_conv2d_input = Operator(
    f"_masked_conv2d_input(Tensor grad_output, Tensor weight, bool channels_last, {_CONFIG}) -> Tensor",
    impl=_input_impl,
    fake=_input_fake,
    vmap=_vmap_over_images(lambda: _masked_conv2d_input),
)
_masked_conv2d_weight = Operator(
    "_masked_conv2d_weight(Tensor grad_output, Tensor input, SymInt kernel_height, SymInt kernel_width,"
    f" {_CONFIG}) -> Tensor",
    impl=_weight_impl,
    fake=_weight_fake,
    vmap=_weight_vmap,
)


class _MaskedConv2d(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *config):
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)
        ctx.config = config
        return _masked_conv2d.below_autograd(input, weight, bias, *config)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        wants, grads = ctx.needs_input_grad, [None] * 3
        if common.is_final((grad_output, input, weight)):  # all at once: calls cost more than small maps
            if wants[0]:
                grads[0] = common.empty(input.shape, input, common.prefers_channels_last(input))
            if wants[1]:
                grads[1] = weight.new_empty(weight.shape)
            if wants[2]:
                grads[2] = weight.new_empty(weight.shape[:1])
            _bwd(input.device, grad_output, input, weight.contiguous(), *grads, *ctx.config)
            return *grads, *[None] * len(ctx.config)
        if wants[0]:
            last = common.prefers_channels_last(input)
            grads[0] = _masked_conv2d_input(grad_output, weight, last, *ctx.config)
        if wants[1]:
            grads[1] = _masked_conv2d_weight(grad_output, input, *weight.shape[2:], *ctx.config)
        if wants[2]:
            grads[2] = channel_sum(grad_output)
        return *grads, *[None] * len(ctx.config)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight = ctx.saved_tensors
        tangent = common.bilinear_jvp(_masked_conv2d, input, weight, input_tangent, weight_tangent, None, *ctx.config)
        if bias_tangent is not None:
            shape = (input.shape[0], weight.shape[0], *input.shape[2:])
            tangent = common.add_up(tangent, bias_tangent[:, None, None].expand(shape))
        return tangent


class _MaskedConv2dInput(Function):
    @staticmethod
    def forward(ctx, grad_output, weight, channels_last, *config):
        ctx.save_for_backward(grad_output, weight)
        ctx.save_for_forward(grad_output, weight)
        ctx.channels_last, ctx.config = channels_last, config
        return _masked_conv2d_input.below_autograd(grad_output, weight, channels_last, *config)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        wants, grads = ctx.needs_input_grad, [None] * 2
        if wants[0]:
            grads[0] = _masked_conv2d(grad, weight, None, *ctx.config)
        if wants[1]:
            grads[1] = _masked_conv2d_weight(grad_output, grad, *weight.shape[2:], *ctx.config)
        return *grads, None, *[None] * len(ctx.config)

    @staticmethod
    def jvp(ctx, grad_tangent, weight_tangent, *_):
        tangents, rest = (grad_tangent, weight_tangent), (ctx.channels_last, *ctx.config)
        return common.bilinear_jvp(_masked_conv2d_input, *ctx.saved_tensors, *tangents, *rest)


class _MaskedConv2dWeight(Function):
    @staticmethod
    def forward(ctx, grad_output, input, kernel_height, kernel_width, *config):
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)
        ctx.kernel, ctx.config = (kernel_height, kernel_width), config
        return _masked_conv2d_weight.below_autograd(grad_output, input, kernel_height, kernel_width, *config)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        wants, grads = ctx.needs_input_grad, [None] * 2
        if wants[0]:
            grads[0] = _masked_conv2d(input, grad, None, *ctx.config)
        if wants[1]:
            grads[1] = _masked_conv2d_input(grad_output, grad, common.prefers_channels_last(input), *ctx.config)
        return *grads, None, None, *[None] * len(ctx.config)

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, *_):
        tangents = grad_tangent, input_tangent
        return common.bilinear_jvp(_masked_conv2d_weight, *ctx.saved_tensors, *tangents, *ctx.kernel, *ctx.config)


_masked_conv2d.differentiate(_MaskedConv2d)
_masked_conv2d_input.differentiate(_MaskedConv2dInput)
_masked_conv2d_weight.differentiate(_MaskedConv2dWeight)


@specified_by(masked_conv2d_reference)
def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str,
    colors: int = 1,
    gates: int = 1,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolution, as large as its input, whose kernel sees only pixels that come before in the order of generation.

    The taps of a 5 x 5 kernel that count (``o`` is the centre where it does, ``+`` where only the order of colors may
    let it)::

        A            B            vertical_a   vertical_b   horizontal_a   horizontal_b
        x x x x x    x x x x x    x x x x x    x x x x x    . . . . .      . . . . .
        x x x x x    x x x x x    x x x x x    x x x x x    . . . . .      . . . . .
        x x + . .    x x o . .    . . . . .    x x x x x    x x + . .      x x o . .
        . . . . .    . . . . .    . . . . .    . . . . .    . . . . .      . . . . .
        . . . . .    . . . . .    . . . . .    . . . . .    . . . . .      . . . . .

    The first layer of a model takes the mask that excludes the pixel itself (A, horizontal_a) or its row (vertical_a),
    each layer after it the other one; ``"vertical"`` and ``"horizontal"`` are short for vertical_b and horizontal_b.
    A and B leave a blind spot, right above the pixel, when stacked; a vertical and a horizontal stack do not.

    With ``colors`` > 1, channels are in as many equal blocks, one a color (red, green, blue). At the centre tap an
    output of color g sees inputs of colors < g (A, horizontal_a) or <= g (B, horizontal_b). With ``gates`` > 1 the
    output is in as many equal parts, each with its own blocks of colors: 2 for the halves that a gated unit splits it
    into. The order counts all channels, through all groups.

    The mask is part of the structure: masked taps are neither read nor multiplied, masked weights may hold anything,
    even NaN, and have exactly zero gradient. Differentiable any number of times in all tensors; deterministic, the same
    bits for any number of threads. Each output is the bias plus its terms tap after tap (row-major) and, within a tap,
    channel after channel, wherever it lies.

    Args:
        input: Tensor[N, IC, H, W] of any strides; float32, float64, float16 or bfloat16. Sums are at least float32.
        weight: Tensor[OC, IC / groups, KH, KW], KH and KW odd, in the dtype of ``input``.
        bias: Tensor[OC] or None.
        mask: ``"A"``, ``"B"``, ``"vertical_a"``, ``"vertical_b"``, ``"horizontal_a"`` or ``"horizontal_b"``.
        colors: blocks of channels that are generated one after the other. 1 for a vertical mask.
        gates: parts of the output that each have all colors.
        groups: as in ``torch.nn.functional.conv2d``.
        dilation: distance of the taps, one int or (rows, columns).

    Returns:
        Tensor[N, OC, H, W] in the dtype and memory format (contiguous or channels_last) of ``input``.

    Raises:
        TypeError: a tensor is not of a floating dtype, dtypes differ, or a tensor is not dense.
        ValueError: a shape or device does not fit, an even kernel, an unknown mask, or channels that ``groups``,
            ``colors`` or ``gates`` do not divide.
    """
    for name, tensor in (("input", input), ("weight", weight)):
        common.check_tensor("masked_conv2d", name, tensor)
    if bias is not None:
        common.check_tensor("masked_conv2d", "bias", bias)
    dilation_y, dilation_x = common.pair("masked_conv2d", dilation, "dilation")
    return _masked_conv2d(input, weight, bias, ALIASES.get(mask, mask), colors, gates, groups, dilation_y, dilation_x)


class MaskedConv2d(nn.Conv2d):
    """See :func:`masked_conv2d`. It is an ``nn.Conv2d`` of stride 1 and same padding: state dicts load both ways, and
    what they hold where the mask is does not matter."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        mask: str,
        colors: int = 1,
        gates: int = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        kernel = common.pair("MaskedConv2d", kernel_size, "kernel_size")
        dilation = common.pair("MaskedConv2d", dilation, "dilation")
        mask = ALIASES.get(mask, mask)
        _check_config("MaskedConv2d", out_channels, in_channels, kernel, mask, colors, gates, groups, *dilation)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            padding="same",
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.mask, self.colors, self.gates = mask, colors, gates

    def forward(self, input: Tensor) -> Tensor:
        return masked_conv2d(
            input,
            self.weight,
            self.bias,
            mask=self.mask,
            colors=self.colors,
            gates=self.gates,
            groups=self.groups,
            dilation=self.dilation,
        )

    def extra_repr(self) -> str:
        order = f", colors={self.colors}, gates={self.gates}" if self.colors > 1 else ""
        return f"{super().extra_repr()}, mask={self.mask!r}{order}"
