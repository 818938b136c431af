"""pyzoo.numpy against pyzoo.ops on the same memory, and on arrays that only NumPy has."""

import re
import subprocess
import sys

import numpy as np
import pytest

import pyzoo.numpy as zoo

RNG = np.random.default_rng(0)
BOXES = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30], [19, 21, 31, 29], [-5, -5, 3, 40]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.95, 0.1], np.float32)
IDXS = np.array([0, 1, 0, 0, 1])
ROIS = np.concatenate([np.array([[0], [1], [0], [1], [1]], np.float32), BOXES], 1)


def features(dtype=np.float32):
    return RNG.standard_normal((2, 6, 24, 28)).astype(dtype)


X = features()


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x):
    out = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def field_of_records(x):
    """Strides that are no multiple of the element."""
    records = np.zeros(x.shape, np.dtype([("value", x.dtype), ("flag", np.uint8)]))
    records["value"] = x
    return records["value"]


ARRANGEMENTS = {
    "contiguous": lambda x: x,
    "read-only": read_only,
    "fortran": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "broadcast": lambda x: np.broadcast_to(x[None], (3, *x.shape))[1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": misaligned,
    "field of records": field_of_records,
}
arranged = pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)


def test_nms():
    assert zoo.nms(BOXES, SCORES, 0.5).tolist() == [3, 0, 4]
    assert zoo.nms(BOXES, SCORES, 0.5).dtype == np.int64
    assert zoo.nms(BOXES[:0], SCORES[:0], 0.5).shape == (0,)
    keep, count = zoo.nms(BOXES, SCORES, 0.5, max_output=4)
    assert (keep.tolist(), count) == ([3, 0, 4, -1], 3)
    keep, count = zoo.nms(np.stack([BOXES, BOXES]), np.stack([SCORES, -SCORES]), 0.5, max_output=2)
    assert (keep.tolist(), count.tolist()) == ([[3, 0], [4, 2]], [2, 2])


def test_batched_nms():
    assert zoo.batched_nms(BOXES, SCORES, IDXS, 0.5).tolist() == [3, 0, 1, 4]
    assert zoo.batched_nms(BOXES, SCORES, IDXS.astype(np.float32), 0.5).tolist() == [3, 0, 1, 4]
    assert zoo.batched_nms(BOXES, SCORES, np.zeros(5, np.uint8), 0.5).tolist() == [3, 0, 4]
    keep, count = zoo.batched_nms(BOXES[None], SCORES[None], IDXS[None], 0.5, max_output=6)
    assert (keep.tolist(), count.tolist()) == ([[3, 0, 1, 4, -1, -1]], [4])


def test_lists_and_integers():
    assert zoo.nms(BOXES.tolist(), SCORES.tolist(), 0.5).tolist() == [3, 0, 4]
    assert zoo.nms(BOXES.astype(np.int32), [90, 80, 70, 95, 10], 0.5).tolist() == [3, 0, 4]
    assert zoo.batched_nms(BOXES.tolist(), SCORES.tolist(), IDXS.tolist(), 0.5).tolist() == [3, 0, 1, 4]
    assert zoo.nms([], [], 0.5).shape == (0,)
    x = features(np.float64)
    expected = zoo.roi_align(x, ROIS.astype(np.float64), 3)
    assert np.array_equal(zoo.roi_align(x, ROIS.tolist(), 3), expected)
    assert np.array_equal(zoo.roi_align(x, ROIS.astype(int), 3), expected)


@arranged
def test_any_arrangement_of_boxes(arrange):
    assert zoo.nms(arrange(BOXES), arrange(SCORES), 0.5).tolist() == [3, 0, 4]
    assert zoo.batched_nms(arrange(BOXES), arrange(SCORES), arrange(IDXS), 0.5).tolist() == [3, 0, 1, 4]
    x = features()
    assert np.array_equal(zoo.roi_align(x, arrange(ROIS), 3), zoo.roi_align(x, ROIS, 3))


@arranged
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_any_arrangement_of_features(arrange, dtype):
    x = features(dtype)
    for op in (zoo.roi_align, zoo.roi_pool):
        expected = op(x, ROIS, (3, 2))
        actual = op(arrange(x), ROIS, (3, 2))
        assert actual.dtype.newbyteorder("=") == dtype
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("op", [zoo.roi_align, zoo.roi_pool])
def test_channels_last_stays(op):
    x = features()
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    out = op(nhwc.transpose(0, 3, 1, 2), ROIS, 3)
    assert out.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_allclose(out, op(x, ROIS, 3), rtol=1e-5, atol=1e-6)
    assert op(x, ROIS, 3).flags.c_contiguous


@pytest.mark.parametrize("op", [zoo.roi_align, zoo.roi_pool])
def test_list_of_boxes(op):
    x = features()
    assert np.array_equal(op(x, [BOXES[[0, 2]], BOXES[[1, 3]]], 3), op(x, ROIS[[0, 2, 1, 3]], 3))
    assert np.array_equal(op(x, [BOXES[[0, 2]].astype(np.float16), []], 3), op(x, ROIS[[0, 2]], 3))
    assert np.array_equal(op(x, ([], BOXES[[1]].tolist()), 3), op(x, ROIS[[1]].astype(np.float64), 3))
    assert op(x, [], 3).shape == (0, 6, 3, 3)
    assert op(x, [[], []], 3).shape == (0, 6, 3, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_torch(dtype, channels_last):
    torch = pytest.importorskip("torch")
    from pyzoo import ops

    x = features(dtype)
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    rois = torch.from_numpy(ROIS)
    for args in ((3,), ((2, 4), 0.5), (3, 0.5, 2), (3, 1.0, -1, True)):
        expected = ops.roi_align(torch.from_numpy(x), rois, *args)
        assert np.array_equal(zoo.roi_align(x, ROIS, *args), expected.numpy())
    assert np.array_equal(zoo.roi_pool(x, ROIS, 3, 0.7), ops.roi_pool(torch.from_numpy(x), rois, 3, 0.7).numpy())
    boxes, scores = BOXES.astype(dtype), SCORES.astype(dtype)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    assert zoo.nms(boxes, scores, 0.3).tolist() == ops.nms(*tensors, 0.3).tolist()
    expected = ops.batched_nms(*tensors, torch.from_numpy(IDXS), 0.3)
    assert zoo.batched_nms(boxes, scores, IDXS, 0.3).tolist() == expected.tolist()


NUMBERS = "float32, float64, float16 or integer"
TYPE_ERRORS = [
    (lambda: zoo.nms(BOXES > 0, SCORES, 0.5), f"nms: boxes must be {NUMBERS}, got bool"),
    (lambda: zoo.nms(BOXES, SCORES.astype(complex), 0.5), f"nms: scores must be {NUMBERS}, got complex128"),
    (lambda: zoo.nms(["a"], SCORES, 0.5), f"nms: boxes must be {NUMBERS}, got <U1"),
    (lambda: zoo.batched_nms(BOXES, SCORES, ["a"] * 5, 0.5), "batched_nms: idxs must be whole numbers, got <U1"),
    (lambda: zoo.roi_align([[1]], ROIS, 3), "roi_align: input must be a numpy.ndarray, got list"),
    (lambda: zoo.roi_align(X.astype(int), ROIS, 3), "input must be float32, float64 or float16, got int64"),
    (lambda: zoo.roi_align(X, ROIS, 2.5), "roi_align: output_size must be an int or two ints, got 2.5"),
]
VALUE_ERRORS = [
    (
        lambda: zoo.nms(BOXES[:, :3], SCORES, 0.5),
        "boxes must have shape [N, 4] ([B, N, 4] needs max_output), got [5, 3]",
    ),
    (lambda: zoo.nms(BOXES[None], SCORES[None], 0.5), "([B, N, 4] needs max_output), got [1, 5, 4]"),
    (lambda: zoo.nms(BOXES, SCORES[:2], 0.5), "nms: scores must have shape [5], got [2]"),
    (lambda: zoo.nms(BOXES, SCORES, float("nan")), "nms: iou_threshold must not be NaN"),
    (lambda: zoo.nms(BOXES, SCORES, 0.5, max_output=-1), "nms: max_output must not be negative, got -1"),
    (lambda: zoo.batched_nms(BOXES, SCORES, IDXS[1:], 0.5), "batched_nms: idxs must have shape [5], got [4]"),
    (lambda: zoo.batched_nms(BOXES, SCORES, IDXS + 0.5, 0.5), "batched_nms: idxs must be whole numbers"),
    (lambda: zoo.roi_align(X[0], ROIS, 3), "roi_align: input must have shape [N, C, H, W], got [6, 24, 28]"),
    (lambda: zoo.roi_align(X, BOXES, 3), "boxes must have shape [K, 5], or be a list of [L, 4], got [5, 4]"),
    (lambda: zoo.roi_align(X, [ROIS], 3), "roi_align: boxes[0] must have shape [L, 4], got [5, 5]"),
    (lambda: zoo.roi_align(X, ROIS, 0), "roi_align: output_size must be at least 1 x 1, got 0 x 0"),
    (lambda: zoo.roi_align(X, ROIS, (1, 2, 3)), "output_size must be an int or two ints, got 3 values"),
    (lambda: zoo.roi_pool(X, ROIS, 3, float("nan")), "roi_pool: spatial_scale must be positive and finite, got nan"),
    (lambda: zoo.roi_pool(X, ROIS + 2, 3), "batch index"),
    (lambda: zoo.roi_align(X, [BOXES] * 3, 3), "batch index"),
]


@pytest.mark.parametrize(("call", "message"), TYPE_ERRORS)
def test_type_errors_name_the_argument(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS)
def test_value_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np, pyzoo.numpy as zoo
boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]], np.float32)
assert zoo.nms(boxes, np.array([.9, .8, .7], np.float32), .5).tolist() == [0, 2]
assert zoo.roi_align(np.ones((1, 2, 9, 9), np.float32), [boxes], 2).shape == (3, 2, 2, 2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
