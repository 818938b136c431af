"""COCO's figures: by hand, and against torchmetrics' own way into pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyzoo.data import DigitScenes
from pyzoo.metrics import NAMES, coco_map


def perfect(targets):
    return [{**target, "scores": torch.ones(len(target["boxes"]))} for target in targets]


def noisy(targets, seed=0):
    """Moved boxes and masks, some wrong labels, random scores, some found twice and some missed."""
    g = torch.Generator().manual_seed(seed)
    predictions = []
    for target in targets:
        picks = torch.randint(len(target["boxes"]), (3,), generator=g)
        boxes = target["boxes"][picks] + torch.randint(-2, 3, (3, 4), generator=g)
        masks = target["masks"][picks, None].roll(int(torch.randint(2, (), generator=g)), -1) * 0.9
        wrong = torch.rand(3, generator=g) < 0.2
        labels = torch.where(wrong, 1, target["labels"][picks])
        predictions.append({"boxes": boxes, "masks": masks, "labels": labels, "scores": torch.rand(3, generator=g)})
    return predictions


@pytest.fixture(scope="module")
def targets():
    return [target for _, target in DigitScenes(30, (140, 140), seed=0, scale=(16, 110))]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_and_nothing(targets, kind, capsys):
    figures = coco_map(perfect(targets), targets, kind)
    assert tuple(figures) == NAMES
    assert all(figures[name] == pytest.approx(1) for name in ("AP", "AP50", "AP75", "AP_small", "AR100"))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    empty["masks"] = torch.zeros(0, 1, 140, 140)
    figures = coco_map([empty] * len(targets), targets, kind)
    assert (figures["AP"], figures["AR100"]) == (0, 0)
    assert set(coco_map(perfect(targets), [empty] * len(targets), kind).values()) == {-1}
    assert set(coco_map([], [], kind).values()) == {-1}
    assert capsys.readouterr().out == ""


def test_by_hand():
    """One object found at IoU 0.6, behind a false alarm with a higher score: precision 1/2 at all recalls."""
    box = torch.tensor([[10.0, 10, 20, 20]])
    target = {"boxes": box, "labels": torch.tensor([3])}
    boxes = torch.tensor([[50.0, 50, 60, 60], [10, 10, 20, 16]])
    prediction = {"boxes": boxes, "labels": torch.tensor([3, 3]), "scores": torch.tensor([0.9, 0.8])}
    figures = coco_map([prediction], [target])
    assert figures["AP50"] == pytest.approx(0.5)
    assert figures["AP75"] == 0
    assert figures["AP"] == pytest.approx(0.5 * 3 / 10)  # thresholds 0.5, 0.55 and 0.6 of ten
    assert figures["AR1"] == 0  # the first is the false alarm
    assert figures["AR10"] == pytest.approx(0.3)
    assert figures["AP_large"] == -1
    crowd = {**target, "iscrowd": torch.tensor([1])}
    assert coco_map([prediction], [crowd])["AP"] == -1
    # Without the false alarm, which is small
    assert coco_map([prediction], [{**target, "area": torch.tensor([1e4])}])["AP_large"] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_torchmetrics(targets, kind):
    detection = pytest.importorskip("torchmetrics.detection")
    predictions = noisy(targets)
    figures = coco_map(predictions, targets, kind)
    # Their default thresholds are of float32, and boxes of whole pixels meet such a threshold exactly.
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    metric = detection.MeanAveragePrecision(iou_type=kind, **thresholds)
    as_bool = [[{**d, "masks": d["masks"].reshape(-1, 140, 140) > 0.5} for d in ds] for ds in (predictions, targets)]
    metric.update(*as_bool)
    theirs = metric.compute()
    names = ("map", "map_50", "map_75", "mar_1", "mar_10", "mar_100")
    assert 0.1 < figures["AP"] < 0.9
    for ours, name in zip(("AP", "AP50", "AP75", "AR1", "AR10", "AR100"), names, strict=True):
        assert figures[ours] == pytest.approx(float(theirs[name]), abs=1e-6), name


def test_bad_input(targets):
    predictions = perfect(targets)
    with pytest.raises(ValueError, match="kind must be 'bbox' or 'segm', got 'box'"):
        coco_map(predictions, targets, "box")
    with pytest.raises(ValueError, match="30 predictions and 29 targets"):
        coco_map(predictions, targets[1:])
    with pytest.raises(ValueError, match=r"predictions\[0\] must have boxes, labels, scores; it lacks scores"):
        coco_map(targets, targets)
    broken = [{**predictions[0], "labels": torch.zeros(9)}, *predictions[1:]]
    with pytest.raises(ValueError, match=r"predictions\[0\] has \d boxes, but 9 labels"):
        coco_map(broken, targets)
