"""Convolutions with weights in the library's order: equal to the modules, and the modules wherever it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from pyzoo import _C
from pyzoo.nn import DepthwiseConv2d, conv, conv_bn, pointwise


def make(channels=6, out=8, size=3, batch_norm=True, seed=0, **options):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, out, size, **options)
    if not batch_norm:
        return nn.ModuleList([conv]).eval()
    bn = nn.BatchNorm2d(out)
    nn.init.uniform_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.5, 1.5)
    nn.init.normal_(bn.weight)
    return nn.ModuleList([conv, bn]).eval()


def fused(modules, x):
    return conv_bn(x, *modules)


def plain(modules, x):
    for module in modules:
        x = module(x)
    return x


def image(channels=6, size=(9, 11), count=2):
    torch.manual_seed(1)
    return torch.randn(count, channels, *size).contiguous(memory_format=torch.channels_last)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


GEOMETRIES = [
    {},
    {"size": 1, "bias": False},
    {"stride": 2, "padding": 1},
    {"padding": 6, "dilation": 6},
    {"size": (1, 4), "padding": (0, 1)},
    {"groups": 2},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_equal_to_the_modules(geometry, batch_norm):
    modules = make(batch_norm=batch_norm, **geometry)
    with torch.no_grad():
        for x in (image(), image(size=(20, 7), count=1), image().contiguous(), image(count=0)):
            close(fused(modules, x), plain(modules, x))
    with torch.inference_mode():
        close(fused(modules, image()), plain(modules, image()))


def test_is_one_operator():
    """Where nothing learns: no batch norm is run, and no weight is moved."""
    modules = make()
    x = image()
    with torch.no_grad():
        fused(modules, x)
        with torch.profiler.profile() as profile:
            fused(modules, x)
    names = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in names
    assert not names & {"aten::batch_norm", "aten::conv2d", "mkldnn::_reorder_convolution_weight", "aten::mul"}


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
@pytest.mark.parametrize(("activation", "adds"), [(None, False), ("relu", True), ("relu6", False)])
@pytest.mark.parametrize(
    ("channels", "out", "size"), [(6, 8, (9, 11)), (70, 131, (13, 1)), (300, 17, (5, 10)), (1, 1, (1, 1))]
)
def test_pointwise(channels, out, size, activation, adds, isa, set_isa, monkeypatch):
    set_isa(isa)
    monkeypatch.setattr(pointwise, "LARGE", 0)
    modules, x = make(channels, out, 1), image(channels, size)
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        expected = plain(copy.deepcopy(modules).double(), x.double())
        residual = torch.randn(expected.shape) if adds else None
        expected = conv.ACTIVATE[activation](expected + residual if adds else expected)
        actual = conv_bn(x, *modules, activation, residual)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert "pointwise" in conv._KEPT[modules[0]]
        assert actual.is_contiguous(memory_format=torch.channels_last)
        if adds:  # in another dtype
            expected = plain(modules, x) + residual.double()
            torch.testing.assert_close(conv_bn(x, *modules, None, residual.double()), expected.float(), equal_nan=True)


def test_pointwise_gradient_of_the_residual_alone(monkeypatch):
    monkeypatch.setattr(pointwise, "LARGE", 0)
    modules, x = make(size=1).requires_grad_(False), image()
    residual = torch.randn(plain(modules, x).shape, requires_grad=True)
    conv_bn(x, *modules, "relu", residual).sum().backward()
    assert torch.equal(residual.grad, (plain(modules, x) + residual > 0).float())


@pytest.mark.parametrize("train", [False, True])
def test_parameters_of_any_strides(train, monkeypatch):
    monkeypatch.setattr(pointwise, "LARGE", 0)
    modules, x = make(size=1, bias=not train).train(train), image()
    modules[1].weight = nn.Parameter(torch.rand(16)[::2])
    modules[1].running_mean = torch.rand(1).expand(8) if not train else torch.rand(16)[::2]
    other = copy.deepcopy(modules)
    with torch.no_grad():
        close(fused(modules, x), plain(other, x))
    close(modules[1].running_mean, other[1].running_mean)


def test_pointwise_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(pointwise, "LARGE", 0)
    modules, x, before = make(40, 70, 1), image(40, (33, 35)), torch.get_num_threads()
    results = []
    with torch.no_grad():
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(fused(modules, x))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_pointwise_checks_its_memory():
    x, y, w = image(4, (3, 3)), image(6, (3, 3)), torch.empty(_C.pointwise_weight_size(6, 4))
    _C.pointwise_weight_cpu(torch.ones(6, 4, 1, 1), w)
    _C.pointwise_conv_cpu(x, w, None, None, y, 0)
    assert torch.allclose(y, x.sum(1, keepdim=True).expand_as(y), atol=1e-5)
    good = {"input": x, "packed": w, "bias": torch.ones(6), "residual": y.clone(), "output": y}
    for wrong in (
        {"input": x.contiguous()},
        {"input": x[:1]},
        {"packed": w[:9]},
        {"bias": torch.ones(5)},
        {"residual": x},
        {"output": y.double()},
    ):
        with pytest.raises(ValueError, match="must"):
            _C.pointwise_conv_cpu(**{**good, **wrong}, activation=0)
    with pytest.raises(ValueError, match="packed must"):
        _C.pointwise_weight_cpu(torch.ones(6, 4, 1, 1), w[1:])


def test_gradients():
    """Of whatever learns."""
    modules = make().double()
    for module in modules:
        for learns in (module.weight, module.bias):
            for parameter in modules.parameters():
                parameter.requires_grad_(parameter is learns)
            x = image().double()
            actual = torch.autograd.grad(fused(modules, x).square().sum(), learns)
            close(actual, torch.autograd.grad(plain(modules, x).square().sum(), learns))
    modules.float().requires_grad_(False)
    x = image().requires_grad_()
    actual = torch.autograd.grad(fused(modules, x).square().sum(), x)
    close(actual, torch.autograd.grad(plain(modules, x).square().sum(), x))


def test_weights_change():
    """In place, by an optimizer, by loading, by moving to another dtype: the next call has the new ones."""
    modules, other, x = make(), make(seed=5), image()
    changes = [
        lambda m: m[0].weight.mul_(2),
        lambda m: m[0].bias.zero_(),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m.load_state_dict(other.state_dict()),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones_like(m[0].weight))),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.bfloat16().float(),
        lambda m: setattr(m[0].weight, "data", setattr(m[0].weight, "data", torch.empty(0)) or torch.randn(8, 6, 3, 3)),
    ]
    with torch.no_grad():
        fused(modules, x)
        for change in changes:
            change(modules)
            close(fused(modules, x), plain(modules, x))
    with torch.no_grad():
        close(fused(copy.deepcopy(modules), x), plain(modules, x))


def test_kept_weights_are_freed():
    modules, x = make(), image()
    with torch.no_grad():
        expected = fused(modules, x)
        assert modules[0] in conv._KEPT
        conv.forget(nn.Sequential(modules))
        assert modules[0] not in conv._KEPT
        assert torch.equal(fused(modules, x), expected)


def test_inference_weights():
    """They have no version, so nothing is kept of them."""
    x = image()
    with torch.inference_mode():
        modules = make()
        close(fused(modules, x), plain(modules, x))
        modules[0].weight.mul_(2)
        close(fused(modules, x), plain(modules, x))


def test_training_statistics():
    """A batch norm in training takes those of the batch, and keeps them."""
    modules = make().train()
    other, x = copy.deepcopy(modules), image()
    with torch.no_grad():
        close(fused(modules, x), plain(other, x))
    close(modules[1].running_mean, other[1].running_mean)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(6, 8, 1, bias=False), DepthwiseConv2d(6, 3, bias=False)], ids=["1x1", "3x3"]
)
def test_evaluation_after_training(conv):
    """What was kept is made again from the statistics that have moved."""
    modules = nn.ModuleList([conv, nn.BatchNorm2d(conv.out_channels)]).eval()
    with torch.no_grad():
        before = fused(modules, image())
        fused(modules.train(), image())
        modules.eval()
        assert (fused(modules, image()) - before).abs().max() > 1e-3
        close(fused(modules, image()), plain(modules, image()))


@pytest.mark.parametrize("which", [0, 1])
def test_hooks(which):
    modules, seen = make(), []
    modules[which].register_forward_hook(lambda *_: seen.append(which))
    with torch.no_grad():
        close(fused(modules, image()), plain(modules, image()))
    assert seen == [which] * 2


def test_other_tensors():
    """float64, autocast, vmap, forward-mode derivatives, the meta device."""
    modules = make()
    with torch.no_grad():
        close(fused(modules.double(), image().double()), plain(modules, image().double()))
        modules.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused(make(batch_norm=False), image()).dtype == torch.bfloat16
        x = torch.stack([image(), image() * 2])
        close(torch.vmap(lambda x: fused(modules, x))(x), torch.stack([plain(modules, y) for y in x]))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image(), image() * 2)
            tangents = [forward_ad.unpack_dual(f(modules, dual)).tangent for f in (fused, plain)]
            close(*tangents)
        assert fused(copy.deepcopy(modules).to("meta"), image().to("meta")).device.type == "meta"


def test_not_a_number():
    """It stays one, as with the modules."""
    x = image()
    x[0, 1, 3, 3] = float("nan")
    modules = make(batch_norm=False)
    with torch.no_grad():
        assert torch.equal(fused(modules, x).isnan(), plain(modules, x).isnan())
