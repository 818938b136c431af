"""Batch norm with fixed statistics, and a convolution with its batch norm in one pass where that is the same."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine map do not change: all four are buffers, under the names of
    ``nn.BatchNorm2d``. Detectors train with it, as their batches are too small for statistics.

    Args:
        num_features: channels.
        eps: added to the variance.

    Shape: [N, C, ...] -> the same.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # of an nn.BatchNorm2d
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module) -> Tensor:
    """``bn(conv(x))``. Where the statistics are fixed, the weights of the convolution take the scale and its bias the
    shift, which saves a pass over the map, forward and backward; results agree to rounding. Gradients reach what both
    modules learn, and a module with hooks is called as usual."""
    if type(x) is not Tensor or type(conv) not in CONVS or not _is_fixed(bn) or _has_hooks(conv) or _has_hooks(bn):
        return bn(conv(x))
    return conv._conv_forward(x, *_folded(conv, bn))


CONVS = (nn.Conv2d, DepthwiseConv2d)


def _is_fixed(bn: nn.Module) -> bool:
    if type(bn) is nn.BatchNorm2d:
        return not bn.training and bn.track_running_stats and bn.affine
    return type(bn) is FrozenBatchNorm2d


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


# Folded weights of the convolutions that inference ran, and what they were made from.
_FOLDED: WeakKeyDictionary[nn.Conv2d, tuple] = WeakKeyDictionary()


def _folded(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does both, kept from call to call while nothing learns."""
    made_from = [t for m in (conv, bn) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in made_from)
    if learns or torch.compiler.is_compiling() or any(t.is_inference() for t in made_from):
        return _fold(conv, bn)
    version = [(t.data_ptr(), t._version, t.dtype) for t in made_from]
    kept = _FOLDED.get(conv)
    if kept is None or kept[0] != version:
        with torch.no_grad():
            kept = _FOLDED[conv] = version, _fold(conv, bn)
    return kept[1]


def _fold(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift
