"""RoIPool. Girshick, "Fast R-CNN", 2015, section 2.1 (https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyzoo._backend import Kernel, runs_on_core, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator, _is_plain

_fwd = Kernel("roi_pool", "roi_pool_fwd")
_bwd = Kernel("roi_pool", "roi_pool_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def _round_half_away(x: Tensor) -> Tensor:
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def _axis_bins(low: Tensor, high: Tensor, bins: int, size: int) -> list[tuple[int, int]]:
    """Pixels [begin, end) of each bin of one box along one axis, in torchvision's arithmetic."""
    low, high = _round_half_away(low), _round_half_away(high)
    if not (low.isfinite() and high.isfinite()):
        return [(0, 0)] * bins
    limit = 2**30  # a coordinate must fit an integer; no map is that large
    start, end = int(low.clamp(-limit, limit)), int(high.clamp(-limit, limit))
    bin_size = torch.full_like(low, max(end - start + 1, 1)) / bins
    begins = [int((p * bin_size).floor()) + start for p in range(bins)]
    ends = [int(((p + 1) * bin_size).ceil()) + start for p in range(bins)]
    return [(min(max(b, 0), size), min(max(e, 0), size)) for b, e in zip(begins, ends, strict=True)]


def roi_pool_reference(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    return_argmax: bool = False,
):
    """:func:`roi_pool` in plain PyTorch: the specification of the kernels. Differentiable in ``input``.

    ``return_argmax`` adds the int32 position y * W + x of each maximum, -1 where there is none.
    """
    boxes = common.rois_from_boxes("roi_pool_reference", boxes, input)
    geometry = torch.promote_types(torch.promote_types(input.dtype, boxes.dtype), torch.float32)
    height, width = common.pair("roi_pool_reference", output_size)
    images, channels, map_height, map_width = input.shape
    lowest = input.new_tensor(torch.finfo(torch.float32).min)  # where torchvision starts from, for float64 too
    columns = torch.arange(map_width, device=input.device)
    pooled, argmax = [], []
    for image, box in zip(boxes[:, 0].tolist(), boxes[:, 1:].to(geometry) * spatial_scale, strict=True):
        if not -1 < image < images:
            raise ValueError(f"roi_pool_reference: batch index must be in [0, {images}), got {image}")
        x1, y1, x2, y2 = box
        bins_x = _axis_bins(x1, x2, width, map_width)
        for top, bottom in _axis_bins(y1, y2, height, map_height):
            for left, right in bins_x:
                if bottom <= top or right <= left:
                    pooled.append(input.new_zeros(channels))
                    argmax.append(torch.full((channels,), -1, device=input.device))
                    continue
                pixels = input[int(image), :, top:bottom, left:right].flatten(1)
                rows = torch.arange(top, bottom, device=input.device)[:, None]
                index = (rows * map_width + columns[left:right]).flatten()
                wins = pixels > lowest  # false for NaN
                best = torch.where(wins, pixels, -torch.inf).max(1, keepdim=True).values
                first = (wins & (pixels == best)).int().argmax(1, keepdim=True)  # row-major
                found = wins.any(1)
                pooled.append(torch.where(found, pixels.gather(1, first)[:, 0], lowest))
                argmax.append(torch.where(found, index[first[:, 0]], -1))
    size = (len(boxes), height, width, channels)
    out = (torch.stack(pooled) if pooled else input.new_zeros(0)).reshape(size).permute(0, 3, 1, 2)
    out = out + input[:0].sum()  # 0, but differentiable where all bins are empty
    if not return_argmax:
        return out
    where = torch.stack(argmax) if argmax else torch.zeros(0)
    return out, where.reshape(size).permute(0, 3, 1, 2).int()


# ----------------------------------------------------------------------------------------------------------- roi_pool


def _fake(input, boxes, spatial_scale, pooled_height, pooled_width):
    return common.new_pooled("roi_pool", input, boxes, spatial_scale, pooled_height, pooled_width)


def _impl(input, boxes, spatial_scale, pooled_height, pooled_width):
    output = common.new_pooled("roi_pool", input, boxes, spatial_scale, pooled_height, pooled_width)
    _fwd(input.device, input, boxes, output, None, spatial_scale)
    return output


def _vmap(info, in_dims, input, boxes, *rest):
    def call(inputs, boxes):
        return _roi_pool.op(inputs[0], boxes, *rest)

    return common.vmap_pool(call, info.batch_size, [input], in_dims[:1], boxes, in_dims[1])


_roi_pool = Operator(
    "roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> Tensor",
    impl=_impl,
    fake=_fake,
    vmap=_vmap,
    constant=["boxes"],
)


def _argmax_fake(input, boxes, spatial_scale, pooled_height, pooled_width):
    return common.new_pooled("_roi_pool_argmax", input, boxes, spatial_scale, pooled_height, pooled_width, torch.int32)


def _argmax_impl(input, boxes, spatial_scale, pooled_height, pooled_width):
    argmax = _argmax_fake(input, boxes, spatial_scale, pooled_height, pooled_width)
    output = _fake(input, boxes, spatial_scale, pooled_height, pooled_width)
    _fwd(input.device, input.detach(), boxes.detach(), output, argmax, spatial_scale)
    return argmax


def _argmax_vmap(info, in_dims, input, boxes, *rest):
    def call(inputs, boxes):
        return _roi_pool_argmax.op(inputs[0], boxes, *rest)

    return common.vmap_pool(call, info.batch_size, [input], in_dims[:1], boxes, in_dims[1])


_roi_pool_argmax = Operator(
    "_roi_pool_argmax(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> Tensor",
    impl=_argmax_impl,
    fake=_argmax_fake,
    vmap=_argmax_vmap,
)


def _backward_fake(grad_output, boxes, input, positions, spatial_scale):
    common.check_features_and_boxes("_roi_pool_backward", "input", input, boxes)
    common.check_grad_output("_roi_pool_backward", grad_output, boxes, input.shape[1], *grad_output.shape[2:])
    return torch.empty_like(
        input,
        memory_format=torch.channels_last if common.prefers_channels_last(input) else torch.contiguous_format,
    )


def _backward_impl(grad_output, boxes, input, positions, spatial_scale):
    grad_input = _backward_fake(grad_output, boxes, input, positions, spatial_scale)
    features = input if positions is None else None  # whose maxima are looked for again
    _bwd(input.device, grad_output, features, boxes, grad_input, spatial_scale, positions)
    return grad_input


def _backward_vmap(info, in_dims, grad_output, boxes, input, positions, spatial_scale):
    def call(tensors, boxes, *_):
        return _roi_pool_backward.op(tensors[0], boxes, tensors[1], None, spatial_scale)

    grad_dim, boxes_dim, input_dim = in_dims[:3]
    images, channels = (input.shape if input_dim is None else input.movedim(input_dim, 0).shape[1:])[:2]
    return common.vmap_pool_backward(
        call, info.batch_size, [grad_output, input], [grad_dim, input_dim], boxes, boxes_dim, images, channels
    )


# positions, from _pool_with_positions, spare the search for the maxima; None: they are looked for again.
_roi_pool_backward = Operator(
    "_roi_pool_backward(Tensor grad_output, Tensor boxes, Tensor input, Tensor? positions, float spatial_scale)"
    " -> Tensor",
    impl=_backward_impl,
    fake=_backward_fake,
    vmap=_backward_vmap,
    constant=["boxes", "input"],
)


def _pool_with_positions(input, boxes, spatial_scale, pooled_height, pooled_width):
    """The pooled tensor and where each maximum is, for the backward. On the CPU its place in its bin: a byte, so a
    quarter of the size of float32 features; None for bins of more than 255 pixels. Elsewhere the host cannot know of
    such a bin without waiting: there it is the pixel."""
    output = _fake(input, boxes, spatial_scale, pooled_height, pooled_width)
    dtype = torch.uint8 if runs_on_core(input.device) else torch.int32
    positions = input.new_empty((boxes.shape[0], pooled_height * pooled_width, input.shape[1]), dtype=dtype)
    fit = _fwd(input.device, input, boxes, output, None, spatial_scale, positions)
    return output, positions if fit else None


def _values_at_maxima(x: Tensor, input: Tensor, boxes: Tensor, spatial_scale: float, *pooled_size: int) -> Tensor:
    """The derivative of the pooled ``input`` along ``x`` [N, C, H, W]: the values of ``x`` where the maxima are."""
    argmax = _roi_pool_argmax.op(input, boxes, spatial_scale, *pooled_size).flatten(2).long()
    image = boxes[:, 0].long()[:, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[:, None]
    values = x.flatten(2)[image, channel, argmax.clamp(min=0)]
    return torch.where(argmax >= 0, values, 0).unflatten(2, pooled_size)


class _RoIPool(Function):
    @staticmethod
    def forward(ctx, input, boxes, *pooling):
        ctx.pooling = pooling
        ctx.save_for_forward(input, boxes)
        if _is_plain((input, boxes)):
            output, positions = _pool_with_positions(input, boxes, *pooling)
        else:
            output, positions = _roi_pool.below_autograd(input, boxes, *pooling), None
        ctx.save_for_backward(input, boxes, positions)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, boxes, positions = ctx.saved_tensors
        grad = _roi_pool_backward(grad_output, boxes, input, positions, ctx.pooling[0])
        return grad, *[None] * (1 + len(ctx.pooling))

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return None if input_tangent is None else _values_at_maxima(input_tangent, *ctx.saved_tensors[:2], *ctx.pooling)


class _RoIPoolBackward(Function):
    @staticmethod
    def forward(ctx, grad_output, boxes, input, positions, spatial_scale):
        ctx.save_for_backward(input, boxes)
        ctx.save_for_forward(input, boxes)
        ctx.pooling = (spatial_scale, *grad_output.shape[2:])
        return _roi_pool_backward.below_autograd(grad_output, boxes, input, positions, spatial_scale)

    @staticmethod
    def backward(ctx, grad_grad_input):
        return _values_at_maxima(grad_grad_input, *ctx.saved_tensors, *ctx.pooling), None, None, None, None

    @staticmethod
    def jvp(ctx, grad_tangent, *_):
        input, boxes = ctx.saved_tensors
        return None if grad_tangent is None else _roi_pool_backward(grad_tangent, boxes, input, None, ctx.pooling[0])


_roi_pool.differentiate(_RoIPool)
_roi_pool_backward.differentiate(_RoIPoolBackward)


@specified_by(roi_pool_reference)
def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """Max-pools each box, rounded to whole pixels, in a grid of bins (Fast R-CNN), as ``torchvision.ops.roi_pool``.

    Coordinates round half away from zero; a box covers at least one pixel; an empty bin, as every bin of a box with a
    non-finite side, gives 0. The first of equal maxima in row-major order gets the gradient; NaN never wins.
    Differentiable in ``input`` any number of times; deterministic; the same bits for any number of threads.

    Args:
        input: features, Tensor[N, C, H, W] of any strides; float32, float64, float16 or bfloat16.
        boxes: Tensor[K, 5] of (index of the image, x1, y1, x2, y2), or a list with one Tensor[L, 4] for each image.
            Their dtype need not be that of ``input``: bins are computed in float32, in float64 if either is.
        output_size: bins as (height, width), or one int for both.
        spatial_scale: what box coordinates are multiplied by to become pixels of ``input``.

    Returns:
        Tensor[K, C, height, width] in the dtype and memory format (contiguous or channels_last) of ``input``.

    Raises:
        TypeError: a tensor is not of a floating dtype or not dense, or ``output_size`` is not integer.
        ValueError: a shape, device, scale or size does not fit, or an image index is out of range.
    """
    common.check_tensor("roi_pool", "input", input)
    boxes = common.rois_from_boxes("roi_pool", boxes, input)
    height, width = common.pair("roi_pool", output_size)
    return _roi_pool(input, boxes, spatial_scale, height, width)


class RoIPool(nn.Module):
    """See :func:`roi_pool`. The arguments are ``torchvision.ops.RoIPool``'s."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"
