"""Mask R-CNN: counts, torchvision's detections, losses and gradients, masks in and out of boxes, options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyzoo
from models import detectors
from pyzoo.models.mask_rcnn import MaskPredictor, mask_targets, paste_masks
from pyzoo.ops import roi_align, roi_pool

TINY = pyzoo.models.model_entry("maskrcnn_resnet50_fpn").tiny


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ours(**options):
    torch.manual_seed(0)
    return pyzoo.create_model("maskrcnn_resnet50_fpn", **options)


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(("norm", "keys", "parameters"), [("BatchNorm2d", 360, 44_454_513), (None, 307, 44_401_393)])
def test_state_dict_of_torchvision(norm, keys, parameters):
    detection = pytest.importorskip("torchvision").models.detection
    options = {"norm_layer": getattr(torch.nn, norm)} if norm else {}
    with torch.device("meta"):
        model = pyzoo.create_model("maskrcnn_resnet50_fpn", **options)
        theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    expected = {k: v.shape for k, v in theirs.items() if norm or not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected
    assert (len(expected), count(model)) == (keys, parameters)
    assert count(model.roi_heads.mask_head) == 2_360_320
    assert count(model.roi_heads.mask_predictor.conv5_mask) == 262_400
    assert count(model.roi_heads.mask_predictor.mask_fcn_logits) == 23_387


def test_equal_to_torchvision():
    """In float64, where no two scores are nearly the same: detections, losses and gradients."""
    theirs = detectors.peer("MaskRCNN", box_score_thresh=0, box_batch_size_per_image=64)
    heads = {"score_threshold": 0, "samples": 64}
    model = ours(depth=18, num_classes=21, input=detectors.SIZES, heads=heads).double()
    model.load_state_dict(theirs.state_dict())
    images, targets = detectors.scenes()
    detectors.assert_same_detections(model, theirs, images, boxes=1e-4, scores=1e-9, masks=1e-4)
    detectors.assert_same_training(model, theirs, images, targets)


def test_equal_to_torchvision_in_float32():
    """ResNet-50."""
    theirs = detectors.peer("MaskRCNN", 50, torch.float32, contrast=0.3, box_score_thresh=0)
    model = ours(num_classes=21, input=detectors.SIZES, heads={"score_threshold": 0})
    model.load_state_dict(theirs.state_dict())
    detectors.assert_near_in_float32(model, theirs, detectors.scenes(torch.float32)[0])


def test_older_names():
    model, other = ours(**TINY), ours(**TINY)
    state = {}
    for key, value in model.state_dict().items():
        for i in range(2):
            key = key.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        state[key] = value + 1
    assert "roi_heads.mask_head.mask_fcn2.weight" in state
    other.load_state_dict(state)
    torch.testing.assert_close(other.roi_heads.mask_head[1][0].weight, model.roi_heads.mask_head[1][0].weight + 1)


def random_boxes(n: int, height: int, width: int) -> torch.Tensor:
    """Some inside, some across the border, some outside or without area."""
    corner = torch.rand(n, 2) * torch.tensor([width * 1.2, height * 1.2]) - 10
    boxes = torch.cat((corner, corner + torch.rand(n, 2) * 50), 1)
    special = torch.tensor([[5.0, 5, 5, 5], [0, 0, width, height], [-40, -40, -20, -20], [3.5, 2.25, 3.75, 30]])
    return torch.cat((boxes, special))


def test_mask_targets():
    peer = pytest.importorskip("torchvision").models.detection.roi_heads.project_masks_on_boxes
    torch.manual_seed(0)
    masks = (torch.rand(3, 60, 80) > 0.5).to(torch.uint8)
    boxes = random_boxes(20, 60, 80)
    objects = torch.randint(3, (len(boxes),))
    torch.testing.assert_close(mask_targets(masks, boxes, objects, 28), peer(masks, boxes, objects, 28))


# ------------------------------------------------------------------------------------------------------------- pasting


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (33, 7)])
def test_paste_as_torchvision(size):
    peer = pytest.importorskip("torchvision").models.detection.roi_heads.paste_masks_in_image
    torch.manual_seed(0)
    boxes = random_boxes(30, *size)
    inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < torch.tensor([size[1], size[0]])).all(1)
    boxes = boxes[inside]  # torchvision's cannot be beside the image; detections never are
    masks = torch.rand(len(boxes), 1, 28, 28)
    torch.testing.assert_close(paste_masks(masks, boxes, size), peer(masks, boxes, size), rtol=0, atol=1e-4)
    assert paste_masks(masks[:0], boxes[:0], size).shape == (0, 1, *size)


def test_paste_as_detectron2():
    """Its grid_sample at the centres of the image's pixels."""
    torch.manual_seed(0)
    height, width = 60, 80
    boxes = random_boxes(30, height, width)[:-4]
    masks = torch.rand(len(boxes), 1, 28, 28)
    x1, y1, x2, y2 = (side[:, None] for side in boxes.unbind(1))
    y = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1)
    expected = F.grid_sample(masks, grid, align_corners=False)
    torch.testing.assert_close(paste_masks(masks, boxes, (height, width), "grid"), expected, rtol=0, atol=1e-4)


def test_paste_covers_the_box_and_no_more():
    ones = torch.ones(2, 1, 28, 28)
    boxes = torch.tensor([[10.0, 20, 38, 48], [70, 50, 126, 78]])
    first, second = paste_masks(ones, boxes, (60, 80))[:, 0]
    rows, columns = (first > 0).nonzero().unbind(1)
    # One pixel more than the box has, as the resized mask counts both ends
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (20, 48, 10, 38)
    assert (first[21:48, 11:38] > 0.99).all()
    assert (second[:50] == 0).all()
    assert (second[52:, 73:] > 0.99).all()


# ---------------------------------------------------------------------------------------------------- loss and options


def losses_of(model, labels=(1,), seed=0):
    images, targets = detectors.scenes(torch.float32, objects=(len(labels), 0))
    targets[0]["labels"] = torch.tensor(labels)
    torch.manual_seed(seed)
    return model(images, targets)


def test_only_the_class_of_the_object_learns():
    model = ours(**TINY)
    losses_of(model, (3,))["loss_mask"].backward()
    grad = model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum((1, 2, 3))
    assert grad[3] > 0
    assert (grad[[0, 1, 2, 4]] == 0).all()


def test_no_objects():
    model = ours(**TINY)
    images, targets = detectors.scenes(torch.float32, objects=(0, 0))
    losses = model(images, targets)
    assert losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_logits_of_given_classes():
    """Those alone are computed: the same as all of them and then a choice."""
    torch.manual_seed(0)
    predictor = MaskPredictor(8, 6, 5)
    x, labels = torch.randn(7, 8, 14, 14), torch.tensor([0, 4, 2, 2, 1, 3, 4])
    expected = predictor(x)[torch.arange(7), labels][:, None]
    torch.testing.assert_close(predictor(x, labels), expected)
    torch.testing.assert_close(predictor(x.contiguous(memory_format=torch.channels_last), labels), expected)
    assert predictor(x[:0], labels[:0]).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("competing", [False, True])
def test_classes_compete_with_softmax_alone(competing):
    """Another class changes: a sigmoid's masks stay, to the bit."""
    model = ours(**TINY, competing=competing).eval()
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        (before,) = model([image])
        label = int(before["labels"][0])
        other = label % 4 + 1
        model.roi_heads.mask_predictor.mask_fcn_logits.weight[other] += 1
        (after,) = model([image])
    same = before["labels"] == label
    assert torch.equal(before["labels"], after["labels"])
    assert torch.equal(before["masks"][same], after["masks"][same]) == (not competing)
    assert not torch.equal(before["masks"], after["masks"]) or not (before["labels"] == other).any()


def test_competing_loss():
    model = ours(**TINY, competing=True)
    loss = losses_of(model, (3,))["loss_mask"]
    loss.backward()
    grad = model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum((1, 2, 3))
    assert (grad > 0).all()


def test_class_agnostic():
    model = ours(**TINY, class_agnostic=True)
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.shape[0] == 1
    sum(losses_of(model, (3,)).values()).backward()
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum() > 0
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 50, 60)])
    assert found["masks"].shape == (len(found["boxes"]), 1, 50, 60)


def test_nothing_found():
    model = ours(**{**TINY, "heads": {"score_threshold": 1.0}}).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 60)])
    assert found["masks"].shape == (0, 1, 50, 60)


# ------------------------------------------------------------------------------------------------------------- RoIAlign


def test_roi_align_follows_a_ramp():
    """Figure 3: on a map whose values are its columns, a bin is the column of its middle, whatever the box."""
    ramp = torch.arange(40.0).expand(1, 1, 30, 40).contiguous()
    x1, x2 = 37.3, 251.9
    box = [torch.tensor([[x1, 20, x2, 130]])]
    middle = (x1 + (torch.arange(7) + 0.5) * (x2 - x1) / 7) / 8 - 0.5
    aligned = roi_align(ramp, box, 7, 1 / 8, 2, aligned=True)[0, 0, 3]
    torch.testing.assert_close(aligned, middle, rtol=0, atol=1e-5)
    torch.testing.assert_close(roi_align(ramp, box, 7, 1 / 8, 2)[0, 0, 3], middle + 0.5, rtol=0, atol=1e-5)
    assert (roi_pool(ramp, box, 7, 1 / 8)[0, 0, 3] - middle).abs().max() > 0.5


def test_roi_align_follows_a_shift():
    """A box that moves by pixels moves RoIAlign's output as far; RoIPool's stays and then jumps a whole cell."""
    ramp = torch.arange(40.0).expand(1, 1, 30, 40).contiguous() * 16
    shifts = torch.arange(9.0)
    boxes = [torch.tensor([[64.0, 64, 176, 176]]) + shifts[:, None] * torch.tensor([1.0, 0, 1, 0])]
    aligned = roi_align(ramp, boxes, 7, 1 / 16, 2, aligned=True).mean((1, 2, 3))
    torch.testing.assert_close(aligned - aligned[0], shifts, rtol=0, atol=1e-3)
    pooled = roi_pool(ramp, boxes, 7, 1 / 16).mean((1, 2, 3))
    assert (pooled[:8] == pooled[0]).all()
    assert pooled[8] - pooled[0] == 16


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input():
    model = ours(**TINY)
    images, targets = detectors.scenes(torch.float32, objects=(1, 1))
    short = {**targets[0], "masks": targets[0]["masks"][:, :-1]}
    with pytest.raises(ValueError, match=r"MaskRCNN: masks of targets\[0\] must have shape \[1, 100, 141\]"):
        model(images, [short, targets[1]])
    with pytest.raises(TypeError, match=r"targets\[1\] must have a tensor 'masks'"):
        model(images, [targets[0], {key: targets[1][key] for key in ("boxes", "labels")}])
    with pytest.raises(ValueError, match="paste must be 'resize' or 'grid', got 'glue'"):
        ours(**TINY, paste="glue")
