"""On a GPU: streams, graphs, several devices; and what the battery (``test_ops.py``) does not compute there."""

from __future__ import annotations

import pytest
import torch

import pyzoo
from benchmarks.measure import move
from pyzoo.ops import pixelcnn_sample
from tests import test_ops
from tests.specs.pixelcnn_sample import random_network, random_uniforms
from tests.stacks import check_step, make_input, make_stack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLOAT32, CONTIGUOUS = torch.float32, test_ops.Layout("", torch.contiguous_format)
specs = pytest.mark.parametrize("spec", test_ops.SPECS, ids=lambda spec: spec.name)


def call(spec, device="cuda"):
    """The typical sample on a device, as a function of nothing whose result has a static shape."""
    sample = test_ops.typical(spec, FLOAT32, CONTIGUOUS)
    args, kwargs = (test_ops.on_device(x, device) for x in (sample.args, {**sample.kwargs, **spec.static}))
    return lambda: spec.op(*args, **kwargs)


def step(spec, device="cuda"):
    """Its gradients."""
    sample = test_ops.typical(spec, FLOAT32, CONTIGUOUS)
    args, leaves = test_ops.with_grad(spec, test_ops.on_device(sample.args, device))
    kwargs = test_ops.on_device(sample.kwargs, device)
    grad_output = torch.randn_like(spec.op(*args, **kwargs))
    return lambda: torch.autograd.grad(spec.op(*args, **kwargs), leaves, grad_output)


def functions(spec):
    return [call(spec), *([step(spec)] if spec.differentiable else [])]


@specs
def test_runs_in_the_stream_of_the_caller(spec):
    """What a stream still has to do comes first, without anybody waiting."""
    for function in functions(spec):
        expected = function()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            actual = function()
            assert not torch.cuda.current_stream().query()  # nobody has waited for it
        torch.cuda.synchronize()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@specs
def test_is_captured_in_a_graph(spec):
    for function in functions(spec):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            actual = function()
        for _ in range(2):
            for x in torch.utils._pytree.tree_leaves(actual):
                x.fill_(1)
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@specs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are(spec):
    """While another device is the current one."""
    actual, expected = call(spec, "cuda:1")(), call(spec, "cuda:0")()
    for there, here in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        assert there.device == torch.device("cuda:1")
        torch.testing.assert_close(there.to("cuda:0"), here, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_sampler_draws_what_it_draws_on_the_cpu(backend):
    network = random_network(3, 4, 6, 1)
    uniforms = random_uniforms(2, network, 3, 4)
    expected = pixelcnn_sample(network, (2, 3, 4), uniforms=uniforms)
    with pyzoo.backend(backend):
        actual = pixelcnn_sample(move(network, "cuda"), (2, 3, 4), uniforms=uniforms.cuda())
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_reversible_stack(backend):
    with pyzoo.backend(backend):
        check_step(make_stack(2).cuda(), make_input(3, 8, 9, 7).cuda())
