"""Reversible stacks under transforms, compilers and other wrappers."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyzoo.nn import ReversibleBlock, ReversibleSequential
from tests.stacks import check_step, make_input, make_stack, residual, saved_bytes, small, smooth, step, stored


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


def test_batches_of_gradients():
    stack = make_stack(2)
    x = make_input(2, 8, 5, 5).requires_grad_()
    inputs, out = [x, *stack.parameters()], stack(x)
    grads = make_input(3, *out.shape)

    def differentiate(grad, **kwargs):
        return torch.autograd.grad(out, inputs, grad, retain_graph=True, **kwargs)

    expected = [torch.stack(each) for each in zip(*map(differentiate, grads), strict=True)]
    torch.testing.assert_close(differentiate(grads, is_grads_batched=True), tuple(expected))
    torch.testing.assert_close(torch.vmap(differentiate)(grads), tuple(expected))


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
    twin, grads = copy.deepcopy(stack), []
    calls = (lambda x: checkpoint(stack, x, use_reentrant=use_reentrant), lambda x: stored(twin, x))
    for model, call in zip((stack, twin), calls, strict=True):
        x = make_input(2, 8, 5, 5).requires_grad_()
        torch.manual_seed(2)
        call(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


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
        block.f = torch.compile(block.f, fullgraph=True)
        block.g.compile()
    x = make_input(2, 8, 6, 6, dtype=torch.float32).requires_grad_()
    for _ in range(2):
        stack(x).square().sum().backward()  # verify sees that the dropout masks are the same
    plain = make_stack(2, dtype=torch.float32)
    compiled = copy.deepcopy(plain)
    for block in compiled:
        block.f.compile()
        block.g = torch.compile(block.g)
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
