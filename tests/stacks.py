"""Reversible stacks for the tests, and the same stacks with stored activations to compare them with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyzoo.nn import ReversibleBlock, ReversibleSequential
from pyzoo.ops.reversible import reversible_reference


def residual(channels, *more):
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1), *more
    )


def smooth(channels):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh())


def make_stack(depth, channels=4, function=residual, dtype=torch.float64, **kwargs):
    torch.manual_seed(depth)
    blocks = [ReversibleBlock(function(channels), function(channels)) for _ in range(depth)]
    return ReversibleSequential(*blocks, **kwargs).to(dtype)


def make_input(*shape, dtype=torch.float64, memory_format=torch.contiguous_format, seed=1):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=memory_format) if len(shape) == 4 else x


def stored(stack, x):
    """The peer: the same modules, with activations stored."""
    return reversible_reference([function for block in stack for function in (block.f, block.g)], x, stack[0].dim)


def step(call, stack, x, seed=2):
    """Output, gradients of the input and of the parameters, buffers, and what the random numbers were after that."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    out = call(x)
    random = torch.get_rng_state()
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(out)
    grads = torch.autograd.grad(out, [x, *(p for p in stack.parameters() if p.requires_grad)], grad, allow_unused=True)
    assert torch.equal(torch.get_rng_state(), random)
    return out.detach(), grads, list(stack.buffers()), random


def check_step(stack, x, rtol=1e-10, **kwargs):
    twin = copy.deepcopy(stack)
    actual, expected = step(stack, stack, x, **kwargs), step(lambda x: stored(twin, x), twin, x, **kwargs)
    scale = max(float(g.abs().max()) for g in expected[1] if g is not None and g.numel())
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=rtol)
    for got, want in zip(actual[1], expected[1], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * scale)
    torch.testing.assert_close(actual[2], expected[2], rtol=rtol, atol=rtol)
    assert torch.equal(actual[3], expected[3])


def small(function=smooth):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(function(2), function(2)) for _ in range(2)]
    return ReversibleSequential(*blocks).double(), make_input(2, 4, 3, 3)


def saved_bytes(call, x):
    """Bytes of the storages that autograd keeps for the backward pass."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(x)
    del out
    return sum(storages.values())


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)
