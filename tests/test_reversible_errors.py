"""What reversible stacks refuse, and what ``verify`` finds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyzoo.nn import ReversibleBlock, ReversibleSequential
from tests.stacks import Returns, check_step, make_input, make_stack, smooth

# --------------------------------------------------------------------------------------------------------------- verify


class Noise(nn.Module):
    """Its random numbers come from a generator of its own, which nobody else can restore."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator()

    def forward(self, x):
        return x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=self.own)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return (x * self.factor).sin() * self.factor


def test_verify_finds_what_is_not_deterministic():
    stack = make_stack(4, verify=True)
    stack[2].g = Noise()
    with pytest.raises(
        RuntimeError, match=r"blocks\[2\].g: the input rebuilt .* by [1-9]\..e-0[12] relative, allowed .*1.0e-08"
    ):
        stack(make_input(2, 8, 6, 6)).sum().backward()
    assert list(stack.errors) == [f"ReversibleSequential: blocks[{i}].{f}" for i, f in ((3, "g"), (3, "f"), (2, "g"))]


def test_verify_finds_what_cannot_be_rebuilt():
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    stack = ReversibleSequential(*[ReversibleBlock(Scale(1e3), Scale(1e3)) for _ in range(4)], verify=0.1)
    with pytest.raises(RuntimeError, match="too steep to be rebuilt"):
        stack(x.requires_grad_()).sum().backward()


def test_verify_reports_the_errors():
    stack = make_stack(4, dtype=torch.float32, verify=True)
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    check_step(stack, x, rtol=1e-4)
    assert len(stack.errors) == 8
    assert 0 <= max(stack.errors.values()) < 1e-5
    make_stack(4, function=smooth, dtype=torch.float32, verify=True)(torch.zeros_like(x)).sum().backward()


# --------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: x[:, :3],
            ValueError,
            r"blocks\[1\].f must keep shape .*, \[2, 4, 4, 4\] on cpu, got \[2, 3, 4, 4\]",
        ),
        (lambda x: x.to("meta"), ValueError, r"blocks\[1\].f must keep shape and device .* got \[2, 4, 4, 4\] on meta"),
        (lambda x: x.double(), TypeError, r"blocks\[1\].f must return torch.float32.*, got torch.float64"),
        (lambda x: x.int(), TypeError, r"blocks\[1\].f must return torch.float32.*, got torch.int32"),
        (lambda x: (x, x), TypeError, r"blocks\[1\].f must return a tensor, got tuple"),
        (lambda x: x.add_(1), RuntimeError, r"blocks\[1\].f modifies its input in place"),
    ],
)
def test_errors_name_the_function(change, error, message):
    stack = make_stack(3, dtype=torch.float32)
    stack[1].f = Returns(change)
    with pytest.raises(error, match="ReversibleSequential: " + message):
        stack(X)
    with torch.no_grad(), pytest.raises(error, match="ReversibleSequential: " + message):
        stack(X.clone())


def test_no_gradient_is_lost():
    stack, hidden = make_stack(2, dtype=torch.float32), torch.ones(3, requires_grad=True)
    stack[0].g = Returns(lambda x: x * hidden.sum())
    out = stack(X)
    with pytest.raises(
        RuntimeError, match=r"blocks\[0\].g uses a tensor of shape \[3\] that requires grad but is neither"
    ):
        out.sum().backward()


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (
            torch.zeros(2, 7, 4, 4),
            ValueError,
            r"input must have an even size in dimension dim=1.*got shape \[2, 7, 4, 4\]",
        ),
        (torch.zeros(8), ValueError, r"input must have dimension dim=1.*got shape \[8\]"),
        ([1.0], TypeError, "input must be a torch.Tensor, got list"),
        (torch.zeros(2, 8, 4, 4).int(), TypeError, "input must be float32.*got torch.int32"),
        (torch.zeros(2, 8, 4, 4).to_sparse(), TypeError, "input must be dense"),
        (torch.zeros(2, 10, 4, 4), RuntimeError, None),  # from the functions themselves
    ],
)
def test_errors_of_the_input(input, error, message):
    stack = make_stack(2, dtype=torch.float32)
    with pytest.raises(error, match=message and "ReversibleSequential: " + message):
        stack(input)
    if message:
        with pytest.raises(error, match="ReversibleBlock: " + message):
            stack[0](input)
        with pytest.raises(error, match="ReversibleSequential: " + message.replace("input", "output")):
            stack.inverse(input)


def test_errors_of_construction():
    with pytest.raises(TypeError, match=r"ReversibleBlock: g must be an nn.Module, got function"):
        ReversibleBlock(nn.Identity(), lambda x: x)
    with pytest.raises(TypeError, match=r"ReversibleBlock: dim must be an int, got 1.0"):
        ReversibleBlock(nn.Identity(), nn.Identity(), 1.0)
    block = ReversibleBlock(nn.Identity(), nn.Identity())
    with pytest.raises(TypeError, match=r"ReversibleSequential: blocks\[1\] must be a ReversibleBlock, got Identity"):
        ReversibleSequential(block, nn.Identity())
    with pytest.raises(ValueError, match=r"ReversibleSequential: blocks\[1\] must split dim=1 .*, got dim=2"):
        ReversibleSequential(block, ReversibleBlock(nn.Identity(), nn.Identity(), dim=2))
