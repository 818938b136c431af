"""Gram matrices of feature maps and the style loss. Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015
(https://arxiv.org/abs/1508.06576), equations 3 to 6."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator

_fwd = Kernel("gram_matrix", "gram_matrix_fwd")
_bwd = Kernel("gram_matrix", "gram_matrix_bwd")
_loss_fwd = Kernel("gram_matrix", "gram_loss_fwd")

# ---------------------------------------------------------------------------------------------------------- reference


def gram_matrix_reference(features: Tensor, *, normalize: bool = True) -> Tensor:
    """:func:`gram_matrix` in plain PyTorch."""
    return _gram(features, normalize).to(features.dtype)


def gram_loss_reference(features: Tensor, target: Tensor, *, normalize: bool = True) -> Tensor:
    """:func:`gram_loss` in plain PyTorch."""
    gram = _gram(features, normalize)
    return (gram - target.to(gram.dtype)).square().sum() / max(gram.numel(), 1)


def _gram(features: Tensor, normalize: bool) -> Tensor:
    x = features.flatten(2).to(_wide(features.dtype))
    gram = x @ x.transpose(1, 2)
    return gram / max(x.shape[1] * x.shape[2], 1) if normalize else gram


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What features of ``dtype`` are summed up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -------------------------------------------------------------------------------------------------------- gram_matrix


def _check_features(op: str, name: str, x: Tensor) -> None:
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: {name} must have shape [N, C, H, W] or [N, C, M], got {list(x.shape)}")
    common.check_floating(op, name, x)


def _fake(features, normalize):
    _check_features("gram_matrix", "features", features)
    images, channels = features.shape[:2]
    return features.new_empty((images, channels, channels))


def _impl(features, normalize):
    gram = _fake(features, normalize)
    _fwd(features.device, features, gram, normalize)
    return gram


def _vmap(info, in_dims, features, normalize):
    gram = _gram_matrix.op(common._fold_batch(features, in_dims[0], info.batch_size), normalize)
    return common._unfold(gram, 0, info.batch_size)


_gram_matrix = Operator("gram_matrix(Tensor features, bool normalize) -> Tensor", impl=_impl, fake=_fake, vmap=_vmap)


# The gradient, (S + S^T) F for a gradient S of the Gram matrix. It is bilinear: its derivative in F is itself, that in
# S is the derivative of the Gram matrix, ``_symmetric_product``.


def _backward_fake(grad_gram, features, normalize):
    op = "_gram_matrix_backward"
    _check_features(op, "features", features)
    common.check_floating(op, "grad_gram", grad_gram)
    if _wide(grad_gram.dtype) != _wide(features.dtype):
        raise TypeError(f"{op}: both tensors must be float64 or none, got {grad_gram.dtype} and {features.dtype}")
    common.check_same_device(op, "grad_gram", grad_gram, "features", features)
    images, channels = features.shape[:2]
    if grad_gram.shape != (images, channels, channels):
        raise ValueError(f"{op}: grad_gram must have shape {[images, channels, channels]}, got {list(grad_gram.shape)}")
    if features.dim() == 4:
        return common.empty(features.shape, features, common.prefers_channels_last(features))
    if common.prefers_channels_last(features):
        return features.new_empty((images, features.shape[2], channels)).transpose(1, 2)
    return features.new_empty(features.shape)


def _backward_impl(grad_gram, features, normalize):
    grad_features = _backward_fake(grad_gram, features, normalize)
    _bwd(features.device, grad_gram, features, grad_features, normalize)
    return grad_features


def _backward_vmap(info, in_dims, grad_gram, features, normalize):
    folded = [common._fold_batch(x, d, info.batch_size) for x, d in zip((grad_gram, features), in_dims, strict=False)]
    return common._unfold(_gram_matrix_backward.op(*folded, normalize), 0, info.batch_size)


_gram_matrix_backward = Operator(
    "_gram_matrix_backward(Tensor grad_gram, Tensor features, bool normalize) -> Tensor",
    impl=_backward_impl,
    fake=_backward_fake,
    vmap=_backward_vmap,
)


def _symmetric_product(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """X Y^T + Y X^T, the derivative of the Gram matrix of X along Y; in the dtype of the sums."""
    wide = _wide(x.dtype)
    x, y = x.flatten(2).to(wide), y.flatten(2).to(wide)
    product = x @ y.transpose(1, 2)
    scale = 1 / max(x.shape[1] * x.shape[2], 1) if normalize else 1
    return (product + product.transpose(1, 2)) * scale


class _GramMatrix(Function):
    @staticmethod
    def forward(ctx, features, normalize):
        ctx.save_for_backward(features)
        ctx.save_for_forward(features)
        ctx.normalize = normalize
        return _gram_matrix.below_autograd(features, normalize)

    @staticmethod
    def backward(ctx, grad_gram):
        return _gram_matrix_backward(grad_gram, *ctx.saved_tensors, ctx.normalize), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (features,) = ctx.saved_tensors
        return None if tangent is None else _symmetric_product(features, tangent, ctx.normalize).to(features.dtype)


class _GramMatrixBackward(Function):
    @staticmethod
    def forward(ctx, grad_gram, features, normalize):
        ctx.save_for_backward(grad_gram, features)
        ctx.save_for_forward(grad_gram, features)
        ctx.normalize = normalize
        return _gram_matrix_backward.below_autograd(grad_gram, features, normalize)

    @staticmethod
    def backward(ctx, grad):
        grad_gram, features = ctx.saved_tensors
        return (
            _symmetric_product(grad, features, ctx.normalize).to(grad_gram.dtype) if ctx.needs_input_grad[0] else None,
            _gram_matrix_backward(grad_gram, grad, ctx.normalize) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_tangent, features_tangent, _):
        tangents = grad_tangent, features_tangent
        return common.bilinear_jvp(_gram_matrix_backward, *ctx.saved_tensors, *tangents, ctx.normalize)


_gram_matrix.differentiate(_GramMatrix)
_gram_matrix_backward.differentiate(_GramMatrixBackward)


@specified_by(gram_matrix_reference)
def gram_matrix(features: Tensor, *, normalize: bool = True) -> Tensor:
    """The Gram matrix of the channels of each image, G_ij = sum over positions of F_ik F_jk, by default per channel and
    position: divided by C * H * W (Gatys et al. 2015, equation 3, where nothing is divided).

    Sums are kept in float32 (float64 for float64) and divided before they are rounded, so float16 stays finite for
    images of any size unless the result itself is too large. The result is symmetric to the last bit. Differentiable
    any number of times; deterministic; the same bits for any number of threads. Only half of the products are computed,
    and features in either memory format are read in place, block by block.

    Args:
        features: Tensor[N, C, H, W] or Tensor[N, C, M] of any strides; float32, float64, float16 or bfloat16.
        normalize: whether to divide by C * H * W, or C * M.

    Returns:
        Tensor[N, C, C] in the dtype of ``features``. Zeros where there are no positions.

    Raises:
        TypeError: ``features`` is not a dense tensor of a floating dtype.
        ValueError: ``features`` has neither three nor four dimensions. An image without batch dimension is not taken:
            its shape could be that of Tensor[N, C, M].
    """
    common.check_tensor("gram_matrix", "features", features)
    return _gram_matrix(features, normalize)


# ---------------------------------------------------------------------------------------------------------- gram_loss


def _loss_fake(features, target, normalize):
    _check_features("gram_loss", "features", features)
    common.check_floating("gram_loss", "target", target)
    common.check_same_device("gram_loss", "target", target, "features", features)
    images, channels = features.shape[:2]
    shape = target.shape
    if len(shape) not in (2, 3) or shape[-1] != channels or shape[-2] != channels:
        fits = False
    else:
        fits = len(shape) == 2 or shape[0] == images or shape[0] == 1
    if not fits:
        raise ValueError(
            f"gram_loss: target must have shape {[images, channels, channels]}, {[1, channels, channels]} or "
            f"{[channels, channels]} for features {list(features.shape)}, got {list(shape)}"
        )
    wide = _wide(features.dtype)
    return features.new_empty((), dtype=wide), features.new_empty((images, channels, channels), dtype=wide)


def _loss_impl(features, target, normalize):
    loss, difference = _loss_fake(features, target, normalize)
    _loss_fwd(features.device, features, target, difference, loss, normalize)
    return loss, difference


def _loss_vmap(info, in_dims, features, target, normalize):
    size = info.batch_size
    features = common._fold_batch(features, in_dims[0], size)
    images, channels = features.shape[0] // size, features.shape[1]
    target = target.expand(size, *target.shape) if in_dims[1] is None else target.movedim(in_dims[1], 0)
    target = target.reshape(size, -1, channels, channels).expand(-1, images, -1, -1).flatten(0, 1)
    difference = _gram_loss.op(features, target, normalize)[1].unflatten(0, (size, images))
    loss = difference.square().sum((1, 2, 3)) / max(images * channels * channels, 1)
    return (loss, difference), (0, 0)


# The difference of the Gram matrix and the target is a second result, for the gradient: with it, that is one product.
_gram_loss = Operator(
    "gram_loss(Tensor features, Tensor target, bool normalize) -> (Tensor loss, Tensor difference)",
    impl=_loss_impl,
    fake=_loss_fake,
    vmap=_loss_vmap,
)


class _GramLoss(Function):
    @staticmethod
    def forward(ctx, features, target, normalize):
        loss, difference = _gram_loss.below_autograd(features, target, normalize)
        ctx.save_for_backward(features, target, difference)
        ctx.save_for_forward(features, difference)
        ctx.set_materialize_grads(False)
        ctx.normalize = normalize
        return loss, difference

    @staticmethod
    def backward(ctx, grad_loss, grad_difference):
        features, target, difference = ctx.saved_tensors
        if grad_loss is not None:
            along_loss = difference * (grad_loss * (2 / max(difference.numel(), 1)))
            grad_difference = along_loss if grad_difference is None else along_loss + grad_difference
        if grad_difference is None:
            return None, None, None
        return (
            _gram_matrix_backward(grad_difference, features, ctx.normalize) if ctx.needs_input_grad[0] else None,
            -grad_difference.sum_to_size(target.shape).to(target.dtype) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, features_tangent, target_tangent, _):
        features, difference = ctx.saved_tensors
        along = torch.zeros_like(difference)
        if features_tangent is not None:
            along = along + _symmetric_product(features, features_tangent, ctx.normalize)
        if target_tangent is not None:
            along = along - target_tangent.to(along.dtype)
        return (difference * along).sum() * (2 / max(difference.numel(), 1)), along


_gram_loss.differentiate(_GramLoss)


@specified_by(gram_loss_reference)
def gram_loss(features: Tensor, target: Tensor, *, normalize: bool = True) -> Tensor:
    """The mean squared difference of the Gram matrices of ``features`` and of ``target``: the style loss of one layer.

    What ``F.mse_loss(gram_matrix(features), target)`` is, in one operator whose gradient takes one product instead of
    two. Equation 4 of Gatys et al. 2015, E = sum of (G - A)^2 / (4 C^2 M^2) for sums G and A over M positions, is
    C^2 / 4 times this loss.

    Computed in float32 (float64 for float64), also for float16, whose squares would overflow. Differentiable in both
    tensors any number of times; deterministic; the same bits for any number of threads.

    Args:
        features: Tensor[N, C, H, W] or Tensor[N, C, M] of any strides; float32, float64, float16 or bfloat16.
        target: Gram matrices, Tensor[N, C, C], or one for all images, Tensor[1, C, C] or Tensor[C, C], of any of these
            dtypes.
        normalize: as in :func:`gram_matrix`; ``target`` is taken as it is.

    Returns:
        A number: float64 for float64 features, else float32. Zero if there are no images or no channels.

    Raises:
        TypeError: a tensor is not dense or not of a floating dtype.
        ValueError: a shape or device does not fit.
    """
    common.check_tensor("gram_loss", "features", features)
    common.check_tensor("gram_loss", "target", target)
    return _gram_loss(features, target, normalize)[0]


# ------------------------------------------------------------------------------------------------------------ modules


class GramMatrix(nn.Module):
    """See :func:`gram_matrix`."""

    def __init__(self, normalize: bool = True):
        super().__init__()
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        return gram_matrix(features, normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


class GramLoss(nn.Module):
    """See :func:`gram_loss`. Called with features and target, as ``nn.MSELoss`` is."""

    def __init__(self, normalize: bool = True):
        super().__init__()
        self.normalize = normalize

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return gram_loss(features, target, normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"
