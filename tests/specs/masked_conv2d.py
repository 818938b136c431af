"""Masked convolution: samples, errors and benchmark cases."""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional as F

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample

MASKS = ("A", "B", "vertical_a", "vertical_b", "horizontal_a", "horizontal_b")


@functools.cache
def float_mask(out_channels, in_channels, kernel, mask, colors=1, gates=1, groups=1):
    """What a user multiplies the weight with."""
    live = torch.zeros(out_channels, in_channels // groups, *kernel)
    row, column = kernel[0] // 2, kernel[1] // 2
    if not mask.startswith("horizontal"):
        live[:, :, :row] = 1
    if mask.startswith("vertical"):
        live[:, :, row] = mask == "vertical_b"
        return live
    live[:, :, row, :column] = 1
    for o in range(out_channels):
        color = o % (out_channels // gates) * colors // (out_channels // gates)
        for i in range(in_channels // groups):
            other = (o * groups // out_channels * (in_channels // groups) + i) * colors // in_channels
            live[o, i, row, column] = other < color if mask[-1] in "Aa" else other <= color
    return live


def peer(input, weight, bias=None, *, mask, colors=1, gates=1, groups=1, dilation=1):
    kernel = tuple(weight.shape[2:])
    live = float_mask(weight.shape[0], input.shape[1], kernel, mask, colors, gates, groups).to(weight.dtype)
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = [size // 2 * step for size, step in zip(kernel, steps, strict=True)]
    return F.conv2d(input, weight * live, bias, padding=padding, dilation=dilation, groups=groups)


def random(shape, weight_shape, dtype, memory_format, *, bias=True, seed=0):
    """(input, weight, bias); the weight scaled so that outputs are about 1."""
    x = inputs.features(*shape, dtype=dtype, memory_format=memory_format, seed=seed)
    scale = 1 / math.sqrt(max(math.prod(weight_shape[1:]), 1))
    weight = (torch.randn(weight_shape, generator=inputs.generator(seed + 1)) * scale).to(dtype)
    return x, weight, torch.randn(weight_shape[0], generator=inputs.generator(seed + 2)).to(dtype) if bias else None


SAMPLES = (  # id, input, weight, keywords
    ("typical", (2, 4, 9, 8), (6, 4, 3, 3), {"mask": "B"}),
    *((f"mask_{mask}", (2, 3, 7, 9), (4, 3, 5, 5), {"mask": mask}) for mask in MASKS),
    *((f"one_row_kernel_{mask}", (2, 3, 5, 9), (4, 3, 1, 5), {"mask": mask}) for mask in MASKS),
    *((f"one_column_kernel_{mask}", (2, 3, 7, 5), (4, 3, 5, 1), {"mask": mask}) for mask in MASKS),
    *((f"one_tap_{mask}", (2, 3, 4, 5), (4, 3, 1, 1), {"mask": mask}) for mask in MASKS),
    *(
        (f"colors_{mask}", (2, 6, 5, 7), (12, 6, 3, 5), {"mask": mask, "colors": 3, "gates": gates})
        for mask, gates in (("A", 1), ("B", 2), ("horizontal_a", 2), ("horizontal_b", 1))
    ),
    ("colors_image", (2, 3, 6, 6), (12, 3, 7, 7), {"mask": "A", "colors": 3, "gates": 2}),
    ("colors_one_tap", (2, 24, 3, 5), (48, 24, 1, 1), {"mask": "B", "colors": 3, "gates": 2}),
    ("colors_wide", (1, 66, 3, 5), (96, 66, 1, 3), {"mask": "B", "colors": 3, "gates": 2}),
    ("colors_groups", (2, 12, 4, 5), (24, 6, 3, 3), {"mask": "B", "colors": 3, "gates": 2, "groups": 2}),
    ("gates_alone", (2, 4, 4, 5), (6, 4, 3, 3), {"mask": "A", "gates": 2}),
    ("groups", (2, 6, 5, 5), (9, 2, 3, 3), {"mask": "B", "groups": 3}),
    ("depthwise", (2, 5, 6, 5), (5, 1, 3, 3), {"mask": "A", "groups": 5}),
    ("dilation", (2, 3, 9, 11), (4, 3, 3, 3), {"mask": "B", "dilation": 2}),
    ("dilation_pair", (2, 3, 9, 11), (4, 3, 3, 5), {"mask": "A", "dilation": (3, 2)}),
    ("dilation_beyond", (1, 3, 4, 5), (4, 3, 3, 3), {"mask": "vertical_b", "dilation": (2, 9)}),
    *((f"channels_{c}", (1, c, 4, 19), (c + 3, c, 3, 3), {"mask": "B"}) for c in (1, 7, 17, 33, 70)),
    # Gradients of few channels from many.
    ("image", (2, 1, 9, 20), (40, 1, 5, 5), {"mask": "A"}),
    ("image_colors", (1, 3, 5, 18), (96, 3, 3, 3), {"mask": "B", "colors": 3, "gates": 2}),
    ("image_groups", (2, 2, 6, 7), (96, 1, 3, 5), {"mask": "vertical_b", "groups": 2}),
    ("image_dilation", (1, 1, 9, 11), (48, 1, 3, 3), {"mask": "B", "dilation": (2, 3)}),
    ("image_small", (1, 1, 2, 1), (64, 1, 5, 5), {"mask": "B"}),
    ("image_tall", (2, 1, 70, 9), (33, 1, 5, 3), {"mask": "B"}),
    ("one_channel", (2, 1, 6, 7), (1, 1, 3, 3), {"mask": "A"}),
    ("one_pixel", (2, 3, 1, 1), (4, 3, 3, 3), {"mask": "B"}),
    ("one_row", (1, 3, 1, 17), (4, 3, 3, 5), {"mask": "B"}),
    ("one_column", (1, 3, 17, 1), (4, 3, 3, 5), {"mask": "B"}),
    ("kernel_above_map", (1, 2, 3, 2), (3, 2, 7, 9), {"mask": "B"}),
    ("wide_map", (1, 2, 3, 61), (3, 2, 3, 3), {"mask": "B"}),
    ("tall_map", (1, 2, 70, 9), (3, 2, 5, 3), {"mask": "A"}),
    ("no_images", (0, 3, 5, 5), (4, 3, 3, 3), {"mask": "B"}),
    ("no_rows", (2, 3, 0, 5), (4, 3, 3, 3), {"mask": "B"}),
    ("no_columns", (2, 3, 5, 0), (4, 3, 3, 3), {"mask": "B"}),
)


def samples(dtype, memory_format):
    for id, shape, weight_shape, kwargs in SAMPLES:
        # The peer takes no map without pixels.
        yield Sample(id, random(shape, weight_shape, dtype, memory_format), kwargs, peer=0 not in shape[2:])
    x, weight, bias = random((2, 4, 6, 7), (5, 4, 3, 3), dtype, memory_format)
    yield Sample("no_bias", (x, weight, None), {"mask": "B"})
    yield Sample("sliced", (inputs.features(3, 8, 8, 16, dtype=dtype)[1:, ::2, 2:, ::2], weight, bias), {"mask": "B"})
    yield Sample("transposed", (inputs.features(2, 4, 7, 6, dtype=dtype).transpose(2, 3), weight, bias), {"mask": "B"})
    yield Sample(
        "expanded", (inputs.features(1, 4, 1, 7, dtype=dtype).expand(2, -1, 6, -1), weight, bias), {"mask": "A"}
    )
    yield Sample("weight_strides", (x, weight.transpose(2, 3), bias.flip(0)[::1]), {"mask": "B"})
    yield Sample("weight_expanded", (x, weight[:1].expand(5, -1, -1, -1), bias[:1].expand(5)), {"mask": "B"})
    # What lies under the mask never matters; the peer's NaN * 0 is NaN.
    for mask in ("A", "vertical_a", "horizontal_b"):
        junk = torch.where(float_mask(5, 4, (3, 3), mask) == 0, inputs.NAN, weight).to(dtype)
        yield Sample(f"junk_nan_{mask}", (x, junk, bias), {"mask": mask}, peer=False)
    x, weight, bias = random((2, 6, 5, 6), (12, 6, 3, 3), dtype, memory_format)
    junk = torch.where(float_mask(12, 6, (3, 3), "B", 3, 2) == 0, inputs.NAN, weight).to(dtype)
    yield Sample("junk_nan_colors", (x, junk, bias), {"mask": "B", "colors": 3, "gates": 2}, peer=False)
    x, weight, bias = random((1, 3, 4, 5), (96, 3, 3, 3), dtype, memory_format)
    junk = torch.where(float_mask(96, 3, (3, 3), "B", 3, 2) == 0, inputs.NAN, weight).to(dtype)
    yield Sample("junk_nan_image", (x, junk, bias), {"mask": "B", "colors": 3, "gates": 2}, peer=False)
    x, weight, bias = random((2, 6, 5, 6), (12, 6, 3, 3), dtype, memory_format)
    for id, value in (("nan", inputs.NAN), ("inf", inputs.INF)):
        holes = x.clone()
        holes[0, 2, 3, 3] = value
        for mask in ("A", "B"):
            yield Sample(f"{id}_{mask}", (holes, weight, bias), {"mask": mask, "colors": 3}, peer=False)


def errors():
    good = {"input": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6), "mask": "B"}
    for id, change, error, match in (
        (
            "input_rank",
            {"input": torch.zeros(4, 5, 5)},
            ValueError,
            r"input must have shape \[N, C, H, W\], got \[4, 5",
        ),
        ("input_type", {"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
        (
            "input_integer",
            {"input": torch.zeros(1, 4, 5, 5).long()},
            TypeError,
            "input must be float32.*got torch.int64",
        ),
        ("input_sparse", {"input": torch.zeros(1, 4, 5, 5).to_sparse()}, TypeError, "must be dense"),
        (
            "input_channels",
            {"input": torch.zeros(1, 3, 5, 5)},
            ValueError,
            r"input must have 4 channels for weight .*got 3",
        ),
        (
            "weight_rank",
            {"weight": torch.zeros(6, 4, 3)},
            ValueError,
            r"weight must have shape \[OC, IC / groups, KH, KW\]",
        ),
        (
            "weight_dtype",
            {"weight": torch.zeros(6, 4, 3, 3).double()},
            TypeError,
            "input and weight must have one dtype",
        ),
        ("weight_type", {"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        (
            "weight_device",
            {"weight": torch.zeros(6, 4, 3, 3, device="meta")},
            ValueError,
            "on one device, got cpu and meta",
        ),
        (
            "kernel_even",
            {"weight": torch.zeros(6, 4, 2, 3)},
            ValueError,
            "kernel must have odd height and width, got 2 x 3",
        ),
        ("bias_shape", {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[6\], got \[4\]"),
        ("bias_dtype", {"bias": torch.zeros(6).half()}, TypeError, "input and bias must have one dtype"),
        ("bias_type", {"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ("bias_device", {"bias": torch.zeros(6, device="meta")}, ValueError, "on one device, got cpu and meta"),
        ("mask", {"mask": "C"}, ValueError, "mask must be one of 'A', 'B', 'vertical_a'.*got 'C'"),
        ("mask_type", {"mask": 1}, ValueError, "mask must be one of 'A', 'B', 'vertical_a'.*got 1"),
        ("groups_zero", {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        (
            "groups",
            {"groups": 4, "weight": torch.zeros(6, 1, 3, 3)},
            ValueError,
            "groups must divide .*groups=4 for 4 and 6",
        ),
        ("colors", {"colors": 3}, ValueError, "colors must divide .*colors=3, gates=1 for 4 and 6"),
        ("gates", {"colors": 2, "gates": 2}, ValueError, "colors must divide .*colors=2, gates=2 for 4 and 6"),
        ("colors_negative", {"colors": -1}, ValueError, "colors must be at least 1, got -1"),
        ("colors_vertical", {"colors": 2, "mask": "vertical"}, ValueError, "colors must be 1 for mask 'vertical_b'"),
        ("dilation_zero", {"dilation": 0}, ValueError, "dilation must be at least 1, got 0 x 0"),
        ("dilation_type", {"dilation": 1.5}, TypeError, "dilation must be an int or two ints, got 1.5"),
        ("dilation_three", {"dilation": (1, 2, 3)}, ValueError, "dilation must be an int or two ints, got 3 values"),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=f"^masked_conv2d: .*{match}")


# Layers of PixelCNNs. id, mask, kernel, (images, in, out channels, side), colors and gates, whether --quick runs it
BENCH = (
    *(
        ("B", (size, size), shape, {}, quick)
        for size, shapes in (
            (3, ((32, 16, 16, 32), (16, 32, 64, 28), (16, 64, 64, 32), (8, 128, 128, 32), (4, 256, 256, 32))),
            (5, ((16, 16, 16, 28), (16, 32, 32, 28), (8, 64, 64, 32), (8, 128, 128, 32), (2, 256, 256, 32))),
            (7, ((16, 16, 16, 28), (8, 32, 32, 28), (8, 64, 64, 32), (4, 128, 128, 32), (2, 256, 256, 16))),
        )
        for shape, quick in zip(shapes, (False, True, False, size == 3, False), strict=True)
    ),
    ("B", (3, 3), (64, 64, 64, 8), {}, False),
    ("B", (3, 3), (2, 32, 32, 128), {}, False),
    ("A", (7, 7), (16, 1, 64, 28), {}, False),
    ("A", (7, 7), (8, 3, 120, 32), {"colors": 3}, True),
    ("vertical_b", (3, 3), (8, 64, 128, 32), {}, False),
    ("horizontal_b", (1, 3), (8, 66, 132, 32), {"colors": 3, "gates": 2}, False),
    ("B", (1, 1), (8, 120, 120, 32), {"colors": 3}, False),
    ("B", (3, 3), (1, 4, 4, 8), {}, True),
)


def arguments(shape, weight_shape, memory_format, keywords):
    return random(shape, weight_shape, torch.float32, memory_format), keywords


def bench():
    for mask, kernel, (images, in_channels, out_channels, side), order, quick in BENCH:
        live = float(float_mask(out_channels, in_channels, kernel, mask, **order).sum())
        weights = out_channels * in_channels * kernel[0] * kernel[1]
        pixels = images * side * side
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for backward in (False, True):
                shape, weight_shape = (images, in_channels, side, side), (out_channels, in_channels, *kernel)
                direction = "backward" if backward else "forward"
                channels = pixels * (in_channels * (1 + backward) + out_channels)
                colors = ", colors" if order else ""
                case = f"{mask} {kernel[0]}x{kernel[1]}, {images}x{in_channels}x{side}x{side} to {out_channels}{colors}"
                yield BenchCase(
                    f"{direction} {case} {layout}",
                    f"{kernel[0]}x{kernel[1]}",
                    functools.partial(arguments, shape, weight_shape, memory_format, {"mask": mask, **order}),
                    backward=backward,
                    size=out_channels,
                    floor_bytes=4.0 * (channels + weights * (1 + backward)),
                    floor_flops=2.0 * pixels * live * (1 + backward),
                    quick=quick,
                )


def small(dtype, memory_format):
    x = torch.randn(1, 2, 3, 3, generator=inputs.generator()).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 2, 3, 3, generator=inputs.generator(1)).to(dtype)
    bias = torch.randn(4, generator=inputs.generator(2)).to(dtype)
    return lambda *args: pyzoo.ops.masked_conv2d(*args, mask="A", colors=2), (x, weight, bias)


def export(tensors):
    """The number of images, height and width."""
    x, *rest = tensors
    dim = torch.export.Dim.DYNAMIC
    smaller = torch.empty_like(x[:, :, 1:, 2:]).copy_(x[:, :, 1:, 2:])
    return ({2: dim, 3: dim}, None, None), [smaller, *rest]


def huge(sparse, memory_format):
    """Images and channels far apart in memory."""
    x, weight, bias = random((2, 3, 5, 6), (4, 3, 3, 3), torch.float64, memory_format)
    strides = (2**31, 2**28, 6, 1) if memory_format == torch.contiguous_format else (2**31, 1, 2**28, 3)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    far = sparse(last + 1).as_strided(x.shape, strides)
    x, weight, bias = (t.to(far.dtype) for t in (x, weight, bias))
    far.copy_(x)
    return tuple(pyzoo.ops.masked_conv2d(t, weight, bias, mask="B") for t in (far, x))


SPEC = OpSpec(
    name="masked_conv2d",
    op=pyzoo.ops.masked_conv2d,
    reference=pyzoo.ops.masked_conv2d_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="F.conv2d(x, w * mask)",
    differentiable=(0, 1, 2),
    # Sums of up to some thousand terms in another order; of 16 bits are results and what second derivatives start from.
    tolerances={
        torch.float64: (1e-9, 1e-11),
        torch.float32: (1e-4, 1e-5),
        torch.float16: (4e-3, 2e-3),
        torch.bfloat16: (3e-2, 1.6e-2),
    },
    autocast=True,
    tensors=3,
    small=small,
    export=export,
    huge=huge,
)
