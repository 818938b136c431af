"""Batch norm that runs twice on one batch: the second run takes the statistics that the first one found.

For large NCHW maps on the CPU, where torch finds them number by number, that is most of the work of a batch norm, and
there are two numbers to keep for each channel. Value and gradient, which goes through the statistics, too, are those of
an ordinary run but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from pyzoo.ops import _common as common

Statistics = tuple[Tensor, Tensor]  # of each channel the mean, and one by the deviation

_LARGE = 1 << 16  # elements: below, a function of Python in the graph takes longer than the statistics
_grad = torch.ops.aten.native_batch_norm_backward.default


def is_large(x: Tensor) -> bool:
    return x.numel() >= _LARGE and x.is_cpu and x.is_contiguous()


def can_record(module: nn.Module) -> bool:
    """Its forward is that of batch norm, which nobody has replaced."""
    return type(module).forward is _BatchNorm.forward and "forward" not in module.__dict__


# Both are functions, not objects with values of their own: for these, compilers would compile the function around them
# again in each call. Another thread that happens to run the module has a batch of its own.


def recording(norm: _BatchNorm, found: list[Statistics | None]) -> Callable[[Tensor], Tensor]:
    """What ``norm`` does in training; each call appends its statistics to ``found``, or None if they are of no use."""

    thread = get_ident()

    def forward(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or get_ident() != thread:
            return type(norm).forward(norm, x)
        if not _suits(norm, x):
            found.append(None)
            return type(norm).forward(norm, x)
        norm._check_input_dim(x)
        tracked, momentum = norm.num_batches_tracked, norm.momentum
        if tracked is not None:
            tracked.add_(1)
        if momentum is None:  # their mean
            momentum = 0.0 if tracked is None else 1 / float(tracked)
        running = norm.running_mean, norm.running_var
        # What F.batch_norm calls, and keeps the statistics to itself.
        output, *statistics = torch._batch_norm_impl_index(
            x, norm.weight, norm.bias, *running, True, momentum, norm.eps, False
        )[:3]
        found.append(tuple(statistics))
        return output

    return forward


def replaying(norm: _BatchNorm, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """``norm`` on the batch that has these statistics."""

    thread = get_ident()

    def forward(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or get_ident() != thread or forward_ad._current_level >= 0:
            return type(norm).forward(norm, x)
        return _Normalize.apply(x, norm.weight, norm.bias, *statistics)

    return forward


def _suits(norm: _BatchNorm, x: Tensor) -> bool:
    """``x`` is large, and nothing about it out of the ordinary; nobody has switched ``norm`` to evaluation by now."""
    return (
        is_large(x)
        and norm.training
        and norm.track_running_stats
        and x.dtype in (torch.float32, torch.float64)
        and common._is_plain((x, norm.weight, norm.bias))
        and x.dim() > 1
        and x.numel() > x.shape[1]
        and norm.eps > 0
    )


class _Normalize(common.Function):
    """Batch norm of ``x`` with the statistics that it has."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd)
        return torch.batch_norm(x, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0, False)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        # Knows how the statistics depend on x, and so do its own derivatives.
        grads = _grad(grad, x, weight, None, None, mean, rstd, True, 0.0, ctx.needs_input_grad[:3])
        return *grads, None, None
