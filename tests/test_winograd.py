"""Convolutions by Winograd's algorithm: as near to float64 as direct ones; and when they are used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyzoo
from pyzoo import _C
from pyzoo.nn import conv_bn, winograd

ISAS = [*_C.build_info()["isas"]]
# images, channels, outputs, height, width, padding
SIZES = [
    (1, 64, 64, 20, 20, 1),
    (2, 3, 5, 9, 11, 1),
    (2, 17, 33, 13, 6, 0),
    (1, 40, 48, 7, 7, 2),
    (3, 1, 1, 1, 1, 1),
    (2, 4, 4, 3, 3, 0),
    (5, 130, 70, 3, 18, 1),
    (3, 260, 24, 45, 70, 1),  # several chunks of tiles, and sums of more than one block of channels
]


def make(images, channels, outputs, height, width, padding):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    grad = torch.randn(images, outputs, height + 2 * padding - 2, width + 2 * padding - 2, generator=g)
    return x, weight, torch.randn(outputs, generator=g), grad


def all_of(convolve, x, weight, bias, grad):
    """The output, and the gradient of everything."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    out = convolve(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(actual, exact) -> float:
    return float((actual.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_near_float64(size, isa, set_isa, poison):
    set_isa(isa)
    inputs, padding = make(*size), size[-1]
    exact = all_of(lambda *t: F.conv2d(*t, padding=padding), *(t.double() for t in inputs))
    actual = all_of(lambda *t: winograd.conv2d(*t, padding), *inputs)
    for a, e in zip(actual, exact, strict=True):
        assert (a.shape, a.dtype) == (e.shape, torch.float32)
        assert error(a, e) < 3e-6
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_as_near_as_a_direct_one():
    """Of the library's two ways, by its layouts, for a layer of VGG-16."""
    inputs = make(1, 512, 64, 28, 28, 1)
    exact = all_of(lambda *t: F.conv2d(*t, padding=1), *(t.double() for t in inputs))
    direct = all_of(lambda *t: F.conv2d(*t, padding=1), *inputs)
    actual = all_of(lambda *t: winograd.conv2d(*t, 1), *inputs)
    for a, d, e in zip(actual, direct, exact, strict=True):
        assert error(a, e) < max(1e-6, 2 * error(d, e))


def test_relu():
    x, weight, bias, grad = make(2, 20, 36, 14, 9, 1)
    expected = all_of(lambda *t: winograd.conv2d(*t, 1).relu(), x, weight, bias, grad)
    actual = all_of(lambda *t: winograd.conv2d(*t, 1, relu=True), x, weight, bias, grad)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_same_bits(set_threads):
    """For any number of threads, for weights of either order and those that are kept."""
    x, weight, bias, grad = make(2, 72, 40, 50, 61, 1)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
            results.append(all_of(lambda *t: winograd.conv2d(*t, 1), x, w, bias, grad))
    for result in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))
    kept = winograd.run(x, winograd.transform(weight), bias, len(weight), 1)
    assert torch.equal(kept, results[0][0])


def test_second_derivatives():
    x, weight, bias, _ = make(1, 8, 8, 9, 9, 1)
    results = []
    for convolve in (lambda *t: F.conv2d(*t, padding=1).relu(), lambda *t: winograd.conv2d(*t, 1, relu=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        first = torch.autograd.grad(convolve(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for a, e in zip(*results, strict=True):
        assert error(a, e.double()) < 1e-5


def test_some_gradients():
    """What needs none gets none."""
    x, weight, bias, grad = make(1, 8, 8, 9, 9, 1)
    for t in (x, weight, bias):
        t.requires_grad_()
        winograd.conv2d(x, weight, bias, 1).backward(grad)
        assert [u.grad is not None for u in (x, weight, bias)] == [u is t for u in (x, weight, bias)]
        t.requires_grad_(False).grad = None
    out = winograd.conv2d(x, weight.requires_grad_(), None, 1)
    out.sum().backward()  # a gradient of stride 0
    assert error(weight.grad, torch.ops.aten.convolution_backward(
        torch.ones_like(out), x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
    )[1].double()) < 1e-5  # fmt: skip


def test_not_a_number():
    """It stays, with ReLU too, and reaches no other tile."""
    x, weight, bias, _ = make(1, 16, 16, 24, 24, 1)
    x[0, 3, 10, 10] = float("nan")
    expected = F.conv2d(x, weight, bias, padding=1).isnan()
    for relu in (False, True):
        actual = winograd.conv2d(x, weight, bias, 1, relu).isnan()
        assert actual[expected].all()
        actual[:, :, 8:12, 8:12] = False
        assert not actual.any()


def test_mistakes():
    x, weight, bias, _ = make(1, 8, 8, 9, 9, 1)
    for call in (
        lambda: winograd.run(x.contiguous(), weight, bias, 8, 1),
        lambda: winograd.run(x.double(), weight, bias, 8, 1),
        lambda: winograd.run(x, weight.contiguous(memory_format=torch.channels_last), bias[:3], 8, 1),
        lambda: winograd.run(x, weight[:, :7].contiguous(memory_format=torch.channels_last), bias, 8, 1),
        lambda: winograd.run(x, winograd.transform(weight)[1:], bias, 8, 1),
    ):
        with pytest.raises(ValueError):
            call()


# ----------------------------------------------------------------------------------------------------- where it is used


def conv(channels=64, outputs=64, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, outputs, options.pop("size", 3), **{"padding": 1, **options})


def test_suits():
    x = make(1, 64, 1, 40, 40, 1)[0]
    assert winograd.suits(x, conv())
    assert winograd.suits(x, conv(padding=0))
    for other in (
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"size": 5},
        {"size": (3, 1)},
        {"padding": 3},
        {"padding": "same"},
        {"padding": (1, 0)},
        {"outputs": 8},  # the maps would cost more to transform than is saved
    ):
        assert not winograd.suits(x, conv(**other)), other
    assert not winograd.suits(x[:, :, :8, :8], conv())  # and here the weight
    assert not winograd.suits(x[:, :, :1, :1].expand(1000, -1, -1, -1), conv())  # tiles of one pixel
    assert not winograd.suits(x[:0], conv())
    with pyzoo.backend("reference"):
        assert not winograd.suits(x, conv())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_conv_bn(batch_norm, frozen, monkeypatch):
    """Outputs and gradients of the modules, whether weights learn, nothing does, or only what is below; and that it is
    this which computed them."""
    calls = []
    real = winograd.run
    monkeypatch.setattr(winograd, "run", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    modules = nn.ModuleList([conv(), nn.BatchNorm2d(64)] if batch_norm else [conv()]).eval().requires_grad_(not frozen)
    if batch_norm:
        nn.init.uniform_(modules[1].running_var, 0.5, 1.5)
    x = make(2, 64, 1, 30, 30, 1)[0]
    exact = copy.deepcopy(modules).double()

    def plain(x):
        for module in exact:
            x = module(x)
        return x.relu()

    with torch.no_grad():
        for _ in range(2):
            assert error(conv_bn(x, *modules, activation="relu"), plain(x.double())) < 1e-6
    assert len(calls) == 2
    xs = x.requires_grad_(), x.detach().double().requires_grad_()
    leaves = [[t, *(() if frozen else m.parameters())] for t, m in zip(xs, (modules, exact), strict=True)]
    actual = torch.autograd.grad(conv_bn(x, *modules, activation="relu").square().sum(), leaves[0])
    expected = torch.autograd.grad(plain(xs[1]).square().sum(), leaves[1])
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) < 3e-6
    assert calls[2:] == [{"relu": True}, {"turned": True}]


def test_weights_change():
    """Kept ones are made again, and each size of a map has the way that suits it."""
    module = conv()
    large, small = make(1, 64, 1, 40, 40, 1)[0], make(1, 64, 1, 6, 6, 1)[0]
    with torch.no_grad():
        for _ in range(2):
            for x in (large, small, large):
                torch.testing.assert_close(conv_bn(x, module), module(x), rtol=1e-5, atol=1e-5)
            module.weight.mul_(2)


def test_compiles():
    """The compiler sees the operators of PyTorch."""
    module, x = conv(), make(1, 64, 1, 40, 40, 1)[0]
    exported = torch.export.export(Wrapped(module), (x,))
    assert torch.ops.aten.conv2d.default in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x), conv_bn(x, module, activation="relu"), rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return conv_bn(x, self.module, activation="relu")
