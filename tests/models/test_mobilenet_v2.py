"""MobileNetV2 against torchvision's, the numbers of its paper, and the wide map in parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyzoo
from pyzoo.models.mobilenet_v2 import (
    TABLE_2,
    ConvBNReLU6,
    InvertedResidual,
    MobileNetV2,
    make_divisible,
)
from pyzoo.reproduce.mobilenet_v2 import DIMENSIONS, spiral_error, thin_net
from tests.models.test_resnet import count_macs, randomize_statistics

WIDTHS = {"": 1.0, "_0.75": 0.75, "_0.5": 0.5, "_0.35": 0.35, "_1.3": 1.3, "_1.4": 1.4}


def pair(name: str = "", **options) -> tuple[nn.Module, MobileNetV2]:
    """torchvision's and ours with the same random weights and statistics."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    peer = randomize_statistics(models.mobilenet_v2(width_mult=WIDTHS[name]))
    model = pyzoo.create_model(f"mobilenet_v2{name}", **options)
    model.load_state_dict(peer.state_dict())
    peer.load_state_dict(model.state_dict())
    return peer, model


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", WIDTHS)
def test_state_dict_of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        ours, theirs = pyzoo.create_model(f"mobilenet_v2{name}"), models.mobilenet_v2(width_mult=WIDTHS[name])
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert len(expected) == 314
    if not name:
        assert sum(b.numel() for b in ours.buffers()) == 34_164


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torchvision(layout):
    peer, model = pair()
    peer.eval(), model.eval().to(memory_format=layout)
    for size in ((224, 224), (193, 257)):
        x = torch.randn(2, 3, *size).contiguous(memory_format=layout)
        with torch.no_grad():
            expected = peer(x)
            assert expected.abs().max() > 0.1
            close(model(x), expected)
            close(model(x), expected)  # with the weights it kept
        with torch.inference_mode():
            close(model(x), expected)
    x = torch.randn(2, 3, 64, 64)
    close(model(x), peer(x), 1e-4)  # with gradients


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_trains_as_torchvision(size):
    peer, model = pair()
    peer.double(), model.double()
    x, y = torch.randn(4, 3, *size).double(), torch.arange(4)
    losses = []
    for net in (peer, model):
        torch.manual_seed(1)  # the same units are dropped
        losses.append(F.cross_entropy(net(x), y))
        losses[-1].backward()
    close(losses[1], losses[0], 1e-12)
    for (key, expected), actual in zip(peer.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=key)
    torch.testing.assert_close(dict(model.named_buffers()), dict(peer.named_buffers()))


# --------------------------------------------------------------------------------------------------------------- tables

MACS = {
    ("", 224): 300_774_272,
    ("", 192): 221_316_608,
    ("", 160): 154_083_200,
    ("", 128): 99_074_048,
    ("", 96): 56_289_152,
    ("_0.75", 224): 209_069_792,
    ("_0.5", 224): 97_131_840,
    ("_0.35", 224): 59_285_808,
    ("_1.3", 224): 509_374_560,
    ("_1.4", 224): 582_195_824,
}
PARAMETERS = [928, 896, 5_136, 8_832, 10_000, 14_848, 14_848, 21_056, 54_272, 54_272, 54_272, 66_624, 118_272, 118_272]
PARAMETERS += [155_264, 320_000, 320_000, 473_920, 412_160]


@pytest.mark.parametrize(("name", "size"), MACS)
def test_macs(name, size):
    with torch.device("meta"):
        model = pyzoo.create_model(f"mobilenet_v2{name}")
    assert count_macs(model, 3, size, size) == MACS[name, size]


def test_parameters_of_each_layer():
    with torch.device("meta"):
        model = pyzoo.create_model("mobilenet_v2")
    assert [sum(p.numel() for p in layer.parameters()) for layer in model.features] == PARAMETERS
    assert sum(p.numel() for p in model.classifier.parameters()) == 1_281_000


@pytest.mark.parametrize(("name", "last"), [("_0.35", 1280), ("_0.5", 1280), ("_1.3", 1664), ("_1.4", 1792)])
def test_last_channels_never_shrink(name, last):
    with torch.device("meta"):
        assert pyzoo.create_model(f"mobilenet_v2{name}").classifier[1].in_features == last


def test_shapes():
    with torch.device("meta"):
        x, shapes = torch.empty(1, 3, 224, 224), []
        for layer in pyzoo.create_model("mobilenet_v2").features:
            x = layer(x)
            shapes.append((x.shape[1], x.shape[2]))
    expected, side = [(32, 112)], 112
    for _, channels, blocks, stride in TABLE_2:
        side //= stride
        expected += [(channels, side)] * blocks
    assert shapes == [*expected, (1280, 7)]


@pytest.mark.parametrize(
    ("channels", "expected"), [(11.2, 16), (22.4, 24), (33.6, 32), (44.8, 48), (134.4, 136), (1, 8), (24, 24)]
)
def test_make_divisible(channels, expected):
    assert make_divisible(channels) == expected


# --------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("expansion", [1, 6])
@pytest.mark.parametrize(("stride", "out"), [(1, 8), (1, 16), (2, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_block(training, stride, out, expansion, linear):
    """Written out with plain modules; the input is added if and only if its shape is that of the output."""
    torch.manual_seed(0)
    block = randomize_statistics(InvertedResidual(8, out, stride, expansion, linear=linear)).double().train(training)
    x = torch.randn(3, 8, 9, 7).double()
    wide = x
    for layer in block.conv[:-2]:
        assert isinstance(layer, ConvBNReLU6)
        conv = layer[0]
        mean_var = (None, None) if training else (layer[1].running_mean, layer[1].running_var)
        wide = F.conv2d(wide, conv.weight, None, conv.stride, conv.padding, 1, conv.groups)
        wide = F.batch_norm(wide, *mean_var, layer[1].weight, layer[1].bias, training).clamp(0, 6)
    norm = block.conv[-1]
    mean_var = (None, None) if training else (norm.running_mean, norm.running_var)
    expected = F.batch_norm(F.conv2d(wide, block.conv[-2].weight), *mean_var, norm.weight, norm.bias, training)
    expected = expected if linear else expected.clamp(0, 6)
    if (stride, out) == (1, 8):
        expected = expected + x
    close(block(x), expected, 1e-9)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("split", [2, 3, 4, 5, 1000])
def test_split(split, linear):
    """The wide map in parts gives the same, where nothing learns."""
    torch.manual_seed(0)
    options = {"width": 0.1, "num_classes": 5, "linear": linear}
    whole = randomize_statistics(MobileNetV2(**options)).eval()
    parts = MobileNetV2(**options, split=split).eval()
    parts.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        close(parts(x), whole(x))
    parts.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in parts.parameters())


def test_split_needs_less_memory():
    """No convolution makes more than its part of the wide map."""
    largest = []
    for split in (1, 4):
        block, seen = InvertedResidual(8, 8, split=split).eval(), []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, seen=seen):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[2:] == (20, 20):
                    seen.append(out.shape[1])
                return out

        with torch.no_grad(), Sizes():
            block(torch.randn(1, 8, 20, 20))
        largest.append(max(seen))
    assert largest == [48, 12]


def test_kernels():
    """All 17 depthwise convolutions are ours."""
    with torch.device("meta"):
        modules = list(pyzoo.create_model("mobilenet_v2").modules())
    depthwise = [m for m in modules if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17
    assert all(type(m) is pyzoo.nn.DepthwiseConv2d for m in depthwise)


def test_spiral():
    errors = [spiral_error(n, 0) for n in DIMENSIONS]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[3] < 0.02
    assert spiral_error(2, 0, linear=True) < 1e-5


def test_thin_net():
    assert sum(p.numel() for p in thin_net(True).parameters()) == 3638


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MobileNetV2(width=0), "width must be above 0, got 0"),
        (lambda: MobileNetV2(width=0.1, split=0), "split must be at least 1, got 0"),
        (lambda: MobileNetV2(width=0.1)(torch.zeros(1, 1, 64, 64)), r"\[N, 3, H, W\], got \[1, 1, 64, 64\]"),
        (lambda: MobileNetV2(width=0.1)(torch.zeros(1, 3, 0, 64)), r"pixels and shape .*, got \[1, 3, 0, 64\]"),
        (lambda: MobileNetV2(width=0.1)(torch.zeros(3, 64, 64)), r"\[N, 3, H, W\], got \[3, 64, 64\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 2)])
def test_small_images(size):
    model = MobileNetV2(width=0.1, num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, *size)).isfinite().all()
