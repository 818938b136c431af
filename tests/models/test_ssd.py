"""SSD: tables, torchvision's outputs and gradients, matching, hard negatives, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pyzoo
from pyzoo.models import ssd, vgg
from pyzoo.models.ssd import (
    SSD,
    SSD300,
    SSD512,
    Layout,
    candidates,
    default_boxes,
    hardest,
    match_best,
    match_bipartite,
)
from pyzoo.nn.boxes import BELOW, box_iou

IMAGES = [(300, 300), (240, 333)]
SSD96 = Layout(
    size=96,
    maps=(12, 6, 3),
    extras=((4, 8, 3, 2, 1),),
    steps=(8, 16, 32),
    ratios=((2,), (2,), (2,)),
    sizes={"coco": (12, 24, 48, 72)},
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def small(seed: int = 0, **options) -> SSD:
    torch.manual_seed(seed)
    return SSD(**{"width": 2, "num_classes": 4, **options})


def make_images(seed: int = 0, sizes=IMAGES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def make_targets(counts=(5, 3), sizes=IMAGES, classes: int = 4, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        corner, side = torch.rand(2, count, 2, generator=generator)
        scale = torch.tensor([width, height])
        boxes = torch.cat((corner * 0.6, corner * 0.6 + 0.05 + side * 0.35), 1) * scale.repeat(2)
        targets.append({"boxes": boxes, "labels": torch.randint(1, classes, (count,), generator=generator)})
    return targets


@pytest.fixture(scope="module")
def pair():
    """torchvision's model, and ours with the same random weights."""
    peer = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    theirs = peer.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=6)
    for parameter in theirs.head.parameters():  # no scores so near 1 that they are equal
        parameter.data *= 0.02
    with torch.device("meta"):
        ours = pyzoo.create_model("ssd300_vgg16", num_classes=6)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


# --------------------------------------------------------------------------------------------------------- torchvision


def test_state_dict_of_torchvision(pair):
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(ours.state_dict()) == 71


def test_default_boxes_of_torchvision(pair):
    ours, theirs = pair
    from torchvision.models.detection.image_list import ImageList

    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    (expected,) = theirs.anchor_generator(images, [torch.zeros(1, 1, m, m) for m in SSD300.maps])
    torch.testing.assert_close(ours.default_boxes(), expected, rtol=0, atol=0)


def test_outputs_of_torchvision(pair):
    """Raw outputs of the head, and detections, for images of two sizes."""
    ours, theirs = (model.eval() for model in pair)
    images = make_images()
    with torch.no_grad():
        batch, _ = theirs.transform(images)
        close(ours.prepare(images), batch.tensors, 1e-4)
        expected = theirs.head(list(theirs.backbone(batch.tensors).values()))
        offsets, logits = ours.network(batch.tensors)
        close(offsets, expected["bbox_regression"], 1e-4)
        close(logits, expected["cls_logits"], 1e-4)
        for actual, expected in zip(ours(images), theirs(images), strict=True):
            assert len(actual["boxes"]) > 50
            close(actual["scores"], expected["scores"], 1e-4)
            assert torch.equal(actual["labels"], expected["labels"])
            close(actual["boxes"], expected["boxes"], 1e-3)


@pytest.mark.parametrize("background", [0, 7])  # thousands of candidates of each class above the threshold, and tens
def test_detections_of_torchvision(pair, background):
    """From the same outputs of the head the same detections, exactly."""
    ours, theirs = pair
    torch.manual_seed(1)
    offsets, logits = torch.randn(2, 8732, 4), torch.randn(2, 8732, 6)
    logits[..., 0] += background
    outputs = {"bbox_regression": offsets, "cls_logits": logits}
    peer = theirs.postprocess_detections(outputs, [ours.default_boxes()] * 2, [(300, 300)] * 2)
    for actual, expected in zip(ours.detect(offsets, logits), peer, strict=True):
        assert len(actual["boxes"]) == 200
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)


def test_losses_of_torchvision(pair):
    """Losses and the gradients of all parameters; in float64, as in float32 rounding puts values on the other side of a
    ReLU."""
    ours, theirs = (model.train().double() for model in pair)
    images = [image.double() for image in make_images(sizes=IMAGES[1:])]
    targets = make_targets((6,), IMAGES[1:], classes=6)
    targets[0]["boxes"][-1] = torch.tensor([2, 3, 325, 236])
    expected, actual = theirs(images, targets), ours(images, targets)
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], 1e-6)
    expected = torch.autograd.grad(sum(expected.values()), theirs.parameters())
    actual = torch.autograd.grad(sum(actual.values()), ours.parameters())
    for (name, _), a, e in zip(ours.named_parameters(), actual, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name
    assert sum(bool(e.any()) for e in expected) > 60  # of 71
    ours.float(), theirs.float()


@pytest.mark.parametrize("counts", [(5, 3), (0, 2), (0, 0), (40, 1)])
def test_losses_for_given_outputs(pair, counts):
    """From the same outputs of the head; with images without objects, and many in one."""
    ours, theirs = pair
    torch.manual_seed(1)
    outputs = [torch.randn(2, 8732, 4, requires_grad=True), torch.randn(2, 8732, 6, requires_grad=True)]
    targets = make_targets(counts, [(300, 300)] * 2, classes=6)
    default = ours.default_boxes()
    matched = [
        theirs.proposal_matcher(box_iou(t["boxes"], default)) if len(t["boxes"]) else torch.full((8732,), -1)
        for t in targets
    ]
    heads = {"bbox_regression": outputs[0], "cls_logits": outputs[1]}
    expected = theirs.compute_loss(targets, heads, [default] * 2, matched)
    actual = ours.losses(*outputs, [t["boxes"] for t in targets], [t["labels"] for t in targets])
    for name in expected:
        close(actual[name], expected[name])
    for a, e in zip(*(torch.autograd.grad(sum(v.values()), outputs) for v in (actual, expected)), strict=True):
        close(a, e, 1e-6)


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("ssd300_vgg16", 21, 26_285_486),
        ("ssd300_vgg16", 81, 34_305_206),
        ("ssd512_vgg16", 21, 27_188_676),
        ("ssd512_vgg16", 81, 36_038_196),
    ],
)
def test_parameters(name, classes, expected):
    with torch.device("meta"):
        model = pyzoo.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("layout", "boxes", "sizes"),
    [
        (SSD300, "voc", [30, 60, 111, 162, 213, 264, 315]),
        (SSD300, "coco", [300 * s for s in (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)]),
        (SSD512, "voc", [512 * s for s in (0.07, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.05)]),
        (SSD512, "coco", [512 * s for s in (0.04, 0.10, 0.26, 0.42, 0.58, 0.74, 0.90, 1.06)]),
    ],
)
def test_default_boxes(layout, boxes, sizes):
    """Against three loops, in pixels; sizes from their rule."""
    expected = []
    for k, (cells, step, ratios) in enumerate(zip(layout.maps, layout.steps, layout.ratios, strict=True)):
        for i in range(cells):
            for j in range(cells):
                shapes = [(1.0, 1.0), ((sizes[k + 1] / sizes[k]) ** 0.5,) * 2]
                for a in ratios:
                    shapes += [(a**0.5, a**-0.5), (a**-0.5, a**0.5)]
                for w, h in shapes:
                    x, y, w, h = (j + 0.5) * step, (i + 0.5) * step, w * sizes[k] / 2, h * sizes[k] / 2
                    expected.append((x - w, y - h, x + w, y + h))
    actual = default_boxes(layout, boxes, clamp_sizes=False)
    assert len(actual) == {300: 8732, 512: 24564}[layout.size]
    close(actual, torch.tensor(expected), 1e-4)


def test_first_default_boxes():
    expected = [
        (-6.5, -6.5, 14.5, 14.5),
        (-11.370, -11.370, 19.370, 19.370),
        (-10.849, -3.425, 18.849, 11.425),
        (-3.425, -10.849, 11.425, 18.849),
    ]
    close(default_boxes(SSD300)[:4], torch.tensor(expected), 1e-3)


def test_options_of_default_boxes():
    plain, clamped = default_boxes(SSD300, "voc", False), default_boxes(SSD300, "voc")
    side = clamped[:, 2:] - clamped[:, :2]
    assert side.max() <= 300 + 1e-3
    changed = (plain != clamped).any(1)
    assert changed.sum() == 9 * 2 + 2  # 213 and 264 times the root of 2
    assert (plain[changed][:, 2:] - plain[changed][:, :2]).amax(1).min() > 300
    whole = default_boxes(SSD512, "voc", whole_sizes=True)
    close((whole[0, 2:] - whole[0, :2]), torch.tensor([35.0, 35.0]), 1e-4)


@pytest.mark.parametrize("layout", [SSD300, SSD512])
def test_maps(layout):
    backbone = small(layout=layout).backbone
    maps = backbone(torch.randn(1, 3, layout.size, layout.size))
    assert [tuple(m.shape[2:]) for m in maps] == [(m, m) for m in layout.maps]
    assert [m.shape[1] for m in maps] == backbone.out_channels


def test_channels_are_scaled_to_one_length():
    """Of conv4_3 alone, and what follows does not see it."""
    backbone = small().backbone
    assert (backbone.scale_weight == 20).all()
    x = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        before = backbone(x)
        close(before[0].norm(dim=1), torch.full((1, 38, 38), 20.0), 1e-3)
        backbone.scale_weight *= torch.arange(16.0)
        after = backbone(x)
    close(after[0], before[0] * torch.arange(16.0)[:, None, None], 1e-4)
    for a, b in zip(after[1:], before[1:], strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- matching


def overlaps(objects: int, boxes: int, seed: int, levels: int = 0) -> torch.Tensor:
    iou = torch.rand(objects, boxes, generator=torch.Generator().manual_seed(seed)) ** 3
    return (iou * levels).round() / levels if levels else iou


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [0, 4])  # 4: many overlaps are equal
@pytest.mark.parametrize(("objects", "boxes"), [(1, 1), (3, 50), (20, 40), (30, 12)])
def test_matching(objects, boxes, levels, seed):
    """Against loops."""
    iou = overlaps(objects, boxes, seed, levels)
    above = [int(c.argmax()) if c.max() >= 0.5 else BELOW for c in iou.T]

    best = list(above)
    for i, row in enumerate(iou):
        best[int(row.argmax())] = i
    assert match_best(iou).tolist() == best

    bipartite, left = list(above), iou.clone()
    while left.max() > 1e-6:
        i, j = divmod(int(left.argmax()), boxes)
        bipartite[j] = i
        left[i], left[:, j] = -1, -1
    assert match_bipartite(iou).tolist() == bipartite


def test_matching_of_torchvision():
    peer = pytest.importorskip("torchvision").models.detection._utils.SSDMatcher(0.5)
    for seed in range(5):
        boxes = make_targets((30,), [(300, 300)], seed=seed)[0]["boxes"]
        iou = box_iou(boxes, default_boxes(SSD300))
        assert torch.equal(match_best(iou), peer(iou))


def test_bipartite_gives_each_object_a_box():
    """Two equal objects: the later one has the only box by torchvision's rule, and each has one by the authors'."""
    iou = box_iou(torch.tensor([[10.0, 10, 31, 31]] * 2), default_boxes(SSD300))
    assert (match_best(iou) == 1).sum() == 1
    assert {0, 1} <= set(match_bipartite(iou).tolist())


def test_hardest_negatives():
    """Three for each positive or all there are, in each image; none where nothing is positive."""
    torch.manual_seed(0)
    loss, positive = torch.rand(3, 40), torch.zeros(3, 40, dtype=torch.bool)
    positive[0, [3, 7]] = True
    positive[2, :35] = True
    taken = hardest(loss, positive)
    assert taken.sum(1).tolist() == [6, 0, 5]
    assert not (taken & positive).any()
    negative = loss[0].masked_fill(positive[0], -1)
    assert torch.equal(taken[0], negative >= negative.sort(descending=True).values[5])
    assert hardest(torch.zeros(1, 40), positive[:1]).sum() == 6  # all equal


def test_encoding():
    """Offsets of an object from a default box, by the formula; decoded it is the object again."""
    model, default = small(), default_boxes(SSD300)[4000:4100]
    box = torch.tensor([20.0, 30, 90, 150])
    code = model.coder.encode(box.expand(100, 4), default)
    cx, cy, w, h = (
        (default[:, 0] + default[:, 2]) / 2,
        (default[:, 1] + default[:, 3]) / 2,
        *(default[:, 2:] - default[:, :2]).T,
    )
    expected = ((55 - cx) / w / 0.1, (90 - cy) / h / 0.1, (70 / w).log() / 0.2, (120 / h).log() / 0.2)
    close(code, torch.stack(expected, 1), 1e-4)
    close(model.coder.decode(code, default), box.expand(100, 4), 1e-3)


@pytest.mark.parametrize("count", [3, 8, 100])
def test_candidates(count):
    torch.manual_seed(0)
    scores = torch.rand(30, 5) * torch.tensor([1, 0.6, 0.2, 0.1, 1])
    expected = set()
    for label in range(5):
        best = scores[:, label].sort(descending=True).indices[:count].tolist()
        expected |= {(box, label) for box in best if scores[box, label] > 0.3}
    box, label, score = candidates(scores, 0.3, min(count, 30))
    assert set(zip(box.tolist(), label.tolist(), strict=True)) == expected
    assert len(box) == len(expected)
    assert torch.equal(score, scores[box, label])


# ------------------------------------------------------------------------------------------------------ the whole model


def test_options_train():
    for options in (
        {"matching": "bipartite"},
        {"boxes": "voc", "clamp_sizes": False},
        {"batch_norm": True, "config": "A"},
    ):
        model = small(**options)
        losses = model(make_images(), make_targets())
        assert losses.keys() == {"bbox_regression", "classification"}
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_objects_at_all():
    model = small()
    losses = model(make_images(), make_targets((0, 0)))
    assert losses["classification"].item() == losses["bbox_regression"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_targets_are_not_changed():
    targets = make_targets()
    before = [t["boxes"].clone() for t in targets]
    small()(make_images(), targets)
    assert all(torch.equal(t["boxes"], b) for t, b in zip(targets, before, strict=True))


def test_detections_are_within_the_image():
    model = small(num_classes=3).eval()
    sizes = [(1, 1), (37, 500), (300, 300)]
    with torch.no_grad():
        found = model(make_images(sizes=sizes))
    for entry, (height, width) in zip(found, sizes, strict=True):
        assert 0 < len(entry["boxes"]) <= 200
        assert (entry["boxes"] >= 0).all()
        assert (entry["boxes"] <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all()
        assert (entry["scores"] > 0.01).all()
        assert (entry["scores"].diff() <= 0).all()
        assert set(entry["labels"].tolist()) <= {1, 2}


def test_nothing_found():
    model = small(score_thresh=1.0).eval()
    with torch.no_grad():
        (found,) = model(make_images(sizes=[(50, 60)]))
    assert [list(found[key].shape) for key in ("boxes", "labels", "scores")] == [[0, 4], [0], [0]]


def test_compiles():
    """The network, from a batch of images to its raw outputs."""
    model = small(layout=SSD96).eval()
    x = model.prepare(make_images())
    with torch.no_grad():
        actual, expected = torch.compile(model.network, fullgraph=True, dynamic=False)(x), model.network(x)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-4)
    torch._dynamo.reset()


def test_exports():
    """For any number of images."""
    model = small().eval()
    x = model.prepare(make_images())
    with torch.no_grad():
        expected = model.network(x)
        batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(model.network, (x,), dynamic_shapes=batch).module()
        for a, e in zip(exported(x), expected, strict=True):
            close(a, e, 1e-4)
        for a, e in zip(exported(x[:1]), expected, strict=True):
            close(a, e[:1], 1e-4)


def test_compiled_gradients():
    model = small(layout=SSD96)
    x = model.prepare(make_images())

    def gradients(network):
        offsets, logits = network(x)
        loss = F.mse_loss(offsets, torch.ones_like(offsets)) + logits.std()
        return torch.autograd.grad(loss, model.parameters())

    actual = gradients(torch.compile(model.network, fullgraph=True, dynamic=False, backend="aot_eager"))
    for a, e in zip(actual, gradients(model.network), strict=True):
        assert (a - e).norm() <= 1e-3 * e.norm()


def test_starts_from_vgg():
    """Convolutions as they are, linear layers thinned out as written in the sheet: taps 0, 3, 6, each fourth output."""
    torch.manual_seed(0)
    classifier = vgg.VGG("D", width=4, hidden=256, num_classes=2)
    model = small(width=4)
    ssd.load_vgg(model, classifier)
    x = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        expected = classifier.taps(x[:, :, :288, :288], ["relu3_3"])["relu3_3"]
        actual = vgg.run(model.backbone.features[:16], x[:, :, :288, :288])
    close(actual, expected)
    fc6, fc7 = model.backbone.extra[0][-1][1], model.backbone.extra[0][-1][3]
    weight = classifier.classifier[0].weight.view(256, 32, 7, 7)
    assert fc6.weight[5, 7, 1, 2] == weight[20, 7, 3, 6]
    assert fc7.weight[3, 9, 0, 0] == classifier.classifier[3].weight[12, 36]
    assert torch.equal(fc7.bias, classifier.classifier[3].bias[::4])


BOX = torch.tensor([[1.0, 2, 30, 40]])


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: SSD(boxes="kitti"), "boxes must be one of coco, voc, got 'kitti'"),
        (ValueError, lambda: SSD(config="F"), "config must be one of A, B, C, D, E, got 'F'"),
        (ValueError, lambda: SSD(matching="hungarian"), "matching must be one of best, bipartite"),
        (
            TypeError,
            lambda: small()(torch.zeros(1, 3, 30, 30)),
            r"images must be a list of .*got \[1, 3, 30, 30\]",
        ),
        (ValueError, lambda: small()([]), "images must hold at least one"),
        (ValueError, lambda: small()([torch.zeros(1, 9, 9)]), r"images\[0\] must have shape \[3, H, W\], got \[1, 9"),
        (ValueError, lambda: small()([torch.zeros(3, 0, 9)]), r"images\[0\] must have shape \[3, H, W\], got \[3, 0"),
        (
            TypeError,
            lambda: small()([torch.zeros(3, 9, 9).byte()]),
            r"images\[0\] must be of a floating .* torch.uint8",
        ),
    ],
)
def test_bad_call(error, call, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"boxes": torch.zeros(1, 5)}, r"boxes of targets\[0\] must have shape \[n, 4\], got \[1, 5\]"),
        (TypeError, {"boxes": torch.tensor([[1, 2, 3, 4]])}, "boxes .*must be of a floating dtype, got torch.int64"),
        (ValueError, {"boxes": torch.tensor([[5.0, 5, 5, 9]])}, r"x1 < x2, .*box 0 is \[5.0, 5.0, 5.0, 9.0\]"),
        (ValueError, {"boxes": torch.tensor([[0.0, 0, float("inf"), 9]])}, "must be finite"),
        (ValueError, {"boxes": torch.tensor([[0.0, 0, float("nan"), 9]])}, "must be finite"),
        (ValueError, {"labels": torch.tensor([0])}, r"labels of targets\[0\] must be from 1 to 3, got 0"),
        (ValueError, {"labels": torch.tensor([4])}, "must be from 1 to 3, got 4"),
        (ValueError, {"labels": torch.tensor([1, 2])}, r"labels of targets\[0\] must be 1, got \[2\]"),
        (TypeError, {"labels": torch.tensor([1.0])}, "must be int64, got torch.float32"),
        (TypeError, {"labels": None}, r"targets\[0\] must have a tensor 'labels'"),
    ],
)
def test_bad_target(error, change, message):
    with pytest.raises(error, match=message):
        small()([torch.rand(3, 50, 50)], [{"boxes": BOX, "labels": torch.tensor([1]), **change}])


def test_targets_are_missing():
    images = [torch.rand(3, 50, 50)]
    with pytest.raises(ValueError, match="targets must be given in training"):
        small()(images)
    with pytest.raises(ValueError, match="targets must be one for each of the 1 images, got 2"):
        small()(images, make_targets())
