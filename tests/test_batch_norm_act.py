"""Batch norm with addition and activation: running statistics, precision, and whose memory the gradient takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyzoo.ops import batch_norm_act
from tests.specs import inputs

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make(*shape, layout=torch.channels_last, dtype=torch.float32, seed=0):
    x = inputs.features(*shape, memory_format=layout, dtype=dtype, seed=seed).requires_grad_()
    weight, bias = (1 + inputs.features(shape[1], dtype=dtype, seed=s) / 4 for s in (1, 2))
    return x, weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics(dtype, momentum, layout):
    """They move as those of ``F.batch_norm`` do, whatever is asked of the output."""
    x, weight, bias = (t.detach() for t in make(3, 20, 9, 7, layout=layout))
    ours, theirs = ([torch.zeros(20), torch.ones(20)] for _ in range(2))
    for step in range(3):
        x = x * 1.5 + step
        batch_norm_act(
            x.to(dtype), weight, bias, running_mean=ours[0], running_var=ours[1], momentum=momentum, activation="relu6"
        )
        F.batch_norm(x.to(dtype).float(), *theirs, weight, bias, True, momentum)
        torch.testing.assert_close(ours, theirs)


def test_no_statistics_of_nothing():
    x, weight, bias = make(0, 3, 4, 4)
    mean, var = torch.zeros(3), torch.ones(3)
    batch_norm_act(x, weight, bias, running_mean=mean, running_var=var).sum().backward()
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert not weight.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_precision(layout):
    """The variance of numbers around 1000 is 1, not what float32 leaves of a difference of squares."""
    x, weight, bias = (t.detach() for t in make(4, 40, 30, 41, layout=layout))
    x += 1000
    expected = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    torch.testing.assert_close(batch_norm_act(x, weight, bias).double(), expected, rtol=0, atol=2e-4)


def grad_of_input(hold, activation="relu6"):
    """The gradient that arrives and the one that leaves, where ``hold(y, x)`` makes a loss."""
    x, weight, bias = make(2, 20, 9, 7)
    hidden = x * 1
    y = batch_norm_act(hidden, weight, bias, activation=activation)
    seen = []
    hidden.register_hook(lambda grad: seen.append(grad.data_ptr()))
    y.register_hook(lambda grad: seen.append(grad.data_ptr()))
    hold(y, hidden).backward()
    return seen, x.grad


@pytest.mark.parametrize("activation", [None, "relu"])
def test_takes_over_the_memory_of_a_gradient(activation):
    (arrived, left), _ = grad_of_input(lambda y, x: (y * 2).square().sum(), activation)
    assert arrived == left


KEPT = []


@pytest.mark.parametrize(
    "hold",
    [
        lambda y, x: (y + x).exp().sum(),
        lambda y, x: (x + y).exp().sum(),
        lambda y, x: (y + x.detach().requires_grad_()).exp().sum(),
        lambda y, x: (y.register_hook(KEPT.append), y.exp().sum())[1],
        lambda y, x: (y.retain_grad(), KEPT.append(y), y.exp().sum())[2],
        lambda y, x: (y.reshape(-1) * 1).exp().sum(),
        lambda y, x: y.permute(2, 3, 0, 1).exp().sum(),
        lambda y, x: y.sum(),
        lambda y, x: torch.utils.checkpoint.checkpoint(torch.exp, y, use_reentrant=False).sum(),
    ],
)
def test_leaves_gradients_that_others_hold(hold):
    """Whoever else has the incoming gradient finds in it what was there."""
    KEPT.clear()
    results = []
    for f in (batch_norm_act, lambda x, w, b, activation: F.relu6(F.batch_norm(x, None, None, w, b, True))):
        x, weight, bias = make(2, 20, 9, 7)
        hidden = x * 1
        y = f(hidden, weight, bias, activation="relu6")
        hold(y, hidden).backward()
        results.append([x.grad, weight.grad, bias.grad])
        if KEPT:
            kept = KEPT.pop()
            results[-1].append((kept if kept.grad_fn is None else kept.grad).clone())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_leaves_the_gradient_of_the_caller():
    x, weight, bias = make(2, 20, 9, 7)
    grad = torch.ones(2, 20, 9, 7).contiguous(memory_format=torch.channels_last)
    torch.autograd.grad(batch_norm_act(x, weight, bias, activation="relu"), x, grad)
    assert torch.equal(grad, torch.ones_like(grad))


def test_leaves_the_gradient_of_a_residual():
    """Without an activation that is the incoming one."""
    x, weight, bias = make(2, 20, 9, 7)
    residual = torch.zeros_like(x).requires_grad_()
    y = batch_norm_act(x, weight, bias, residual)
    (y * 3).sum().backward()
    assert torch.equal(residual.grad, torch.full_like(residual, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles(layout):
    x, weight, bias = make(2, 20, 9, 7, layout=layout)
    mean, var = torch.zeros(20), torch.ones(20)

    def step(x, weight, bias, mean, var):
        return batch_norm_act(x, weight, bias, running_mean=mean, running_var=var, activation="relu6")

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight, bias, mean, var)
    grads = torch.autograd.grad(out.square().sum(), (x, weight, bias))
    other_mean, other_var = torch.zeros(20), torch.ones(20)
    expected = step(x, weight, bias, other_mean, other_var)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (x, weight, bias)))
    torch.testing.assert_close((mean, var), (other_mean, other_var))
