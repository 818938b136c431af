"""PixelCNN sampling: networks, errors and benchmark cases.

Not in the battery of ``tests/test_ops.py``, whose operators take a few tensors and have derivatives:
``tests/test_pixelcnn_sample.py`` asks what there is to ask of a sampler.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import pyzoo.ops
from pyzoo.ops import PixelCNNLayer, PixelCNNNetwork
from pyzoo.ops.pixelcnn_sample import _draw, _flat, _logits, _masked
from tests.specs import inputs
from tests.specs.spec import BenchCase, ErrorSample, OpSpec


def random_network(
    channels=1, levels=4, width=6, layers=2, first_kernel=5, kernel=3, head=9, dtype=torch.float64, seed=0
) -> PixelCNNNetwork:
    """``layers`` layers after the first. The logits spread by a few units and depend on each pixel before."""
    generator = inputs.generator(seed)

    def random(*shape, gain):
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(gain).to(dtype)

    def conv(outputs, inputs, rows=1, columns=1, gain=2.0):
        weight = random(outputs, inputs, rows, columns, gain=gain / (inputs * rows * columns) ** 0.5)
        return weight, random(outputs, gain=0.3)

    def layer(inputs, n, residual):
        vertical, horizontal = (2 * width, inputs, n // 2 + 1, n), (2 * width, inputs, 1, n // 2 + 1)
        convs = conv(*vertical), conv(*horizontal), conv(2 * width, 2 * width), conv(width, width)
        return PixelCNNLayer(*(t for pair in convs for t in pair), residual=residual)

    gated = [layer(channels, first_kernel, False), *(layer(width, kernel, True) for _ in range(layers))]
    return PixelCNNNetwork(gated, [conv(head, width), conv(channels * levels, head, gain=1.5)])


def random_uniforms(images, network, height, width, seed=0) -> torch.Tensor:
    shape = (images, network.channels, height, width)
    return torch.rand(shape, generator=inputs.generator(seed), dtype=torch.float64)


def errors():
    """Wrong calls of ``pixelcnn_sample``."""
    network = random_network(channels=3)
    image, known = torch.zeros(2, 3, 4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.bool)
    good = {"network": network, "size": (2, 4, 5)}
    pair = (torch.zeros(2, 12), None)
    for id, change, error, match in (
        ("network", {"network": None}, TypeError, "network must be a PixelCNNNetwork, got NoneType"),
        ("size", {"size": (2, 4)}, ValueError, r"size must be \(B, H, W\), got \(2, 4\)"),
        ("size_negative", {"size": (2, -4, 5)}, ValueError, r"size must be .* got \(2, -4, 5\)"),
        ("temperature", {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ("temperature_nan", {"temperature": inputs.NAN}, ValueError, "temperature must be .* got nan"),
        (
            "uniforms",
            {"uniforms": torch.zeros(2, 1, 4, 5)},
            ValueError,
            "uniforms must have shape .2, 3, 4, 5.*2, 1, 4",
        ),
        ("uniforms_integer", {"uniforms": image}, TypeError, "uniforms must be float32.*got torch.int64"),
        ("uniforms_type", {"uniforms": 0.5}, TypeError, "uniforms must be a torch.Tensor, got float"),
        (
            "uniforms_and_generator",
            {"uniforms": torch.zeros(2, 3, 4, 5), "generator": torch.Generator()},
            ValueError,
            "either uniforms or a generator",
        ),
        ("image_alone", {"image": image}, ValueError, "image and known go together, got only image"),
        ("known_alone", {"known": known}, ValueError, "image and known go together, got only known"),
        ("image_shape", {"image": image[:1], "known": known}, ValueError, "image must have shape .2, 3, 4, 5"),
        (
            "image_floating",
            {"image": image.float(), "known": known},
            TypeError,
            "image must be integers, got torch.float",
        ),
        (
            "image_level",
            {"image": image + 4, "known": known},
            ValueError,
            r"image must be in \[0, 4\) where known, got 4",
        ),
        ("image_negative", {"image": image - 1, "known": known}, ValueError, "where known, got -1"),
        ("known_dtype", {"image": image, "known": known.int()}, TypeError, "known must be bool, got torch.int32"),
        ("known_shape", {"image": image, "known": known.T}, ValueError, "known must expand to .*got .5, 4"),
        ("condition_count", {"condition": [pair]}, ValueError, "one pair for each of the 3 layers, got 1"),
        ("condition_pair", {"condition": [pair[0]] * 3}, TypeError, r"condition\[0\] must be a pair.*got Tensor"),
        (
            "condition_shape",
            {"condition": [pair, pair, (None, torch.zeros(2, 6))]},
            ValueError,
            r"condition\[2\]\[1\] must have shape \[2, 12\] or \[2, 12, 4, 5\], got \[2, 6\]",
        ),
        (
            "condition_dtype",
            {"condition": [(pair[0].int(), None)] * 3},
            TypeError,
            r"condition\[0\]\[0\] must be float32",
        ),
        ("device", {"uniforms": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "must be on one device"),
    ):
        yield ErrorSample(id, (), {**good, **change}, error=error, match=f"^pixelcnn_sample: .*{match}")


def network_errors():
    """(id, function that makes a wrong network, exception, message)."""
    network = random_network(channels=3)

    def changed(i, **fields):
        layers = list(network.layers)
        layers[i] = replace(layers[i], **fields)
        return lambda: PixelCNNNetwork(layers, network.head)

    def head(*pairs):
        return lambda: PixelCNNNetwork(network.layers, pairs)

    hidden, zeros = network.head[0], torch.zeros
    yield (
        "layers_empty",
        lambda: PixelCNNNetwork([], network.head),
        ValueError,
        "layers and head must not be empty, got 0",
    )
    yield "head_empty", head(), ValueError, "layers and head must not be empty, got 3 and 0"
    yield "weight_type", changed(1, link_weight=None), TypeError, r"layers\[1\].link_weight must be a torch.Tensor"
    yield "weight_dtype", changed(1, link_weight=zeros(12, 12, 1, 1).int()), TypeError, "link_weight must be float32"
    yield (
        "weight_rank",
        changed(1, link_weight=zeros(12, 12)),
        ValueError,
        r"must have 4 dimensions, got shape \[12, 12\]",
    )
    yield "device", changed(1, link_weight=zeros(12, 12, 1, 1, device="meta")), ValueError, "must be on one device"
    yield "bias", changed(1, link_bias=zeros(6)), ValueError, r"layers\[1\].link_bias must have shape \[12\], got \[6\]"
    yield "output_bias", changed(2, output_bias=zeros(12)), ValueError, r"output_bias must have shape \[6\], got \[12\]"
    yield (
        "even_kernel",
        changed(1, vertical_weight=zeros(12, 6, 2, 4)),
        ValueError,
        r"layers\[1\].vertical_weight must have an odd kernel, got \[12, 6, 2, 4\]",
    )
    yield (
        "rows",
        changed(1, vertical_weight=zeros(12, 6, 3, 3)),
        ValueError,
        r"layers\[1\].vertical_weight must have shape \[12, 6, 2, 3\], got \[12, 6, 3, 3\]",
    )
    yield (
        "horizontal",
        changed(1, horizontal_weight=zeros(12, 6, 1, 3)),
        ValueError,
        r"layers\[1\].horizontal_weight must have shape \[12, 6, 1, 2\], got \[12, 6, 1, 3\]",
    )
    yield (
        "inputs",
        changed(2, vertical_weight=zeros(12, 5, 2, 3)),
        ValueError,
        r"layers\[2\].vertical_weight must have shape \[12, 6, 2, 3\]",
    )
    yield (
        "link",
        changed(0, link_weight=zeros(12, 6, 1, 1)),
        ValueError,
        r"link_weight must have shape \[12, 12, 1, 1\]",
    )
    yield (
        "output",
        changed(0, output_weight=zeros(6, 12, 1, 1)),
        ValueError,
        r"output_weight must have shape \[6, 6, 1, 1\]",
    )
    yield (
        "colors",
        changed(0, output_weight=zeros(8, 8, 1, 1)),
        ValueError,
        r"layers\[0\].output_weight: the number of outputs must be a multiple of the 3 image channels, got 8",
    )
    yield "residual_first", changed(0, residual=True), ValueError, "residual"
    yield (
        "head_colors",
        head((zeros(8, 6, 1, 1), None)),
        ValueError,
        r"head\[0\].weight: .* multiple of the 3 .* got 8",
    )
    yield (
        "head_inputs",
        head(hidden, (zeros(12, 6, 1, 1), None)),
        ValueError,
        r"head\[1\].weight must have shape \[12, 9, 1",
    )
    yield (
        "head_bias",
        head((zeros(12, 6, 1, 1), zeros(3))),
        ValueError,
        r"head\[0\].bias must have shape \[12\], got \[3\]",
    )
    yield (
        "levels",
        head(hidden, (zeros(3, 9, 1, 1), None)),
        ValueError,
        r"head\[1\].weight must have C \* K .*K >= 2, got 3",
    )


# --------------------------------------------------------------------------------------------------------- benchmark
# A loop of full forwards takes minutes, so the peer does a few of its steps, evenly spread, on the image that was drawn
# before; each must draw the values that the image has there. All steps cost the same.

STEPS = 2


def draw_all(network, uniforms, image):
    images, _, height, width = image.shape
    return pyzoo.ops.pixelcnn_sample(network, (images, height, width), uniforms=uniforms)


@torch.no_grad()
def draw_some(network, uniforms, image):
    """``image`` with the values of ``STEPS`` steps drawn anew; the network is masked already, its condition none."""
    _, channels, height, width = image.shape
    drawn, condition = image.clone(), [(0, 0)] * len(network.layers)
    for step in range(STEPS):
        at = (2 * step + 1) * height * width * channels // (2 * STEPS)
        (i, j), c = divmod(at // channels, width), at % channels
        logits = _logits(network, image, condition)[:, c, :, i, j]
        drawn[:, c, i, j] = _draw(logits, uniforms[:, c, i, j], 1.0)
    return drawn


def multiplications(network) -> float:
    """Of one pixel of one image: one for each weight that is not masked."""
    dense = sum(layer.vertical_weight.numel() + layer.link_weight.numel() for layer in network.layers)
    dense += sum(layer.horizontal_weight[..., :-1].numel() for layer in network.layers)
    own = sum(layer.horizontal_weight[..., -1].numel() + layer.output_weight.numel() for layer in network.layers)
    own += sum(weight.numel() for weight, _ in network.head)
    return dense + own * (network.channels + 1) / (2 * network.channels)


BENCH = (  # images, channels, size, levels, width, layers after the first, their kernel, head, quick
    (16, 1, 28, 256, 32, 5, 3, 32, True),
    (16, 1, 28, 256, 64, 8, 3, 64, False),
    (16, 1, 28, 256, 128, 12, 3, 128, False),
    (16, 1, 28, 2, 64, 8, 5, 64, False),
    (1, 1, 28, 256, 64, 8, 3, 64, False),
    (16, 3, 32, 256, 48, 5, 3, 96, True),
    (16, 3, 32, 256, 96, 8, 3, 192, False),
    (16, 3, 32, 256, 120, 12, 5, 240, False),
    (1, 3, 32, 256, 96, 8, 3, 192, False),
    (100, 1, 8, 4, 32, 4, 3, 32, False),
    (1, 1, 4, 2, 8, 1, 3, 8, True),
)


def bench():
    for images, channels, size, levels, width, layers, kernel, head, quick in BENCH:
        shape = (channels, levels, width, layers, 7, kernel, head)

        def make(shape=shape, images=images, size=size):
            network = _masked(random_network(*shape, dtype=torch.float32))
            uniforms = random_uniforms(images, network, size, size)
            image = pyzoo.ops.pixelcnn_sample(network, (images, size, size), uniforms=uniforms)
            return (network, uniforms, image), {}

        network = random_network(*shape, dtype=torch.float32)
        yield BenchCase(
            f"{images}x{channels}x{size}x{size}, {levels} levels, {layers + 1} layers of {width}, kernel {kernel}",
            f"{images} images {size}x{size}x{channels}",
            make,
            size=multiplications(network),
            floor_bytes=4.0 * sum(t.numel() for t in _flat(network)),
            floor_flops=2.0 * images * size * size * multiplications(network),
            quick=quick,
            peer_share=STEPS / (size * size * channels),
        )


SPEC = OpSpec(
    name="pixelcnn_sample",
    op=draw_all,
    reference=pyzoo.ops.pixelcnn_sample_reference,
    samples=lambda dtype, memory_format: iter(()),
    errors=errors,
    bench=bench,
    peer=draw_some,
    peer_name="loop of full forwards (from a few steps)",
    exact=True,
)
