"""The second run of a function is like the first, and nobody notices that there is one."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pyzoo.nn import ReversibleBlock, ReversibleSequential, _batch_statistics
from tests.stacks import Returns, check_step, make_input, make_stack, residual, smooth, step, stored


def test_batch_norm_is_updated_once():
    stack, x = make_stack(3), make_input(2, 8, 5, 5)
    stack(x).sum().backward()
    for module in stack.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 1
            assert module.track_running_stats


class Twice(nn.Module):
    """One batch norm on two batches: its statistics are found again."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.norm(x.sin()) * x)


@pytest.mark.parametrize(
    ("function", "shape", "calls"),
    [
        (lambda: residual(4, nn.Dropout(0.3)), (2, 8, 5, 5), 6),
        (lambda: nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 1)), (2, 8, 5, 5), 6),
        (lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False, eps=0.1), nn.Conv2d(4, 4, 1)), (2, 8, 5, 5), 6),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), (6, 8), 6),
        (lambda: nn.Sequential(nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1)), (2, 8, 2, 3, 2), 6),
        (lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1)), (2, 8, 5, 5), 0),
        (Twice, (2, 8, 5, 5), 0),
        # twice in each second run, and once in the stack that stores, whose functions are such stacks, too
        (lambda: ReversibleSequential(ReversibleBlock(residual(2), residual(2))), (2, 8, 5, 5), 36),
    ],
)
def test_batch_norm_runs_again_with_the_statistics_that_it_found(function, shape, calls, monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    replayed, normalize = [], _batch_statistics._Normalize
    monkeypatch.setattr(normalize, "forward", lambda *args, of=normalize.forward: replayed.append(0) or of(*args))
    shared, more = function(), [function() for _ in range(4)]
    blocks = [ReversibleBlock(shared, more[0]), ReversibleBlock(more[1], shared), ReversibleBlock(*more[2:])]
    stack = ReversibleSequential(*blocks).double()
    check_step(stack, make_input(*shape))
    assert len(replayed) == calls
    assert not any("forward" in m.__dict__ for m in stack.modules())


@pytest.mark.parametrize("first", [True, False])
def test_batch_norm_of_two_functions_takes_the_statistics_of_neither_for_the_other(first, monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    norm = nn.BatchNorm2d(4)
    once, twice = nn.Sequential(norm, nn.Conv2d(4, 4, 1)), Twice(norm)
    stack = ReversibleSequential(ReversibleBlock(once, twice) if first else ReversibleBlock(twice, once))
    check_step(stack.double(), make_input(2, 8, 5, 5))


class Frozen(nn.Module):
    """Switches its batch norm to evaluation for as long as it runs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        self.norm.eval()
        out = self.norm(x)
        self.norm.train()
        return out.sin()


def test_batch_norm_that_its_function_freezes(monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    check_step(ReversibleSequential(ReversibleBlock(Frozen(), smooth(4))).double(), make_input(2, 8, 5, 5))


class Elsewhere(nn.Module):
    """Calls its batch norm in another thread, too, on another batch."""

    def __init__(self, norm, other):
        super().__init__()
        self.norm, self.other, self.found = norm, other, []

    def forward(self, x):
        out = self.norm(x).sin()
        thread = threading.Thread(target=lambda: self.found.append(self.norm(self.other)))
        thread.start()
        thread.join()
        return out


def test_other_threads_have_batches_of_their_own(monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    norm, other = nn.BatchNorm2d(4).double(), make_input(2, 4, 5, 5)
    expected = copy.deepcopy(norm)(other)
    function = Elsewhere(norm, other)
    replayed, normalize = [], _batch_statistics._Normalize
    monkeypatch.setattr(normalize, "forward", lambda *args, of=normalize.forward: replayed.append(0) or of(*args))
    ReversibleSequential(ReversibleBlock(function, smooth(4).double()))(make_input(2, 8, 5, 5)).sum().backward()
    assert len(replayed) == 1
    for found in function.found:
        torch.testing.assert_close(found, expected)


def test_threads_run_one_stack(monkeypatch):
    """Whose forward ends first leaves the modules as they were, and those of the others do not mind."""
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    stack, x, both = make_stack(2), make_input(2, 8, 5, 5), threading.Barrier(2, timeout=60)

    def wait(*_):
        both.wait()

    for m in stack.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(stack, x) for _ in range(2)]:
            task.result()
    assert not any("forward" in m.__dict__ for m in stack.modules())


def test_second_derivatives_through_statistics(monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    stack = make_stack(2)
    twin, x = copy.deepcopy(stack), make_input(2, 8, 5, 5)
    found = []
    for call in (stack, lambda x: stored(twin, x)):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


class CompiledInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.run = torch.compile(lambda x: self.norm(x).sin(), backend="aot_eager", fullgraph=True)

    def forward(self, x):
        return self.run(x)


def test_compiled_batch_norm_is_not_compiled_again(monkeypatch):
    monkeypatch.setattr(_batch_statistics, "_LARGE", 1)
    torch._dynamo.reset()
    stack = ReversibleSequential(ReversibleBlock(CompiledInside(), smooth(4))).double()
    x = make_input(2, 8, 5, 5)
    stack(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            stack(x).sum().backward()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stack: stack[1].g[2].weight.data.add_(1), None),
        (lambda stack: stack[1].g[2].weight.add_(1), r"blocks\[1\].g: 'weight' of shape \[4, 4, 3, 3\] was modified"),
        (
            lambda stack: stack[0].f[0].running_mean.add_(1),
            r"blocks\[0\].f: 'running_mean' of shape .* was modified",
        ),
    ],
)
def test_what_was_changed_in_between_is_noticed(change, message):
    stack = make_stack(2).eval()
    out = stack(make_input(2, 8, 5, 5))
    with torch.no_grad():
        change(stack)
    with pytest.raises(RuntimeError, match=message) if message else nullcontext():
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
    """They see both runs forward, and the gradients once."""
    stack, twin = make_stack(3), make_stack(3)
    x, seen = make_input(2, 8, 5, 5), []
    for model, call in ((stack, stack), (twin, lambda x: stored(twin, x))):
        forward, backward = [], []
        for block in model:
            for f in (block.f, block.g):
                f.register_forward_hook(lambda m, args, out, into=forward: into.append((args[0], out)))
                f.register_full_backward_hook(lambda m, grad, grad_out, into=backward: into.append(grad + grad_out))
        call(x.clone().requires_grad_()).square().sum().backward()
        seen.append((forward[:6], forward[:5:-1], backward))
    (first, second, grads), (expected, _, expected_grads) = seen
    for got in (first, second):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-8)


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


def test_errors_of_the_second_run_name_the_function():
    calls = []
    for change, error, message in (
        (lambda x: x[:, len(calls) % 2 :], ValueError, "must keep shape"),
        (lambda x: x.half() if len(calls) % 2 else x, RuntimeError, "returned torch.float32 .*, now torch.float16"),
    ):
        calls.clear()
        stack = make_stack(3, dtype=torch.float32)
        stack[1].f = Returns(lambda x, change=change: (change(x), calls.append(0))[0])
        out = stack(torch.zeros(2, 8, 4, 4))
        with pytest.raises(error, match=r"blocks\[1\].f " + message):
            out.sum().backward()
