"""Forcing a backend, and the reference as one."""

from __future__ import annotations

import inspect

import pytest
import torch

import pyzoo
from pyzoo import _backend, ops
from tests import test_ops

REFERENCES = [name for name in ops.__all__ if name.endswith("_reference") and hasattr(ops, name[: -len("_reference")])]


def test_a_backend_is_forced_until_the_end():
    before = _backend.forced
    with pyzoo.backend("triton"):
        with pyzoo.backend("cpu"):
            assert _backend.forced == "cpu"
        assert _backend.forced == "triton"
    assert _backend.forced is before
    with pytest.raises(ValueError, match="must be one of cpu, cuda, triton, reference or None, got 'Triton'"):
        pyzoo.backend("Triton")


def test_a_forced_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with (
        pyzoo.backend("triton"),
        pytest.raises(NotImplementedError, match=r"roi_align_fwd: .* cpu tensors .*triton: runs on a GPU"),
    ):
        pyzoo.ops.roi_align(torch.ones(2, 3, 4, 4), torch.zeros(1, 5), 2)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_takes_the_same_arguments(name):
    op, reference = getattr(ops, name.removesuffix("_reference")), getattr(ops, name)
    arguments = list(inspect.signature(op).parameters.values())
    assert list(inspect.signature(reference).parameters.values())[: len(arguments)] == arguments


@pytest.mark.parametrize("spec", test_ops.SPECS, ids=lambda spec: spec.name)
def test_the_reference_as_a_backend(spec, monkeypatch):
    monkeypatch.setattr(_backend.Kernel, "__call__", lambda *_: pytest.fail("the reference called a kernel"))
    sample = test_ops.typical(spec, torch.float32, test_ops.layouts(spec)[0])
    with pyzoo.backend("reference"):
        actual = spec.op(*sample.args, **sample.kwargs)
        if spec.differentiable:
            test_ops.gradients(spec.op, spec, sample)
    test_ops.check(spec, actual, spec.reference(*sample.args, **sample.kwargs))


def test_a_kernel_has_no_reference():
    with pyzoo.backend("reference"), pytest.raises(NotImplementedError, match="functions of pyzoo"):
        torch.ops.pyzoo.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
