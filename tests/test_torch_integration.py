"""How the ops sit in torch, beyond what the battery of test_ops.py asks of each: imports, modules, modes, overhead."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

import pyzoo
from pyzoo import _ext, ops
from tests.specs import inputs


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------------ import, loading


def test_import_does_not_import_torch():
    assert python("import sys, pyzoo, pyzoo._ext; print('torch' in sys.modules)") == "False\n"


def test_missing_core_raises_at_the_first_call():
    code = """
import sys, json
sys.modules["pyzoo._C"] = None  # as if it could not be found
import torch, pyzoo
try:
    pyzoo.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
except ImportError as error:
    print(json.dumps(str(error)))
"""
    message = json.loads(python(code))
    for part in ("pyzoo._C", "built:", "needed: _C", "loader: ", "fix: pip install", sys.version.split()[0]):
        assert part in message


def test_broken_core_names_the_loader_error(tmp_path, monkeypatch):
    error = OSError("libgomp.so.1: cannot open shared object file")
    core = _ext.MissingCore(error)
    with pytest.raises(ImportError, match=r"loader: OSError: libgomp.so.1: cannot open") as raised:
        core.nms_cpu()
    assert raised.value.__cause__ is error


# ------------------------------------------------------------------------------------------------------------- modules


def test_roi_modules_are_torchvisions():
    vision = pytest.importorskip("torchvision").ops
    x, rois = torch.rand(2, 3, 16, 16), inputs.random_rois(5, 2, 32, 32)
    for ours, theirs in (
        (ops.RoIAlign((2, 3), 0.5, 2, True), vision.RoIAlign((2, 3), 0.5, 2, True)),
        (ops.RoIPool(3, 0.5), vision.RoIPool(3, 0.5)),
    ):
        torch.testing.assert_close(ours(x, rois), theirs(x, rois))
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1", "2"], ["2"]])
def test_multiscale_module_is_torchvisions(names):
    vision = pytest.importorskip("torchvision").ops
    shapes = [(2, 3, -(-200 // s), -(-272 // s)) for s in (4, 8, 16, 32, 64)]
    maps = OrderedDict((n, inputs.features(*s, seed=i)) for i, (n, s) in enumerate(zip("0123p", shapes, strict=True)))
    boxes = [inputs.photo_boxes(30, seed=i) / 4 for i in range(2)]
    image_shapes = [(190, 272), (200, 260)]
    arguments = (names, (3, 2), 2)
    ours = ops.MultiScaleRoIAlign(*arguments, canonical_scale=56)
    theirs = vision.MultiScaleRoIAlign(*arguments, canonical_scale=56)
    torch.testing.assert_close(ours(maps, boxes, image_shapes), theirs(maps, boxes, image_shapes))
    assert repr(ours) == repr(theirs)
    with pytest.raises(ValueError, match="image_shapes must not be empty"):
        ours(maps, boxes, [])


# -------------------------------------------------------------------------------------------------- the bare operators


def test_bare_operator_keeps_the_gradient():
    x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8)
    for op in (
        lambda x: torch.ops.pyzoo.roi_align(x, rois, 1.0, 2, 2, 2, True),
        lambda x: torch.ops.pyzoo.roi_pool(x, rois, 1.0, 2, 2),
        lambda x: torch.ops.pyzoo.multiscale_roi_align([x], rois, 2, 2, [1.0], 2, True, 224.0, 4.0),
    ):
        leaf = x.clone().requires_grad_()
        op(leaf).sum().backward()
        assert leaf.grad.any()
        torch.testing.assert_close(torch.func.grad(lambda x, op=op: op(x).sum())(x), leaf.grad)
        torch.testing.assert_close(torch.vmap(op)(torch.stack([x, -x])), torch.stack([op(x), op(-x)]))


def test_boxes_get_no_gradient():
    """Boxes may come from a layer that is trained; like in torchvision they are constants here."""
    x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8).requires_grad_()
    assert not ops.roi_align(x, rois, 2).requires_grad
    assert not ops.roi_pool(x, rois, 2).requires_grad
    leaf = x.clone().requires_grad_()
    ops.roi_align(leaf, rois, 2).sum().backward()
    assert leaf.grad is not None
    assert rois.grad is None
    scores = torch.rand(4, requires_grad=True)
    assert not ops.nms(rois[:, 1:], scores, 0.5).requires_grad
    assert not ops.batched_nms(rois[:, 1:], scores, torch.arange(4), 0.5).requires_grad


def test_only_some_levels_need_a_gradient():
    fine, coarse = torch.rand(1, 2, 16, 16), torch.rand(1, 2, 8, 8, requires_grad=True)
    rois = torch.tensor([[0, 0, 0, 3, 3], [0, 1, 1, 15, 15.0]])
    ops.multiscale_roi_align([fine, coarse], rois, 2, [1.0, 0.5], 2, canonical_scale=64).sum().backward()
    assert coarse.grad.any()
    assert fine.grad is None


def test_levels_of_different_dtypes():
    """Autocast may give the layers of a backbone different dtypes."""
    fine, coarse = torch.rand(1, 2, 16, 16), torch.rand(1, 2, 8, 8).bfloat16().requires_grad_()
    rois = torch.tensor([[0, 0, 0, 3, 3], [0, 1, 1, 15, 15.0]])
    out = ops.multiscale_roi_align([fine, coarse], rois, 2, [1.0, 0.5], 2, canonical_scale=64)
    same = ops.multiscale_roi_align([fine, coarse.float()], rois, 2, [1.0, 0.5], 2, canonical_scale=64)
    assert torch.equal(out, same)
    out.sum().backward()
    assert coarse.grad.dtype == torch.bfloat16


def test_roi_pool_values_are_copies():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x, rois = inputs.features(2, 5, 13, 17, dtype=dtype), inputs.random_rois(9, 2, 13, 17)
        assert torch.equal(ops.roi_pool(x, rois, 3), ops.roi_pool_reference(x, rois, 3))


def test_roi_pool_argmax_is_torchvisions():
    pytest.importorskip("torchvision")
    rois = inputs.random_rois(9, 2, 13, 17)
    for x in (inputs.features(2, 5, 13, 17), inputs.features(2, 5, 13, 17).round(), torch.zeros(2, 5, 13, 17)):
        expected = torch.ops.torchvision.roi_pool(x, rois, 1.0, 3, 2)[1]
        assert torch.equal(torch.ops.pyzoo._roi_pool_argmax(x, rois, 1.0, 3, 2), expected)
        assert torch.equal(ops.roi_pool_reference(x, rois, (3, 2), return_argmax=True)[1], expected)


def test_features_changed_after_roi_pool_are_noticed():
    """Its backward looks at the features again, so a change in place must not go unnoticed."""
    x = torch.rand(1, 2, 8, 8, requires_grad=True) * 1
    out = ops.roi_pool(x, inputs.random_rois(4, 1, 8, 8), 2)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -------------------------------------------------------------------------------------------------- modes of execution


def test_inference_mode():
    with torch.inference_mode():
        x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8)
        pooled = ops.roi_align(x, rois, 2)
        kept = ops.nms(rois[:, 1:], torch.rand(4), 0.5)
    assert pooled.is_inference()
    assert kept.is_inference()
    torch.testing.assert_close(pooled, ops.roi_align(x.clone(), rois.clone(), 2))


def test_default_device_and_dtype_do_not_leak_in():
    x, rois, scores = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8), torch.rand(4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = (
                ops.roi_align(x, rois, 2),
                ops.roi_pool(x, rois, 2),
                ops.nms(rois[:, 1:], scores, 0.5),
                *ops.batched_nms(rois[:, 1:], scores, scores.round(), 0.5, max_output=2),
            )
    finally:
        torch.set_default_dtype(before)
    assert {r.device.type for r in results} == {"cpu"}
    assert results[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_trace_records_the_operators():
    x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8)
    traced = torch.jit.trace(lambda x, rois: ops.roi_align(x, rois, 2), (x, rois))
    other = torch.rand(2, 3, 9, 7), inputs.random_rois(6, 2, 9, 7)
    torch.testing.assert_close(traced(*other), ops.roi_align(*other, 2))


def test_profiler_shows_the_operators():
    x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8)
    with torch.profiler.profile() as profile:
        ops.roi_align(x, rois, 2)
        ops.nms(rois[:, 1:], torch.rand(4), 0.5)
    assert {"pyzoo::roi_align", "pyzoo::nms"} <= {event.key for event in profile.key_averages()}


def test_subclass_sees_the_operator():
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, rois = torch.rand(1, 2, 8, 8), inputs.random_rois(4, 1, 8, 8)
    out = ops.roi_align(x.as_subclass(Logged), rois, 2)
    assert isinstance(out, Logged)
    assert "pyzoo.roi_align.default" in seen


def test_gradient_checkpointing():
    x, rois = torch.rand(1, 2, 8, 8, requires_grad=True), inputs.random_rois(4, 1, 8, 8)

    def f(x):
        return ops.roi_pool(
            ops.roi_align(x, rois, 8).flatten(0, 1)[None], rois[:, :5] * torch.tensor([0, 1, 1, 1, 1]), 2
        )

    (plain,) = torch.autograd.grad(f(x).sum(), x)
    (checkpointed,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, checkpointed)


# -------------------------------------------------------------------------------------------------------- the short cut


def test_plain_tensors_take_the_direct_way():
    """The cost of a call on tiny input depends on it, and a new torch could have other keys."""
    from pyzoo.ops import _common

    assert pyzoo.ops is ops
    x, boxes = torch.rand(1, 2, 8, 8), torch.rand(3, 5)
    assert _common._is_plain((x, boxes))
    assert not _common._is_plain((x, boxes.to("meta")))
    assert not _common._is_plain((x.to_sparse(), boxes))
    assert not _common._is_plain((torch._neg_view(x), boxes))
    with torch._subclasses.FakeTensorMode():
        assert not _common._is_plain((x, boxes))
    for transform in (torch.vmap, torch.func.functionalize, lambda f: torch.func.grad(lambda x: f(x).sum())):
        transform(lambda x: x * (_common._is_plain((x, boxes)) and pytest.fail(f"plain under {transform}")))(x)  # noqa: B023
