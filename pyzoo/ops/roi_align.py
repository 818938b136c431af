"""RoIAlign, on one feature map and on a pyramid of them.

He, Gkioxari, Dollár, Girshick, "Mask R-CNN", 2017, section 3 (https://arxiv.org/abs/1703.06870); the levels of a
pyramid after Lin et al., "Feature Pyramid Networks for Object Detection", 2017, equation 1
(https://arxiv.org/abs/1612.03144).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyzoo._backend import Kernel, specified_by
from pyzoo.ops import _common as common
from pyzoo.ops._common import Function, Operator

_fwd = Kernel("roi_align", "roi_align_fwd")
_bwd = Kernel("roi_align", "roi_align_bwd")

# ---------------------------------------------------------------------------------------------------------- reference


def _geometry_dtype(input: Tensor, boxes: Tensor) -> torch.dtype:
    """float64 as soon as the boxes or the features are, else float32."""
    return torch.promote_types(torch.promote_types(input.dtype, boxes.dtype), torch.float32)


def _axis_samples(low: Tensor, high: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool):
    """The samples of one box along one axis that lie on a map of ``size`` pixels.

    Returns for each sample its bin, its two pixels and their weights, and the number of samples in a bin, lost ones
    included. The operations and their order are torchvision's, since the number of samples and the edge are
    discontinuous in them.
    """
    start = low - (0.5 if aligned else 0.0)
    length = (high - (0.5 if aligned else 0.0)) - start
    if not aligned:
        length = length.clamp(min=1)
    bin_size = length / bins
    grid = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    if not (start.isfinite() and bin_size.isfinite() and grid < 2**31) or size == 0:
        grid = torch.zeros_like(grid)
    count = max(int(grid), 0)
    p = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]
    i = torch.arange(count, dtype=start.dtype, device=start.device)
    x = start + p * bin_size + (i + 0.5) * bin_size / grid  # [bins, count]

    inside = (x >= -1) & (x <= size)
    bin_index = inside.nonzero()[:, 0]
    x = x[inside].clamp(min=0)
    x0 = x.long()
    x = torch.where(x0 >= size - 1, size - 1, x)
    x0 = x0.clamp(max=size - 1)
    x1 = (x0 + 1).clamp(max=size - 1)
    weight1 = x - x0
    return bin_index, (x0, x1), (1 - weight1, weight1), count


def roi_align_reference(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`roi_align` in plain PyTorch: the specification of the kernels. Differentiable in ``input``.

    ``dtype`` is that of the interpolation, the sums and the result; by default they happen in float32 or better and the
    result has the dtype of ``input``. The sampling points follow from the dtypes of ``input`` and ``boxes`` alone.
    """
    boxes = common.rois_from_boxes("roi_align_reference", boxes, input)
    geometry = _geometry_dtype(input, boxes)
    height, width = common.pair("roi_align_reference", output_size)
    images, channels, map_height, map_width = input.shape
    maps = input.to(dtype or geometry)
    pooled = []
    for image, box in zip(boxes[:, 0].tolist(), boxes[:, 1:].to(geometry) * spatial_scale, strict=True):
        if not -1 < image < images:
            raise ValueError(f"roi_align_reference: batch index must be in [0, {images}), got {image}")
        x1, y1, x2, y2 = box
        bin_y, ys, weights_y, count_y = _axis_samples(y1, y2, height, map_height, sampling_ratio, aligned)
        bin_x, xs, weights_x, count_x = _axis_samples(x1, x2, width, map_width, sampling_ratio, aligned)
        samples = maps.new_zeros(channels, len(bin_y), len(bin_x))
        for y, wy in zip(ys, weights_y, strict=True):
            for x, wx in zip(xs, weights_x, strict=True):
                weight = wy.to(maps.dtype)[:, None] * wx.to(maps.dtype)
                samples = samples + weight * maps[int(image)][:, y[:, None], x]
        sums = maps.new_zeros(channels, height, len(bin_x)).index_add(1, bin_y, samples)
        sums = maps.new_zeros(channels, height, width).index_add(2, bin_x, sums)
        pooled.append(sums / max(count_y * count_x, 1))
    out = torch.stack(pooled) if pooled else maps.new_zeros(0, channels, height, width)
    return (out + maps[:0].sum()).to(dtype or input.dtype)  # the sum is 0, but differentiable where there are no boxes


def _first_level(spatial_scales: Sequence[float]) -> int:
    return int(-math.log2(spatial_scales[0]))


def multiscale_roi_align_reference(
    inputs: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`multiscale_roi_align` in plain PyTorch, one :func:`roi_align_reference` for each level."""
    boxes = common.rois_from_boxes("multiscale_roi_align_reference", boxes, inputs[0])
    x1, y1, x2, y2 = boxes[:, 1:].to(_geometry_dtype(inputs[0], boxes)).unbind(1)
    size = ((x2 - x1) * (y2 - y1)).sqrt()
    level = (canonical_level + (size / canonical_scale).log2() + 1e-6).floor() - _first_level(spatial_scales)
    level = level.clamp(0, len(inputs) - 1)  # NaN, of a box with one negative side, is no level: it pools to zero
    height, width = common.pair("multiscale_roi_align_reference", output_size)
    out = inputs[0].new_zeros(len(boxes), inputs[0].shape[1], height, width, dtype=dtype or inputs[0].dtype)
    for i, (input, scale) in enumerate(zip(inputs, spatial_scales, strict=True)):
        members = (level == i).nonzero()[:, 0]
        pooled = roi_align_reference(input, boxes[members], output_size, scale, sampling_ratio, aligned, dtype=dtype)
        out = out.index_add(0, members, pooled)
    return out


# ---------------------------------------------------------------------------------------------------------- roi_align


def _fake(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    return common.new_pooled("roi_align", input, boxes, spatial_scale, pooled_height, pooled_width)


def _impl(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    output = common.new_pooled("roi_align", input, boxes, spatial_scale, pooled_height, pooled_width)
    _fwd(boxes.device, [input], boxes, output, [spatial_scale], sampling_ratio, aligned, None)
    return output


def _vmap(info, in_dims, input, boxes, *rest):
    def call(inputs, boxes):
        return _roi_align.op(inputs[0], boxes, *rest)

    return common.vmap_pool(call, info.batch_size, [input], in_dims[:1], boxes, in_dims[1])


_roi_align = Operator(  # torchvision's schema
    "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt sampling_ratio, bool aligned) -> Tensor",
    impl=_impl,
    fake=_fake,
    vmap=_vmap,
    constant=["boxes"],
)


def _backward_fake(grad_output, boxes, scale, pooled_height, pooled_width, batch_size, channels, height, width, *rest):
    common.check_grad_output("_roi_align_backward", grad_output, boxes, channels, pooled_height, pooled_width)
    return common.empty((batch_size, channels, height, width), grad_output, channels_last=rest[-1])


def _backward_impl(grad_output, boxes, scale, pooled_height, pooled_width, batch_size, channels, height, width, *rest):
    grad_input = _backward_fake(
        grad_output, boxes, scale, pooled_height, pooled_width, batch_size, channels, height, width, *rest
    )
    sampling_ratio, aligned, _ = rest
    _bwd(boxes.device, grad_output, boxes, [grad_input], [scale], sampling_ratio, aligned, None)
    return grad_input


def _backward_vmap(info, in_dims, grad_output, boxes, scale, pooled_height, pooled_width, images, channels, *rest):
    def call(grads, boxes, images, channels):
        return _roi_align_backward.op(grads[0], boxes, scale, pooled_height, pooled_width, images, channels, *rest)

    return common.vmap_pool_backward(
        call, info.batch_size, [grad_output], in_dims[:1], boxes, in_dims[1], images, channels
    )


_roi_align_backward = Operator(  # torchvision's schema and the memory format
    "_roi_align_backward(Tensor grad_output, Tensor boxes, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width, SymInt sampling_ratio, "
    "bool aligned, bool channels_last) -> Tensor",
    impl=_backward_impl,
    fake=_backward_fake,
    vmap=_backward_vmap,
    constant=["boxes"],
)


class _RoIAlign(Function):
    @staticmethod
    def forward(ctx, input, boxes, *pooling):
        ctx.save_for_backward(boxes)
        ctx.save_for_forward(boxes)
        ctx.pooling, ctx.size, ctx.channels_last = pooling, input.shape, common.prefers_channels_last(input)
        return _roi_align.below_autograd(input, boxes, *pooling)

    @staticmethod
    def backward(ctx, grad_output):
        (boxes,) = ctx.saved_tensors
        sizes, options = ctx.pooling[:3], ctx.pooling[3:]
        grad = _roi_align_backward(grad_output, boxes, *sizes, *ctx.size, *options, ctx.channels_last)
        return grad, *[None] * (1 + len(ctx.pooling))

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return None if input_tangent is None else _roi_align(input_tangent, *ctx.saved_tensors, *ctx.pooling)


class _RoIAlignBackward(Function):
    """RoIAlign is linear in the features: the backward of its backward is the forward."""

    @staticmethod
    def forward(ctx, grad_output, boxes, *args):
        ctx.save_for_backward(boxes)
        ctx.save_for_forward(boxes)
        ctx.args = args
        return _roi_align_backward.below_autograd(grad_output, boxes, *args)

    @staticmethod
    def backward(ctx, grad_grad_input):
        sizes, options = ctx.args[:3], ctx.args[7:9]
        grad = _roi_align(grad_grad_input, *ctx.saved_tensors, *sizes, *options)
        return grad, *[None] * (1 + len(ctx.args))

    @staticmethod
    def jvp(ctx, grad_tangent, *_):
        return None if grad_tangent is None else _roi_align_backward(grad_tangent, *ctx.saved_tensors, *ctx.args)


_roi_align.differentiate(_RoIAlign)
_roi_align_backward.differentiate(_RoIAlignBackward)


@specified_by(roi_align_reference)
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average-pools each box on a regular grid of bilinear samples (Mask R-CNN), as ``torchvision.ops.roi_align`` does.

    A bin is the mean of its samples; a sample outside [-1, H] x [-1, W] counts as zero, as does every sample of a box
    with a non-finite side. Differentiable in ``input`` any number of times; deterministic; the same bits for any number
    of threads.

    Args:
        input: features, Tensor[N, C, H, W] of any strides; float32, float64, float16 or bfloat16.
        boxes: Tensor[K, 5] of (index of the image, x1, y1, x2, y2), or a list with one Tensor[L, 4] for each image.
            Their dtype need not be that of ``input``: sampling points are computed in float32, in float64 if either is.
        output_size: bins as (height, width), or one int for both.
        spatial_scale: what box coordinates are multiplied by to become pixels of ``input``.
        sampling_ratio: samples per bin and axis; if <= 0, ceil(size of the bin in pixels).
        aligned: shift the boxes by half a pixel (detectron2), so that pixel centres lie at integers plus one half.

    Returns:
        Tensor[K, C, height, width] in the dtype and memory format (contiguous or channels_last) of ``input``.

    Raises:
        TypeError: a tensor is not of a floating dtype or not dense, or ``output_size`` is not integer.
        ValueError: a shape, device, scale or size does not fit, or an image index is out of range.
    """
    common.check_tensor("roi_align", "input", input)
    boxes = common.rois_from_boxes("roi_align", boxes, input)
    height, width = common.pair("roi_align", output_size)
    return _roi_align(input, boxes, spatial_scale, height, width, sampling_ratio, aligned)


class RoIAlign(nn.Module):
    """See :func:`roi_align`. The arguments are ``torchvision.ops.RoIAlign``'s."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


# ------------------------------------------------------------------------------------------------------------ pyramid


def _new_multiscale_pooled(inputs, boxes, pooled_height, pooled_width, spatial_scales):
    op = "multiscale_roi_align"
    if not inputs:
        raise ValueError(f"{op}: inputs must hold at least one feature map")
    if len(inputs) != len(spatial_scales):
        raise ValueError(
            f"{op}: spatial_scales must be one for each of the {len(inputs)} inputs, got {len(spatial_scales)}"
        )
    first = inputs[0]
    for i, (x, scale) in enumerate(zip(inputs, spatial_scales, strict=True)):
        common.check_features_and_boxes(op, f"inputs[{i}]", x, boxes)
        common.check_pooling(op, scale, pooled_height, pooled_width)
        if x.shape[:2] != first.shape[:2] or x.dtype != first.dtype:
            raise ValueError(
                f"{op}: inputs must agree in N, C and dtype, got {list(first.shape)} {first.dtype} in inputs[0] "
                f"and {list(x.shape)} {x.dtype} in inputs[{i}]"
            )
    return common.new_pooled(op, first, boxes, spatial_scales[0], pooled_height, pooled_width)


def _level_map(spatial_scales, canonical_scale, canonical_level):
    return (_first_level(spatial_scales), canonical_scale, canonical_level, 1e-6) if len(spatial_scales) > 1 else None


def _multiscale_fake(inputs, boxes, pooled_height, pooled_width, spatial_scales, *rest):
    return _new_multiscale_pooled(inputs, boxes, pooled_height, pooled_width, spatial_scales)


def _multiscale_impl(inputs, boxes, pooled_height, pooled_width, spatial_scales, sampling_ratio, aligned, *canonical):
    output = _new_multiscale_pooled(inputs, boxes, pooled_height, pooled_width, spatial_scales)
    level_map = _level_map(spatial_scales, *canonical)
    _fwd(boxes.device, inputs, boxes, output, spatial_scales, sampling_ratio, aligned, level_map)
    return output


def _multiscale_vmap(info, in_dims, inputs, boxes, *rest):
    def call(inputs, boxes):
        return _multiscale_roi_align(inputs, boxes, *rest)

    return common.vmap_pool(call, info.batch_size, inputs, in_dims[0] or [None] * len(inputs), boxes, in_dims[1])


_multiscale_roi_align = Operator(
    "multiscale_roi_align(Tensor[] inputs, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
    "float[] spatial_scales, SymInt sampling_ratio, bool aligned, float canonical_scale, float canonical_level)"
    " -> Tensor",
    impl=_multiscale_impl,
    fake=_multiscale_fake,
    vmap=_multiscale_vmap,
    constant=["boxes"],
)


def _multiscale_backward_fake(grad_output, boxes, pooled_height, pooled_width, batch_size, channels, map_sizes, *rest):
    op, channels_last = "_multiscale_roi_align_backward", rest[-1]
    common.check_grad_output(op, grad_output, boxes, channels, pooled_height, pooled_width)
    sizes = zip(map_sizes[::2], map_sizes[1::2], strict=True)
    return [common.empty((batch_size, channels, h, w), grad_output, channels_last) for h, w in sizes]


def _multiscale_backward_impl(grad_output, boxes, *args):
    grad_inputs = _multiscale_backward_fake(grad_output, boxes, *args)
    spatial_scales, sampling_ratio, aligned, *canonical, _ = args[5:]
    level_map = _level_map(spatial_scales, *canonical)
    _bwd(boxes.device, grad_output, boxes, grad_inputs, spatial_scales, sampling_ratio, aligned, level_map)
    return grad_inputs


def _multiscale_backward_vmap(info, in_dims, grad_output, boxes, pooled_height, pooled_width, images, channels, *rest):
    def call(grads, boxes, images, channels):
        return _multiscale_roi_align_backward(grads[0], boxes, pooled_height, pooled_width, images, channels, *rest)

    return common.vmap_pool_backward(
        call, info.batch_size, [grad_output], in_dims[:1], boxes, in_dims[1], images, channels
    )


_multiscale_roi_align_backward = Operator(
    "_multiscale_roi_align_backward(Tensor grad_output, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt[] map_sizes, float[] spatial_scales, SymInt sampling_ratio, "
    "bool aligned, float canonical_scale, float canonical_level, bool channels_last) -> Tensor[]",
    impl=_multiscale_backward_impl,
    fake=_multiscale_backward_fake,
    vmap=_multiscale_backward_vmap,
    constant=["boxes"],
)


class _MultiScaleRoIAlign(Function):
    @staticmethod
    def forward(ctx, boxes, pooled_height, pooled_width, *rest):
        options, inputs = rest[:5], list(rest[5:])
        ctx.save_for_backward(boxes)
        ctx.save_for_forward(boxes)
        ctx.pooled, ctx.options = (pooled_height, pooled_width), options
        map_sizes = [size for x in inputs for size in x.shape[2:]]
        ctx.sizes = (*inputs[0].shape[:2], map_sizes)
        ctx.channels_last = common.prefers_channels_last(inputs[0])
        return _multiscale_roi_align.below_autograd(inputs, boxes, pooled_height, pooled_width, *options)

    @staticmethod
    def backward(ctx, grad_output):
        grads = _multiscale_roi_align_backward(
            grad_output, *ctx.saved_tensors, *ctx.pooled, *ctx.sizes, *ctx.options, ctx.channels_last
        )
        return *[None] * 8, *grads

    @staticmethod
    def jvp(ctx, *tangents):
        tangents = tangents[8:]
        known = next((t for t in tangents if t is not None), None)
        if known is None:
            return None
        sizes = zip(ctx.sizes[2][::2], ctx.sizes[2][1::2], strict=True)
        tangents = [
            known.new_zeros(*ctx.sizes[:2], *size) if t is None else t for t, size in zip(tangents, sizes, strict=True)
        ]
        return _multiscale_roi_align(tangents, *ctx.saved_tensors, *ctx.pooled, *ctx.options)


class _MultiScaleRoIAlignBackward(Function):
    """Linear like RoIAlign: the backward of the backward is the forward."""

    @staticmethod
    def forward(ctx, grad_output, boxes, *args):
        ctx.save_for_backward(boxes)
        ctx.save_for_forward(boxes)
        ctx.args = args
        return tuple(_multiscale_roi_align_backward.below_autograd(grad_output, boxes, *args))

    @staticmethod
    def backward(ctx, *grad_grad_inputs):
        pooled, options = ctx.args[:2], ctx.args[5:10]
        grad = _multiscale_roi_align(list(grad_grad_inputs), *ctx.saved_tensors, *pooled, *options)
        return grad, *[None] * (1 + len(ctx.args))

    @staticmethod
    def jvp(ctx, grad_tangent, *_):
        return tuple(_multiscale_roi_align_backward(grad_tangent, *ctx.saved_tensors, *ctx.args))


_multiscale_roi_align.differentiate(_MultiScaleRoIAlign)
_multiscale_roi_align_backward.differentiate(_MultiScaleRoIAlignBackward)


@specified_by(multiscale_roi_align_reference)
def multiscale_roi_align(
    inputs: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
) -> Tensor:
    """:func:`roi_align` of each box on the level of a feature pyramid that suits its size, in one call.

    Level k of a box of area A is floor(canonical_level + log2(sqrt(A) / canonical_scale) + 1e-6), in the dtype of the
    sampling points, clamped to the levels there are. The first input is level -log2(spatial_scales[0]), and each next
    input is the next level, half as large. A box with one negative side has no level and pools to zero, as in
    torchvision.

    Args:
        inputs: feature maps, Tensor[N, C, Hi, Wi] each, finest first; as in :func:`roi_align`. Inputs of another dtype
            than the first are converted to it.
        boxes: as in :func:`roi_align`, in pixels of the image.
        output_size, sampling_ratio, aligned: as in :func:`roi_align`.
        spatial_scales: one for each input.
        canonical_scale, canonical_level: a box of canonical_scale x canonical_scale pixels belongs to canonical_level.

    Returns:
        Tensor[K, C, height, width] in the dtype and memory format of ``inputs[0]``.

    Raises:
        TypeError, ValueError: as :func:`roi_align`; also when the inputs do not agree in N, C and device.
    """
    op = "multiscale_roi_align"
    if isinstance(inputs, Tensor) or not inputs:
        raise TypeError(f"{op}: inputs must be a list of at least one Tensor[N, C, H, W]")
    for i, x in enumerate(inputs):
        common.check_tensor(op, f"inputs[{i}]", x)
    inputs = [x if x.dtype == inputs[0].dtype else x.to(inputs[0].dtype) for x in inputs]
    boxes = common.rois_from_boxes(op, boxes, inputs[0])
    height, width = common.pair(op, output_size)
    return _multiscale_roi_align.op(
        inputs, boxes, height, width, spatial_scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )


class MultiScaleRoIAlign(nn.Module):
    """:func:`multiscale_roi_align` on the maps of a backbone, with ``torchvision.ops.MultiScaleRoIAlign``'s arguments.

    Args:
        featmap_names: which entries of the dict of feature maps to pool from.
        output_size: bins as (height, width), or one int for both.
        sampling_ratio: as in :func:`roi_align`.
        canonical_scale, canonical_level: as in :func:`multiscale_roi_align`.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: float = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = tuple(common.pair("MultiScaleRoIAlign", output_size))
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pools ``boxes``, one Tensor[L, 4] for each image, in pixels; ``image_shapes`` are their (height, width).

        The scale of each map is the power of two nearest to its height over the largest image's.
        """
        if not image_shapes:
            raise ValueError("MultiScaleRoIAlign: image_shapes must not be empty")
        inputs = [features for name, features in x.items() if name in self.featmap_names]
        height = max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(features.shape[-2] / height)) for features in inputs]
        return multiscale_roi_align(
            inputs,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )
