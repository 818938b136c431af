"""A convolution and its batch norm in one pass, where the statistics are fixed; weights put in order once, not in every
call, where nothing learns."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyzoo.nn import winograd
from pyzoo.nn.batch_norm import FrozenBatchNorm2d
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d

FOLDS = (nn.Conv2d, DepthwiseConv2d)

# Of the convolutions that inference ran, by how: the version of what weight and bias were made from, and these.
_KEPT: WeakKeyDictionary[nn.Conv2d, dict[str, tuple]] = WeakKeyDictionary()


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None = None, relu: bool = False) -> Tensor:
    """``bn(conv(x))``, or ``conv(x)``, and then ReLU.

    Where the statistics are fixed, the weights of the convolution take the scale and its bias the shift, which saves a
    pass over the map, forward and backward; gradients reach what both modules learn. Where nothing learns they are kept
    from call to call. On the CPU, for float32 and channels_last, they are kept in the order that the library of
    convolutions wants, and :mod:`pyzoo.nn.winograd` computes what it is faster for. Results agree to rounding. Modules
    with hooks and other kinds of modules are called as usual.
    """
    if type(x) is not Tensor or type(conv) not in FOLDS or has_hooks(conv):
        out = conv(x) if bn is None else bn(conv(x))
        return out.relu_() if relu else out
    if bn is not None and (not _is_fixed(bn) or has_hooks(bn)):
        out = bn(conv_bn(x, conv))
        return out.relu_() if relu else out
    modules = (conv,) if bn is None else (conv, bn)
    made_from = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in made_from)
    is_plain = _is_plain(x, conv, made_from)
    fast = is_plain and winograd.suits(x, conv)
    how, weight, bias = "", conv.weight, conv.bias
    if learns or torch.compiler.is_compiling() or any(t.is_inference() for t in made_from):
        if bn is not None:
            weight, bias = _fold(conv, bn)
    else:
        if is_plain and not (torch.is_grad_enabled() and x.requires_grad):
            how = "winograd" if fast else "packed"
        weight, bias = _kept(x, conv, bn, made_from, how)
    if how == "winograd":
        return winograd.run(x, weight, bias, conv.out_channels, conv.padding[0], relu=relu)
    if fast:
        return winograd.conv2d(x, weight, bias, conv.padding[0], relu)
    if how == "packed":  # without the fused ReLU, which makes NaN zero
        out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_geometry(conv), "none", [], "")
    else:
        out = conv._conv_forward(x, weight, bias)
    return out.relu_() if relu else out


def _kept(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None, made_from: list[Tensor], how: str) -> tuple:
    version = [(t.data_ptr(), t._version, t.dtype) for t in made_from]
    kept = _KEPT.setdefault(conv, {})
    if how not in kept or kept[how][0] != version:
        with torch.no_grad():
            weight, bias = (conv.weight, conv.bias) if bn is None else _fold(conv, bn)
            if how == "winograd":
                weight = winograd.transform(weight)
            elif how == "packed":
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(conv), x.shape)
        kept[how] = version, weight, bias
    return kept[how][1:]


def _is_fixed(bn: nn.Module) -> bool:
    if type(bn) is nn.BatchNorm2d:
        return not bn.training and bn.track_running_stats and bn.affine
    return type(bn) is FrozenBatchNorm2d


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _fold(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.padding, conv.stride, conv.dilation, conv.groups


def _is_plain(x: Tensor, conv: nn.Conv2d, made_from: list[Tensor]) -> bool:
    return (
        not torch.compiler.is_compiling()
        # What counts, fakes or transforms operators is to see those of PyTorch.
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) for t in (x, *made_from))
        and all(type(t) in (Tensor, nn.Parameter) for t in made_from)
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
