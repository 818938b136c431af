"""The gradient of a convolution's bias. Not ``x.sum((0, 2, 3))``, whose bits depend on the number of threads."""

from __future__ import annotations

from pyzoo._backend import Kernel
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator

_kernel = Kernel("channel_sum", "channel_sum")


def _fake(x):
    if x.dim() != 4:
        raise ValueError(f"_channel_sum: x must have shape [N, C, H, W], got {list(x.shape)}")
    common.check_floating("_channel_sum", "x", x)
    return x.new_empty(x.shape[1])


def _impl(x):
    output = _fake(x)
    _kernel(x.device, x, output)
    return output


def _vmap(info, in_dims, x):
    return common._unfold(channel_sum.op(common._fold_channels(x, in_dims[0], info.batch_size)), 0, info.batch_size)


channel_sum = Operator("_channel_sum(Tensor x) -> Tensor", impl=_impl, fake=_fake, vmap=_vmap)


class _ChannelSum(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return channel_sum.below_autograd(x)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None, None].expand(ctx.shape)

    @staticmethod
    def jvp(ctx, tangent):
        return channel_sum(tangent)


channel_sum.differentiate(_ChannelSum)
