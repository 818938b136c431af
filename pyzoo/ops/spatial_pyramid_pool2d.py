"""Spatial pyramid pooling. He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
2014, section 2.2 (https://arxiv.org/abs/1406.4729)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator

Levels = Sequence[int | tuple[int, int]]

_fwd = Kernel("spatial_pyramid_pool2d", "spatial_pyramid_pool2d_fwd")
_bwd = Kernel("spatial_pyramid_pool2d", "spatial_pyramid_pool2d_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def spatial_pyramid_pool2d_reference(input: Tensor, levels: Levels = (1, 2, 4), mode: str = "max") -> Tensor:
    """:func:`spatial_pyramid_pool2d` in plain PyTorch: the specification of the kernels."""
    if input.dim() == 3:
        return spatial_pyramid_pool2d_reference(input[None], levels, mode)[0]
    if input.shape[1] == 0:
        return input.flatten(1)
    # paper: on a map of a x a pixels, windows of ceil(a / n) at strides of floor(a / n), which may leave out pixels.
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return torch.cat([pool(input, level).flatten(1) for level in levels], 1)


# ------------------------------------------------------------------------------------------------------------- checks


def _flat_levels(levels: Levels) -> list[int]:
    """[height, width, height, width, ...] of the grids."""
    if not isinstance(levels, (tuple, list)):
        raise TypeError(f"spatial_pyramid_pool2d: levels must be a tuple or a list, got {type(levels).__name__}")
    flat = []
    for level in levels:
        if type(level) is int:
            flat += level, level
            continue
        pair = level if isinstance(level, (tuple, list)) else (level, level)
        try:
            height, width = map(operator.index, pair)
        except (TypeError, ValueError):
            raise TypeError(
                f"spatial_pyramid_pool2d: levels must be ints or (height, width) pairs of ints, got {level!r}"
            ) from None
        flat += height, width
    return flat


def _count_bins(levels: Sequence[int]) -> int:
    """Of a channel, in all levels together."""
    return _count_bins_of(tuple(levels))


@functools.lru_cache
def _count_bins_of(levels: tuple[int, ...]) -> int:
    if not levels or len(levels) % 2:
        raise ValueError("spatial_pyramid_pool2d: levels must name at least one grid")
    for height, width in zip(levels[::2], levels[1::2], strict=True):
        if height < 1 or width < 1:
            raise ValueError(f"spatial_pyramid_pool2d: levels must be at least 1 x 1, got {height} x {width}")
    return sum(map(operator.mul, levels[::2], levels[1::2]))


def _new_output(input: Tensor, levels: Sequence[int]) -> Tensor:
    if input.dim() != 4:
        raise ValueError(f"spatial_pyramid_pool2d: input must have shape [N, C, H, W], got {list(input.shape)}")
    common.check_floating("spatial_pyramid_pool2d", "input", input)
    images, channels, height, width = input.shape
    if height < 1 or width < 1:
        raise ValueError(f"spatial_pyramid_pool2d: input must have pixels, got shape {list(input.shape)}")
    return input.new_empty((images, channels * _count_bins(levels)))


# --------------------------------------------------------------------------------------------- spatial_pyramid_pool2d


def _fake(input, levels, average):
    return _new_output(input, levels)


def _impl(input, levels, average):
    output = _new_output(input, levels)
    _fwd(input.device, input, levels, output, None, average)
    return output


def _vmap(info, in_dims, input, levels, average):
    output = _pool.op(input.movedim(in_dims[0], 0).flatten(0, 1), levels, average)
    return output.unflatten(0, (info.batch_size, -1)), 0


_pool = Operator(
    "spatial_pyramid_pool2d(Tensor input, int[] levels, bool average) -> Tensor", impl=_impl, fake=_fake, vmap=_vmap
)


def _argmax_fake(input, levels):
    output = _new_output(input, levels)
    return output, torch.empty_like(output, dtype=torch.int32)


def _argmax_impl(input, levels):
    output, argmax = _argmax_fake(input, levels)
    _fwd(input.device, input, levels, output, argmax, False)
    return output, argmax


def _argmax_vmap(info, in_dims, input, levels):
    both = _pool_argmax.op(input.movedim(in_dims[0], 0).flatten(0, 1), levels)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in both), (0, 0)


# The maxima and their pixels y * W + x, as few as the features: with them the backward pass need not read the map.
_pool_argmax = Operator(
    "_spatial_pyramid_pool2d_argmax(Tensor input, int[] levels) -> (Tensor, Tensor)",
    impl=_argmax_impl,
    fake=_argmax_fake,
    vmap=_argmax_vmap,
)


def _backward_fake(grad_output, argmax, levels, channels, height, width, channels_last):
    expected = (grad_output.shape[0], channels * _count_bins(levels))
    for name, x in ("grad_output", grad_output), ("argmax", argmax):
        if x is not None and x.shape != expected:
            raise ValueError(
                f"_spatial_pyramid_pool2d_backward: {name} must have shape {list(expected)}, got {list(x.shape)}"
            )
    return common.empty((grad_output.shape[0], channels, height, width), grad_output, channels_last)


def _backward_impl(grad_output, argmax, levels, *size):
    grad_input = _backward_fake(grad_output, argmax, levels, *size)
    argmax = None if argmax is None else argmax.contiguous()
    _bwd(grad_output.device, grad_output.contiguous(), argmax, levels, grad_input)
    return grad_input


def _backward_vmap(info, in_dims, grad_output, argmax, *rest):
    def fold(x, dim):
        if x is None:
            return None
        return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    grad_input = _pool_backward.op(fold(grad_output, in_dims[0]), fold(argmax, in_dims[1]), *rest)
    return grad_input.unflatten(0, (info.batch_size, -1)), 0


_pool_backward = Operator(
    "_spatial_pyramid_pool2d_backward(Tensor grad_output, Tensor? argmax, int[] levels, SymInt channels, SymInt height,"
    " SymInt width, bool channels_last) -> Tensor",
    impl=_backward_impl,
    fake=_backward_fake,
    vmap=_backward_vmap,
    constant=["argmax"],
)


def _values_at_maxima(x: Tensor, argmax: Tensor, levels: Sequence[int]) -> Tensor:
    """The derivative of the maxima along ``x`` [N, C, H, W]: the values of ``x`` where they are."""
    channels, pixels = x.shape[1], x.flatten(2)
    bins = [height * width for height, width in zip(levels[::2], levels[1::2], strict=True)]
    parts = zip(bins, argmax.split([channels * n for n in bins], 1), strict=True)
    return torch.cat([pixels.gather(2, at.unflatten(1, (channels, n)).long()).flatten(1) for n, at in parts], 1)


def _size(input: Tensor) -> tuple:
    return *input.shape[1:], common.prefers_channels_last(input)


class _Average(Function):
    @staticmethod
    def forward(ctx, input, levels):
        ctx.levels, ctx.size = levels, _size(input)
        return _pool.below_autograd(input, levels, True)

    @staticmethod
    def backward(ctx, grad_output):
        return _pool_backward(grad_output, None, ctx.levels, *ctx.size), None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return None if input_tangent is None else _pool(input_tangent, ctx.levels, True)


class _Max(Function):
    @staticmethod
    def forward(ctx, input, levels):
        output, argmax = _pool_argmax.below_autograd(input, levels)
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.levels, ctx.size = levels, _size(input)
        return output, argmax

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None
        return _pool_backward(grad_output, *ctx.saved_tensors, ctx.levels, *ctx.size), None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return None if input_tangent is None else _values_at_maxima(input_tangent, *ctx.saved_tensors, ctx.levels), None


class _Pool:
    @staticmethod
    def apply(input, levels, average):
        return _Average.apply(input, levels) if average else _pool_argmax(input, levels)[0]


class _PoolBackward(Function):
    @staticmethod
    def forward(ctx, grad_output, argmax, levels, *size):
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)
        ctx.levels, ctx.size = levels, size
        return _pool_backward.below_autograd(grad_output, argmax, levels, *size)

    @staticmethod
    def backward(ctx, grad_grad_input):
        (argmax,) = ctx.saved_tensors
        if argmax is None:
            grad = _pool(grad_grad_input, ctx.levels, True)
        else:
            grad = _values_at_maxima(grad_grad_input, argmax, ctx.levels)
        return grad, *[None] * (2 + len(ctx.size))

    @staticmethod
    def jvp(ctx, grad_tangent, *_):
        return None if grad_tangent is None else _pool_backward(grad_tangent, *ctx.saved_tensors, ctx.levels, *ctx.size)


_pool.differentiate(_Pool)
_pool_argmax.differentiate(_Max)
_pool_backward.differentiate(_PoolBackward)


@specified_by(spatial_pyramid_pool2d_reference)
def spatial_pyramid_pool2d(input: Tensor, levels: Levels = (1, 2, 4), mode: str = "max") -> Tensor:
    """Pools a map of any size to a vector of fixed length: the bins of several grids (SPP-net, section 2.2).

    The concatenation of ``adaptive_max_pool2d(input, level).flatten(1)``, or ``adaptive_avg_pool2d``, over the levels,
    in one pass over the map. Bin i of n along an axis of size s covers floor(i * s / n) up to ceil((i + 1) * s / n), so
    a grid may be finer than the map. The first of equal maxima in row-major order gets the gradient; NaN wins over
    everything. Differentiable any number of times; deterministic; the same bits for any number of threads.

    Args:
        input: Tensor[N, C, H, W] or Tensor[C, H, W] of any strides; float32, float64, float16 or bfloat16.
        levels: the grids, each as n (n x n bins) or (height, width). Their order is that of the features.
        mode: "max" or "avg".

    Returns:
        Tensor[N, C * bins], or Tensor[C * bins], contiguous, in the dtype of ``input``: level after level, within a
        level channel after channel, within a channel the bins row by row.

    Raises:
        TypeError: ``input`` is not of a floating dtype or not dense, or ``levels`` are not integers.
        ValueError: ``input`` has no pixels or another number of dimensions, ``levels`` are empty or not positive, or
            ``mode`` is unknown.
    """
    common.check_tensor("spatial_pyramid_pool2d", "input", input)
    if mode not in ("max", "avg"):
        raise ValueError(f'spatial_pyramid_pool2d: mode must be "max" or "avg", got {mode!r}')
    levels = _flat_levels(levels)
    if input.dim() == 3:
        return _pool(input.unsqueeze(0), levels, mode == "avg").squeeze(0)
    return _pool(input, levels, mode == "avg")


class SpatialPyramidPool2d(nn.Module):
    """See :func:`spatial_pyramid_pool2d`. In place of the last pooling of a network, it lets the fully connected layers
    take images of any size."""

    def __init__(self, levels: Levels = (1, 2, 4), mode: str = "max"):
        super().__init__()
        self.levels = levels
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return spatial_pyramid_pool2d(input, self.levels, self.mode)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode!r}"
