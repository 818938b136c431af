"""Reversible stacks against the same stack with stored activations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pyzoo
from benchmarks.measure import peak_bytes
from pyzoo import _C
from pyzoo.nn import ReversibleBlock, ReversibleSequential
from pyzoo.ops import reversible as coupling
from tests.stacks import check_step, make_input, make_stack, residual, saved_bytes, small, smooth, step, stored

# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("isa", [*_C.build_info()["isas"], None], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, d) for d in (torch.float32, torch.float16, torch.bfloat16)] + [(torch.float64,) * 2]
)
def test_kernels(isa, dtypes, set_isa):
    """None: what is chosen where no backend is forced, for small halves a kernel of torch."""
    if isa:
        set_isa(isa)
    half, narrow = dtypes
    shapes = [
        (3, 8, 5, 7),
        (1, 2, 1, 1),
        (2, 66, 40, 37),
        (5, 6),
        (0, 4, 3, 3),
        (),
        (2, 4, 3, 5, 6),
        (3, 1, 2, 1, 2, 2),
    ]
    for shape in shapes:
        base, update, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        base, update, grad = base.to(half), update.to(narrow), grad.to(half)
        views = [lambda x: x.clone(), lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone()]
        if len(shape) == 4:
            views += [
                lambda x: x.contiguous(memory_format=torch.channels_last),
                lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
                lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0],
                lambda x: torch.stack([x, x], -1)[..., 0],
            ]
        for view in views:
            for other in views:
                x, u, g = view(base.clone()), other(update), view(grad.clone())
                out = other(torch.zeros_like(x))
                with pyzoo.backend("cpu" if isa else None):
                    assert coupling.couple(x, u, out) is out
                    rebuilt, summed = coupling.uncouple_with_grad(x, u, g, u)
                torch.testing.assert_close(out, base + update.to(half), rtol=0, atol=0)
                torch.testing.assert_close(rebuilt, base - update.to(half), rtol=0, atol=0)
                torch.testing.assert_close(summed, grad + update.to(half), rtol=0, atol=0)


def test_kernels_write_in_place_only_what_nobody_else_sees():
    x, update = torch.randn(2, 3), torch.randn(2, 3)
    address, expected = x.data_ptr(), x + update
    x = coupling.couple(x, update)
    assert x.data_ptr() == address
    seen = x[0]
    y = coupling.uncouple(x, update)
    assert y.data_ptr() != address
    torch.testing.assert_close(seen, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3)), r"update must have shape \[2, 3\], got \[2, 4\]"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(1).expand(2)), "y must not be expanded"),
        ((torch.zeros(2), torch.zeros(2).double(), torch.zeros(2)), "update must be float32 or narrower, got float64"),
        ((torch.zeros(2).half(),) * 3, "x must be float32 or float64, got float16"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2).double()), "y must be float32, got float64"),
    ],
)
def test_kernels_guard_memory(tensors, message):
    with pytest.raises(ValueError, match=message):
        _C.reversible_fwd_cpu(*tensors)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 8, 32])
def test_equal_to_stored_activations(depth, images, memory_format):
    stack = make_stack(depth, function=lambda c: residual(c, nn.Dropout(0.2)))
    x = make_input(images, 8, 9, 7, memory_format=memory_format)
    check_step(stack, x)
    assert stack(x).stride() == x.stride()
    assert stack[0].f[0].num_batches_tracked == 2


def test_float32():
    check_step(make_stack(32, dtype=torch.float32), make_input(3, 8, 9, 7, dtype=torch.float32), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rebuilds_without_drift(dtype):
    """As near to the float32 gradients as one function in 16 bits is, not 32 times as far."""
    wide = make_stack(16, function=smooth, dtype=torch.float32)
    x = make_input(2, 8, 9, 7, dtype=torch.float32)
    _, expected, *_ = step(lambda x: stored(wide, x), wide, x)
    narrow = copy.deepcopy(wide).to(dtype)
    out, actual, *_ = step(narrow, narrow, x.to(dtype))
    assert out.dtype == dtype
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 8 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize(
    ("shape", "dim", "function"),
    [
        ((5, 6), 1, lambda: nn.Linear(3, 3)),
        ((2, 4, 6), -1, lambda: nn.Linear(3, 3)),
        ((2, 6, 9), 1, lambda: nn.Conv1d(3, 3, 3, padding=1)),
        ((2, 6, 4, 3, 5), 1, lambda: nn.Conv3d(3, 3, 3, padding=1)),
        ((4, 3), 0, lambda: nn.Linear(3, 3)),
        ((6,), 0, lambda: nn.Linear(3, 3)),
        ((0, 6, 9), 1, lambda: nn.Conv1d(3, 3, 3, padding=1)),
        ((1, 1, 1, 1, 1, 1, 6), -1, lambda: nn.Linear(3, 3)),
    ],
)
def test_any_dimension(shape, dim, function):
    blocks = [ReversibleBlock(nn.Sequential(function(), nn.Tanh()), function(), dim) for _ in range(3)]
    check_step(ReversibleSequential(*blocks).double(), make_input(*shape))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2, 1:],
        torch._neg_view,
    ],
    ids=["transposed", "expanded", "every_other_channel", "sliced", "negated"],
)
def test_views(view):
    x = view(make_input(3, 16, 8, 8))
    check_step(make_stack(2, channels=x.shape[1] // 2), x)


def test_gradients_of_any_strides():
    stack = make_stack(2, function=smooth)
    out = stack(make_input(2, 8, 6, 6).requires_grad_())
    for grad in (torch.ones((), dtype=out.dtype).expand_as(out), make_input(2, 8, 6, 6).mT):
        actual = torch.autograd.grad(out, stack.parameters(), grad, retain_graph=True)
        expected = torch.autograd.grad(out, stack.parameters(), grad.contiguous(), retain_graph=True)
        torch.testing.assert_close(actual, expected)


def test_block_alone_is_a_stack_of_one():
    stack = make_stack(1)
    x = make_input(2, 8, 5, 5)
    torch.testing.assert_close(stack[0](x), stack(x))
    stack[0](x).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_backward_twice():
    stack, x = make_stack(3), make_input(2, 8, 5, 5)
    out = stack(x)
    out.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in stack.parameters()]
    out.sum().backward()
    torch.testing.assert_close([p.grad for p in stack.parameters()], [2 * grad for grad in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_stack_used_twice_in_one_graph():
    stack = make_stack(2, function=lambda c: residual(c, nn.Dropout(0.5)))
    twin, x = copy.deepcopy(stack), make_input(2, 8, 5, 5)
    actual = step(lambda x: stack(stack(x) + x) - stack(x), stack, x)
    expected = step(lambda x: stored(twin, stored(twin, x) + x) - stored(twin, x), twin, x)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_shared_and_frozen_and_unused_parameters():
    shared = smooth(4)
    blocks = [ReversibleBlock(shared, smooth(4)), ReversibleBlock(smooth(4), shared), ReversibleBlock(shared, shared)]
    blocks[1].f[0].weight.requires_grad_(False)
    blocks[0].g.register_parameter("unused", nn.Parameter(torch.ones(3)))
    stack = ReversibleSequential(*blocks).double()
    check_step(stack, make_input(2, 8, 5, 5))
    stack.requires_grad_(False)
    check_step(stack, make_input(2, 8, 5, 5))
    assert not stack(make_input(2, 8, 5, 5)).requires_grad


def test_input_without_gradient():
    stack, x = make_stack(3), make_input(2, 8, 5, 5)
    twin = copy.deepcopy(stack)
    stack(x).square().sum().backward()
    stored(twin, x).square().sum().backward()
    for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


class Bias(nn.Module):
    """Its gradients are the very tensors that it is given: none may be overwritten later."""

    def __init__(self, *shape):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x + self.bias


def test_functions_without_memory_of_their_own():
    functions = [smooth(4), Bias(2, 4, 5, 5), nn.Identity(), Constant(), Bias(2, 4, 5, 5), nn.Flatten(0, 0)]
    functions += copy.deepcopy([*functions[1:], functions[0]])
    blocks = [ReversibleBlock(f, g) for f, g in zip(functions[::2], functions[1::2], strict=True)]
    check_step(ReversibleSequential(*blocks).double(), make_input(2, 8, 5, 5))


class ScaleOfItsOwn(torch.autograd.Function):
    """Its gradient is the parameter itself, which requires grad."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.sum() * scale

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], torch.ones_like(ctx.saved_tensors[0])


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return ScaleOfItsOwn.apply(x, self.scale)


def test_gradients_that_require_grad():
    stack, x = make_stack(2), make_input(2, 8, 5, 5)
    blocks = [*stack, ReversibleBlock(Scaled(2, 4, 5, 5), smooth(4)), ReversibleBlock(smooth(4), Scaled(2, 4, 5, 5))]
    stack = ReversibleSequential(*blocks).double()
    twin, inputs, grad = copy.deepcopy(stack), [x, x.clone()], x.clone().requires_grad_()
    found = []
    for call, leaf in zip((stack, lambda x: stored(twin, x)), inputs, strict=True):
        found.append(torch.autograd.grad(call(leaf.requires_grad_()), leaf, grad)[0])
    assert not found[0].requires_grad
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_layers_in_place_before_and_after():
    """Nothing of the input is kept, so layers in place around the stack are fine; over its output they are not."""
    stack, x = make_stack(2), make_input(2, 8, 5, 5)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), stack, nn.Conv2d(8, 8, 1)).double()
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stack(x).mul_(2).sum().backward()


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_flat_in_depth():
    x = make_input(4, 16, 16, 16, dtype=torch.float32).requires_grad_()
    activation = x.numel() * x.element_size()
    flat, growing = [], []
    for depth in (2, 8, 32):
        stack = make_stack(depth, channels=8, dtype=torch.float32)
        assert saved_bytes(stack, x) == activation

        def training_step(call, stack=stack):
            return torch.autograd.grad(call(x).sum(), [x, *stack.parameters()])

        flat.append(peak_bytes(lambda stack=stack, run=training_step: run(stack)))
        growing.append(peak_bytes(lambda stack=stack, run=training_step: run(lambda x: stored(stack, x))))
    assert max(flat) < 1.01 * min(flat)
    assert max(flat) < 8 * activation
    assert growing[2] > 3 * growing[1] > 6 * growing[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    stack = make_stack(3).eval()
    x = make_input(2, 8, 5, 5)
    expected = stack(x.requires_grad_())
    assert expected.requires_grad
    with mode():
        out = stack(x)
    assert not out.requires_grad
    assert out.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- inverse


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_inverse(dtype, error):
    stack = make_stack(32, dtype=dtype)
    x = make_input(2, 8, 6, 6, dtype=dtype)
    y = stack(x)
    torch.testing.assert_close(stack.inverse(y).detach(), x, rtol=error, atol=error)
    assert stack[0].f[0].num_batches_tracked == 1  # not updated again
    assert stack[0].f[0].track_running_stats
    torch.testing.assert_close(stack[3].inverse(stack[3](x)).detach(), x, rtol=error, atol=error)
    with torch.no_grad():
        torch.testing.assert_close(stack(stack.inverse(x)), x, rtol=error, atol=error)


def test_inverse_is_differentiable():
    stack, y = small()
    assert torch.autograd.gradcheck(stack.inverse, y.requires_grad_())


# ------------------------------------------------------------------------------------------------------- as a container


def test_is_a_sequential():
    stack = make_stack(3)
    assert isinstance(stack, nn.Sequential)
    assert len(stack) == len(list(stack)) == 3
    assert "0.f.2.weight" in stack.state_dict()
    part = stack[1:]
    assert isinstance(part, ReversibleSequential)
    assert part[0] is stack[1]
    x = make_input(2, 8, 5, 5)
    torch.testing.assert_close(stack.eval()(x), part(stack[0](x)), rtol=1e-12, atol=1e-12)
    copied = pickle.loads(pickle.dumps(stack))
    torch.testing.assert_close(copied(x), stack(x), rtol=0, atol=0)
    assert ReversibleSequential()(x) is x
    stack.append(ReversibleBlock(nn.Identity(), nn.Identity()))
    assert "dim=1" in repr(stack)
    assert stack(x).shape == x.shape
