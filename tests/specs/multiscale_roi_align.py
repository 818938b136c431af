"""RoIAlign on a feature pyramid: samples, errors and benchmark cases."""

from __future__ import annotations

import functools
import math

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs import roi_align as single
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(
    maps, boxes, output_size, spatial_scales, sampling_ratio=-1, aligned=False, canonical_scale=224, canonical_level=4
):
    """What torchvision's MultiScaleRoIAlign does once it knows the scales."""
    from torchvision.ops import poolers

    assert not aligned, "torchvision's pyramid is never aligned"
    levels = [int(-math.log2(scale)) for scale in (spatial_scales[0], spatial_scales[-1])]
    mapper = poolers.initLevelMapper(*levels, canonical_scale, canonical_level)
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    return poolers._multiscale_roi_align(maps, boxes, size, sampling_ratio, spatial_scales, mapper)


def samples(dtype, memory_format):
    def pyramid(images, channels, *sizes):
        shapes = [(images, channels, *size) for size in sizes]
        maps = [inputs.features(*s, dtype=dtype, memory_format=memory_format, seed=i) for i, s in enumerate(shapes)]
        return maps, [2.0 ** -(2 + i) for i in range(len(maps))]

    def split(boxes):
        boxes = boxes.to(inputs.boxes_dtype(dtype))
        return [boxes[: len(boxes) // 2], boxes[len(boxes) // 2 :]]

    maps, scales = pyramid(2, 5, (50, 68), (25, 34), (13, 17), (7, 9))
    boxes = inputs.photo_boxes(40, smallest=4, largest=270) / torch.tensor([4, 4, 4, 4])
    options = {"canonical_scale": 28, "sampling_ratio": 2}
    yield Sample("pyramid", (maps, split(boxes), (3, 2), scales), options)
    yield Sample("adaptive", (maps, split(boxes), 2, scales), {**options, "sampling_ratio": -1})
    yield Sample("aligned", (maps, split(boxes), 2, scales), {**options, "aligned": True}, peer=False)
    yield Sample("canonical_level", (maps, split(boxes), 2, scales), {**options, "canonical_level": 3})
    rois = torch.cat([torch.arange(40)[:, None] % 2, boxes], dim=1).to(inputs.boxes_dtype(dtype))
    yield Sample("rois", (maps, rois, 2, scales), options, peer=False)
    yield Sample("half_boxes", (maps, [b.half() for b in split(boxes)], 2, scales), options, peer=False)
    yield Sample("one_level", (maps[:1], split(boxes), 2, scales[:1]), options)
    yield Sample("two_levels", (maps[1:3], split(boxes), 2, scales[1:3]), options)
    many = [(11 + i, 20 - i) for i in range(10)]
    yield Sample(
        "ten_levels",
        (pyramid(2, 5, *many)[0], split(boxes), 2, [2.0 ** -(2 + i) for i in range(10)]),
        {**options, "canonical_scale": 2},
    )
    yield Sample("no_boxes", (maps, split(boxes[:0]), 2, scales), options)
    for channels in (1, 17, 64):
        few, few_scales = pyramid(2, channels, (16, 12), (8, 6))
        few_boxes = split(inputs.random_rois(8, 1, 64, 48)[:, 1:])
        yield Sample(f"channels_{channels}", (few, few_boxes, 2, few_scales), {"canonical_scale": 24})
    # Sides at which the level changes: 28 is level 4, and the largest float32 below it is, too, thanks to the 1e-6.
    sides = torch.tensor([28.0, 27.999998, 27.9, 28.1, 14.0, 13.999999, 56.0, 55.99, 112.0, 1e-3, 1e3, 7.0])
    squares = torch.cat([torch.ones(len(sides), 2), 1 + sides[:, None].expand(-1, 2)], dim=1)
    yield Sample("level_edges", (maps, split(squares), 2, scales), options)
    degenerate = [[5, 5, 5, 5], [5, 5, 20, 5], [20, 9, 5, 30], [9, 30, 20, 5], [30, 30, 9, 9], [-50, -50, -9, -9.0]]
    yield Sample("degenerate", (maps, split(torch.tensor(degenerate)), 2, scales), options)
    not_finite = torch.tensor([[inputs.NAN, 1, 9, 9], [1, 1, inputs.INF, 9], [-3e38, 1, 3e38, 9], [1, 2, 20, 30]])
    yield Sample("not_finite", (maps, split(not_finite), 2, scales), options, peer=False)
    sliced = [x[:, 1:4, 1:, ::2] for x in maps]
    yield Sample("sliced", (sliced, split(boxes), 2, scales), options)


def errors():
    maps = [torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8)]
    good = {"inputs": maps, "boxes": torch.zeros(2, 5), "output_size": 2, "spatial_scales": [0.5, 0.25]}
    for id, change, error, match in (
        ("inputs_empty", {"inputs": [], "spatial_scales": []}, TypeError, "inputs must be a list of at least one"),
        ("inputs_tensor", {"inputs": maps[0]}, TypeError, "inputs must be a list of at least one"),
        ("inputs_type", {"inputs": [maps[0], 3]}, TypeError, r"inputs\[1\] must be a torch.Tensor, got int"),
        ("inputs_rank", {"inputs": [maps[0], maps[1][0]]}, ValueError, r"inputs\[1\] must have shape \[N, C, H, W\]"),
        ("inputs_channels", {"inputs": [maps[0], maps[1][:, :2]]}, ValueError, "inputs must agree in N, C and dtype"),
        ("inputs_sparse", {"inputs": [maps[0], maps[1].to_sparse()]}, TypeError, "must be dense"),
        ("inputs_device", {"inputs": [maps[0], maps[1].to("meta")]}, ValueError, "must be on one device"),
        (
            "scales_count",
            {"spatial_scales": [0.5]},
            ValueError,
            "spatial_scales must be one for each of the 2 inputs, got 1",
        ),
        ("scales_negative", {"spatial_scales": [0.5, -0.25]}, ValueError, "spatial_scale must be positive and finite"),
        ("boxes_shape", {"boxes": torch.zeros(7, 4)}, ValueError, r"boxes must have shape \[K, 5\], got \[7, 4\]"),
        ("size_zero", {"output_size": 0}, ValueError, "output_size must be at least 1 x 1"),
        (
            "index_high",
            {"boxes": torch.tensor([[1.0, 0, 0, 2, 2]])},
            ValueError,
            r"batch index must be in \[0, 1\), got 1",
        ),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=match)


STRIDES = (4, 8, 16, 32)


def bench():
    for bins, count, images, quick in (
        (7, 1000, 1, True),
        (7, 1000, 2, False),
        (14, 100, 1, False),
        (7, 200, 1, False),
    ):
        boxes = inputs.photo_boxes(count, smallest=16, largest=700)
        shapes = [(images, 256, -(-inputs.IMAGE_HEIGHT // s), inputs.IMAGE_WIDTH // s) for s in STRIDES]
        level = (4 + ((boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 224).log2()).floor().clamp(2, 5) - 2
        rois = torch.cat([(torch.arange(count) * images // count)[:, None], boxes], dim=1)
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for backward in (False, True):
                parts = [
                    single.floors(rois[level == i], shape, 1 / stride, bins, 2, backward)
                    for i, (shape, stride) in enumerate(zip(shapes, STRIDES, strict=True))
                ]

                def make(rois=rois, images=images, shapes=shapes, memory_format=memory_format, bins=bins):
                    maps = [
                        inputs.features(*shape, memory_format=memory_format, seed=i) for i, shape in enumerate(shapes)
                    ]
                    boxes = [rois[rois[:, 0] == i, 1:] for i in range(images)]
                    return (maps, boxes, bins, [1 / stride for stride in STRIDES], 2), {}

                direction = "backward" if backward else "forward"
                yield BenchCase(
                    f"{direction} {images}x256x200x272 and 3 more levels {layout}, {count} boxes, {bins}x{bins}",
                    f"{direction} {bins}x{bins} {layout}",
                    make,
                    backward=backward,
                    size=count * 256,
                    quick=quick,
                    **{key: sum(part[key] for part in parts) for key in parts[0]},
                )


SPEC = OpSpec(
    name="multiscale_roi_align",
    op=pyzoo.ops.multiscale_roi_align,
    reference=functools.partial(pyzoo.ops.multiscale_roi_align_reference, dtype=torch.float64),
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torchvision",
    differentiable=(0,),
    tolerances=single.SPEC.tolerances,
    tensors=2,
    typical="rois",
    small=functools.partial(
        inputs.small_pooling,
        lambda x, boxes: pyzoo.ops.multiscale_roi_align(
            [x, 2 * x[:, :, 1:4, 1:3]], boxes, 2, [1.0, 0.5], 2, canonical_scale=32
        ),
    ),
    export=inputs.export_pooling,
    huge=functools.partial(
        inputs.huge_pooling, lambda x, boxes: pyzoo.ops.multiscale_roi_align([x, x], boxes, 3, [1.0, 1.0], 2)
    ),
)
