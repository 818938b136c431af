"""Data: digit scenes, and datasets in local folders, which the tests make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyzoo.data import digit_scenes, digits

# -------------------------------------------------------------------------------------------------------- digit scenes


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(torch.as_tensor(a[1][k]), torch.as_tensor(b[1][k])) for k in a[1])


def test_digits():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))
    parts = [digits(split) for split in ("train", "test")]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    images.zero_()  # the caller's own
    assert digits()[0].any()


def test_scenes_keep_the_contract():
    height, width = 80, 112
    scenes = digit_scenes(60, (height, width), seed=1, objects=(0, 6), scale=(10, 50), max_overlap=0.5)
    counts, covered, labels = set(), 0, set()
    for index, (image, target) in enumerate(scenes):
        boxes, masks = target["boxes"], target["masks"]
        n = len(boxes)
        assert image.shape == (3, height, width)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert (boxes.dtype, masks.dtype, target["labels"].dtype) == (torch.float32, torch.uint8, torch.int64)
        assert boxes.shape == (n, 4)
        assert masks.shape == (n, height, width)
        assert target["labels"].shape == (n,)
        assert target["image_id"] == index
        assert masks.sum(0).max() <= 1  # one digit a pixel: what is visible
        for box, mask in zip(boxes, masks, strict=True):
            ys, xs = np.nonzero(mask.numpy())
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        counts.add(n)
        labels.update(target["labels"].tolist())
        boxes = boxes.tolist()
        covered += sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in boxes) - n
    assert {0, 1, 2, 3, 4, 5} <= counts
    assert labels == set(range(1, 11))
    assert covered > 10


def test_scenes_show_the_digits():
    """Where the mask is, all channels are brighter than the ground, or all are darker."""
    for image, target in digit_scenes(20, seed=2, objects=(1, 1)):
        mask = target["masks"][0].bool()
        difference = image[:, mask].mean(1) - image[:, ~mask].mean(1)
        assert (difference > 0.1).all() or (difference < -0.1).all()


def test_scenes_without_overlap():
    for _, target in digit_scenes(30, seed=3, objects=(4, 4), max_overlap=0):
        boxes = target["boxes"]
        size = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
        assert ((size > 0).all(2).sum(1) == 1).all()  # each with itself


def test_scenes_depend_on_seed_and_index_only():
    scenes = digit_scenes(9, seed=5)
    forward = list(scenes)
    backward = [digit_scenes(20, seed=5)[i] for i in reversed(range(9))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert_same(a, b)
    assert_same(scenes[-1], forward[8])
    assert len(scenes[2:4]) == 2
    with pytest.raises(IndexError, match="index 9 of 9"):
        scenes[9]
    others = [forward[1], digit_scenes(9, seed=6)[0], digit_scenes(9, seed=5, split="test")[0]]
    assert all(not torch.equal(forward[0][0], other[0]) for other in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"size": (96, 4)}, r"size must be .*got \(96, 4\)"),
        ({"objects": (3, 2)}, r"objects must be .*got \(3, 2\)"),
        ({"scale": (16, 90)}, r"scale must be .*to 76.8.*got \(16, 90\)"),
        ({"max_overlap": 2}, "max_overlap must be in"),
        ({"split": "val"}, "split must be 'train' or 'test', got 'val'"),
    ],
)
def test_scenes_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        digit_scenes(**{"count": 3, **change})
    with pytest.raises(ValueError, match="split must be"):
        digits("val")
