"""Batch norm of a batch in training, an addition and a ReLU in as few passes over the map as there can be.

Ioffe and Szegedy, "Batch Normalization", 2015 (https://arxiv.org/abs/1502.03167).
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator

OP = "batch_norm_act"

_fwd = Kernel(OP, "batch_norm_act_fwd")
_bwd = Kernel(OP, "batch_norm_act_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def batch_norm_act_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """:func:`batch_norm_act` in plain PyTorch: the specification of the kernels. Differentiable in all tensors."""
    centered, rstd = _centered(input, eps)
    output = centered * rstd * weight[:, None, None] + bias[:, None, None]
    if residual is not None:
        output = output + residual
    with torch.no_grad():
        mean, var = input.mean((0, 2, 3)), centered.square().mean((0, 2, 3))
        _update(input, mean, var, running_mean, running_var, momentum)
    return common.ACTIVATE[activation](output).to(input.dtype)


def _centered(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Input minus the mean of its channel, and one by the deviation."""
    centered = input - input.mean((0, 2, 3), keepdim=True)
    return centered, (centered.square().mean((0, 2, 3), keepdim=True) + eps).rsqrt()


def _update(input, mean, var, running_mean, running_var, momentum: float) -> None:
    """Moves the running statistics towards those of the batch, the variance as an estimate for more than it."""
    count = input.shape[0] * input.shape[2] * input.shape[3]
    if count == 0:
        return
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


# ---------------------------------------------------------------------------------------------------------- the kernel


def _check(op: str, input, weight, bias, residual) -> None:
    if input.dim() != 4:
        raise ValueError(f"{op}: input must have shape [N, C, H, W], got {list(input.shape)}")
    common.check_floating(op, "input", input)
    for name, t in (("weight", weight), ("bias", bias)):
        if t.dim() != 1 or t.shape[0] != input.shape[1]:
            raise ValueError(f"{op}: {name} must have shape [{input.shape[1]}], got {list(t.shape)}")
        common.check_floating(op, name, t)
        common.check_same_device(op, "input", input, name, t)
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(f"{op}: residual must have shape {list(input.shape)}, got {list(residual.shape)}")
        if residual.dtype != input.dtype:
            raise TypeError(f"{op}: residual must have the dtype of input, {input.dtype}, got {residual.dtype}")
        common.check_same_device(op, "input", input, "residual", residual)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(x: Tensor | None, channels_last: bool) -> Tensor | None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return None if x is None else x.contiguous(memory_format=memory_format)


def _like(x: Tensor) -> Tensor:
    return common.empty(x.shape, x, common.prefers_channels_last(x))


def _fake(input, weight, bias, residual, eps, activation):
    _check(OP, input, weight, bias, residual)
    if input.shape[0] * input.shape[2] * input.shape[3] == 1:
        raise ValueError(f"{OP}: input must have more than one value per channel, got shape {list(input.shape)}")
    mean = input.new_empty(input.shape[1], dtype=_wide(input.dtype))
    return _like(input), mean, torch.empty_like(mean)


def _impl(input, weight, bias, residual, eps, activation):
    output, mean, var = _fake(input, weight, bias, residual, eps, activation)
    last = common.prefers_channels_last(input)
    weight, bias = (t.to(mean.dtype).contiguous() for t in (weight, bias))
    residual = _dense(residual, last)
    _fwd(input.device, _dense(input, last), weight, bias, residual, output, mean, var, eps, activation)
    return output, mean, var


def _vmap(info, in_dims, input, weight, bias, residual, eps, activation):
    size, (x, w, b, r) = info.batch_size, in_dims[:4]
    outputs = _batch_norm_act.op(
        common._fold_channels(input, x, size),
        common._fold_batch(weight, w, size),
        common._fold_batch(bias, b, size),
        None if residual is None else common._fold_channels(residual, r, size),
        eps,
        activation,
    )
    dims = (1, 0, 0)
    return tuple(common._unfold(t, d, size)[0] for t, d in zip(outputs, dims, strict=True)), dims


_batch_norm_act = Operator(
    "batch_norm_act(Tensor input, Tensor weight, Tensor bias, Tensor? residual, float eps, int activation)"
    " -> (Tensor, Tensor, Tensor)",
    impl=_impl,
    fake=_fake,
    vmap=_vmap,
)


# The gradients of input, weight, bias, and, if `output` tells where the activation was closed, residual.


def _backward_fake(grad_output, input, weight, bias, output, mean, var, eps, activation):
    _check("_batch_norm_act_backward", input, weight, bias, output)
    residual = [] if output is None else [_like(input)]
    return [_like(input), torch.empty_like(weight), torch.empty_like(bias), *residual]


def _backward_impl(grad_output, input, weight, bias, output, mean, var, eps, activation, over: Tensor | None = None):
    """``over``: the memory for the input's gradient."""
    _check("_batch_norm_act_backward", input, weight, bias, output)
    last = common.prefers_channels_last(input)
    grad_input = _like(input) if over is None else over
    grad_residual = None if output is None else _like(input)
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    maps = _dense(grad_output, last), _dense(input, last)
    scale = weight.to(mean.dtype).contiguous(), bias.to(mean.dtype).contiguous()
    grads = grad_input, grad_weight, grad_bias, grad_residual
    _bwd(input.device, *maps, *scale, _dense(output, last), mean, var, *grads, eps, activation)
    return [grad_input, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *grads[3:][: output is not None]]


def _backward_vmap(info, in_dims, grad_output, input, weight, bias, output, mean, var, *rest):
    size, (g, x, w, b, y, m, v) = info.batch_size, in_dims[:7]
    grads = _batch_norm_act_backward.op(
        common._fold_channels(grad_output, g, size),
        common._fold_channels(input, x, size),
        common._fold_batch(weight, w, size),
        common._fold_batch(bias, b, size),
        None if output is None else common._fold_channels(output, y, size),
        common._fold_batch(mean, m, size),
        common._fold_batch(var, v, size),
        *rest,
    )
    dims = [1, 0, 0, 1][: len(grads)]
    return [common._unfold(t, d, size)[0] for t, d in zip(grads, dims, strict=True)], dims


_batch_norm_act_backward = Operator(
    "_batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor bias, Tensor? output,"
    " Tensor mean, Tensor var, float eps, int activation) -> Tensor[]",
    impl=_backward_impl,
    fake=_backward_fake,
    vmap=_backward_vmap,
)


# -------------------------------------------------------------------------------------------------------- derivatives
# The first one is a kernel; in plain PyTorch where it is to be differentiated itself, and forwards.


class _BatchNormAct(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, eps, activation):
        output, mean, var = _batch_norm_act.below_autograd(input, weight, bias, residual, eps, activation)
        ctx.mark_non_differentiable(mean, var)
        ctx.eps, ctx.activation, ctx.adds = eps, activation, residual is not None
        # Without a residual, where the activation was open is computed again.
        saved = input, weight, bias, output if activation and ctx.adds else None, mean, var
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        return output, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        input, weight, bias, output, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = _where_open(grad, input, weight, bias, output, ctx)
            centered, rstd = _centered(_widen(input), ctx.eps)
            normed, wide = centered * rstd, _widen(grad)
            scale = (weight[:, None, None] * rstd).to(wide.dtype)
            away = wide - wide.mean((0, 2, 3), keepdim=True) - normed * (wide * normed).mean((0, 2, 3), keepdim=True)
            grads = [(scale * away).to(input.dtype), (wide * normed).sum((0, 2, 3)), wide.sum((0, 2, 3))]
            grads[1:] = (g.to(t.dtype) for g, t in zip(grads[1:], (weight, bias), strict=True))
            return *grads, grad if ctx.adds else None, None, None
        arguments = input, weight, bias, output, mean, var, ctx.eps, ctx.activation
        if (output is not None or not ctx.adds) and _can_overwrite(grad, input) and _counts(grad) == _ALONE:
            grads = _backward_impl(grad, *arguments, over=grad)
        else:
            grads = _batch_norm_act_backward(grad, *arguments)
        return *grads[:3], (grads[3] if output is not None else grad) if ctx.adds else None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, residual_tangent, *_):
        input, weight, bias, output, *_ = ctx.saved_tensors
        centered, rstd = _centered(_widen(input), ctx.eps)
        normed, tangent = centered * rstd, None
        if input_tangent is not None:
            wide = _widen(input_tangent)
            away = wide - wide.mean((0, 2, 3), keepdim=True) - normed * (wide * normed).mean((0, 2, 3), keepdim=True)
            tangent = weight[:, None, None] * rstd * away
        tangent = common.add_up(
            tangent,
            None if weight_tangent is None else weight_tangent[:, None, None] * normed,
            None if bias_tangent is None else bias_tangent[:, None, None].expand_as(input),
            residual_tangent,
        )
        return _where_open(tangent.to(input.dtype), input, weight, bias, output, ctx), None, None


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _where_open(x: Tensor, input, weight, bias, output, ctx) -> Tensor:
    """``x`` where the activation lets a change through, else 0."""
    if ctx.activation and output is None:
        output = _batch_norm_act(input, weight, bias, None, ctx.eps, ctx.activation)[0]
    return common.where_active(x, output, ctx.activation)


_batch_norm_act.differentiate(_BatchNormAct)

# The gradient of the input is written over that of the output, unless somebody else holds that: half of the memory, and
# all of it in the cache.


def _can_overwrite(grad: Tensor, input: Tensor) -> bool:
    fits = type(grad) is Tensor and grad.device.type == "cpu" and grad.dtype == input.dtype
    return fits and grad.stride() == input.stride() and common._is_plain((grad, input)) and input.numel() > 0


def _counts(x: Tensor) -> tuple[int, ...]:
    """Who holds ``x``: from Python, from C++, and its memory."""
    return sys.getrefcount(x), x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _count_alone() -> tuple[int, ...]:
    """What these are for a gradient that autograd has made for one backward function alone."""
    counts = []

    class Count(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad, *_):
            counts.append(_counts(grad))
            return grad

    with torch.inference_mode(False), torch.enable_grad():
        (Count.apply(torch.zeros(2, requires_grad=True, device="cpu")) * 2).sum().backward()
    return counts[0]


_ALONE = _count_alone()


# ----------------------------------------------------------------------------------------------------- public function


@specified_by(batch_norm_act_reference)
def batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """``activation(F.batch_norm(input, ..., training=True) + residual)``: each channel of the batch gets mean ``bias``
    and deviation ``weight``.

    Differentiable in all four tensors any number of times; deterministic; the same bits for any number of threads; sums
    are kept in float32 or better. On a GPU these are PyTorch's own operators.

    Args:
        input: Tensor[N, C, H, W] of any strides; float32, float64, float16 or bfloat16.
        weight: Tensor[C] of any of these dtypes, as the next ones.
        bias: Tensor[C].
        residual: Tensor[N, C, H, W] of the dtype of ``input``, or None.
        running_mean: Tensor[C] that moves towards the mean of the batch, or None.
        running_var: Tensor[C] that moves towards the variance, or None.
        momentum: how far they move, 1 all the way.
        eps: added to the variance.
        activation: None, "relu" or "relu6".

    Returns:
        Tensor[N, C, H, W] in the dtype and memory format (contiguous or channels_last) of ``input``.

    Raises:
        TypeError: a tensor is not of a floating dtype; ``residual`` has another one than ``input``.
        ValueError: a shape or device does not fit; a channel has a single value.
    """
    for name, t in (("input", input), ("weight", weight), ("bias", bias)):
        common.check_tensor(OP, name, t)
    if residual is not None:
        common.check_tensor(OP, "residual", residual)
    kind = common.activation_index(OP, activation)
    if input.device.type not in ("cpu", "meta"):
        _check(OP, input, weight, bias, residual)
        output = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        return common.ACTIVATE[activation](output if residual is None else output + residual)
    output, mean, var = _batch_norm_act(input, weight, bias, residual, eps, kind)
    if running_mean is not None or running_var is not None:
        _update(input, mean, var, running_mean, running_var, momentum)
    return output
