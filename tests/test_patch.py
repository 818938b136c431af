"""pyzoo.patch("torchvision"): the same results through torchvision's own functions and models, and clean to undo."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from torchvision.models import detection  # noqa: E402

import pyzoo  # noqa: E402

OPS = ["nms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"]
BOXES = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [3.0, 2.0, 18.0, 11.0]])
SCORES = torch.tensor([0.9, 0.8, 0.7])


def kernel_of(op: str) -> str:
    """Where the CPU kernel in use was registered."""
    dump = torch._C._dispatch_dump(f"torchvision::{op}").splitlines()
    return next(line for line in dump if line.startswith("CPU:"))


def is_patched() -> bool:
    patched = {"_patch.py" in kernel_of(op) for op in OPS}
    assert len(patched) == 1, "some operators are patched and some are not"
    return patched.pop()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    assert not is_patched()
    yield
    assert not is_patched()


# ------------------------------------------------------------------------------------------------------------- lifetime


def test_context_manager_restores_the_original_kernels():
    before = [kernel_of(op) for op in OPS]
    with pyzoo.patch("torchvision"):
        assert is_patched()
    assert [kernel_of(op) for op in OPS] == before


def test_context_manager_restores_after_an_error():
    with pytest.raises(KeyError), pyzoo.patch("torchvision"):
        raise KeyError


def test_plain_call_stays_until_undone():
    patch = pyzoo.patch("torchvision")
    assert is_patched()
    with pyzoo.patch("torchvision"):
        pass
    assert is_patched()
    patch.undo()
    patch.undo()  # nothing more to do
    assert not is_patched()
    patch.install()
    assert is_patched()
    patch.undo()


def test_nested_and_entered_again():
    with pyzoo.patch("torchvision") as outer:
        with pyzoo.patch("torchvision"), outer, outer:
            assert is_patched()
        assert is_patched()
    assert not is_patched()
    with outer:
        assert is_patched()


def test_out_of_order():
    first, second = pyzoo.patch("torchvision"), pyzoo.patch("torchvision")
    first.undo()
    assert is_patched()
    assert torchvision.ops.nms(BOXES, SCORES, 0.5).tolist() == [0, 2]
    second.undo()


def test_repr_says_what_happened():
    with pyzoo.patch("torchvision") as patch:
        assert patch.ops == {f"torchvision::{op}": "patched" for op in OPS}
        assert "torchvision::roi_align            patched" in repr(patch)
    assert "torchvision::nms                  original: this patch is undone" in repr(patch)


def test_operator_that_this_version_lacks_is_left(monkeypatch):
    from pyzoo import _patch

    kernels = _patch._torchvision_kernels() | {"not_an_op": (print, print)}
    monkeypatch.setitem(_patch._TARGETS, "torchvision", lambda: kernels)
    with pyzoo.patch("torchvision") as patch:
        assert patch.ops["torchvision::not_an_op"] == "left: this torchvision has no such operator"
        assert patch.ops["torchvision::nms"] == "patched"


def test_unknown_target():
    with pytest.raises(ValueError, match="target must be one of 'torchvision', got 'mmcv'"):
        pyzoo.patch("mmcv")


def test_torchvision_missing():
    code = "import sys; sys.modules['torchvision'] = None; import pyzoo; pyzoo.patch('torchvision')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: pyzoo.patch('torchvision') needs torchvision; install it with" in done.stderr


# ------------------------------------------------------------------------------------------------------------ operators


def features(dtype=torch.float32, memory_format=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 16, 20, 24, generator=g).to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [torchvision.ops.roi_align, torchvision.ops.roi_pool])
def test_pooling_and_gradient(op, dtype, memory_format):
    def run():
        x = features(dtype, memory_format).requires_grad_()
        out = op(x, [BOXES.to(dtype), BOXES[1:].to(dtype)], (3, 4), 0.8)
        grad_output = torch.randint(-8, 8, out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return out, *torch.autograd.grad(out, x, grad_output)

    expected = run()
    with pyzoo.patch("torchvision"):
        actual = run()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
        assert a.stride() == e.stride()  # what views of it rely on


def test_roi_pool_returns_argmax():
    args = features(), torch.cat([torch.zeros(3, 1), BOXES], 1), 0.8, 3, 4
    output, argmax = torch.ops.torchvision.roi_pool(*args)
    with pyzoo.patch("torchvision"):
        actual_output, actual_argmax = torch.ops.torchvision.roi_pool(*args)
    assert torch.equal(actual_output, output)
    assert actual_argmax.dtype == torch.int32
    assert torch.equal(actual_argmax, argmax)


def test_nms_and_batched_nms():
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 50, 2000):
        corner = torch.rand(n, 2, generator=g) * 100
        boxes = torch.cat([corner, corner + torch.rand(n, 2, generator=g) * 50], 1).requires_grad_()
        scores, idxs = torch.rand(n, generator=g), torch.randint(5, (n,), generator=g)
        expected = torchvision.ops.nms(boxes, scores, 0.4), torchvision.ops.batched_nms(boxes, scores, idxs, 0.4)
        with pyzoo.patch("torchvision"):
            actual = torchvision.ops.nms(boxes, scores, 0.4), torchvision.ops.batched_nms(boxes, scores, idxs, 0.4)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_serves_what_torchvision_refuses():
    with pytest.raises(RuntimeError):
        torchvision.ops.nms(BOXES.bfloat16(), SCORES, 0.5)
    with pyzoo.patch("torchvision"):
        assert torchvision.ops.nms(BOXES.bfloat16(), SCORES, 0.5).tolist() == [0, 2]
        out = torchvision.ops.roi_align(features(torch.bfloat16), [BOXES, BOXES], 2)
        assert out.dtype == torch.bfloat16


def test_what_pyzoo_refuses_goes_to_the_original():
    scale = -1.0
    expected = torchvision.ops.roi_align(features(), [BOXES, BOXES], 2, scale)
    with pyzoo.patch("torchvision"):
        with pytest.raises(ValueError):
            pyzoo.ops.roi_align(features(), [BOXES, BOXES], 2, scale)
        assert torch.equal(torchvision.ops.roi_align(features(), [BOXES, BOXES], 2, scale), expected)
        assert torchvision.ops.nms(BOXES, SCORES, float("nan")).tolist() == [0, 1, 2]


def test_image_index_out_of_range():
    rois = torch.cat([torch.full((3, 1), 2.0), BOXES], 1)
    with pyzoo.patch("torchvision"):
        for op in (torchvision.ops.roi_align, torchvision.ops.roi_pool):
            with pytest.raises(ValueError, match="batch index"):
                op(features(), rois, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torchvision.ops.nms(BOXES[:, :3], SCORES, 0.5),
        lambda: torchvision.ops.nms(BOXES, SCORES[:2], 0.5),
        lambda: torchvision.ops.nms(BOXES.long(), SCORES.long(), 0.5),
        lambda: torch.ops.torchvision.roi_align(features(), BOXES, 1.0, 2, 2, -1, False),
        lambda: torch.ops.torchvision.roi_align(features().int(), BOXES.int(), 1.0, 2, 2, -1, False),
    ],
)
def test_errors_are_torchvisions(call):
    with pytest.raises(Exception) as expected:
        call()
    with pyzoo.patch("torchvision"), pytest.raises(type(expected.value)) as actual:
        call()
    assert str(actual.value) == str(expected.value)


def test_compiled_code_takes_the_patched_kernels():
    def pool(x):
        return torchvision.ops.roi_align(x * 2, [BOXES, BOXES], 3).view(6, -1)

    x = features().contiguous(memory_format=torch.channels_last)
    expected = pool(x)
    with pyzoo.patch("torchvision"):
        torch.testing.assert_close(torch.compile(pool, backend="aot_eager", fullgraph=True)(x), expected)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(params=["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def model(request):
    torch.manual_seed(0)
    return getattr(detection, request.param)(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=96,
        max_size=128,
        box_score_thresh=0.0,  # a random network is sure of nothing
        box_detections_per_img=20,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=16,
    )


def images():
    g = torch.Generator().manual_seed(1)
    return [torch.rand(3, 96, 128, generator=g), torch.rand(3, 110, 100, generator=g)]


def test_model_detects_the_same(model):
    model.eval()
    with torch.no_grad():
        expected = model(images())
        with pyzoo.patch("torchvision"):
            actual = model(images())
    for a, e in zip(actual, expected, strict=True):
        assert len(e["boxes"]) > 5
        assert torch.equal(a["labels"], e["labels"])
        for key in e:
            torch.testing.assert_close(a[key], e[key], rtol=1e-4, atol=1e-4)


def test_model_trains_the_same(model):
    """In float64: a deep network magnifies the last bits of float32 too much for a tight tolerance."""
    model.double().train()
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]], dtype=torch.float64)
    photographs, targets = [image.double() for image in images()], []
    for image in photographs:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[:, 20:60, 30:60] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks})

    def step():
        torch.manual_seed(2)  # of the sampling of anchors and proposals
        model.zero_grad()
        losses = model(photographs, [dict(t) for t in targets])
        sum(losses.values()).backward()
        return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_grads = step()
    with pyzoo.patch("torchvision"):
        actual, actual_grads = step()
    assert actual_grads.keys() == expected_grads.keys()
    for key, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(actual[key], loss, rtol=1e-9, atol=1e-12)
    for key, grad in expected_grads.items():
        error = (actual_grads[key] - grad).norm() / grad.norm().clamp(min=1e-12)
        assert error < 1e-8, key
