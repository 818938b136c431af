"""Depthwise convolution: samples, errors and benchmark cases."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

import pyzoo.ops
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec, Sample


def peer(input, weight, bias=None, stride=1, padding=0, dilation=1, *, activation=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.shape[-3])
    return {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation](output)


def samples(dtype, memory_format):
    def maps(*shape, seed=0):
        return inputs.features(*shape, dtype=dtype, memory_format=memory_format, seed=seed)

    def parameters(channels, *kernel, seed=1):
        weight = inputs.features(channels, 1, *kernel, dtype=dtype, seed=seed)
        return weight, inputs.features(channels, dtype=dtype, seed=seed + 1)

    x = maps(2, 5, 9, 11)
    w, b = parameters(5, 3, 3)
    yield Sample("typical", (x, w, b, 1, 1))
    yield Sample("no_bias", (x, w))
    for kernel in ((1, 1), (2, 2), (2, 3), (5, 5), (7, 7), (1, 9), (9, 1), (4, 8)):
        half = (kernel[0] // 2, kernel[1] // 2)
        sized = parameters(5, *kernel, seed=sum(kernel))
        for stride in (1, 2):
            yield Sample(f"kernel_{kernel[0]}x{kernel[1]}_stride_{stride}", (x, *sized, stride, half))
    yield Sample("kernel_31x31", (maps(1, 18, 20, 24), *parameters(18, 31, 31), 1, 15))
    yield Sample("kernel_31x31_stride_2", (maps(1, 2, 20, 40), *parameters(2, 31, 31), 2, 15))
    for channels in (1, 3, 16, 17, 40):
        own = parameters(channels, 3, 3)
        yield Sample(f"channels_{channels}", (maps(2, channels, 6, 7), *own, 1, 1))
        yield Sample(f"channels_{channels}_stride_2", (maps(1, channels, 7, 6), *own, 2, 1))
    for width in (1, 4, 15, 16, 17, 33, 65, 140):  # around the length of a vector, and more than one tile
        yield Sample(f"width_{width}", (maps(1, 2, 6, width), *parameters(2, 3, 3), 1, 1))
        yield Sample(f"width_{width}_stride_2", (maps(1, 2, 6, width), *parameters(2, 5, 5), 2, 2))
    yield Sample("many_channels", (maps(2, 40, 18, 50), *parameters(40, 5, 5), 1, 2))
    yield Sample("bands", (maps(1, 17, 70, 80), *parameters(17, 3, 3), 1, 1))
    yield Sample("bands_stride_2", (maps(1, 1, 300, 260), *parameters(1, 5, 5), 2, 2))
    yield Sample("stride_3", (maps(2, 5, 13, 50), w, b, 3, 1))
    yield Sample("stride_uneven", (maps(2, 5, 13, 50), w, b, (1, 2), (2, 1)))
    yield Sample("stride_beyond_kernel", (maps(1, 5, 13, 50), *parameters(5, 2, 2), (5, 4), 1))
    yield Sample("dilation", (maps(1, 5, 13, 40), w, b, 1, 2, 2))
    yield Sample("dilation_uneven", (x, w, b, 1, (1, 3), (1, 3)))
    yield Sample("dilation_stride", (maps(2, 5, 13, 50), w, b, 2, 3, 3))
    yield Sample("dilation_is_stride", (maps(2, 5, 13, 50), w, b, 2, 2, 2))
    yield Sample("padding_uneven", (x, w, b, 1, (0, 2)))
    yield Sample("padding_beyond_kernel", (x, w, b, 1, 5))
    yield Sample("padding_beyond_kernel_stride_2", (x, w, b, 2, (5, 4)))
    yield Sample("valid", (x, w, b, 2, "valid"))
    yield Sample("same", (x, *parameters(5, 5, 7), 1, "same", (2, 1)))
    yield Sample("same_even", (x, *parameters(5, 2, 4), 1, "same"))
    for multiplier in (2, 3):
        yield Sample(f"multiplier_{multiplier}", (x, *parameters(5 * multiplier, 3, 3), 2, 1))
    yield Sample("multiplier_of_one_channel", (maps(2, 1, 9, 20), *parameters(4, 3, 3), 1, 1))
    yield Sample("one_pixel", (maps(1, 3, 1, 1), *parameters(3, 3, 3), 1, 1))
    yield Sample("one_output", (maps(1, 3, 5, 5), *parameters(3, 5, 5)))
    yield Sample("one_row", (maps(1, 3, 1, 30), *parameters(3, 1, 3)))
    yield Sample("one_column", (maps(1, 3, 30, 1), *parameters(3, 3, 1)))
    yield Sample("no_images", (x[:0], w, b, 1, 1))
    yield Sample("no_channels", (x[:, :0], w[:0], b[:0], 1, 1), peer=False)
    yield Sample("not_batched", (maps(2, 5, 9, 11)[1], w, b, 1, 1))
    for activation in ("relu", "relu6"):
        yield Sample(activation, (4 * x, w, b, 1, 1), {"activation": activation})
        yield Sample(f"{activation}_wide", (4 * maps(1, 5, 9, 40), w, b, 1, 1), {"activation": activation})
    holes = maps(2, 5, 9, 40)
    holes[:, :, 4:6, 3:9] = inputs.NAN
    holes[:, :, 1, 38] = inputs.INF
    yield Sample("nan", (holes, w, b, 1, 1))
    yield Sample("nan_relu6", (holes, w, b, 1, 1), {"activation": "relu6"})
    yield Sample("sliced", (maps(3, 8, 15, 40)[1:, 1:6, ::2, 2:-1], w, b, 1, 1))
    yield Sample("sliced_columns", (maps(3, 8, 15, 40)[1:, 1:6, :, ::2], w, b, 1, 1))
    yield Sample("transposed", (maps(2, 5, 17, 13).transpose(2, 3), w, b, 1, 1))
    yield Sample("expanded", (maps(1, 1, 13, 17).expand(2, 5, -1, -1), w, b, 1, 1))
    yield Sample("repeated_pixel", (maps(2, 5, 1, 1).expand(-1, -1, 13, 17), w, b, 1, 1))
    yield Sample("weight_expanded", (x, w[:1].expand(5, -1, -1, -1), b[:1].expand(5), 1, 1))
    yield Sample("weight_transposed", (x, w.transpose(2, 3), b, 1, 1))


def errors():
    x, w, b = torch.zeros(1, 3, 8, 8), torch.zeros(3, 1, 3, 3), torch.zeros(3)
    good = {"input": x, "weight": w, "bias": b}
    for id, change, error, match in (
        ("input_rank", {"input": x[0, 0]}, ValueError, r"input must have shape \[N, C, H, W\] or .*got \[8, 8\]"),
        ("input_type", {"input": [[1.0]]}, TypeError, "input must be a torch.Tensor, got list"),
        ("input_integer", {"input": x.int()}, TypeError, "input must be float32.*got torch.int32"),
        ("input_complex", {"input": x.cfloat()}, TypeError, "input must be float32.*got torch.complex64"),
        ("input_sparse", {"input": x.to_sparse()}, TypeError, "must be dense"),
        ("weight_type", {"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ("weight_rank", {"weight": w[0]}, ValueError, r"weight must have shape .*got \[1, 3, 3\]"),
        (
            "weight_dense",
            {"weight": w.expand(-1, 3, -1, -1)},
            ValueError,
            r"weight must have shape .*got \[3, 3, 3, 3\]",
        ),
        ("weight_dtype", {"weight": w.double()}, TypeError, "weight must have the dtype of input, torch.float32, got"),
        ("weight_device", {"weight": w.to("meta")}, ValueError, "must be on one device, got cpu and meta"),
        ("weight_empty", {"weight": w[:, :, :0]}, ValueError, r"kernel must be at least 1 x 1, got .*\[3, 1, 0, 3\]"),
        ("channels", {"weight": torch.zeros(4, 1, 3, 3)}, ValueError, "channels of weight must be a multiple of .* 3,"),
        ("channels_none", {"weight": w[:0]}, ValueError, "channels of weight must be a multiple of .* 3,"),
        ("bias_type", {"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ("bias_shape", {"bias": b[:2]}, ValueError, r"bias must have shape \[3\], got \[2\]"),
        ("bias_dtype", {"bias": b.half()}, TypeError, "bias must have the dtype of input, torch.float32, got"),
        ("stride_zero", {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ("stride_three", {"stride": (1, 1, 1)}, ValueError, "stride must be an int or two ints, got 3 values"),
        ("stride_float", {"stride": 1.5}, TypeError, "stride must be an int or two ints, got 1.5"),
        ("padding_negative", {"padding": (0, -1)}, ValueError, r"padding must be at least 0, got \(0, -1\)"),
        ("padding_name", {"padding": "full"}, ValueError, "padding must be int, .*'same' or 'valid', got 'full'"),
        ("padding_same", {"padding": "same", "stride": 2}, ValueError, r"'same' needs stride 1, got stride \(2, 2\)"),
        ("dilation_zero", {"dilation": (1, 0)}, ValueError, r"dilation must be at least 1, got \(1, 0\)"),
        ("too_small", {"dilation": 4}, ValueError, r"at least as large as the kernel, got input .*\[1, 3, 8, 8\]"),
        ("no_rows", {"input": x[:, :, :0]}, ValueError, r"at least as large as the kernel, got input .*\[1, 3, 0, 8\]"),
        ("activation", {"activation": "gelu"}, ValueError, "activation must be None, 'relu' or 'relu6', got 'gelu'"),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=f"^depthwise_conv2d: .*{match}")


# Of MobileNetV2, EfficientNet (5x5), ConvNeXt (7x7) and RepLKNet (31x31): group, shape, kernel, stride, run by --quick.
BENCH = (
    ("3x3", (1, 32, 112, 112), 3, 1, False),
    ("3x3", (8, 32, 112, 112), 3, 1, True),
    ("3x3", (8, 96, 112, 112), 3, 2, False),
    ("3x3", (1, 144, 56, 56), 3, 1, False),
    ("3x3", (8, 144, 56, 56), 3, 1, False),
    ("3x3", (8, 144, 56, 56), 3, 2, True),
    ("3x3", (8, 192, 28, 28), 3, 1, False),
    ("3x3", (1, 384, 14, 14), 3, 1, False),
    ("3x3", (8, 384, 14, 14), 3, 1, True),
    ("3x3", (8, 576, 14, 14), 3, 2, False),
    ("3x3", (1, 960, 7, 7), 3, 1, False),
    ("3x3", (8, 960, 7, 7), 3, 1, False),
    ("5x5", (8, 144, 28, 28), 5, 1, True),
    ("5x5", (8, 144, 56, 56), 5, 2, False),
    ("5x5", (1, 672, 14, 14), 5, 1, False),
    ("5x5", (8, 672, 14, 14), 5, 2, False),
    ("7x7", (1, 96, 56, 56), 7, 1, False),
    ("7x7", (8, 96, 56, 56), 7, 1, True),
    ("7x7", (8, 384, 14, 14), 7, 1, False),
    ("7x7", (8, 768, 7, 7), 7, 1, False),
    ("7x7", (8, 96, 56, 56), 7, 2, False),
    ("31x31", (1, 128, 56, 56), 31, 1, False),
    ("31x31", (1, 64, 28, 28), 31, 1, True),
    ("31x31", (4, 64, 28, 28), 31, 1, False),
    ("31x31", (4, 64, 28, 28), 31, 2, False),
    ("3x3, tiny", (1, 8, 6, 6), 3, 1, True),
)


def bench():
    for group, shape, kernel, stride, quick in BENCH:
        images, channels, height, width = shape
        outputs = images * channels * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
        for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            for backward in (False, True):

                def make(shape=shape, kernel=kernel, stride=stride, memory_format=memory_format):
                    x = inputs.features(*shape, memory_format=memory_format, seed=3)
                    weight = inputs.features(shape[1], 1, kernel, kernel, seed=1) / kernel
                    return (x, weight, inputs.features(shape[1], seed=2), stride, kernel // 2), {}

                # The maps once each: input and output; for the backward both gradients and the input.
                maps = outputs + images * channels * height * width * (1 + backward)
                direction = "backward" if backward else "forward"
                yield BenchCase(
                    f"{direction} {'x'.join(map(str, shape))} {layout}, {group}, stride {stride}",
                    f"{direction} {group} {layout}",
                    make,
                    backward=backward,
                    size=outputs * kernel**2,
                    floor_bytes=4.0 * maps,
                    floor_flops=2.0 * outputs * kernel**2 * (1 + backward),
                    quick=quick,
                )


def small(dtype, memory_format):
    x = inputs.features(1, 2, 5, 4, dtype=dtype, memory_format=memory_format)
    weight, bias = inputs.features(4, 1, 2, 3, dtype=dtype, seed=1), inputs.features(4, dtype=dtype, seed=2)
    return lambda *tensors: pyzoo.ops.depthwise_conv2d(*tensors, (2, 1), (1, 2), (1, 2)), (x, weight, bias)


def export(tensors):
    x, weight, bias = tensors
    dim = torch.export.Dim.DYNAMIC
    smaller = torch.empty_like(x[:, :, 1:, 1:]).copy_(x[:, :, 1:, :-1])
    return ({0: dim, 2: dim, 3: dim}, {}, {}), [smaller, weight, bias]


def huge(sparse, memory_format):
    far = 2**31
    strides = (far, 2**20, 2**10, 1) if memory_format == torch.contiguous_format else (far, 1, 2**20, 2**10)
    x = sparse(far + 2**26).as_strided((2, 5, 30, 40), strides)
    x.copy_(inputs.features(2, 5, 30, 40, dtype=x.dtype))
    weight, bias = inputs.features(5, 1, 3, 3, dtype=x.dtype, seed=1), inputs.features(5, dtype=x.dtype, seed=2)
    return tuple(pyzoo.ops.depthwise_conv2d(x, weight, bias, 1, 1) for x in (x, x.clone()))


SPEC = OpSpec(
    name="depthwise_conv2d",
    op=pyzoo.ops.depthwise_conv2d,
    reference=pyzoo.ops.depthwise_conv2d_reference,
    samples=samples,
    errors=errors,
    bench=bench,
    peer=peer,
    peer_name="F.conv2d",
    differentiable=(0, 1, 2),
    # Sums of up to 961 products, or for the gradient of the weight of all pixels, in another order; then rounded to
    # their dtype. A gradient with a channel multiplier and that of the bias round their sum once more.
    tolerances={
        torch.float32: (1e-5, 1e-5),
        torch.float64: (1e-13, 1e-13),
        torch.float16: (2e-3, 1e-3),
        torch.bfloat16: (1.6e-2, 8e-3),
    },
    autocast=True,
    tensors=3,
    small=small,
    export=export,
    huge=huge,
)
