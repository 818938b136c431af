"""Batch norm in training with an addition and a ReLU: samples, errors and benchmark cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(input, weight, bias, residual=None, *, eps=1e-5, activation=None):
    """In place as in torchvision's models."""
    out = F.batch_norm(input, None, None, weight, bias, True, eps=eps)
    if residual is not None:
        out += residual
    return {None: lambda x: x, "relu": F.relu_, "relu6": lambda x: F.relu6(x, inplace=True)}[activation](out)


def samples(dtype, memory_format):
    def maps(*shape, seed=0):
        return inputs.features(*shape, dtype=dtype, memory_format=memory_format, seed=seed) * 2 + 1

    def parameters(channels, dtype=dtype):
        return 1 + inputs.features(channels, dtype=dtype, seed=1) / 4, 1 + inputs.features(
            channels, dtype=dtype, seed=2
        )

    x = maps(2, 5, 13, 17)
    yield Sample("random", (x, *parameters(5), maps(2, 5, 13, 17, seed=3)), {"activation": "relu"})
    for activation in (None, "relu", "relu6"):
        yield Sample(f"{activation}", (x, *parameters(5)), {"activation": activation})
        for channels in (1, 3, 8, 17, 24, 33, 64, 70, 96, 130):
            yield Sample(
                f"channels_{channels}_{activation}",
                (maps(3, channels, 5, 7, seed=channels), *parameters(channels)),
                {"activation": activation},
            )
    yield Sample("adds", (x, *parameters(5), maps(2, 5, 13, 17, seed=3)))
    if dtype in (torch.float32, torch.float64):  # else what is nearly 6 rounds to it, and is closed for gradients
        yield Sample("adds_relu6", (x, *parameters(5), maps(2, 5, 13, 17, seed=3)), {"activation": "relu6"})
    yield Sample("several_blocks", (maps(2, 40, 30, 41), *parameters(40)), {"activation": "relu6"})
    yield Sample("several_segments", (maps(1, 2, 200, 213), *parameters(2)), {"activation": "relu6"})
    yield Sample("eps", (x, *parameters(5)), {"eps": 0.5})
    yield Sample("far_from_zero", ((x.float() + 100).to(dtype), *parameters(5)))
    yield Sample("wide_parameters", (x, *parameters(5, torch.float32)), peer=dtype != torch.float64)
    yield Sample("two_numbers", (maps(2, 3, 1, 1), *parameters(3)), {"eps": 0.5})
    yield Sample("one_row", (maps(2, 9, 1, 11), *parameters(9)), {"activation": "relu"})
    yield Sample("one_column", (maps(2, 9, 11, 1), *parameters(9)), {"activation": "relu"})
    yield Sample("constant", (torch.full_like(x, 3), *parameters(5)), {"eps": 0.5})
    yield Sample("no_images", (x[:0], *parameters(5)))
    yield Sample("no_channels", (x[:, :0], *parameters(0)), {"activation": "relu"}, peer=False)
    yield Sample("no_rows", (x[:, :, :0], *parameters(5)), peer=False)
    yield Sample("sliced", (maps(3, 8, 15, 20)[1:, 1:6, ::2, 2:-1], *parameters(5)), {"activation": "relu"})
    yield Sample("transposed", (maps(2, 5, 17, 13).transpose(2, 3), *parameters(5), x), {"activation": "relu"})
    yield Sample("expanded", (maps(1, 5, 1, 17).expand(2, -1, 13, -1), *parameters(5), x))
    yield Sample("residual_expanded", (x, *parameters(5), maps(1, 1, 13, 17).expand(2, 5, -1, -1)))
    holes = maps(2, 20, 13, 17)
    holes[1, 3, 4:7] = inputs.NAN
    holes[0, 7, 2, 3] = inputs.INF
    yield Sample("nan_channel", (holes, *parameters(20)), {"activation": "relu6"})


def errors():
    x, c = torch.zeros(2, 3, 4, 4), torch.ones(3)
    for id, args, error, match in [
        ("input_type", (None, c, c), TypeError, "input must be a torch.Tensor, got NoneType"),
        ("weight_type", (x, None, c), TypeError, "weight must be a torch.Tensor, got NoneType"),
        ("bias_type", (x, c, 0.0), TypeError, "bias must be a torch.Tensor, got float"),
        ("residual_type", (x, c, c, 1), TypeError, "residual must be a torch.Tensor, got int"),
        ("input_rank", (x[0], c, c), ValueError, r"input must have shape \[N, C, H, W\], got \[3, 4, 4\]"),
        ("input_integer", (x.int(), c, c), TypeError, "input must be float32.*int32"),
        ("weight_shape", (x, torch.ones(4), c), ValueError, r"weight must have shape \[3\], got \[4\]"),
        ("weight_rank", (x, c[None], c), ValueError, r"weight must have shape \[3\], got \[1, 3\]"),
        ("bias_shape", (x, c, torch.ones(1)), ValueError, r"bias must have shape \[3\], got \[1\]"),
        ("bias_integer", (x, c, c.int()), TypeError, "bias must be float32.*int32"),
        (
            "residual_shape",
            (x, c, c, x[:1]),
            ValueError,
            r"residual must have shape \[2, 3, 4, 4\], got \[1, 3, 4, 4\]",
        ),
        ("residual_dtype", (x, c, c, x.double()), TypeError, "residual must have the dtype of input.*float64"),
        ("weight_device", (x, c.to("meta"), c), ValueError, "input and weight must be on one device, got cpu and meta"),
        (
            "one_value",
            (x[:1, :, :1, :1], c, c),
            ValueError,
            r"input must have more than one value per channel, got .*\[1, 3, 1, 1\]",
        ),
        ("sparse", (x.to_sparse(), c, c), TypeError, ".*must be dense"),
    ]:
        yield ErrorSample(id, args, error=error, match=f"^batch_norm_act: {match}")
    yield ErrorSample(
        "activation",
        (x, c, c),
        {"activation": "gelu"},
        match="^batch_norm_act: activation must be None, 'relu' or 'relu6', got 'gelu'",
    )


BENCH = (  # what it is, shape of the map, activation, whether a map is added, run by --quick
    ("expansion", (8, 96, 112, 112), "relu6", False, False),
    ("expansion", (8, 144, 56, 56), "relu6", False, True),
    ("expansion", (8, 384, 14, 14), "relu6", False, True),
    ("expansion", (8, 960, 7, 7), "relu6", False, False),
    ("projection", (8, 24, 56, 56), None, True, True),
    ("projection", (8, 160, 7, 7), None, True, False),
    ("residual", (4, 256, 56, 56), "relu", True, False),
    ("residual", (8, 512, 28, 28), "relu", True, True),
    ("residual", (8, 2048, 7, 7), "relu", True, False),
    ("tiny", (2, 8, 4, 4), "relu", False, True),
)


def _settled(maps, weight, bias):
    """The map to normalise, where rounding would decide on which side of 0 or 6 an output is moved a little."""
    out = peer(maps[0], weight, bias, *maps[1:])
    maps[0][(out.abs() < 1e-4) | ((out - 6).abs() < 1e-4)] += 0.01
    return maps


def bench():
    for group, shape, activation, adds, quick in BENCH:
        numel = shape[0] * shape[1] * shape[2] * shape[3]
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for backward in (False, True):

                def make(shape=shape, memory_format=memory_format, adds=adds, activation=activation):
                    maps = [inputs.features(*shape, memory_format=memory_format, seed=seed) for seed in (3, 4)]
                    channels = 1 + inputs.features(shape[1], seed=1) / 4, inputs.features(shape[1], seed=2)
                    maps = _settled(maps[: 1 + adds], *channels)
                    return (maps[0], *channels, *maps[1:]), {"activation": activation}

                # The maps once each: input, output and what is added; for the backward both gradients and the input,
                # and where a ReLU follows the addition the output, and another gradient.
                maps = (3 + 2 * (adds and activation is not None)) if backward else 2 + adds
                direction = "backward" if backward else "forward"
                yield BenchCase(
                    f"{direction} {'x'.join(map(str, shape))} {layout}, {group}",
                    f"{direction} {group} {layout}",
                    make,
                    backward=backward,
                    size=numel,
                    floor_bytes=4.0 * numel * maps,
                    floor_flops=8.0 * numel,
                    quick=quick,
                )


def small(dtype, memory_format):
    x = inputs.features(2, 3, 2, 3, dtype=dtype, memory_format=memory_format)
    residual = inputs.features(2, 3, 2, 3, dtype=dtype, memory_format=memory_format, seed=3)
    weight, bias = (1 + inputs.features(3, dtype=dtype, seed=seed) / 4 for seed in (1, 2))
    return lambda *tensors: pyzoo.ops.batch_norm_act(*tensors, activation="relu6"), (x, weight, bias, residual)


def export(tensors):
    x, weight, bias, residual = tensors
    dim = torch.export.Dim.DYNAMIC
    smaller = [torch.empty_like(t[:, :, 1:, 1:]).copy_(t[:, :, 1:, :-1]) for t in (x, residual)]
    return ({0: dim, 2: dim, 3: dim}, {}, {}, {0: dim, 2: dim, 3: dim}), [smaller[0], weight, bias, smaller[1]]


SPEC = OpSpec(
    name="batch_norm_act",
    op=pyzoo.ops.batch_norm_act,
    reference=pyzoo.ops.batch_norm_act_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="F.batch_norm",
    differentiable=(0, 1, 2, 3),
    # Sums over all pixels of a channel in another order, then rounded to their dtype.
    tolerances={
        torch.float32: (2e-5, 2e-5),
        torch.float64: (1e-12, 1e-12),
        torch.float16: (2e-3, 2e-3),
        torch.bfloat16: (1.6e-2, 1.6e-2),
    },
    tensors=4,
    small=small,
    export=export,
)
