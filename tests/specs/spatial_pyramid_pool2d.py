"""Spatial pyramid pooling: samples, errors and benchmark cases."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

import pyzoo.ops
from tests.specs import inputs
from tests.specs.inputs import INF, NAN
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(input, levels=(1, 2, 4), mode="max"):
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return torch.cat([pool(input, level).flatten(1) for level in levels], 1)


def samples(dtype, memory_format):
    def maps(*shape, seed=0):
        return inputs.features(*shape, dtype=dtype, memory_format=memory_format, seed=seed)

    x = maps(2, 5, 13, 17)
    for mode in ("max", "avg"):

        def sample(id, x, levels=(1, 2, 4), mode=mode, **kwargs):
            return Sample(f"{id}_{mode}", (x, levels, mode), **kwargs)

        yield sample("random", x)
        yield sample("defaults" if mode == "max" else "one_level", x, [3])
        for channels in (1, 3, 16, 17, 33, 64, 130):
            yield sample(f"channels_{channels}", maps(2, channels, 9, 10, seed=channels), (1, 3))
        yield sample("divides", maps(1, 20, 24, 36), (1, 2, 3, 6))
        yield sample("shares_pixels", maps(2, 20, 13, 13), (6, 3, 2, 1))
        yield sample("tall", maps(2, 20, 75, 9), (1, 2, 4))
        yield sample("wide", maps(2, 20, 9, 75), (1, 2, 4))
        yield sample("large", maps(1, 18, 70, 67), (1, 2, 3, 6, 8))
        yield sample("large_plane", maps(1, 2, 200, 210), (1, 5))
        yield sample("pairs", x, [(1, 3), 2, (4, 1), (5, 6)])
        yield sample("same_twice", x, (2, 2, (4, 2)))
        yield sample("finer_than_map", x, (20, 1, 40))
        yield sample("one_pixel", maps(2, 3, 1, 1), (1, 2, 3))
        yield sample("one_row", maps(2, 3, 1, 9))
        yield sample("one_column", maps(2, 3, 9, 1))
        yield sample("no_images", x[:0])
        yield sample("no_channels", x[:, :0], peer=False)
        yield sample("unbatched", x[0], peer=False)
        yield sample("sliced", maps(3, 8, 15, 20)[1:, 1:6, ::2, 2:-1])
        yield sample("transposed", maps(2, 5, 17, 13).transpose(2, 3))
        yield sample("expanded", maps(1, 1, 13, 17).expand(2, 5, -1, -1))
        yield sample("repeated_pixel", maps(2, 5, 1, 1).expand(-1, -1, 13, 17))
        yield sample("ties", x.mul(2).round())
        yield sample("all_equal", torch.ones_like(x))
        yield sample("zeros_of_both_signs", x.mul(0))
        yield sample("all_nan", torch.full_like(x, NAN))
        yield sample("all_minus_inf", torch.full_like(x, -INF))
        holes = maps(2, 20, 75, 19)
        holes[:, :, 4:7, 3:9] = NAN
        holes[0, 3, 40, 2] = -NAN
        yield sample("nan_pixels", holes, (1, 2, 3, 6))
        yield sample("inf_pixels", holes.nan_to_num(INF), (1, 2, 3, 6))


def errors():
    good = {"input": torch.zeros(1, 3, 8, 8), "levels": (1, 2), "mode": "max"}
    for id, change, error, match in (
        ("input_rank", {"input": torch.zeros(8, 8)}, ValueError, r"input must have shape \[N, C, H, W\], got \[8, 8\]"),
        (
            "input_integer",
            {"input": torch.zeros(1, 3, 8, 8).int()},
            TypeError,
            "input must be float32.*got torch.int32",
        ),
        ("input_array", {"input": [[1.0]]}, TypeError, "input must be a torch.Tensor, got list"),
        ("input_sparse", {"input": torch.zeros(1, 3, 8, 8).to_sparse()}, TypeError, "must be dense"),
        ("no_rows", {"input": torch.zeros(1, 3, 0, 8)}, ValueError, r"must have pixels, got shape \[1, 3, 0, 8\]"),
        ("no_columns", {"input": torch.zeros(0, 3, 8, 0)}, ValueError, r"must have pixels, got shape \[0, 3, 8, 0\]"),
        ("levels_empty", {"levels": ()}, ValueError, "levels must name at least one grid"),
        ("levels_int", {"levels": 4}, TypeError, "levels must be a tuple or a list, got int"),
        ("levels_zero", {"levels": (1, 0)}, ValueError, "levels must be at least 1 x 1, got 0 x 0"),
        ("levels_negative", {"levels": [(2, -1)]}, ValueError, "levels must be at least 1 x 1, got 2 x -1"),
        ("levels_float", {"levels": (1, 2.0)}, TypeError, r"levels must be ints or \(height, width\).*got 2.0"),
        ("levels_three", {"levels": [(1, 2, 3)]}, TypeError, r"levels must be ints or .*got \(1, 2, 3\)"),
        ("levels_none", {"levels": [(None, 2)]}, TypeError, r"levels must be ints or .*got \(None, 2\)"),
        ("mode", {"mode": "mean"}, ValueError, 'mode must be "max" or "avg", got \'mean\''),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=match)


def small(dtype, memory_format):
    values = torch.randperm(2 * 2 * 5 * 4, generator=inputs.generator()).reshape(2, 2, 5, 4) / 10 - 4

    def both(x):
        pool = pyzoo.ops.spatial_pyramid_pool2d
        return torch.cat([pool(x, (1, (2, 3))), pool(x, (1, 3), "avg")], -1)

    return both, (values.to(dtype).contiguous(memory_format=memory_format),)


def export(tensors):
    (x,) = tensors
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    last = x.is_contiguous(memory_format=torch.channels_last)
    other = torch.cat([x, x])[:3, :, 1:, :-1]
    return dynamic, [other.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)]


def huge(sparse, memory_format):
    shape = (3, 16, 7168, 7168)
    size = (shape[0], shape[2], shape[3], shape[1]) if memory_format == torch.channels_last else shape
    x = sparse(math.prod(shape)).view(size)
    x = x.permute(0, 3, 1, 2) if memory_format == torch.channels_last else x
    far = (slice(2, 3), slice(None), slice(7104, None), slice(7104, None))
    x[far] = inputs.features(1, 16, 64, 64).to(x.dtype)
    # The last row of the last image as a map of its own.
    last = x[2:, :, 7104:, 7104:]
    return pyzoo.ops.spatial_pyramid_pool2d(last), pyzoo.ops.spatial_pyramid_pool2d(x[far].clone())


BENCH = (  # shape, levels, modes, whether --quick runs it
    ((8, 512, 40, 60), (1, 2, 4), ("max", "avg"), True),
    ((8, 512, 40, 60), (1, 2, 3, 6), ("max",), False),
    ((32, 256, 13, 13), (1, 2, 3, 6), ("max", "avg"), True),
    ((1, 256, 13, 13), (1, 2, 3, 6), ("max", "avg"), False),
    ((2, 512, 7, 7), (1, 2, 4), ("max", "avg"), False),
    ((4, 64, 112, 112), (1, 2, 4), ("max", "avg"), False),
    ((1, 1024, 30, 40), (1, 2, 3, 6), ("max", "avg"), False),
    ((1, 1024, 30, 40), (1, 2, 3, 6, 8), ("max", "avg"), False),
    ((4, 100, 57, 83), (1, 2, 3, 6, 8), ("max", "avg"), False),
    ((64, 256, 10, 10), (1, 2, 3, 6), ("max", "avg"), False),
    ((32, 512, 14, 14), (1, 2, 4), ("max", "avg"), False),
    ((16, 2048, 7, 7), (1, 2, 4), ("max", "avg"), False),
    ((2, 128, 64, 64), (1, 2, 4, 8), ("max", "avg"), False),
    ((1, 4, 8, 8), (1, 2, 4), ("max", "avg"), True),
)


def bench():
    for shape, levels, modes, quick in BENCH:
        images, channels, height, width = shape
        pixels, bins = height * width, sum(n * n for n in levels)
        name = f"levels {','.join(map(str, levels))}"
        for mode in modes:
            for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
                for backward in (False, True):

                    def make(shape=shape, levels=levels, mode=mode, memory_format=memory_format):
                        return (inputs.features(*shape, memory_format=memory_format), levels, mode), {}

                    direction = "backward" if backward else "forward"
                    # Reads the map, or writes its gradient; the pooled values, and in the backward the positions.
                    features = bins * (2 if backward and mode == "max" else 1)
                    yield BenchCase(
                        f"{direction} {'x'.join(map(str, shape))} {layout}, {mode}, {name}",
                        f"{direction} {mode} {layout}",
                        make,
                        backward=backward,
                        size=images * channels * pixels,
                        quick=quick,
                        floor_bytes=4.0 * images * channels * (pixels + features),
                        floor_flops=float(images * channels * (pixels if not backward else bins)),
                    )


SPEC = OpSpec(
    name="spatial_pyramid_pool2d",
    op=pyzoo.ops.spatial_pyramid_pool2d,
    reference=pyzoo.ops.spatial_pyramid_pool2d_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="torch",
    differentiable=(0,),
    # Maxima are copies, and equal. Means and gradients are sums of up to some thousand numbers of size one, in another
    # order than torch's, then rounded to their dtype.
    tolerances={
        torch.float32: (1e-5, 1e-5),
        torch.float64: (1e-13, 1e-13),
        torch.float16: (1e-3, 1e-4),
        torch.bfloat16: (8e-3, 1e-3),
    },
    small=small,
    export=export,
    huge=huge,
)
