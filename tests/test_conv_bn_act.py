"""1x1 or depthwise convolution, batch norm in training, addition and ReLU in one: as near to float64 as one after the
other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyzoo import _C
from pyzoo.nn import conv_bn, conv_bn_act
from pyzoo.ops import DepthwiseConv2d
from pyzoo.ops import _common as common

ISAS = [*_C.build_info()["isas"]]
# images, channels, outputs, height, width
SIZES = [
    (1, 32, 16, 9, 7),
    (2, 3, 5, 3, 3),
    (1, 1, 1, 1, 2),
    (2, 70, 130, 9, 1),
    (1, 24, 144, 20, 28),
    (1, 300, 100, 7, 7),  # sums of more than one block of channels
    (3, 17, 64, 21, 20),  # and of pixels
]
WHAT = [(None, False), ("relu6", False), (None, True), ("relu", True)]  # activation, residual


LAST, FIRST = torch.channels_last, torch.contiguous_format
# images, channels, height, width; kernel, stride, padding, dilation; order of the map
DEPTHWISE = [
    ((1, 32, 9, 7), (3, 1, 1, 1), LAST),
    ((2, 5, 8, 9), (3, 2, 1, 1), LAST),
    ((2, 70, 11, 12), (5, 1, (2, 0), 1), FIRST),
    ((3, 1, 6, 6), (3, 1, 0, 2), FIRST),
    ((2, 16, 1, 1), (3, 1, 1, 1), LAST),
]


def make(images, channels, outputs, height, width, residual=False):
    return finish(nn.Conv2d(channels, outputs, 1, bias=False), torch.randn(images, channels, height, width), residual)


def make_depthwise(size, geometry, order, residual=False):
    return finish(DepthwiseConv2d(size[1], *geometry, bias=False), torch.randn(size), residual, order)


def finish(conv, x, residual, order=LAST):
    torch.manual_seed(0)
    nn.init.normal_(conv.weight, 0, (conv.weight[0].numel()) ** -0.5)
    bn = nn.BatchNorm2d(conv.out_channels)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    size = conv(x).shape
    x, grad, shortcut = (torch.randn(size).contiguous(memory_format=order) for size in (x.shape, size, size))
    return nn.ModuleList([conv, bn]), x, grad, shortcut if residual else None


def one_by_one(x, conv, bn, activation=None, residual=None):
    out = bn(conv(x))
    return common.ACTIVATE[activation](out if residual is None else out + residual)


def all_of(call, modules, x, grad, residual, activation):
    """The output, the gradient of everything, and the running statistics."""
    modules = copy.deepcopy(modules)
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual) if t is not None
    ]
    out = call(leaves[0], *modules, activation, leaves[1] if residual is not None else None)
    grads = torch.autograd.grad(out, [*leaves, *modules.parameters()], grad)
    return [out.detach(), *grads, *modules.buffers()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("what", WHAT, ids=str)
@pytest.mark.parametrize("size", [*SIZES, *DEPTHWISE], ids=str)
def test_near_float64(size, what, isa, set_isa, poison):
    set_isa(isa)
    activation, residual = what
    modules, x, grad, shortcut = (make_depthwise if size in DEPTHWISE else make)(*size, residual)
    assert conv_bn_act.suits(x, modules[0])
    wide = [None if t is None else t.double() for t in (x, grad, shortcut)]
    expected = all_of(one_by_one, copy.deepcopy(modules).double(), *wide, activation)
    actual = all_of(conv_bn, modules, x, grad, shortcut, activation)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=2e-5 * max(1, float(e.abs().max())))
    assert actual[0].is_contiguous(memory_format=size[2] if size in DEPTHWISE else LAST)


@pytest.mark.parametrize("kind", ["1x1", "depthwise"])
def test_same_bits_for_any_number_of_threads(kind):
    modules, x, grad, shortcut = make(2, 48, 72, 33, 35, True)
    if kind == "depthwise":
        modules, x, grad, shortcut = make_depthwise((2, 48, 33, 35), (3, 1, 1, 1), LAST, True)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_of(conv_bn, modules, x, grad, shortcut, "relu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_that_others_hold_stay():
    modules, x, grad, _ = make(1, 8, 12, 5, 5)
    kept = grad.clone()
    conv_bn(x, *modules, "relu6").backward(grad)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("what", WHAT, ids=str)
@pytest.mark.parametrize("depthwise", [False, True])
def test_second_derivatives(what, depthwise):
    modules, x, grad, shortcut = make(2, 6, 10, 4, 5, what[1])
    if depthwise:
        modules, x, grad, shortcut = make_depthwise((2, 6, 7, 5), (3, 2, 1, 1), LAST, what[1])
    results = []
    for call in (conv_bn, one_by_one):
        leaf, g = x.clone().requires_grad_(), grad.clone().requires_grad_()
        out = call(leaf, *copy.deepcopy(modules), what[0], shortcut)
        (first,) = torch.autograd.grad(out, leaf, g, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [leaf, g]))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_only_what_learns():
    modules, x, grad, _ = make(1, 8, 12, 5, 5)
    modules[0].weight.requires_grad_(False)
    conv_bn(x, *modules).backward(grad)
    assert modules[0].weight.grad is None
    assert modules[1].weight.grad is not None
    modules[1].requires_grad_(False)
    assert not conv_bn(x, *modules).requires_grad


def test_when_it_is_used():
    modules, x, *_ = make(2, 64, 96, 14, 14)
    assert conv_bn_act.suits(x, modules[0])
    for other in ({"bias": True}, {"stride": 2}, {"padding": 1}, {"groups": 2}):
        assert not conv_bn_act.suits(x, nn.Conv2d(64, 96, 1, **{"bias": False, **other}))
    assert conv_bn_act.suits(x, DepthwiseConv2d(64, 3, bias=False))
    for other in ({"bias": True}, {"multiplier": 2}, {"padding": "same"}, {"padding_mode": "reflect"}, {"dilation": 9}):
        assert not conv_bn_act.suits(x, DepthwiseConv2d(64, 3, **{"bias": False, **other}))
    assert not conv_bn_act.suits(x[..., ::2], DepthwiseConv2d(64, 3, bias=False))
    assert not conv_bn_act.suits(x.new_empty(64, 64, 56, 56, device="meta"), modules[0])
    with pytest.raises(ValueError, match="more than one value per channel"):
        conv_bn(x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last), *modules)


def test_the_core_checks_its_memory():
    x, w, y, c = torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1), torch.ones(1, 4, 3, 3), torch.ones(4)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))

    def call(x=x, w=w, y=y, running=(None, None)):
        _C.pointwise_bn_act_fwd_cpu(x, w, y, c, c, None, y, c.clone(), c.clone(), *running, 0.1, 1e-5, 0)

    call()
    with pytest.raises(ValueError, match="both or neither"):
        call(running=(c, None))
    with pytest.raises(ValueError, match="running_var must"):
        call(running=(c, c[:3]))
    for wrong in ({"x": x.contiguous()}, {"x": x[:, :, :2]}, {"w": w[:3]}, {"w": w.double()}, {"y": y.contiguous()}):
        with pytest.raises(ValueError, match="must"):
            call(**wrong)
