"""RoIPool: samples, errors and benchmark cases."""

from __future__ import annotations

import functools

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(*args, **kwargs):
    from torchvision.ops import roi_pool

    return roi_pool(*args, **kwargs)


def samples(dtype, memory_format):
    for id, x, boxes, output_size, scale, has_peer in inputs.pooling_inputs(dtype, memory_format):
        yield Sample(id, (x, boxes, output_size, scale), peer=has_peer)
    boxes = inputs.random_rois(9, 2, 13, 17).to(inputs.boxes_dtype(dtype))
    x = inputs.features(2, 5, 13, 17, memory_format=memory_format)
    yield Sample("ties", (x.mul(2).round().to(dtype), boxes, (3, 4)))
    yield Sample("all_equal", (torch.ones_like(x, dtype=dtype), boxes, (3, 4)))
    yield Sample("all_nan", (torch.full_like(x, inputs.NAN, dtype=dtype), boxes, (3, 4)))
    yield Sample("all_minus_inf", (torch.full_like(x, -inputs.INF, dtype=dtype), boxes, (3, 4)))
    huge = torch.tensor([[0, 0, 2, 1e9, 9], [0, 3e8, 3e8, 4e8, 4e8]]).to(inputs.boxes_dtype(dtype))
    yield Sample("huge", (x.to(dtype), huge, 2))
    # Bins of more pixels than a byte can number.
    large = inputs.features(1, 5, 33, 40, dtype=dtype, memory_format=memory_format)
    yield Sample("large_bins", (large, torch.tensor([[0, 1, 1, 38, 31], [0, 9, 3, 12, 8.0]]).to(huge.dtype), (1, 2)))
    beyond = torch.tensor([[0, 0, 2, 3e9, 9], [1, -1e30, 2, 1e30, 9]]).to(inputs.boxes_dtype(dtype))
    yield Sample("beyond_int32", (x.to(dtype), beyond, 2), peer=False)


def errors():
    good = {"input": torch.zeros(1, 3, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 2}
    for id, change, error, match in inputs.POOLING_ERRORS:
        yield ErrorSample(
            id, (), {**good, **change}, error=error, match=f"^(roi_pool|boxes): .*{match}|^roi_pool: {match}"
        )


def floors(rois, shape, scale, bins, backward):
    """Bytes: the touched features, for the backward all of the gradient, too; and the pooled tensor once. Operations:
    one comparison for each channel and pixel of a box."""
    images, channels, height, width = shape
    pixels = inputs.touched_pixels(rois, scale, images, height, width) + images * height * width * backward
    sides = ((rois[:, 3:] - rois[:, 1:3]) * scale).round() + 1
    return {
        "floor_bytes": 4.0 * channels * (pixels + len(rois) * bins * bins) + 20.0 * len(rois),
        "floor_flops": channels * float(sides.prod(1).sum()),
    }


BENCH = (  # group, feature shape, stride, boxes, their sides in pixels, bins, sizes run by --quick
    ("7x7", (2, 256, 50, 68), 16, (64, 512, 2000), (16, 400), 7, (512,)),
    ("7x7, one image", (1, 256, 50, 68), 16, (1000,), (16, 400), 7, ()),
    ("7x7, FPN level", (1, 256, 200, 272), 4, (1000,), (16, 112), 7, (1000,)),
    ("14x14", (1, 256, 100, 136), 8, (100,), (32, 400), 14, ()),
    ("7x7, 64 channels", (1, 64, 25, 34), 32, (20, 100), (32, 400), 7, (100,)),
    ("2x2, tiny", (1, 4, 8, 8), 1, (1,), (4, 8), 2, (1,)),
)


def bench():
    for group, shape, stride, counts, (smallest, largest), bins, quick in BENCH:
        for count in counts:
            rois = inputs.photo_rois(count, shape[0], smallest=smallest, largest=largest)
            if stride == 1:
                rois = torch.tensor([[0.0, 1, 1, 6, 7]])
            for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
                for backward in (False, True):

                    def make(rois=rois, shape=shape, memory_format=memory_format, rest=(bins, 1 / stride)):
                        return (inputs.features(*shape, memory_format=memory_format), rois, *rest), {}

                    direction = "backward" if backward else "forward"
                    yield BenchCase(
                        f"{direction} {'x'.join(map(str, shape))} {layout}, {count} boxes, {group}",
                        f"{direction} {group} {layout}",
                        make,
                        backward=backward,
                        size=count * shape[1],
                        quick=count in quick,
                        **floors(rois, shape, 1 / stride, bins, backward),
                    )


SPEC = OpSpec(
    name="roi_pool",
    op=pyzoo.ops.roi_pool,
    reference=pyzoo.ops.roi_pool_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torchvision",
    differentiable=(0,),
    # The values are copies, and equal; gradients are sums of a few dozen numbers of size one, then rounded to their
    # dtype.
    tolerances={
        torch.float32: (1e-6, 1e-6),
        torch.float64: (1e-14, 1e-14),
        torch.float16: (1e-3, 1e-5),
        torch.bfloat16: (8e-3, 1e-5),
    },
    tensors=2,
    small=functools.partial(
        inputs.small_pooling,
        lambda x, boxes: pyzoo.ops.roi_pool(x, boxes, 2, 0.9),
    ),
    export=inputs.export_pooling,
    huge=functools.partial(inputs.huge_pooling, lambda x, boxes: pyzoo.ops.roi_pool(x, boxes, 3)),
)
