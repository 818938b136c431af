"""What the ops share: registration with torch, argument checks, boxes, memory formats and the folding for vmap.

Each op is ``torch.ops.pyzoo.<name>``. Its ``impl`` is Python that allocates the outputs and calls a kernel, on whatever
device. Autograd, forward-mode AD, ``torch.func``, ``vmap`` and autocast are rules of the operator itself, so the bare
operator has them too.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

lib = torch.library.Library("pyzoo", "DEF")

# ------------------------------------------------------------------------------------------------------- registration

_dispatch_keys = torch._C._dispatch_keys
_functorch_active = torch._C._are_functorch_transforms_active
_included_keys = torch._C._dispatch_tls_local_include_set


def _key_set(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_DEVICES = ("CPU", "CUDA", "XPU")
_PLAIN_TENSORS = [_key_set(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}") for device in _DEVICES]
_PLAIN_STATE = _key_set("BackendSelect", "ADInplaceOrView")
_PLAIN_TYPES = (Tensor, nn.Parameter)
_NOT_PLAIN = ~functools.reduce(operator.or_, _PLAIN_TENSORS, _PLAIN_STATE)


def _is_plain(tensors: Sequence) -> bool:
    """Nothing but autograd and autocast stands between the caller of an operator on ``tensors`` and its kernel.

    The keys of a tensor tell a plain one from a sparse, negated, batched, functional or wrapped one; those of the
    thread tell of modes, transforms and tracing.
    """
    if _included_keys().raw_repr() != _PLAIN_STATE:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or _dispatch_keys(t).raw_repr() not in _PLAIN_TENSORS):
            return False
    return True


def _skips_dispatcher(tensors: Sequence) -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_function_stack()
        or not _is_plain(tensors)
    )


def is_final(tensors: Sequence) -> bool:
    """Whether a backward pass may call kernels on ``tensors``: what it computes is not differentiated again."""
    return not torch.is_grad_enabled() and forward_ad._current_level < 0 and _skips_dispatcher(tensors)


class Function(_SingleLevelFunction):
    """Base of the derivative rules: the part of ``torch.autograd.Function`` that acts on one level of ``torch.func``.

    That is the part which fits below the dispatcher, where the level has already been chosen. It is also four times
    faster to call than ``torch.autograd.Function`` with ``setup_context``, which binds the signature in Python at each
    call.
    """


class Operator:
    """``torch.ops.pyzoo.<name>``: schema, implementation, fake one, vmap rule and, if it has one, derivative.

    The schema names its tensors (``Tensor``, ``Tensor?``, or one ``Tensor[]``) first. Those called ``constant`` have no
    derivative. With ``autocast`` all are cast as those of ``F.conv2d`` are; without, autocast changes nothing: the
    kernel takes the dtypes as they come and accumulates in float32 or better.

    ``self.op`` is the operator. Calling the object does the same, but goes straight to the kernel where nobody could
    tell: the trip through the dispatcher is a quarter of a call on tiny input.
    """

    def __init__(
        self,
        schema: str,
        *,
        impl: Callable,
        fake: Callable,
        vmap: Callable,
        constant: Sequence[str] = (),
        autocast: bool = False,
    ):
        self.name, _, arguments = schema.partition("(")
        tensors = re.findall(r"Tensor\S* (\w+)", arguments.partition(" -> ")[0])
        self.count = len(tensors)
        self.constant = [tensors.index(name) for name in constant]
        self.differentiable = [i for i in range(self.count) if i not in self.constant]
        self.autocast = autocast
        self.impl = self.apply = impl
        lib.define(schema)
        for device in _DEVICES:
            lib.impl(self.name, impl, device)
        torch.library.register_fake(f"pyzoo::{self.name}", fake, lib=lib)
        torch.library.register_vmap(f"pyzoo::{self.name}", vmap, lib=lib)
        self.op = getattr(torch.ops.pyzoo, self.name).default
        if autocast:
            for device in _DEVICES:
                lib.impl(self.name, self._autocast_kernel(device), f"Autocast{device}")
        operators[self.name] = self

    def __call__(self, *args):
        if (
            not _skips_dispatcher(args[: self.count])
            or (self.autocast and torch.is_autocast_enabled(args[0].device.type))
            or self._must_detach(args)
        ):
            return self.op(*args)
        return (self.apply if self._wants_derivative(args) else self.impl)(*args)

    def _must_detach(self, args) -> bool:
        """A constant requires grad, which the core refuses: it would lose the gradient."""
        return torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in self.constant)

    def _wants_derivative(self, args) -> bool:
        if forward_ad._current_level >= 0:
            return True
        if not torch.is_grad_enabled():
            return False
        for i in self.differentiable:
            t = args[i]
            if t is not None and (any(x.requires_grad for x in t) if type(t) is list else t.requires_grad):
                return True
        return False

    def differentiate(self, function: type[Function]) -> None:
        """Registers the derivative.

        ``function.apply`` takes the arguments of the operator; a list comes last and spread out, as autograd needs it.
        """
        apply, below, impl = function.apply, self.below_autograd, self.impl
        self.apply = apply

        def kernel(keys, *args):
            spread = [*args[1:], *args[0]] if type(args[0]) is list else args
            if _functorch_active():
                with enable_single_level_autograd_function():
                    return apply(*spread)
            if self._wants_derivative(args):
                return apply(*spread)
            if not keys.raw_repr() & _NOT_PLAIN and not self._must_detach(args):
                return impl(*args)
            return below(*args)

        lib.impl(self.name, kernel, "Autograd", with_keyset=True)

    def below_autograd(self, *args):
        """The value alone, for the forward of ``Function``."""
        if self._must_detach(args):
            args = [x.detach() if i in self.constant and x is not None else x for i, x in enumerate(args)]
        tensors = args[: self.count]
        if _is_plain(tensors):
            return self.impl(*args)
        for t in (*tensors[0], *tensors[1:]) if type(tensors[0]) is list else tensors:
            if t is not None and t.layout != torch.strided:
                raise TypeError(f"{self.name}: tensors must be dense (torch.strided), got layout {t.layout}")
        with torch._C._AutoDispatchBelowAutograd():
            if not _functorch_active():
                return self.op(*args)
            # The forward of a Function runs without gradients, but the levels of torch.func below this one want theirs.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return self.op(*args)

    def _autocast_kernel(self, device: str) -> Callable:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def kernel(*args):
            dtype = torch.get_autocast_dtype(device.lower())
            tensors = [x.to(dtype) if _is_castable(x) else x for x in args[: self.count]]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.op(*tensors, *args[self.count :])

        return kernel


operators: dict[str, Operator] = {}


def _is_castable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point() and x.dtype != torch.float64


# -------------------------------------------------------------------------------------------------------- derivatives


def add_up(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms there are."""
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def bilinear_jvp(operator: Callable, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None, *rest):
    """The derivative of ``operator(x, y, *rest)``, linear in x and in y, along (dx, dy), each of which may be None."""
    return add_up(
        None if dx is None else operator(dx, y, *rest),
        None if dy is None else operator(x, dy, *rest),
    )


# -------------------------------------------------------------------------------------------------------- activations

ACTIVATE = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}  # in the order of the core's numbers


def activation_index(op: str, activation: str | None) -> int:
    if activation not in ACTIVATE:
        raise ValueError(f"{op}: activation must be None, 'relu' or 'relu6', got {activation!r}")
    return list(ACTIVATE).index(activation)


def where_active(x: Tensor, output: Tensor | None, activation: int) -> Tensor:
    """``x`` where the activation lets a change through, else 0."""
    if activation == 0:
        return x
    closed = output <= 0 if activation == 1 else (output <= 0) | (output >= 6)
    return torch.where(closed, 0, x)


# ------------------------------------------------------------------------------------------------------------- checks

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def check_same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{op}: {name} and {other_name} must be on one device, got {x.device} and {other.device}")


def check_features_and_boxes(op: str, name: str, x: Tensor, boxes: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W], got {list(x.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"{op}: boxes must have shape [K, 5], got {list(boxes.shape)}")
    if x.dtype not in _FLOATS or boxes.dtype not in _FLOATS:
        check_floating(op, name, x)
        check_floating(op, "boxes", boxes)
    check_same_device(op, name, x, "boxes", boxes)


def check_pooling(op: str, spatial_scale: float, pooled_height: int, pooled_width: int) -> None:
    if not 0 < spatial_scale < math.inf:
        raise ValueError(f"{op}: spatial_scale must be positive and finite, got {spatial_scale}")
    if pooled_height < 1 or pooled_width < 1:
        raise ValueError(f"{op}: output_size must be at least 1 x 1, got {pooled_height} x {pooled_width}")


def check_grad_output(
    op: str, grad_output: Tensor, boxes: Tensor, channels: int, pooled_height: int, pooled_width: int
) -> None:
    check_features_and_boxes(op, "grad_output", grad_output, boxes)
    expected = (boxes.shape[0], channels, pooled_height, pooled_width)
    if grad_output.shape != expected:
        raise ValueError(f"{op}: grad_output must have shape {list(expected)}, got {list(grad_output.shape)}")


# ---------------------------------------------------------------------------------------------------------- arguments


def pair(op: str, value, name: str = "output_size") -> tuple[int, int]:
    """(height, width) from an int or from a sequence of one or two."""
    if type(value) is int:
        return value, value
    sizes = value if isinstance(value, (tuple, list, torch.Size)) else (value,)
    if not 1 <= len(sizes) <= 2:
        raise ValueError(f"{op}: {name} must be an int or two ints, got {len(sizes)} values")
    for size in sizes:
        if not isinstance(size, (int, torch.SymInt)) and not hasattr(size, "__index__"):
            raise TypeError(f"{op}: {name} must be an int or two ints, got {value!r}")
    return sizes[0], sizes[-1]


def rois_from_boxes(op: str, boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """Boxes as [K, 5] with the image index in front: [K, 5] as they are, or one tensor [L, 4] for each image."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{op}: boxes must be a Tensor[K, 5] or a list of Tensor[L, 4], got {type(boxes).__name__}")
    for i, b in enumerate(boxes):
        check_tensor(op, f"boxes[{i}]", b)
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{i}] must have shape [L, 4], got {list(b.shape)}")
        check_floating(op, f"boxes[{i}]", b)
    if len(boxes) == 0:
        return like.new_empty((0, 5))
    return torch.cat([torch.nn.functional.pad(_at_least_float32(b), (1, 0), value=i) for i, b in enumerate(boxes)])


def _at_least_float32(boxes: Tensor) -> Tensor:
    """float16 and bfloat16 cannot hold every image index; the widening loses nothing."""
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


# ------------------------------------------------------------------------------------------------------------ outputs


def prefers_channels_last(x: Tensor) -> bool:
    """Whether in ``x`` [N, C, H, W] the channels of a pixel lie next to each other, and neighbouring pixels do not."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def empty(size: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    if not channels_last:
        return like.new_empty(size, dtype=dtype) if dtype else like.new_empty(size)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def new_pooled(
    op: str, x: Tensor, boxes: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, dtype=None
):
    """The tensor that ``op`` pools into, like ``x`` in dtype and layout: the common part of its kernel and its fake."""
    check_features_and_boxes(op, "input", x, boxes)
    check_pooling(op, spatial_scale, pooled_height, pooled_width)
    return empty((boxes.shape[0], x.shape[1], pooled_height, pooled_width), x, prefers_channels_last(x), dtype)


# --------------------------------------------------------------------------------------------------------------- vmap
# One call with the extra dimension V folded away: into the channels when all entries share the boxes, else into the
# boxes, and when each entry has its own features too, into the images.


def vmap_pool(
    call: Callable, size: int, inputs: Sequence[Tensor], dims: Sequence, boxes: Tensor, boxes_dim: int | None
):
    """The vmap rule of a pooling op: ``call(inputs, boxes)`` -> tensors [K, C, PH, PW]."""
    if boxes_dim is None:
        return _unfold(call([_fold_channels(x, d, size) for x, d in zip(inputs, dims, strict=True)], boxes), 1, size)
    if all(d is None for d in dims):
        return _unfold(call(list(inputs), _fold_boxes(boxes, boxes_dim, None)), 0, size)
    inputs = [_fold_batch(x, d, size) for x, d in zip(inputs, dims, strict=True)]
    return _unfold(call(inputs, _fold_boxes(boxes, boxes_dim, inputs[0].shape[0] // size)), 0, size)


def vmap_pool_backward(
    call: Callable,
    size: int,
    grads: Sequence[Tensor],
    dims: Sequence,
    boxes: Tensor,
    boxes_dim,
    images: int,
    channels: int,
):
    """The vmap rule of its backward: ``call(grads, boxes, images, channels)`` -> tensors [N, C, H, W]."""
    if boxes_dim is None:
        grads = [_fold_channels(g, d, size) for g, d in zip(grads, dims, strict=True)]
        return _unfold(call(grads, boxes, images, size * channels), 1, size)
    grads = [_fold_batch(g, d, size) for g, d in zip(grads, dims, strict=True)]
    return _unfold(call(grads, _fold_boxes(boxes, boxes_dim, images), size * images, channels), 0, size)


def _fold_channels(x: Tensor, dim: int | None, size: int) -> Tensor:
    """[N, C, ...] with V at ``dim`` -> [N, V * C, ...]."""
    x = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _fold_batch(x: Tensor, dim: int | None, size: int) -> Tensor:
    """[N, ...] with V at ``dim`` -> [V * N, ...]."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_boxes(boxes: Tensor, dim: int, images: int | None) -> Tensor:
    """[K, 5] with V at ``dim`` -> [V * K, 5]. If each entry has so many ``images``, entry v starts at v * images."""
    boxes = boxes.movedim(dim, 0)
    if images is not None:
        boxes = _at_least_float32(boxes)
        index = boxes[..., :1].trunc()
        first = images * torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)[:, None, None]
        # An index out of range must not reach into the images of another entry: -1 makes the kernel raise.
        index = torch.where((index >= 0) & (index < images), index + first, -1)
        boxes = torch.cat([index, boxes[..., 1:]], dim=-1)
    return boxes.flatten(0, 1)


def _unfold(outputs: Tensor | Sequence[Tensor], dim: int, size: int):
    """Splits V off ``dim`` of each output; returns the outputs and where V is now."""
    if isinstance(outputs, Tensor):
        return outputs.unflatten(dim, (size, outputs.shape[dim] // size)), dim
    return [_unfold(x, dim, size)[0] for x in outputs], [dim] * len(outputs)
