"""Batch norm of a batch in training, an addition and a ReLU in as few passes over the map as there can be.

Ioffe and Szegedy, "Batch Normalization", 2015 (https://arxiv.org/abs/1502.03167).
"""

from __future__ import annotations

import functools
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
    statistics = None, None, 0.0  # an operator that is compiled moves nothing
    _fwd(input.device, _dense(input, last), weight, bias, residual, output, mean, var, *statistics, eps, activation)
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


# The gradients of input, weight, bias, and, if `output` tells where the activation was closed, of residual. Mean and
# var are those of input.


def _grad_fake(grad_output, input, weight, bias, output, mean, var, eps, activation):
    op = "_batch_norm_act_grad"
    _check(op, input, weight, bias, output)
    if grad_output.shape != input.shape:
        raise ValueError(f"{op}: grad_output must have shape {list(input.shape)}, got {list(grad_output.shape)}")
    if grad_output.dtype != input.dtype:
        raise TypeError(f"{op}: grad_output must have the dtype of input, {input.dtype}, got {grad_output.dtype}")
    grad_residual = input.new_empty(0) if output is None else _like(input)
    return _like(input), torch.empty_like(weight), torch.empty_like(bias), grad_residual


def _grad_impl(grad_output, input, weight, bias, output, mean, var, eps, activation):
    grads = _grad_fake(grad_output, input, weight, bias, output, mean, var, eps, activation)
    return _grad_into(*grads, grad_output, input, weight, bias, output, mean, var, eps, activation)


def _grad_into(grad_input, grad_weight, grad_bias, grad_residual, grad_output, input, weight, bias, output, *rest):
    """``grad_input`` may be ``grad_output``."""
    last, wide = common.prefers_channels_last(input), _wide(input.dtype)
    maps = _dense(grad_output, last), _dense(input, last)
    channels = [t.to(wide).contiguous() for t in (weight, bias)]
    into = [t.to(wide) for t in (grad_weight, grad_bias)]
    residual = None if output is None else grad_residual
    mean, var, eps, activation = rest
    output = _dense(output, last)
    _bwd(input.device, *maps, *channels, output, mean, var, grad_input, *into, residual, eps, activation)
    return grad_input, into[0].to(weight.dtype), into[1].to(bias.dtype), grad_residual


def _grad_vmap(info, in_dims, grad_output, input, weight, bias, output, mean, var, *rest):
    size, (g, x, w, b, y, m, v) = info.batch_size, in_dims[:7]
    grads = _batch_norm_act_grad.op(
        common._fold_channels(grad_output, g, size),
        common._fold_channels(input, x, size),
        common._fold_batch(weight, w, size),
        common._fold_batch(bias, b, size),
        None if output is None else common._fold_channels(output, y, size),
        common._fold_batch(mean, m, size),
        common._fold_batch(var, v, size),
        *rest,
    )
    dims = [1, 0, 0, None if output is None else 1]
    grads = [t if d is None else common._unfold(t, d, size)[0] for t, d in zip(grads, dims, strict=True)]
    return tuple(grads), tuple(dims)


_batch_norm_act_grad = Operator(
    "_batch_norm_act_grad(Tensor grad_output, Tensor input, Tensor weight, Tensor bias, Tensor? output, Tensor mean,"
    " Tensor var, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_grad_impl,
    fake=_grad_fake,
    vmap=_grad_vmap,
    constant=("bias", "output", "mean", "var"),
)


# -------------------------------------------------------------------------------------------------------- derivatives
# With n(x) = (x - mean) rstd, changes of x change n by rstd P, where P v = v - mean(v) - n mean(v n), which is its own
# transpose: that is the gradient, too. The derivatives of the gradients are in plain PyTorch, and go on from there.


class _Normed:
    """n(x) of a map, in float32 or better, and P."""

    def __init__(self, input: Tensor, eps: float):
        self.centered, self.rstd = _centered(_widen(input), eps)
        self.n = self.centered * self.rstd

    def project(self, v: Tensor) -> Tensor:
        return v - _mean(v) - self.n * _mean(v * self.n)


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3), keepdim=True)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _of_channels(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)[:, None, None]


def _where_open(x: Tensor, input, weight, bias, output, eps: float, activation: int) -> Tensor:
    """``x`` where the activation lets a change through, else 0."""
    if activation and output is None:
        output = _batch_norm_act(input.detach(), weight.detach(), bias.detach(), None, eps, activation)[0]
    return common.where_active(x, output, activation)


class _BatchNormAct(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, eps, activation):
        output, mean, var = _batch_norm_act.below_autograd(input, weight, bias, residual, eps, activation)
        ctx.mark_non_differentiable(mean, var)
        ctx.adds, ctx.rest = residual is not None, (eps, activation)
        # Without a residual, where the activation was open is computed again.
        saved = input, weight, bias, output if activation and ctx.adds else None, mean, var
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        return output, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        input, weight, bias, output, mean, var = ctx.saved_tensors
        arguments = input, weight, bias, output, mean, var, *ctx.rest
        keeps = ctx.adds and output is None  # the gradient, which is the residual's, too
        if (
            not keeps
            and not torch.is_grad_enabled()
            and _can_overwrite(grad, input)
            and _counts(grad) == _counts_alone()
        ):
            _, *grads = _grad_fake(grad, *arguments)
            grads = _grad_into(grad, *grads, grad, *arguments)
        else:
            grads = _batch_norm_act_grad(grad, *arguments)
        return *grads[:3], (grad if keeps else grads[3]) if ctx.adds else None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, residual_tangent, *_):
        input, weight, bias, output, *_ = ctx.saved_tensors
        normed = _Normed(input, ctx.rest[0])
        tangent = common.add_up(
            None
            if input_tangent is None
            else _of_channels(weight, normed.n) * normed.rstd * normed.project(_widen(input_tangent)),
            None if weight_tangent is None else _of_channels(weight_tangent, normed.n) * normed.n,
            None if bias_tangent is None else _of_channels(bias_tangent, normed.n).expand_as(input),
            residual_tangent,
        )
        return _where_open(tangent.to(input.dtype), input, weight, bias, output, *ctx.rest), None, None


class _BatchNormActGrad(Function):
    @staticmethod
    def forward(ctx, grad_output, input, weight, bias, output, mean, var, eps, activation):
        saved = grad_output, input, weight, bias, output
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.rest = eps, activation
        return _batch_norm_act_grad.below_autograd(grad_output, input, weight, bias, output, mean, var, eps, activation)

    @staticmethod
    def backward(ctx, of_input, of_weight, of_bias, of_residual):
        grad, input, weight, bias, output = ctx.saved_tensors
        where = input, weight, bias, output, *ctx.rest
        normed = _Normed(input, ctx.rest[0])
        n, rstd, scale = normed.n, normed.rstd, _of_channels(weight, normed.n)
        g, v = _widen(_where_open(grad, *where)), _widen(of_input)
        through = rstd * normed.project(v)
        along = _of_channels(of_weight, n)
        to_grad = scale * through + along * n + _of_channels(of_bias, n)
        if output is not None:
            to_grad = to_grad + _widen(of_residual)
        to_weight = _sum(g * through)
        # How the gradient of the input depends on it: through n, and through rstd, whose change is -rstd^2 mean(n dx).
        by_n = along * g - scale * rstd * (v * _mean(g * n) + g * _mean(v * n))
        by_rstd = scale * _mean(v * normed.project(g))
        to_input = rstd * normed.project(by_n) - by_rstd * rstd.square() * n
        to_grad = _where_open(to_grad.to(grad.dtype), *where)
        return to_grad, to_input.to(input.dtype), to_weight.to(weight.dtype), *[None] * 6

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, weight_tangent, *_):
        grad, input, weight, bias, output = ctx.saved_tensors
        where = input, weight, bias, output, *ctx.rest
        normed = _Normed(input, ctx.rest[0])
        n, rstd, scale = normed.n, normed.rstd, _of_channels(weight, normed.n)
        g = _widen(_where_open(grad, *where))
        zero = torch.zeros_like(g)
        to_input, to_weight, to_bias, dg = zero, _sum(zero), _sum(zero), zero
        if grad_tangent is not None:
            dg = _widen(_where_open(grad_tangent, *where))
            to_input, to_weight, to_bias = scale * rstd * normed.project(dg), _sum(dg * n), _sum(dg)
        if weight_tangent is not None:
            to_input = to_input + _of_channels(weight_tangent, n) * rstd * normed.project(g)
        if input_tangent is not None:
            dx = _widen(input_tangent)
            dn = rstd * normed.project(dx)
            to_input = to_input - scale * rstd.square() * _mean(n * dx) * normed.project(g)
            to_input = to_input - scale * rstd * (dn * _mean(g * n) + n * _mean(g * dn))
            to_weight = to_weight + _sum(g * dn)
        residual = input.new_zeros(0) if output is None else dg.to(grad.dtype)
        return to_input.to(input.dtype), to_weight.to(weight.dtype), to_bias.to(bias.dtype), residual


_batch_norm_act.differentiate(_BatchNormAct)
_batch_norm_act_grad.differentiate(_BatchNormActGrad)

# The gradient of the input is written over that of the output, unless somebody else holds that: half of the memory, and
# all of it in the cache.


def _can_overwrite(grad: Tensor, input: Tensor) -> bool:
    if not (type(grad) is Tensor and common._is_plain((grad, input)) and grad.device.type == "cpu"):
        return False
    order = torch.channels_last if common.prefers_channels_last(input) else torch.contiguous_format
    return grad.dtype == input.dtype and grad.is_contiguous(memory_format=order)


def _counts(x: Tensor) -> tuple[int, ...]:
    """Who holds ``x``: from Python, from C++, and its memory."""
    return sys.getrefcount(x), x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


@functools.cache
def _counts_alone() -> tuple[int, ...]:
    """What these are for a gradient that autograd has made for one backward function alone. Not found at import: a
    process whose autograd has run cannot fork into one that uses it."""
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
