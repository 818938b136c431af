"""Input that every detector must refuse."""

from __future__ import annotations

import pytest
import torch


def check_refuses_bad_input(model, name: str, num_classes: int) -> None:
    """A message begins with the name of the model and names what was wrong."""
    image = torch.rand(3, 40, 60)
    good = {
        "boxes": torch.tensor([[1.0, 2, 30, 20]]),
        "labels": torch.tensor([1]),
        "masks": torch.zeros(1, 40, 60, dtype=torch.uint8),
    }
    nan = float("nan")
    images = [
        ((i for i in [image]), TypeError, "images must be a list"),
        ([], ValueError, "images must have at least one"),
        ([image, None], TypeError, r"images\[1\] must be a tensor"),
        ([image[0]], ValueError, r"images\[0\] must be \[3, H, W\].*\[40, 60\]"),
        ([image[:1]], ValueError, r"images\[0\] must be \[3, H, W\].*\[1, 40, 60\]"),
        ([image[:, :0]], ValueError, r"images\[0\] must be \[3, H, W\].*\[3, 0, 60\]"),
        ([(image * 255).byte()], TypeError, r"images\[0\] must be floating.*uint8"),
    ]
    targets = [
        (None, ValueError, "targets must be a list of 1 dicts"),
        ([], ValueError, "targets must be a list of 1 dicts"),
        ([good, good], ValueError, "targets must be a list of 1 dicts"),
        ([None], ValueError, r"targets\[0\] must be a dict with boxes and labels"),
        ([{"boxes": good["boxes"]}], ValueError, r"targets\[0\] must be a dict with boxes and labels"),
    ]
    for key, value, error, message in [
        ("boxes", [[1.0, 2, 30, 20]], TypeError, "boxes must be a tensor"),
        ("boxes", torch.zeros(1, 5), ValueError, r"boxes must be \[n, 4\].*\[1, 5\]"),
        ("boxes", torch.zeros(4), ValueError, r"boxes must be \[n, 4\].*\[4\]"),
        ("boxes", torch.tensor([[1, 2, 30, 20]]), TypeError, "boxes must be floating.*int64"),
        ("boxes", torch.tensor([[1.0, 2, 1, 20]]), ValueError, r"boxes\[0\] must be finite with x1 < x2.*1\.0, 20\.0"),
        ("boxes", torch.tensor([[1.0, 2, 30, -20]]), ValueError, r"boxes\[0\] must be finite with x1 < x2 and y1 < y2"),
        ("boxes", torch.tensor([[1.0, 2, nan, 20]]), ValueError, r"boxes\[0\] must be finite"),
        ("boxes", torch.tensor([[1.0, 2, float("inf"), 20]]), ValueError, r"boxes\[0\] must be finite"),
        ("labels", torch.tensor([1, 1]), ValueError, r"labels must be \[1\].*\[2\]"),
        ("labels", torch.tensor([1.0]), TypeError, "labels must be int64.*float32"),
        ("labels", torch.tensor([0]), ValueError, rf"labels\[0\] must be in 1 \.\. {num_classes - 1}, got 0"),
        ("labels", torch.tensor([num_classes]), ValueError, rf"labels\[0\] must be in 1 .. .*got {num_classes}"),
        ("masks", torch.zeros(1, 39, 60), ValueError, r"masks must be \[1, 40, 60\].*\[1, 39, 60\]"),
        ("masks", torch.zeros(2, 40, 60), ValueError, r"masks must be \[1, 40, 60\].*\[2, 40, 60\]"),
    ]:
        targets.append(([{**good, key: value}], error, rf"targets\[0\].*{message}"))
    model.train()
    for bad, error, message in images:
        with pytest.raises(error, match=rf"^{name}: .*{message}"):
            model(bad, [good])
    for bad, error, message in targets:
        with pytest.raises(error, match=rf"^{name}: .*{message}"):
            model([image], bad)
    model.eval()
    with pytest.raises(ValueError, match=rf"^{name}: images\[0\]"):
        model([image[:1]])
