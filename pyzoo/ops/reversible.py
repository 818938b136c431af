"""The additive coupling of reversible blocks, and its inverse. Gomez et al., "The Reversible Residual Network", 2017,
section 3 (https://arxiv.org/abs/1707.04585).

These are no operators of the dispatcher: :mod:`pyzoo.nn._reversible_function` calls them where no graph is recorded,
and they write in place wherever nobody else holds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyzoo import _backend
from pyzoo._backend import Kernel
from pyzoo.ops import _common as common

_fwd = Kernel("reversible", "reversible_fwd")
_inv = Kernel("reversible", "reversible_inv")
_bwd = Kernel("reversible", "reversible_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def reversible_reference(functions: Iterable[Callable[[Tensor], Tensor]], x: Tensor, dim: int = 1) -> Tensor:
    """f, g, f, g ... of a stack of blocks, with ordinary autograd, which stores every activation.

    A block is y1 = x1 + f(x2), y2 = x2 + g(y1): each function adds to one half what it makes of the other, and the
    halves change places.
    """
    a, b = x.chunk(2, dim)
    for function in functions:
        a, b = b, a + function(b)
    return torch.cat([a, b], dim)


# ------------------------------------------------------------------------------------------------------------ kernels

_MAX_DIMS = 6  # of the core
_storage_use_count = torch._C._storage_Use_Count


def _use_count(x: Tensor) -> int:
    """How many tensors look at the memory of ``x``, plus one for asking."""
    return _storage_use_count(x.untyped_storage()._cdata)


_ALONE = _use_count(torch.empty(1))


def _target(x: Tensor) -> Tensor:
    """Where the successor of ``x`` goes: over ``x``, unless someone else (a hook, a view, autograd) still sees it."""
    return x if type(x) is Tensor and _use_count(x) == _ALONE else torch.empty_like(x)


_SMALL = 1 << 16  # elements on the CPU: up to here the call is what counts, and that of a kernel of torch is shorter


def _has_kernel(*tensors: Tensor) -> bool:
    x = tensors[0]
    if x.is_cpu and x.numel() <= _SMALL and _backend.forced is None:
        return False
    if _backend.forced == "reference" or torch._C._len_torch_dispatch_stack() or x.dim() > _MAX_DIMS:
        return False
    for t in tensors:
        if type(t) is not Tensor or common._dispatch_keys(t).raw_repr() & common._NOT_PLAIN:
            return False
    return x.device.type == "cpu" or _backend.forced is not None or _fwd.exists(x.device)


def couple(x: Tensor, update: Tensor, out: Tensor | None = None) -> Tensor:
    """x + update, written to ``out`` or over ``x``."""
    out = _target(x) if out is None else out
    update = _fit(update, x)
    if _has_kernel(x, update):
        _fwd(x.device, x, update, out)
        return out
    return torch.add(x, update, out=out)


def uncouple(y: Tensor, update: Tensor) -> Tensor:
    """y - update, written over ``y``."""
    out = _target(y)
    update = _fit(update, y)
    if _has_kernel(y, update):
        _inv(y.device, y, update, out)
        return out
    return torch.sub(y, update, out=out)


def uncouple_with_grad(y: Tensor, update: Tensor, grad_y: Tensor, grad_update: Tensor) -> tuple[Tensor, Tensor]:
    """(y - update, grad_y + grad_update) in one go, written over ``y`` and ``grad_y``."""
    x, grad_x = _target(y), _target(grad_y)
    update, grad_update = _fit(update, y), _fit(grad_update, grad_y)
    if _has_kernel(y, update, grad_y, grad_update):
        _bwd(y.device, y, update, x, grad_y, grad_update, grad_x)
        return x, grad_x
    return torch.sub(y, update, out=x), torch.add(grad_y, grad_update, out=grad_x)


def _fit(update: Tensor, half: Tensor) -> Tensor:
    """The kernels take 16-bit updates of a float32 half as they are."""
    return update.to(half.dtype) if half.dtype == torch.float64 else update
