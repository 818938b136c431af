"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not here.

On a machine with a GPU the interpreter is not used: there ``PYZOO_BACKEND=triton`` runs all of ``test_ops.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pyzoo
from pyzoo import _backend
from pyzoo.ops import reversible as coupling
from pyzoo.ops.channel_sum import channel_sum
from tests import test_ops
from tests.conftest import INTERPRET_TRITON
from tests.specs import inputs
from tests.stacks import check_step, make_input, make_stack

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SLICES = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
SPECS = [spec for spec in test_ops.SPECS if spec.op.__module__.rpartition(".")[2] in SLICES]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, on what a mask then drops
interpreted = pytest.mark.skipif(not INTERPRET_TRITON, reason="there is a GPU")


@pytest.fixture
def triton():
    with pyzoo.backend("triton"):
        yield


def some(found: list, spec, dtype, layout) -> list:
    """Four of the smaller, others for each dtype and layout: the interpreter takes a millisecond a statement."""
    cells = [(d, at.name) for d in spec.dtypes for at in test_ops.layouts(spec)]
    median = sorted(map(numbers, found))[len(found) // 2]
    few = [sample for sample in found if numbers(sample) <= median]
    step = max(len(few) // 4, 1)
    return few[cells.index((dtype, layout.name)) % step :: step][:4]


def numbers(sample) -> int:
    leaves = tree_leaves((sample.args, sample.kwargs))
    return sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))


@interpreted
@test_ops.each_cell(SPECS)
def test_forward(spec, dtype, layout, triton, poison):
    for sample in some(test_ops.samples(spec, dtype, layout), spec, dtype, layout):
        actual = spec.op(*sample.args, **sample.kwargs)
        test_ops.check(spec, actual, test_ops.expected_of(spec, dtype, sample), sample.id)


@interpreted
@test_ops.each_cell([spec for spec in SPECS if spec.differentiable])
def test_backward(spec, dtype, layout, triton, poison):
    for sample in some(test_ops.samples(spec, dtype, layout, only=test_ops.finite), spec, dtype, layout):
        _, actual = test_ops.gradients(spec.op, spec, sample)
        test_ops.check(spec, actual, test_ops.expected_gradients_of(spec, dtype, sample), sample.id)


@interpreted
def test_image_out_of_range_shows(triton):
    """A kernel on a GPU cannot raise."""
    boxes = torch.tensor([[2.0, 0, 0, 3, 3], [-1, 0, 0, 3, 3], [float("nan"), 0, 0, 3, 3], [1, 0, 0, 3, 3]])
    out = pyzoo.ops.roi_align(torch.ones(2, 3, 4, 4), boxes, 2)
    assert out.isnan().flatten(1).all(1).tolist() == [True, True, True, False]


@interpreted
def test_a_gradient_that_is_not_finite_stays_where_it_belongs(triton):
    x, boxes = torch.ones(1, 1, 8, 8, requires_grad=True), torch.tensor([[0.0, 0, 0, 4, 4]])
    out = pyzoo.ops.roi_align(x, boxes, 2, sampling_ratio=1)  # samples at (1, 1), (1, 3), (3, 1), (3, 3)
    grad_output = torch.tensor([[[[float("inf"), 1], [1, 1]]]])
    (grad,) = torch.autograd.grad(out, x, grad_output)
    assert grad[0, 0, 1, 1] == torch.inf
    assert (~grad.isfinite()).sum() == 1
    assert grad[grad.isfinite()].sum() == 3


@interpreted
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gram_matrix_of_several_tiles(layout, triton, poison):
    """Symmetric to the last bit, and a channel of NaN spoils its row and its column alone."""
    x = inputs.features(2, 140, 6, 7, memory_format=layout)
    expected = pyzoo.ops.gram_matrix_reference(x)
    gram = pyzoo.ops.gram_matrix(x)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gram, gram.mT)
    x[1, 70, 3, 3] = torch.nan
    expected[1, 70, :] = expected[1, :, 70] = torch.nan
    torch.testing.assert_close(pyzoo.ops.gram_matrix(x), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_channel_sum(dtype, triton, poison):
    atol = 1e-11 if dtype == torch.float64 else 1e-4
    for shape in ((2, 5, 9, 11), (3, 70, 7, 1), (2, 3, 65, 66), (0, 3, 4, 4), (2, 0, 4, 4)):
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        for view in (x, last, torch.stack([x, x], -1)[..., 1], x[:, :, :1].expand(shape)):
            expected = view.double().sum((0, 2, 3)).to(dtype)
            torch.testing.assert_close(channel_sum(view), expected, rtol=torch.finfo(dtype).eps, atol=atol)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_coupling(dtype, triton):
    half = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((), (5, 6), (0, 4, 3, 3), (2, 6, 20, 37), (3, 1, 2, 1, 2, 2)):
        base, update, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        base, update, grad = base.to(half), update.to(dtype), grad.to(half)
        views = [lambda x: x.clone(), lambda x: torch.stack([x, x], -1)[..., 0]]
        if len(shape) == 4:
            views += [lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1]]
        for view in views:
            for other in views:
                x, u, g = view(base), other(update), view(grad)
                out = other(torch.zeros_like(x))
                assert coupling.couple(x, u, out) is out
                assert torch.equal(out, base + update.to(half))
                assert torch.equal(coupling.uncouple(view(base), u), base - update.to(half))
                rebuilt, summed = coupling.uncouple_with_grad(x, u, g, other(update))
                assert torch.equal(rebuilt, base - update.to(half))
                assert torch.equal(summed, grad + update.to(half))


@interpreted
def test_reversible_stack(triton):
    check_step(make_stack(2), make_input(3, 8, 9, 7))


def test_a_forced_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        pyzoo.backend("triton"),
        pytest.raises(NotImplementedError, match=r"roi_align_fwd: .* cpu tensors .*triton: runs on a GPU"),
    ):
        pyzoo.ops.roi_align(torch.ones(2, 3, 4, 4), torch.zeros(1, 5), 2)


def test_a_backend_is_forced_until_the_end():
    before = _backend.forced
    with pyzoo.backend("triton"):
        with pyzoo.backend("cpu"):
            assert _backend.forced == "cpu"
        assert _backend.forced == "triton"
    assert _backend.forced is before
    with pytest.raises(ValueError, match="backend: name must be one of cpu, cuda, triton or None, got 'Triton'"):
        pyzoo.backend("Triton")


# ---------------------------------------------------------------------------------------------------- without running

LIMITS = {"registers": 255, "spilled": 0, "shared": 99 << 10}  # what a block may have on every GPU since Ampere


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_gpus_that_are_not_here(arch, tmp_path):
    """For the shapes of the quick benchmarks, within what every GPU can launch and without spilling registers."""
    program = [sys.executable, "-m", "tests.triton_offline", str(arch)]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["slice"] for kernel in kernels} == {spec.op.__module__.rpartition(".")[2] for spec in SPECS}
    for kernel in kernels:
        assert all(kernel[name] <= most for name, most in LIMITS.items()), kernel
