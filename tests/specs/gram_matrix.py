"""Gram matrix: samples, errors and benchmark cases; the feature maps are those of the Gram loss, too."""

from __future__ import annotations

import torch

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(features, *, normalize=True):
    f = features.flatten(2)
    gram = torch.bmm(f, f.transpose(1, 2))
    return gram / (f.shape[1] * f.shape[2]) if normalize else gram


def feature_maps(dtype, memory_format):
    """(id, features, whether the peer is defined there)."""

    def maps(*shape, seed=0):
        return inputs.features(*shape, dtype=dtype, memory_format=memory_format, seed=seed)

    x = maps(2, 5, 13, 17)
    yield "random", x, True
    for channels in (1, 3, 8, 17, 33, 64, 70, 130):
        yield f"channels_{channels}", maps(2, channels, 6, 7, seed=channels), True
    yield "several_blocks", maps(1, 40, 12, 25), True
    yield "several_chunks", maps(2, 20, 30, 37), True
    yield "one_pixel", maps(3, 9, 1, 1), True
    yield "one_row", maps(2, 9, 1, 11), True
    yield "one_column", maps(2, 9, 11, 1), True
    yield "one_number", maps(1, 1, 1, 1), True
    yield "three_dimensions", maps(2, 7, 45, 1).squeeze(3), True
    yield "no_images", x[:0], True
    yield "no_channels", x[:, :0], False
    yield "no_rows", x[:, :, :0], False
    yield "no_columns", x[..., :0], False
    yield "sliced", maps(3, 8, 15, 20)[1:, 1:6, ::2, 2:-1], True
    yield "every_other_pixel", maps(2, 20, 9, 20)[..., ::2], True
    yield "every_other_channel", maps(2, 40, 9, 8)[:, ::2], True
    yield "transposed", maps(2, 5, 17, 13).transpose(2, 3), True
    yield "channels_and_rows_swapped", maps(2, 13, 5, 17).transpose(1, 2), True
    yield "expanded", maps(1, 1, 13, 17).expand(2, 5, -1, -1), True
    yield "repeated_pixel", maps(2, 5, 1, 1).expand(-1, -1, 13, 17), True
    yield "sliced_positions", maps(2, 7, 45, 1).squeeze(3)[..., 3:-1:3], True
    holes = maps(2, 20, 13, 17)
    holes[1, 3, 4:7] = inputs.NAN
    yield "nan_channel", holes, True
    infinite = maps(2, 20, 13, 17)
    infinite[0, 11, 2, 3] = inputs.INF
    yield "inf_channel", infinite, True


def samples(dtype, memory_format):
    for id, x, has_peer in feature_maps(dtype, memory_format):
        yield Sample(id, (x,), peer=has_peer)
        if id in ("random", "channels_33", "no_rows"):
            yield Sample(f"{id}_not_normalized", (x,), {"normalize": False}, peer=has_peer)


FEATURE_ERRORS = (  # id, features, error, match
    (
        "rank_two",
        torch.zeros(3, 8),
        ValueError,
        r"features must have shape \[N, C, H, W\] or \[N, C, M\], got \[3, 8\]",
    ),
    ("rank_five", torch.zeros(1, 1, 3, 8, 8), ValueError, r"features must have shape .*, got \[1, 1, 3, 8, 8\]"),
    ("integer", torch.zeros(1, 3, 8, 8).int(), TypeError, "features must be float32.*got torch.int32"),
    ("complex", torch.zeros(1, 3, 8, 8).cfloat(), TypeError, "features must be float32.*got torch.complex64"),
    ("array", [[1.0]], TypeError, "features must be a torch.Tensor, got list"),
    ("sparse", torch.zeros(1, 3, 8, 8).to_sparse(), TypeError, "must be dense"),
)


def errors():
    for id, features, error, match in FEATURE_ERRORS:
        yield ErrorSample(id, (features,), error=error, match=f"^gram_matrix: .*{match}")


BENCH = (  # group, shape, run by --quick; the layers of VGG-19 for a picture of 512 x 512, then other sizes
    ("VGG-19", (1, 64, 512, 512), False),
    ("VGG-19", (1, 128, 256, 256), True),
    ("VGG-19", (1, 256, 128, 128), False),
    ("VGG-19", (1, 512, 64, 64), True),
    ("VGG-19", (1, 512, 32, 32), False),
    ("batch of 4", (4, 64, 128, 128), False),
    ("batch of 4", (4, 128, 64, 64), False),
    ("batch of 4", (4, 256, 32, 32), True),
    ("batch of 4", (4, 512, 16, 16), False),
    ("small maps", (1, 512, 14, 14), False),
    ("small maps", (8, 256, 7, 7), False),
    ("odd sizes", (2, 96, 75, 99), False),
    ("few channels", (2, 32, 200, 200), False),
    ("tiny", (1, 8, 8, 8), True),
)


def floors(shape, backward):
    """Bytes: features and Gram matrices once, in the backward pass also the gradient. Operations: half of the products
    in the forward pass, as the result is symmetric."""
    images, channels, height, width = shape
    positions = height * width
    products = channels * channels if backward else channels * (channels + 1) / 2
    return {
        "floor_bytes": 4.0 * images * channels * (positions * (2 if backward else 1) + channels),
        "floor_flops": 2.0 * images * products * positions,
    }


def bench_cases(make_arguments):
    """``make_arguments(features)``: what the op is called with."""
    for group, shape, quick in BENCH:
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for backward in (False, True):

                def make(shape=shape, memory_format=memory_format):
                    return make_arguments(inputs.features(*shape, memory_format=memory_format)), {}

                direction = "backward" if backward else "forward"
                yield BenchCase(
                    f"{direction} {'x'.join(map(str, shape))} {layout}, {group}",
                    f"{direction} {group} {layout}",
                    make,
                    backward=backward,
                    size=shape[0] * shape[1] * shape[2] * shape[3],
                    quick=quick,
                    **floors(shape, backward),
                )


def small_features(dtype, memory_format):
    return inputs.features(2, 3, 2, 2, dtype=dtype, memory_format=memory_format)


def export_features(features):
    """``OpSpec.export`` of features: height and width."""
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return dynamic, torch.empty_like(features[:, :, 1:, 1:]).copy_(features[:, :, 1:, :-1])


def export(tensors):
    dynamic, other = export_features(tensors[0])
    return (dynamic,), [other]


def huge_features(sparse, memory_format):
    """The corners of three maps of 16 x 7168 x 7168, and a copy of them."""
    map = sparse(3 * 16 * 7168 * 7168)
    if memory_format == torch.channels_last:
        map = map.view(3, 7168, 7168, 16).permute(0, 3, 1, 2)
    corner = map.view(3, 16, 7168, 7168)[:, :, 7100:, 7100:]
    corner.copy_(inputs.features(3, 16, 68, 68))
    return corner, corner.clone()


SPEC = OpSpec(
    name="gram_matrix",
    op=pyzoo.ops.gram_matrix,
    reference=pyzoo.ops.gram_matrix_reference,
    samples=samples,
    errors=errors,
    bench=lambda: bench_cases(lambda features: (features,)),
    peer=peer,
    peer_name="torch.bmm",
    differentiable=(0,),
    # Sums of up to some thousand products of numbers of size one, in another order than the reference's; half precision
    # rounds once at the end.
    tolerances={
        torch.float32: (1e-5, 2e-6),
        torch.float64: (1e-13, 1e-14),
        torch.float16: (1e-3, 1e-4),
        torch.bfloat16: (8e-3, 1e-3),
    },
    small=lambda dtype, memory_format: (pyzoo.ops.gram_matrix, (small_features(dtype, memory_format),)),
    export=export,
    huge=lambda sparse, memory_format: tuple(map(pyzoo.ops.gram_matrix, huge_features(sparse, memory_format))),
)
