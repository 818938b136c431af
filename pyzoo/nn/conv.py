"""Convolutions in inference on the CPU: their weights are put in order once, not in every call."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyzoo.nn.batch_norm import _fold, _has_hooks, _is_fixed, conv_bn

# Weight and bias of the convolutions that inference ran, as the library of convolutions wants them, and the version of
# what they were made from.
_PACKED: WeakKeyDictionary[nn.Conv2d, tuple] = WeakKeyDictionary()


def packed_conv(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None = None) -> Tensor:
    """``bn(conv(x))`` or ``conv(x)``. Where nothing learns and ``x`` is float32, on the CPU and channels last, the
    convolution has the batch norm in its weights and these are kept in the library's own order; results agree to
    rounding. Else it is :func:`conv_bn`."""
    if not torch.compiler.is_compiling() and _can_pack(x, conv, bn):
        modules = (conv,) if bn is None else (conv, bn)
        made_from = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *made_from))
        if not learns and all(map(_is_plain, made_from)):
            # Without its fused ReLU, which makes NaN zero.
            weight, bias = _packed(conv, bn, made_from, x.shape)
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_geometry(conv), "none", [], "")
    return conv(x) if bn is None else conv_bn(x, conv, bn)


def _can_pack(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None) -> bool:
    return (
        # What counts, fakes or transforms operators is to see those of PyTorch.
        torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and _is_plain(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and (bn is None or (_is_fixed(bn) and not _has_hooks(bn)))
        and not _has_hooks(conv)
    )


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.padding, conv.stride, conv.dilation, conv.groups


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.int64)


def _packed(conv: nn.Conv2d, bn: nn.Module | None, made_from: list[Tensor], shape: torch.Size) -> tuple:
    """Weight and bias for inputs of about this shape, kept from call to call while nothing changes."""
    kept = _PACKED.get(conv)
    version = None if any(t.is_inference() for t in made_from) else [(t.data_ptr(), t._version) for t in made_from]
    if kept is None or version is None or kept[0] != version:
        with torch.no_grad():
            weight, bias = (conv.weight, conv.bias) if bn is None else _fold(conv, bn)
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(conv), shape)
        kept = _PACKED[conv] = version, weight, bias
    return kept[1:]
