"""Faster R-CNN: counts, anchors, torchvision's detections, losses and gradients, the paper's proposal layer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import pyzoo
from models import detectors
from pyzoo.models.faster_rcnn import (
    PAPER_RPN,
    RPN,
    RPNHead,
    anchor_cells,
    assign,
    from_caffe_names,
    make_anchors,
    paper_cells,
    pool_map,
)
from pyzoo.models.vgg import layer_index
from pyzoo.nn.boxes import box_iou
from pyzoo.nn.detection import Batch, InputTransform

FPN_SIZES = ((32,), (64,), (128,), (256,), (512,))
TINY = pyzoo.models.model_entry("fasterrcnn_resnet50_fpn").tiny
OTHERS = {"depth": 18, "num_classes": 21, "input": detectors.SIZES, "heads": {"score_threshold": 0}}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ours(**options):
    torch.manual_seed(0)
    return pyzoo.create_model("fasterrcnn_resnet50_fpn", **options)


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("norm", "keys", "parameters"), [("BatchNorm2d", 348, 41_808_406), (None, 295, 41_755_286)])
def test_state_dict_of_torchvision(norm, keys, parameters):
    detection = pytest.importorskip("torchvision").models.detection
    options = {"norm_layer": getattr(torch.nn, norm)} if norm else {}
    with torch.device("meta"):
        model = pyzoo.create_model("fasterrcnn_resnet50_fpn", **options)
        theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    expected = {k: v.shape for k, v in theirs.items() if norm or not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected
    assert (len(expected), count(model)) == (keys, parameters)
    parts = model.backbone.fpn, model.rpn, model.roi_heads.box_head, model.roi_heads.box_predictor
    assert [count(part) for part in parts] == [3_344_384, 593_935, 13_895_680, 466_375]
    assert count(model.backbone.body) == (23_508_032 if norm else 23_508_032 - 53_120)


def test_counts_of_the_paper():
    create = partial(pyzoo.create_model, "fasterrcnn_vgg16")
    with torch.device("meta"):
        assert count(create(rpn={"softmax": False})) == 137_073_622
        assert count(create(num_classes=81, scales=(4, 8, 16, 32))) == 138_316_573
        assert count(RPNHead(512, 9, softmax=True)) == 2_387_510


# -------------------------------------------------------------------------------------------------------------- anchors


@pytest.mark.parametrize(("size", "expected"), [((800, 1344), 268_569), ((800, 1088), 217_413), ((224, 224), 12_543)])
def test_anchors_of_a_pyramid(size, expected):
    detection = pytest.importorskip("torchvision").models.detection
    maps = [torch.zeros(1, 1, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    maps.append(maps[-1][:, :, ::2, ::2])
    anchors = torch.cat(make_anchors([anchor_cells(s) for s in FPN_SIZES], maps, size))
    assert len(anchors) == expected
    peer = detection.anchor_utils.AnchorGenerator(FPN_SIZES, ((0.5, 1.0, 2.0),) * 5)
    images = detection.image_list.ImageList(torch.zeros(1, 3, *size), [size])
    assert torch.equal(anchors, peer(images, maps)[0])


def test_anchors_of_the_paper():
    """In the paper's code the first pixel is 1 and both ends are in the box."""
    table = [(-83, -39, 100, 56), (-175, -87, 192, 104), (-359, -183, 376, 200)]
    table += [(-55, -55, 72, 72), (-119, -119, 136, 136), (-247, -247, 264, 264)]
    table += [(-35, -79, 52, 96), (-79, -167, 96, 184), (-167, -343, 184, 360)]
    assert paper_cells() == [[x1 - 1, y1 - 1, x2, y2] for x1, y1, x2, y2 in table]
    assert len(paper_cells((4, 8, 16, 32))) == 12
    (anchors,) = make_anchors([paper_cells()], [torch.zeros(1, 1, 37, 62)], (600, 1000), 16)
    assert len(anchors) == 20_646
    grid = anchors.view(37, 62, 9, 4)
    assert grid[3, 5, 4].tolist() == [5 * 16 - 120, 3 * 16 - 120, 5 * 16 + 136, 3 * 16 + 136]
    inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= torch.tensor([1000, 600]))).all(1).float().mean()
    assert 0.3 < inside < 0.4  # "about 1/3"


def test_assign_by_brute_force():
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 50
    candidates = torch.cat((corner, corner + torch.rand(60, 2) * 40 + 1), 1)
    objects = torch.cat((candidates[:3] + 2, candidates[:1] + 2, torch.tensor([[500.0, 500, 510, 510]])))
    iou = box_iou(objects, candidates)
    expected = []
    for j in range(60):
        column = iou[:, j].tolist()
        best = max(column)
        state = column.index(best) if best >= 0.7 else -1 if best < 0.3 else -2
        if any(iou[i, j] == iou[i].max() and iou[i, j] > 0 for i in range(len(objects))):
            state = column.index(best)
        expected.append(state)
    assert assign(candidates, objects, 0.7, 0.3, keep_best=True).tolist() == expected
    assert {-1, -2, 0, 1} <= set(expected)
    assert 4 not in expected  # it overlaps none
    assert assign(candidates, objects[:0], 0.7, 0.3, keep_best=True).tolist() == [-1] * 60
    assert assign(candidates[:0], objects, 0.5, 0.5).tolist() == []


# ---------------------------------------------------------------------------------------------------------- torchvision


def test_equal_to_torchvision():
    """In float64, where no two scores are nearly the same: detections, losses and gradients."""
    theirs = detectors.peer("FasterRCNN", box_score_thresh=0)
    model = ours(**OTHERS).double()
    model.load_state_dict(theirs.state_dict())
    images, targets = detectors.scenes()
    detectors.assert_same_detections(model, theirs, images, boxes=1e-4, scores=1e-9)
    detectors.assert_same_training(model, theirs, images, targets)


def test_equal_to_torchvision_in_float32():
    """ResNet-50."""
    theirs = detectors.peer("FasterRCNN", 50, torch.float32, contrast=0.3, box_score_thresh=0)
    model = ours(**{**OTHERS, "depth": 50})
    model.load_state_dict(theirs.state_dict())
    detectors.assert_near_in_float32(model, theirs, detectors.scenes(torch.float32)[0])


def test_input_as_torchvision():
    """Several sizes to draw from, and odd sizes of images."""
    detection = pytest.importorskip("torchvision").models.detection
    sizes = (40, 64, 97)
    theirs = detection.transform.GeneralizedRCNNTransform(sizes, 150, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = InputTransform(sizes, 150)
    images = [torch.rand(3, 37, 41), torch.rand(3, 64, 90), torch.rand(3, 64, 200), torch.rand(3, 1, 3)]
    for training in (True, False):
        torch.manual_seed(0)
        expected, _ = theirs.train(training)(images)
        torch.manual_seed(0)
        batch = transform.batch(images, training)
        assert batch.sizes == [tuple(size) for size in expected.image_sizes]
        torch.testing.assert_close(batch.images, expected.tensors, rtol=1e-5, atol=1e-5)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_older_names():
    model, other = ours(**TINY), ours(**TINY)
    state = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): v + 1 for key, v in model.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(other.rpn.head.conv[0][0].weight, model.rpn.head.conv[0][0].weight + 1)


# ------------------------------------------------------------------------------------------------- the paper's settings


def proposal_layer(scores, deltas, anchors, size, scale, *, before, after, threshold, min_size):
    """The authors' layer with NumPy: both ends in the box, and so one pixel less on the right after decoding."""
    w, h = anchors[:, 2] - anchors[:, 0] + 1, anchors[:, 3] - anchors[:, 1] + 1
    cx, cy = anchors[:, 0] + 0.5 * w, anchors[:, 1] + 0.5 * h
    cx, cy = deltas[:, 0] * w + cx, deltas[:, 1] * h + cy
    w, h = np.exp(deltas[:, 2]) * w, np.exp(deltas[:, 3]) * h
    boxes = np.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w - 1, cy + 0.5 * h - 1), 1)
    boxes = np.clip(boxes, 0, np.array((size[1], size[0], size[1], size[0])) - 1)
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    large = (sides >= min_size * scale).all(1)
    boxes, scores = boxes[large], scores[large]
    order = np.argsort(-scores, kind="stable")[:before]
    boxes, kept = boxes[order], []
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for i in range(len(boxes)):
        if kept:
            others = boxes[kept]
            corner, end = np.maximum(boxes[i, :2], others[:, :2]), np.minimum(boxes[i, 2:], others[:, 2:])
            inter = np.maximum(end - corner + 1, 0).prod(1)
            if (inter / (area[i] + area[kept] - inter) > threshold).any():
                continue
        kept.append(i)
    return boxes[kept[:after]]


def test_proposals_of_the_paper():
    torch.manual_seed(0)
    height, width, scale = 18, 29, 1.6
    options = {**PAPER_RPN, "before_nms": (900, 600), "after_nms": (200, 100)}
    rpn = RPN(8, [paper_cells()], stride=16, **options).eval()
    maps = [torch.zeros(1, 8, height, width)]
    anchors = make_anchors([paper_cells()], maps, (300, 470), 16)
    objectness = [torch.randn(1, len(anchors[0]), dtype=torch.float64)]
    offsets = [torch.randn(1, len(anchors[0]), 4, dtype=torch.float64) * torch.tensor([0.2, 0.2, 1.5, 1.5])]
    batch = Batch(torch.zeros(1, 3, 300, 470), [(300, 470)], [scale])
    for training, before, after in ((True, 900, 200), (False, 600, 100)):
        (actual,) = rpn.train(training).propose(objectness, offsets, anchors, batch)
        inclusive = anchors[0].double().numpy() - np.array((0, 0, 1, 1))
        expected = proposal_layer(
            objectness[0][0].numpy(),
            offsets[0][0].numpy(),
            inclusive,
            (300, 470),
            scale,
            before=before,
            after=after,
            threshold=0.7,
            min_size=16,
        )
        assert len(expected) == after
        np.testing.assert_allclose(actual.numpy(), expected + np.array((0, 0, 1, 1)), atol=1e-4)


def test_pool_of_the_paper():
    """RoIPool's x2 is in the box."""
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    maps = [torch.randn(1, 4, 20, 30)]
    corner = torch.rand(30, 2) * 200
    boxes = torch.cat((corner, corner + torch.rand(30, 2) * 200), 1).round()
    expected = ops.roi_pool(maps[0], [boxes - torch.tensor([0.0, 0, 1, 1])], 7, 1 / 16)
    torch.testing.assert_close(pool_map(maps, [boxes], 7, stride=16), expected)


def test_softmax_of_the_paper():
    """All outputs for background come first; the losses are those of a softmax over two classes."""
    torch.manual_seed(0)
    head = RPNHead(8, 3, softmax=True)
    x = torch.randn(2, 8, 5, 7)
    (objectness,), (offsets,) = head([x])
    two = head.cls_logits(head.conv(x)).unflatten(1, (2, 3)).permute(0, 3, 4, 2, 1).flatten(1, 3)  # [N, HWA, 2]
    torch.testing.assert_close(objectness.sigmoid(), two.softmax(-1)[..., 1])
    boxes = head.bbox_pred(head.conv(x)).unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    torch.testing.assert_close(offsets, boxes)


def test_caffe_names():
    model = pyzoo.create_model("fasterrcnn_vgg16", **pyzoo.models.model_entry("fasterrcnn_vgg16").tiny)
    state = model.state_dict()
    back = {f"backbone.body.{i}": name for name, i in layer_index(model.backbone.body).items()}
    back |= {"rpn.head.conv.0.0": "rpn_conv/3x3", "rpn.head.cls_logits": "rpn_cls_score"}
    back |= {"rpn.head.bbox_pred": "rpn_bbox_pred"}
    caffe = {}
    for key, value in state.items():
        layer, _, what = key.rpartition(".")
        caffe[f"{back.get(layer, layer.rpartition('.')[2])}.{what}"] = value
    assert {"conv1_1.weight", "conv5_3.bias", "rpn_conv/3x3.weight", "fc6.weight", "bbox_pred.bias"} <= caffe.keys()
    stds = torch.tensor([0.1, 0.1, 0.2, 0.2]).repeat(5)
    caffe["bbox_pred.weight"], caffe["bbox_pred.bias"] = (
        caffe["bbox_pred.weight"] * stds[:, None],
        caffe["bbox_pred.bias"] * stds,
    )
    loaded = from_caffe_names(caffe, model)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(loaded[key], value)


# ------------------------------------------------------------------------------------------------------------- training


def test_anchors_across_the_border_do_not_count():
    torch.manual_seed(0)
    maps = [torch.randn(1, 8, 12, 12)]
    batch = Batch(torch.zeros(1, 3, 192, 192), [(192, 160)], [1])
    targets = [{"boxes": torch.tensor([[10.0, 20, 90, 120]]), "labels": torch.tensor([1])}]
    (anchors,) = make_anchors([paper_cells((2, 4, 8))], maps, (192, 192), 16)
    inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= torch.tensor([160, 192]))).all(1)
    for cross in (False, True):
        rpn = RPN(8, [paper_cells((2, 4, 8))], stride=16, cross_border=cross, samples=10_000)
        objectness = torch.zeros(1, len(anchors), requires_grad=True)
        offsets = torch.zeros(1, len(anchors), 4, requires_grad=True)
        losses = rpn.losses(objectness, offsets, anchors, batch, targets)
        sum(losses.values()).backward()
        looked_at = objectness.grad[0] != 0
        assert looked_at.any()
        assert bool((looked_at & ~inside).any()) == cross
        assert (looked_at & inside).sum() > 100


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_vgg16"])
def test_image_without_objects(name):
    torch.manual_seed(0)
    model = pyzoo.create_model(name, **pyzoo.models.model_entry(name).tiny)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model([torch.rand(3, 50, 60)], [empty])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_vgg16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_strange_sizes(name, size):
    model = pyzoo.create_model(name, **pyzoo.models.model_entry(name).tiny).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, *size)])
    assert found["boxes"].shape == (len(found["scores"]), 4)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2) + 1e-4).all()


def test_nothing_found():
    model = ours(**{**TINY, "heads": {"score_threshold": 1.0}}).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 50, 60)])
    assert found["boxes"].shape == (0, 4)
    assert found["labels"].shape == found["scores"].shape == (0,)


def test_targets_stay_as_they_are():
    model = ours(**TINY)
    images, targets = detectors.scenes(torch.float32)
    targets = [{**target, "labels": target["labels"].clamp(max=4)} for target in targets]
    before = [{key: value.clone() for key, value in target.items()} for target in targets]
    model(images, targets)
    for target, old in zip(targets, before, strict=True):
        assert all(torch.equal(target[key], old[key]) for key in old)


def test_proposals():
    """In pixels of the image, the likeliest first, no two nearly the same."""
    model = ours(**TINY).eval()
    image = torch.rand(3, 40, 50)  # 1.6 times larger inside
    (boxes,) = model.propose([image])
    assert len(boxes) > 100
    assert boxes[:, 2].max() > 45
    assert (boxes[:, 2:] <= torch.tensor([50, 40]) + 1e-4).all()


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8), [GOOD, GOOD], TypeError, r"images must be a list .* got \[2, 3, 8, 8\] in one tensor"),
        ([], [], ValueError, "images must hold at least one"),
        ([torch.rand(1, 64, 64)], [GOOD], ValueError, r"images\[0\] must have shape \[3, H, W\], got \[1, 64, 64\]"),
        ([torch.rand(3, 0, 64)], [GOOD], ValueError, r"images\[0\] must have shape"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], [GOOD], TypeError, r"images\[0\] must be of a floating dtype"),
        (None, None, ValueError, "targets must be given"),
        (None, GOOD, TypeError, "targets must be a list of dicts, got dict"),
        (None, [GOOD, GOOD], ValueError, "targets must be one for each of the 1 images, got 2"),
        (None, [{"boxes": GOOD["boxes"]}], TypeError, r"targets\[0\] must have a tensor 'labels'"),
        (None, [{**GOOD, "boxes": torch.zeros(4)}], ValueError, r"boxes of targets\[0\] must have shape \[n, 4\]"),
        (None, [{**GOOD, "boxes": torch.ones(1, 4).int()}], TypeError, "must be of a floating dtype, got torch.int32"),
        (None, [{**GOOD, "boxes": torch.tensor([[5.0, 5, 5, 9]])}], ValueError, r"x1 < x2, y1 < y2; box 0 is \[5.0"),
        (None, [{**GOOD, "boxes": torch.tensor([[5.0, 5, float("nan"), 9]])}], ValueError, "must be finite"),
        (None, [{**GOOD, "boxes": torch.tensor([[5.0, 5, float("inf"), 9]])}], ValueError, "must be finite"),
        (None, [{**GOOD, "labels": torch.tensor([0])}], ValueError, "must be from 1 to 4, got 0 to 0"),
        (None, [{**GOOD, "labels": torch.tensor([5])}], ValueError, "must be from 1 to 4, got 5 to 5"),
        (None, [{**GOOD, "labels": torch.tensor([1.0])}], TypeError, "must be int64, got torch.float32"),
        (None, [{**GOOD, "labels": torch.tensor([1, 2])}], ValueError, r"labels of targets\[0\] must be 1, got \[2\]"),
    ],
)
def test_bad_input(images, targets, error, message):
    with pytest.raises(error, match="FasterRCNN: .*" + message):
        ours(**TINY)([torch.rand(3, 64, 64)] if images is None else images, targets)
