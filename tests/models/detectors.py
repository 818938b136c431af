"""What the tests of Faster and Mask R-CNN share: torchvision's models with weights worth comparing, and scenes."""

from __future__ import annotations

import pytest
import torch

SIZES = {"min_size": 160, "max_size": 256}


def peer(kind: str, depth: int = 18, dtype=torch.float64, contrast: float = 5, **options):
    """torchvision's FasterRCNN or MaskRCNN on a ResNet of any depth with 21 classes, with statistics of batch norm that
    are fixed and fit, and outputs that differ from each other as those of trained models."""
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=f"resnet{depth}", weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d
    )
    model = getattr(detection, kind)(backbone, 21, **{**SIZES, **options}).to(dtype)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
        model.backbone(torch.randn(1, 3, 160, 256, dtype=dtype))
        for norm in norms:
            norm.eval().requires_grad_(False)
        for head in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, model.roi_heads.box_predictor.cls_score):
            head.weight *= contrast
            head.bias.normal_(0, 0.1)
    return model


def train(model):
    """In training mode, but for batch norm."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def scenes(dtype=torch.float64, objects=(3, 1)):
    """Two images of different sizes, and their targets."""
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for (height, width), n in zip(((100, 141), (120, 90)), objects, strict=True):
        images.append(torch.rand(3, height, width, generator=generator, dtype=dtype))
        corner = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        size = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) * 0.4 + 8
        boxes = torch.cat((corner, corner + size), 1)
        masks = torch.zeros(n, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1 + 1 : y2, x1 : x2 - 3] = 1
        targets.append({"boxes": boxes.to(dtype), "labels": torch.tensor([1, 20, 7])[:n], "masks": masks})
    return images, targets


def assert_same_detections(ours, theirs, images, **tolerance):
    """Boxes, labels, scores, masks of both, score threshold 0."""
    with torch.no_grad():
        actual, expected = ours.eval()(images), theirs.eval()(images)
    assert all(len(found["boxes"]) == 100 for found in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.keys() == e.keys()
        for key in e:
            torch.testing.assert_close(a[key], e[key], rtol=0, atol=tolerance.get(key, 0))


def assert_near_in_float32(ours, theirs, images):
    """Rounding swaps scores that are nearly equal and is amplified by random weights: nearly all detections are the
    same, and at the tolerance of a trained model no fewer than torchvision's that are those of float64."""
    with torch.no_grad():
        actual, expected = ours.eval()(images), theirs.eval()(images)
        exact = theirs.double()([image.double() for image in images])
    assert sum(len(found["boxes"]) for found in expected) == 200
    assert count_same(actual, expected, 10) >= 196
    assert count_same(actual, expected, 1) >= count_same(expected, exact, 1)


def count_same(actual, expected, tolerance: float) -> int:
    """How many detections that were expected are there, in whatever order."""
    count = 0
    for a, e in zip(actual, expected, strict=True):
        same = ((a["boxes"] - e["boxes"][:, None]).abs() <= 1e-3 * tolerance).all(2)
        same &= (a["scores"] - e["scores"][:, None]).abs() <= 1e-5 * tolerance
        same &= a["labels"] == e["labels"][:, None]
        for i, j in same.nonzero().tolist() if "masks" in e else ():
            same[i, j] &= bool((a["masks"][j] - e["masks"][i]).abs().max() <= 1e-3 * tolerance)
        count += int(same.any(1).sum())
    return count


def assert_same_training(ours, theirs, images, targets):
    """Losses, and the gradient of every parameter, with the same random numbers."""
    losses = []
    for model in (train(ours), train(theirs)):
        torch.manual_seed(2)
        losses.append(model(images, targets))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    for key, expected in losses[1].items():
        torch.testing.assert_close(losses[0][key], expected.double(), rtol=1e-6, atol=0)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = expected[name].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-9 * float(grad.abs().max()), msg=name)
