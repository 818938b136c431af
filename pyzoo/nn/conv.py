"""A convolution and its batch norm in one pass, where the statistics are fixed; weights put in order once, not in every
call, where nothing learns."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyzoo.nn import conv_bn_act, pointwise, winograd
from pyzoo.nn.batch_norm import FrozenBatchNorm2d
from pyzoo.ops.batch_norm_act import batch_norm_act
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d

FOLDS = (nn.Conv2d, DepthwiseConv2d)

# Of the convolutions that inference ran, by how: the version of what weight and bias were made from, these, and aliases
# of what they were made from, without which other tensors could come to lie at its addresses.
_KEPT: WeakKeyDictionary[nn.Conv2d, dict[str, tuple]] = WeakKeyDictionary()


def conv_bn(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.Module | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(bn(conv(x)) + residual)``, where all but the convolution may be left out.

    Where the statistics are fixed, the weights of the convolution take the scale and its bias the shift, which saves a
    pass over the map, forward and backward; gradients reach what both modules learn. Where nothing learns they are kept
    from call to call. On the CPU, for float32 and channels_last, they are kept in the order that the library of
    convolutions wants, or that :mod:`pyzoo.nn.winograd` or :mod:`pyzoo.nn.pointwise` want where these are faster. In
    training, on the CPU, what follows the convolution is one operator, :func:`pyzoo.ops.batch_norm_act`, and
    :mod:`pyzoo.nn.conv_bn_act` computes 1x1 and depthwise convolutions together with it where that is faster. Results
    agree to rounding. Modules with hooks and other kinds of modules are called as usual.

    Args:
        x: Tensor[N, C, H, W].
        conv: the convolution.
        bn: its batch norm.
        activation: None, "relu" or "relu6".
        residual: Tensor of the shape of the output, which is added before the activation.
    """
    if type(x) is not Tensor or type(conv) not in FOLDS or has_hooks(conv):
        return _finish(conv(x), bn, activation, residual)
    if bn is not None and _trains(bn, x):
        if (
            _is_plain(x, conv, _tensors(conv, bn))
            and conv_bn_act.suits(x, conv)
            and (residual is None or _is_plain(residual, conv, []))
        ):
            return conv_bn_act.conv_bn_act(x, conv, bn, residual, _statistics(bn), activation)
        return _batch_norm_act(conv_bn(x, conv), bn, activation, residual)
    if bn is not None and not _is_fixed(bn):
        return _finish(conv_bn(x, conv), bn, activation, residual)
    made_from = _tensors(conv, bn)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in made_from)
    is_plain = type(conv) is nn.Conv2d and _is_plain(x, conv, made_from) and _is_last(x)
    by_winograd = is_plain and winograd.suits(x, conv)
    how, weight, bias = "", conv.weight, conv.bias
    if learns or torch.compiler.is_compiling() or any(t.is_inference() for t in made_from):
        if bn is not None:
            weight, bias = fold(conv, bn)
    else:
        if is_plain and not _wants_gradient(x):
            how = "winograd" if by_winograd else "pointwise" if pointwise.suits(x, conv) else "packed"
        weight, bias = _kept(x, conv, bn, made_from, how)
    if by_winograd:
        relu = activation == "relu" and residual is None
        if how == "winograd":
            out = winograd.run(x, weight, bias, conv.out_channels, conv.padding[0], relu=relu)
        else:
            out = winograd.conv2d(x, weight, bias, conv.padding[0], relu)
        return out if relu else _finish(out, None, activation, residual)
    if how == "pointwise":
        if residual is None or (_is_plain(residual, conv, []) and not _wants_gradient(residual)):
            return pointwise.run(x, weight, bias, conv.out_channels, residual, activation)
        out = pointwise.run(x, weight, bias, conv.out_channels, None, None)
    elif how == "packed":  # without the fused ReLU, which makes NaN zero
        out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_geometry(conv), "none", [], "")
    elif type(conv) is DepthwiseConv2d and residual is None:
        return conv._conv_forward(x, weight, bias, activation)
    else:
        out = conv._conv_forward(x, weight, bias)
    return _finish(out, None, activation, residual)


def _tensors(conv: nn.Conv2d, bn: nn.Module | None) -> list[Tensor]:
    """What their outputs are made from, besides the input."""
    tensors = [*conv._parameters.values()]
    if bn is not None:
        tensors += *bn._parameters.values(), bn._buffers["running_mean"], bn._buffers["running_var"]
        if type(bn) is FrozenBatchNorm2d:
            tensors += bn._buffers["weight"], bn._buffers["bias"]
    return [t for t in tensors if t is not None]


def _kept(x: Tensor, conv: nn.Conv2d, bn: nn.Module | None, made_from: list[Tensor], how: str) -> tuple:
    version = [(t.data_ptr(), t._version, t.dtype) for t in made_from]
    if bn is not None and (tracked := bn._buffers.get("num_batches_tracked")) is not None:
        version.append(tracked._version)  # PyTorch's batch norm moves the running statistics without a new version
    kept = _KEPT.setdefault(conv, {})
    if how not in kept or kept[how][0] != version:
        with torch.no_grad():
            weight, bias = (conv.weight, conv.bias) if bn is None else fold(conv, bn)
            if how == "winograd":
                weight = winograd.transform(weight)
            elif how == "pointwise":
                weight = pointwise.transform(weight)
            elif how == "packed":
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *_geometry(conv), x.shape)
        kept[how] = version, weight, bias, [t.detach() for t in made_from]
    return kept[how][1:3]


def forget(module: nn.Module) -> None:
    """Frees what inference keeps of the convolutions of a module, up to four times their weights; the next makes it
    again."""
    for m in module.modules():
        _KEPT.pop(m, None)


def _finish(out: Tensor, bn: nn.Module | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """What follows the convolution, over its output where that is possible."""
    if bn is not None:
        if _trains(bn, out):
            return _batch_norm_act(out, bn, activation, residual)
        out = bn(out)
    if residual is not None:
        out += residual
    return ACTIVATE[activation](out)


def _trains(bn: nn.Module, x: Tensor) -> bool:
    return (
        type(bn) is nn.BatchNorm2d
        and bn.affine
        and (bn.training or bn.running_mean is None)
        and not has_hooks(bn)
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.is_floating_point()
    )


def _batch_norm_act(x: Tensor, bn: nn.BatchNorm2d, activation: str | None, residual: Tensor | None) -> Tensor:
    mean, var, momentum = _statistics(bn)
    statistics = {"running_mean": mean, "running_var": var, "momentum": momentum}
    return batch_norm_act(x, bn.weight, bn.bias, residual, eps=bn.eps, activation=activation, **statistics)


def _statistics(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, float]:
    """What this batch is to move, and how far; it is counted."""
    if not (bn.training and bn.track_running_stats):
        return None, None, 0.0
    tracked, momentum = bn.num_batches_tracked, bn.momentum
    if tracked is not None:
        tracked.add_(1)
    if momentum is None:  # their mean
        momentum = 0.0 if tracked is None else 1 / float(tracked)
    return bn.running_mean, bn.running_var, momentum


ACTIVATE = {
    None: lambda x: x,
    "relu": partial(F.relu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
}


def _is_fixed(bn: nn.Module) -> bool:
    if has_hooks(bn):
        return False
    if type(bn) is nn.BatchNorm2d:
        return not bn.training and bn.track_running_stats and bn.affine
    return type(bn) is FrozenBatchNorm2d


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def fold(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.padding, conv.stride, conv.dilation, conv.groups


def _is_plain(x: Tensor, conv: nn.Conv2d, made_from: list[Tensor]) -> bool:
    """Whether kernels can be called: float32 on the CPU, and nothing that is to see the operators of PyTorch, as what
    counts, fakes, differentiates forward or transforms them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or x.dim() != 4
        or x.numel() == 0
    ):
        return False
    for t in (x, *made_from):
        if t.dtype is not torch.float32 or not t.is_cpu or type(t) not in (Tensor, nn.Parameter):
            return False
        if t.dim() == 1 and not t.is_contiguous():
            return False
    return True


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _is_last(x: Tensor) -> bool:
    return (
        x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
