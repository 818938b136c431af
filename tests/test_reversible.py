"""Reversible stacks against the same stack with stored activations."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from pyzoo import _C
from pyzoo.nn import ReversibleBlock, ReversibleSequential
from pyzoo.ops import reversible as coupling
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
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(out.dtype)
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


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, d) for d in (torch.float32, torch.float16, torch.bfloat16)] + [(torch.float64,) * 2]
)
def test_kernels(isa, dtypes, set_isa):
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
                assert coupling.couple(x, u, out) is out
                torch.testing.assert_close(out, base + update.to(half), rtol=0, atol=0)
                rebuilt, summed = coupling.uncouple_with_grad(x, u, g, u)
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
    functions = [nn.Identity(), Bias(2, 4, 5, 5), Constant(), smooth(4), Bias(2, 4, 5, 5), nn.Flatten(0, 0)]
    blocks = [ReversibleBlock(f, g) for f, g in zip(functions, functions[1:] + functions[:1], strict=True)]
    check_step(ReversibleSequential(*blocks).double(), make_input(2, 8, 5, 5))


def test_layers_in_place_before_and_after():
    """Nothing of the input is kept, so layers in place around the stack are fine; over its output they are not."""
    stack, x = make_stack(2), make_input(2, 8, 5, 5)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), stack, nn.Conv2d(8, 8, 1)).double()
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stack(x).mul_(2).sum().backward()


# ------------------------------------------------------------------------------------------------- state and its replay


def test_batch_norm_is_updated_once():
    stack, x = make_stack(3), make_input(2, 8, 5, 5)
    stack(x).sum().backward()
    for module in stack.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 1
            assert module.track_running_stats


class Counting(nn.Module):
    """Output and gradient depend on a buffer that each forward pass changes, in place or by assignment."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x):
        if self.in_place:
            self.count.add_(1)
        else:
            self.count = self.count + 1
        return x.sin() * self.scale * self.count.clone()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda: Counting(True),
        lambda: Counting(False),
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.BatchNorm2d(4, momentum=None),
    ],
)
def test_buffers_that_change(function, training):
    shared = function()
    blocks = [ReversibleBlock(shared, function()), ReversibleBlock(function(), shared)]
    check_step(ReversibleSequential(*blocks).double().train(training), make_input(2, 8, 5, 5))


def test_mode_switched_between_forward_and_backward():
    for before, after in ((True, False), (False, True)):
        stack = make_stack(2, function=lambda c: residual(c, nn.Dropout(0.5)))
        twin, x = copy.deepcopy(stack), make_input(2, 8, 5, 5)
        outs = []
        for model, call in ((stack, stack), (twin, lambda x, twin=twin: stored(twin, x))):
            model.train(before)
            torch.manual_seed(0)
            outs.append(call(x))
            model.train(after)
            outs[-1].sum().backward()
            assert all(m.training == after for m in model.modules())
        for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_what_was_changed_in_between_is_noticed():
    for change, message in (
        (lambda stack: stack[1].g[2].weight.data.add_(1), None),
        (lambda stack: stack[1].g[2].weight.add_(1), r"blocks\[1\].g: 'weight' of shape \[4, 4, 3, 3\] was modified"),
        (
            lambda stack: stack[0].f[0].running_mean.add_(1),
            r"blocks\[0\].f: 'running_mean' of shape \[4\] was modified",
        ),
    ):
        stack = make_stack(2).eval()
        out = stack(make_input(2, 8, 5, 5))
        with torch.no_grad():
            change(stack)
        if message:
            with pytest.raises(RuntimeError, match=message):
                out.sum().backward()


def test_hooks_of_parameters_see_one_gradient():
    shared = smooth(4)
    stack = ReversibleSequential(ReversibleBlock(shared, smooth(4)), ReversibleBlock(shared, shared)).double()
    x, seen = make_input(2, 8, 5, 5), []
    stack(x).sum().backward()
    expected = shared[0].weight.grad.clone()
    stack.zero_grad()
    shared[0].weight.register_hook(lambda grad: seen.append(grad) or 3 * grad)
    shared[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    stack(x).sum().backward()
    torch.testing.assert_close(seen, [expected, 3 * expected])


def test_hooks_of_modules_may_keep_what_they_see():
    stack, twin = make_stack(3), make_stack(3)
    x, kept, expected = make_input(2, 8, 5, 5), [], []
    for model, into in ((stack, kept), (twin, expected)):
        for block in model:
            block.f.register_forward_hook(lambda m, args, out, into=into: into.append((args[0], out)))
            block.g.register_full_backward_hook(lambda m, grad, grad_out, into=into: into.append((*grad, *grad_out)))
    stack(x).sum().backward()
    first_run = kept[:3]
    stored(twin, x).sum().backward()
    backward = [pair for pair in kept[3:] if not pair[0].requires_grad]
    for (a, b), (c, d) in zip(first_run, expected[:3], strict=True):
        torch.testing.assert_close((a, b), (c.detach(), d.detach()), rtol=1e-10, atol=1e-10)
    for got, want in zip([p for p in backward if len(p) == 2][-3:], expected[3:], strict=False):
        assert got[0].shape == want[0].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    stack = make_stack(4, function=smooth, dtype=torch.float32)
    twin, x = copy.deepcopy(stack), make_input(2, 8, 6, 6, dtype=torch.float32)
    for call in (stack, lambda x: stored(twin, x)):
        with torch.autocast("cpu", dtype=dtype):
            out = call(x)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        assert out.dtype == torch.float32
    for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 4 * torch.finfo(dtype).eps * q.grad.norm()


def test_autocast_of_half_precision_input():
    stack = make_stack(4, function=smooth, dtype=torch.float32)
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    _, expected, *_ = step(stack, stack, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, actual, *_ = step(stack, stack, x.bfloat16())
    assert out.dtype == torch.bfloat16
    for got, want in zip(actual, expected, strict=True):
        assert (got.float() - want).norm() < 4 * torch.finfo(torch.bfloat16).eps * want.norm()


def test_autocast_is_left_as_it_was():
    shared = smooth(4)
    stack = ReversibleSequential(ReversibleBlock(shared, shared))
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(x)
        assert torch.is_autocast_cache_enabled()
        (shared(x[:, :4]).sum() + out.sum()).backward()  # no weight that was cast without a graph is left in the cache
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert shared[0].weight.grad is not None
    out = stack(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()


def test_gradient_scaler():
    stack = make_stack(3, function=smooth, dtype=torch.float32)
    twin, x = copy.deepcopy(stack), make_input(2, 8, 6, 6, dtype=torch.float32)
    for model, call in ((stack, stack), (twin, lambda x: stored(twin, x))):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = call(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- memory


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


# -------------------------------------------------------------------------------- transforms, compilers, other wrappers


def small(function=smooth):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(function(2), function(2)) for _ in range(2)]
    return ReversibleSequential(*blocks).double(), make_input(2, 4, 3, 3)


def test_second_derivatives():
    stack, x = small()
    parameters = {name: p.detach().requires_grad_() for name, p in stack.named_parameters()}

    def f(x, *values):
        return torch.func.functional_call(stack, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *parameters.values()))
    assert torch.autograd.gradgradcheck(f, (x, *parameters.values()))


def test_gradient_penalty():
    """With batch norm and dropout, whose second run must be the first in this way, too."""
    stack = make_stack(2, function=lambda c: residual(c, nn.Dropout(0.3)))
    twin = copy.deepcopy(stack)

    def penalty(call, model):
        x = make_input(2, 8, 5, 5).requires_grad_()
        torch.manual_seed(5)
        (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    for got, want in zip(penalty(stack, stack), penalty(lambda x: stored(twin, x), twin), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_transforms():
    stack, x = small()

    def loss(x):
        return stack(x).square().sum()

    def expected_loss(x):
        return stored(stack, x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(expected_loss)(x))
    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.func.hessian(expected_loss)(x))
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(stack)(batch), torch.stack([stack(x), stack(2 * x)]))
    torch.testing.assert_close(
        torch.func.jvp(stack, (x,), (x,)), torch.func.jvp(lambda x: stored(stack, x), (x,), (x,))
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(stack(dual)).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(stack, (x,), (x,))[1])


def test_parameters_of_functional_call_get_the_gradients():
    stack, x = small()
    swapped = {name: (2 * p).detach().requires_grad_() for name, p in stack.named_parameters()}
    torch.func.functional_call(stack, swapped, x).sum().backward()
    twin = copy.deepcopy(stack)
    twin.load_state_dict({name: p.detach() for name, p in swapped.items()})
    stored(twin, x).sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(swapped[name].grad, p.grad)
    assert all(p.grad is None for p in stack.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around(use_reentrant):
    stack = make_stack(2, function=lambda c: residual(c, nn.Dropout(0.3)))
    x = make_input(2, 8, 5, 5)
    twin = copy.deepcopy(stack)
    actual = step(lambda x: checkpoint(stack, x, use_reentrant=use_reentrant), stack, x) if not use_reentrant else None
    if use_reentrant:  # only for .backward()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        checkpoint(stack, leaf, use_reentrant=True).sum().backward()
        other = x.clone().requires_grad_()
        torch.manual_seed(2)
        stored(twin, other).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-10)
    else:
        expected = step(lambda x: stored(twin, x), twin, x)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-10, atol=1e-10)


def test_nested():
    def inner():
        return ReversibleSequential(ReversibleBlock(smooth(2), smooth(2)), ReversibleBlock(smooth(2), smooth(2)))

    stack = ReversibleSequential(ReversibleBlock(inner(), smooth(4)), ReversibleBlock(inner(), inner())).double()
    check_step(stack, make_input(2, 8, 5, 5))


def test_saved_on_the_host():
    stack, x = make_stack(2), make_input(2, 8, 5, 5).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        out = stack(x)
    out.sum().backward()
    assert x.grad is not None


def test_lazy_modules():
    lazy = [nn.LazyConv2d(4, 3, padding=1) for _ in range(2)]
    stack, x = ReversibleSequential(ReversibleBlock(*lazy)), make_input(2, 8, 5, 5, dtype=torch.float32)
    stack(x).sum().backward()
    assert stack[0].f.weight.grad is not None
    assert saved_bytes(stack, x) == 4 * x.numel()


def test_compiled_functions():
    torch._dynamo.reset()
    stack = make_stack(2, function=lambda c: residual(c, nn.Dropout(0.4)), dtype=torch.float32, verify=True)
    for block in stack:
        block.f.compile(fullgraph=True)
        block.g = torch.compile(block.g)
    x = make_input(2, 8, 6, 6, dtype=torch.float32).requires_grad_()
    for _ in range(2):
        stack(x).square().sum().backward()  # verify sees that the dropout masks are the same
    plain = make_stack(2, dtype=torch.float32)
    compiled = copy.deepcopy(plain)
    for block in compiled:
        block.f.compile()
        block.g.compile()
    expected, actual = step(plain, plain, x), step(compiled, compiled, x)
    for got, want in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-4)


def test_compiled_around():
    torch._dynamo.reset()
    stack = make_stack(2, function=smooth, dtype=torch.float32)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), stack, nn.Conv2d(8, 8, 1))
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    expected, actual = step(net, net, x), step(compiled, net, x)
    for got, want in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        whole = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x), net(x))


def test_export():
    stack = make_stack(2, function=smooth, dtype=torch.float32).eval()
    x = make_input(2, 8, 6, 6, dtype=torch.float32)
    program = torch.export.export(stack, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for images in (x, make_input(5, 8, 6, 6, dtype=torch.float32)):
        torch.testing.assert_close(program.module()(images), stack(images))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stack = ReversibleSequential(ReversibleBlock(residual(4), residual(4)))
        stack(torch.empty(2, 8, 5, 5, requires_grad=True)).sum().backward()
        assert stack[0].f[2].weight.grad.shape == (4, 4, 3, 3)


def test_meta_tensors():
    stack = make_stack(2).to("meta")
    x = torch.empty(2, 8, 5, 5, dtype=torch.float64, device="meta", requires_grad=True)
    stack(x).sum().backward()
    assert x.grad.shape == x.shape


def ddp_worker(rank, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stack = make_stack(3, function=smooth)
    model = DistributedDataParallel(stack)
    x = make_input(4, 8, 5, 5)[2 * rank : 2 * rank + 2]
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in stack.parameters()], f"{folder}/grads")
    dist.barrier()
    os._exit(0)  # gloo's threads abort the process now and then while it takes them down


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    stack = make_stack(3, function=smooth)
    stack(make_input(4, 8, 5, 5)).square().mean().backward()
    torch.testing.assert_close(
        torch.load(tmp_path / "grads"), [p.grad for p in stack.parameters()], rtol=1e-10, atol=1e-12
    )


# ------------------------------------------------------------------------------------------------------------- inverse


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


# -------------------------------------------------------------------------------------------------------------- verify


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


# -------------------------------------------------------------------------------------------------------------- errors


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


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


def test_errors_of_the_second_run_name_the_function():
    calls = []
    for change, error, message in (
        (lambda x: x[:, len(calls) % 2 :], ValueError, "must keep shape"),
        (lambda x: x.half() if len(calls) % 2 else x, RuntimeError, "returned torch.float32 .*, now torch.float16"),
    ):
        calls.clear()
        stack = make_stack(3, dtype=torch.float32)
        stack[1].f = Returns(lambda x, change=change: (change(x), calls.append(0))[0])
        out = stack(X)
        with pytest.raises(error, match=r"blocks\[1\].f " + message):
            out.sum().backward()


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
