"""RoIAlign: samples, errors and benchmark cases."""

from __future__ import annotations

import functools

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(*args, **kwargs):
    from torchvision.ops import roi_align

    return roi_align(*args, **kwargs)


SAMPLINGS = (
    {"sampling_ratio": 2},
    {"sampling_ratio": -1},
    {"sampling_ratio": 3, "aligned": True},
    {"sampling_ratio": 0, "aligned": True},
)


def samples(dtype, memory_format):
    for id, x, boxes, output_size, scale, has_peer in inputs.pooling_inputs(dtype, memory_format):
        for kwargs in SAMPLINGS:
            name = f"{id}-{kwargs['sampling_ratio']}{'a' if 'aligned' in kwargs else ''}"
            overflows = id == "inverted" and kwargs["sampling_ratio"] == 0  # the peer tries to allocate -n samples
            yield Sample(name, (x, boxes, output_size, scale), kwargs, peer=has_peer and not overflows)
    boxes = inputs.random_rois(4, 2, 13, 17).to(inputs.boxes_dtype(dtype))
    yield Sample(
        "many_samples",
        (inputs.features(2, 5, 13, 17, dtype=dtype, memory_format=memory_format), boxes, 3),
        {"sampling_ratio": 11},
    )
    # A bin of 2^30 pixels: most of its samples lie outside, and the rest is hardly anything.
    huge = torch.tensor([[0, 0, 2, 1e9, 9], [1, -1e30, 2, 1e30, 9], [0, 3e8, 3e8, 4e8, 4e8]]).to(
        inputs.boxes_dtype(dtype)
    )
    x = inputs.features(2, 5, 13, 17, dtype=dtype, memory_format=memory_format)
    yield Sample("huge", (x, huge, 2), {"sampling_ratio": 2})


def errors():
    good = {"input": torch.zeros(1, 3, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 2}
    for id, change, error, match in inputs.POOLING_ERRORS:
        yield ErrorSample(
            id, (), {**good, **change}, error=error, match=f"^(roi_align|boxes): .*{match}|^roi_align: {match}"
        )


def _taps(pixels: torch.Tensor, sampling_ratio: int) -> torch.Tensor:
    """About how many pixels of an axis have a weight in a bin of ``pixels`` pixels."""
    grid = torch.full_like(pixels, sampling_ratio) if sampling_ratio > 0 else pixels.ceil().clamp(min=1)
    return torch.minimum(2 * grid, pixels - pixels / grid + 2)


def floors(rois, shape, scale, bins, sampling_ratio, backward):
    """Bytes: the touched features, or for the backward all of their gradient, and the pooled tensor once. Operations:
    one multiply-add for each bin, channel and pixel of non-zero weight in the bin."""
    images, channels, height, width = shape
    pixels = images * height * width if backward else inputs.touched_pixels(rois, scale, images, height, width)
    size = ((rois[:, 3:] - rois[:, 1:3]) * scale).clamp(min=1) / bins
    taps = _taps(size[:, 0], sampling_ratio) * _taps(size[:, 1], sampling_ratio)
    return {
        "floor_bytes": 4.0 * channels * (pixels + len(rois) * bins * bins) + 20.0 * len(rois),
        "floor_flops": 2.0 * channels * bins * bins * float(taps.sum()),
    }


BENCH = (  # group, feature shape, stride, boxes, their sides in pixels, bins, sampling_ratio, sizes run by --quick
    ("7x7, sampling 2", (2, 256, 50, 68), 16, (64, 512, 2000), (16, 400), 7, 2, (512,)),
    ("7x7, adaptive", (2, 256, 50, 68), 16, (64, 512, 2000), (16, 400), 7, -1, (512,)),
    ("7x7, one image, adaptive", (1, 256, 50, 68), 16, (1000,), (16, 400), 7, -1, ()),
    ("7x7, FPN level, sampling 2", (1, 256, 200, 272), 4, (1000,), (16, 112), 7, 2, (1000,)),
    ("14x14 mask head, sampling 2", (1, 256, 100, 136), 8, (100,), (32, 400), 14, 2, (100,)),
    ("7x7, 64 channels, adaptive", (1, 64, 25, 34), 32, (20, 100), (32, 400), 7, -1, (100,)),
    ("2x2, tiny", (1, 4, 8, 8), 1, (1,), (4, 8), 2, 2, (1,)),
)


def bench():
    for group, shape, stride, counts, (smallest, largest), bins, sampling_ratio, quick in BENCH:
        for count in counts:
            rois = inputs.photo_rois(count, shape[0], smallest=smallest, largest=largest)
            if stride == 1:
                rois = torch.tensor([[0.0, 1, 1, 6, 7]])
            for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
                for backward in (False, True):

                    def make(
                        rois=rois, shape=shape, memory_format=memory_format, rest=(bins, 1 / stride, sampling_ratio)
                    ):
                        return (inputs.features(*shape, memory_format=memory_format), rois, *rest), {}

                    direction = "backward" if backward else "forward"
                    yield BenchCase(
                        f"{direction} {'x'.join(map(str, shape))} {layout}, {count} boxes, {group}",
                        f"{direction} {group} {layout}",
                        make,
                        backward=backward,
                        size=count * shape[1],
                        quick=count in quick,
                        **floors(rois, shape, 1 / stride, bins, sampling_ratio, backward),
                    )


SPEC = OpSpec(
    name="roi_align",
    op=pyzoo.ops.roi_align,
    # Same sampling points, but interpolated and summed in float64.
    reference=functools.partial(pyzoo.ops.roi_align_reference, dtype=torch.float64),
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torchvision",
    differentiable=(0,),
    # A value is a weighted mean of a few dozen numbers of size one, a gradient the sum of that many: some ten roundings
    # of the accumulator (float32, or float64), then one to the dtype of the result: 2^-11 and 2^-8.
    tolerances={
        torch.float32: (1e-5, 2e-6),
        torch.float64: (1e-13, 1e-14),
        torch.float16: (1e-3, 1e-5),
        torch.bfloat16: (8e-3, 1e-5),
    },
    tensors=2,
    small=functools.partial(
        inputs.small_pooling,
        lambda x, boxes: pyzoo.ops.roi_align(x, boxes, 2, 0.9, 2),
    ),
    export=inputs.export_pooling,
    huge=functools.partial(inputs.huge_pooling, lambda x, boxes: pyzoo.ops.roi_align(x, boxes, 3)),
)
