"""What every model of the list must do, whatever its paper."""

from __future__ import annotations

import io

import pytest
import torch

import pyzoo
from pyzoo.models import model_entry, register_model
from pyzoo.models.gated_pixelcnn import bits_per_dim
from pyzoo.nn import MaskedConv2d
from pyzoo.ops.masked_conv2d import live_weights

ALL = pyzoo.list_models()


def make_tiny(name: str, seed: int = 0):
    torch.manual_seed(seed)
    entry = model_entry(name)
    return entry, entry.build(**entry.tiny)


def make_batch(entry, count: int = 2):
    """Images, and targets: classes; for a detector an object, and then none."""
    height, width = entry.size
    if entry.task == "generation":
        return torch.randint(entry.tiny["levels"], (count, 3, height, width)), torch.arange(count)
    if entry.task in ("classification", "features"):
        return torch.randn(count, 3, height, width), torch.arange(count)
    images = [torch.rand(3, height, width), torch.rand(3, height, width - 3)][:count]
    targets = []
    for image, objects in zip(images, (1, 0), strict=False):
        boxes = torch.tensor([[4.0, 6.0, width * 0.7, height * 0.8]])[:objects]
        masks = torch.zeros(objects, *image.shape[1:], dtype=torch.uint8)
        masks[:, 6 : int(height * 0.8), 4 : int(width * 0.7)] = 1
        targets.append({"boxes": boxes, "labels": torch.ones(objects, dtype=torch.int64), "masks": masks})
    return images, targets


def run(entry, model, inputs, targets):
    """A conditional model is given the classes."""
    return model(inputs, targets) if "condition" in entry.tiny else model(inputs)


def loss_of(entry, model, inputs, targets):
    if entry.task == "generation":
        return bits_per_dim(run(entry, model, inputs, targets), inputs)
    if entry.task == "classification":
        return torch.nn.functional.cross_entropy(model(inputs), targets)
    if entry.task == "features":
        return sum(maps.square().mean() for maps in model(inputs).values())
    return sum(model(inputs, targets).values())


@pytest.mark.parametrize("name", ALL)
def test_parameters(name):
    entry = model_entry(name)
    with torch.device("meta"):
        model = entry.build()
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            channels = m.out_channels, m.in_channels
            live = live_weights(*channels, m.kernel_size, m.mask, colors=m.colors, gates=m.gates, groups=m.groups)
            learned -= int((~live).sum())
    assert learned == entry.parameters
    assert "arXiv" in entry.paper
    assert entry.input


@pytest.mark.parametrize("name", ALL)
def test_learns(name):
    """Each parameter gets a finite gradient, and a step along it makes the loss smaller."""
    entry, model = make_tiny(name)
    inputs, targets = make_batch(entry)

    def loss():
        torch.manual_seed(1)  # what is drawn, as dropout or the sampling of anchors
        return loss_of(entry, model, inputs, targets)

    before = loss()
    before.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad * (1e-3 / norm)
    assert loss() < before


@pytest.mark.parametrize("name", ALL)
def test_evaluates(name):
    """The same images give the same, in either memory format; an image does not depend on those beside it."""
    entry, model = make_tiny(name)
    model.eval()
    inputs, targets = make_batch(entry)
    with torch.no_grad():
        expected = run(entry, model, inputs, targets)
        assert_equal(run(entry, model, inputs, targets), expected)
        first = {k: v[:1] for k, v in expected.items()} if entry.task == "features" else expected[:1]
        assert_equal(run(entry, model, inputs[:1], targets[:1]), first)
        model.to(memory_format=torch.channels_last)
        assert_equal(run(entry, model, inputs, targets), expected)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_state_dict(name):
    """What is saved and loaded is the same model."""
    entry, model = make_tiny(name)
    _, other = make_tiny(name, seed=1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    inputs, targets = make_batch(entry)
    with torch.no_grad():
        expected = run(entry, model.eval(), inputs, targets)
        torch.testing.assert_close(run(entry, other.eval(), inputs, targets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in ALL if model_entry(name).task == "detection"])
def test_detectors_refuse_bad_input(name):
    """A message begins with the name of the model and says what was wrong, and where."""
    _, model = make_tiny(name)
    name, num_classes = type(model).__name__, model.num_classes
    image = torch.rand(3, 40, 60)
    good = {
        "boxes": torch.tensor([[1.0, 2, 30, 20]]),
        "labels": torch.tensor([1]),
        "masks": torch.zeros(1, 40, 60, dtype=torch.uint8),
    }
    nan = float("nan")
    images = [
        ((i for i in [image]), TypeError, "images must be a list"),
        ([], ValueError, "images must hold at least one image"),
        ([image, None], TypeError, "images must be a list of tensors"),
        ([image[0]], ValueError, r"images\[0\] must have shape \[3, H, W\].*\[40, 60\]"),
        ([image[:1]], ValueError, r"images\[0\] must have shape \[3, H, W\].*\[1, 40, 60\]"),
        ([image[:, :0]], ValueError, r"images\[0\] must have shape \[3, H, W\].*\[3, 0, 60\]"),
        ([(image * 255).byte()], TypeError, r"images\[0\] must be of a floating dtype.*uint8"),
    ]
    targets = [
        (None, ValueError, "targets must be given in training"),
        ([], ValueError, "targets must be one for each of the 1 images, got 0"),
        ([good, good], ValueError, "targets must be one for each of the 1 images, got 2"),
        ([None], TypeError, r"targets\[0\] must have a tensor 'boxes'"),
        ([{"boxes": good["boxes"]}], TypeError, r"targets\[0\] must have a tensor 'labels'"),
    ]
    for key, value, error, message in [
        ("boxes", [[1.0, 2, 30, 20]], TypeError, "must have a tensor 'boxes'"),
        ("boxes", torch.zeros(1, 5), ValueError, r"boxes .*must have shape \[n, 4\].*\[1, 5\]"),
        ("boxes", torch.zeros(4), ValueError, r"boxes .*must have shape \[n, 4\].*\[4\]"),
        ("boxes", torch.tensor([[1, 2, 30, 20]]), TypeError, "boxes .*must be of a floating dtype.*int64"),
        (
            "boxes",
            torch.tensor([[1.0, 2, 1, 20]]),
            ValueError,
            r"boxes .*must be finite, with x1 < x2, y1 < y2; box 0 .*1\.0, 20\.0",
        ),
        ("boxes", torch.tensor([[1.0, 2, 30, -20]]), ValueError, r"boxes .*must be finite, .*-20\.0"),
        ("boxes", torch.tensor([[1.0, 2, nan, 20]]), ValueError, r"boxes .*must be finite"),
        ("boxes", torch.tensor([[1.0, 2, float("inf"), 20]]), ValueError, r"boxes .*must be finite"),
        ("labels", torch.tensor([1, 1]), ValueError, r"labels .*must be 1, got \[2\]"),
        ("labels", torch.tensor([1.0]), TypeError, "labels .*must be int64.*float32"),
        ("labels", torch.tensor([0]), ValueError, rf"labels .*must be from 1 to {num_classes - 1}, got 0"),
        ("labels", torch.tensor([num_classes]), ValueError, rf"labels .*must be from 1 to .*to {num_classes}"),
        ("masks", torch.zeros(1, 39, 60), ValueError, r"masks .*must have shape \[1, 40, 60\].*\[1, 39, 60\]"),
        ("masks", torch.zeros(2, 40, 60), ValueError, r"masks .*must have shape \[1, 40, 60\].*\[2, 40, 60\]"),
    ]:
        targets.append(([{**good, key: value}], error, message))
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


def test_unknown_model():
    with pytest.raises(ValueError, match="no model 'resnet5'; did you mean resnet50"):
        pyzoo.create_model("resnet5")


def test_same_name_twice():
    with pytest.raises(ValueError, match="'resnet18' is already"):
        register_model("resnet18", torch.nn.Linear)
