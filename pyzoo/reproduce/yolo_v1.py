"""One pass over the image learns to detect; what goes wrong is places rather than background; a cell has one class.

A small YOLO with a grid of 3 x 3 on scenes of one or two handwritten digits, 48 x 48, between strokes that are no
digits: without those nothing is taken for an object that is none. As in the paper the convolutions first learn to
classify, here scenes of one digit. The detector of two stages beside it, a small Faster R-CNN, learns the same scenes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyzoo.data import DigitScenes
from pyzoo.data.digits import contrasting
from pyzoo.metrics import coco_map
from pyzoo.models.yolo_v1 import P, YOLOv1, pretraining_net
from pyzoo.nn.boxes import box_iou, to_centres
from pyzoo.reproduce._detection import LastMap, Trunk, detect, detector, train

SIZE, GRID = 48, 3
PRETRAINING_STEPS, STEPS, RATE = 350, 1300, 2e-3
TWO_STAGE_STEPS = 800
SCENES = {"size": (SIZE, SIZE), "objects": (1, 2), "scale": (16, 30)}
LAYERS = ((3, 16), P, (3, 32), P, (3, 64), P, (3, 128), P, (3, 128))


def reproduce(report) -> None:
    seen = clutter(DigitScenes(3000, seed=report.seed, **SCENES))
    one_digit = clutter(DigitScenes(3000, seed=report.seed, **{**SCENES, "objects": (1, 1)}))
    test = clutter(DigitScenes(2000, seed=report.seed + 1, split="test", **SCENES))
    targets = [target for _, target in test]
    torch.manual_seed(report.seed)
    head = (("fc", 512), "leaky")  # no dropout: so short a run does not overfit
    model = YOLOv1(LAYERS, head, batch_norm=True, num_classes=11, image_size=SIZE, score_threshold=0.001)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # a run this short needs statistics of the last few batches
    pretrain(model, *collect(one_digit))
    fit(model, *collect(seen))

    known, found = detect(model, seen[:200]), detect(model, test)
    ap = [coco_map(known, [target for _, target in seen[:200]])["AP50"], coco_map(found, targets)["AP50"]]
    claim = "mAP 63.4 on VOC 2007, trained end to end (Table 1)"
    measured = f"AP50 {ap[0]:.2f} on scenes of training, {ap[1]:.2f} on new ones"
    report.check("one regression from image to boxes detects", claim, measured, ap[0] > 0.7 and ap[1] > 0.45)

    compare_errors(report, found, detect(two_stage(seen, report.seed), test), targets)

    together, apart = both_found(model, report.seed)
    claim = "a cell has one class, so of objects close together some are missed (Section 2.4)"
    measured = f"both digits found of {together:.0%} of pairs with centers in one cell, {apart:.0%} of others"
    report.check("one class a cell", claim, measured, together < apart / 2)
    report.save(draw(*collect(test[:12]), found[:12]))


def compare_errors(report, found, of_two_stages, targets) -> None:
    """Section 4.2, Figure 4: shares of the best detections of YOLO, and of a detector that classifies regions."""
    yolo, rcnn = error_types(found, targets), error_types(of_two_stages, targets)
    measured = ", ".join(f"{kind} {share:.1%}" for kind, share in yolo.items())
    claim = "on VOC 2007 19.0 % of detections are at wrong places, 4.8 % on background"
    report.check("more wrong places than background", claim, measured, yolo["localisation"] > yolo["background"])
    measured = f"{yolo['localisation']:.1%}, Faster R-CNN {rcnn['localisation']:.1%}"
    holds = yolo["localisation"] > 1.5 * rcnn["localisation"]
    report.check("more wrong places than a detector of two stages", "19.0 %, Fast R-CNN 8.6 %", measured, holds)
    measured = f"{yolo['background']:.1%}, Faster R-CNN {rcnn['background']:.1%}"
    holds = yolo["background"] < rcnn["background"]
    report.check("less on background than a detector of two stages", "4.8 %, Fast R-CNN 13.6 %", measured, holds)
    report.note("Faster R-CNN: " + ", ".join(f"{kind} {share:.1%}" for kind, share in rcnn.items()))


def clutter(scenes) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The scenes, with one or two bent strokes behind the digits: ground that could be taken for an object."""
    return [(with_strokes(image, target, scenes.seed), target) for image, target in scenes]


def with_strokes(image: Tensor, target: dict[str, Tensor], seed: int) -> Tensor:
    rng = np.random.default_rng((seed, target["image_id"]))
    free = target["masks"].amax(0) == 0
    ground = image[:, free].mean(1).numpy()
    pixels = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)) + 0.5
    t = torch.linspace(0, 1, 32)[:, None]
    for _ in range(rng.integers(1, 3)):
        a, b, c = torch.from_numpy(rng.uniform(4, SIZE - 4, 2) + rng.uniform(-12, 12, (3, 2))).float()
        curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
        distance = torch.cdist(pixels, curve).amin(1).view(SIZE, SIZE)
        alpha = (rng.uniform(1.5, 2.7) - distance).clamp(0, 1) * free  # edges are as smooth as those of digits
        paint = contrasting(rng, ground)[:, None, None] + rng.normal(0, 0.03, image.shape)  # as noisy, too
        image = image + (torch.from_numpy(paint).float().clamp(0, 1) - image) * alpha
    return image


def collect(scenes) -> tuple[Tensor, list[dict[str, Tensor]]]:
    images, targets = zip(*scenes, strict=True)
    return torch.stack(images), list(targets)


def pretrain(model: YOLOv1, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> None:
    """The convolutions learn to tell classes first, as the paper's do on ImageNet; without it the classes come late."""
    labels = torch.cat([target["labels"] for target in targets]) - 1
    net = pretraining_net(model, 10, layers=len(LAYERS))
    optimize(net, lambda rows: F.cross_entropy(net(images[rows]), labels[rows]), len(images), 64, PRETRAINING_STEPS)


def fit(model: YOLOv1, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> None:
    def loss(rows: Tensor) -> Tensor:
        rows = rows.tolist()
        return sum(model([images[i] for i in rows], [targets[i] for i in rows]).values())

    optimize(model, loss, len(images), 32, STEPS)


def optimize(net: nn.Module, loss_of: Callable[[Tensor], Tensor], count: int, batch: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    batches = (rows for _ in itertools.count() for rows in torch.randperm(count).split(batch))
    net.train()
    for rows in itertools.islice(batches, steps):
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
        schedule.step()


def two_stage(scenes, seed: int) -> nn.Module:
    """A Faster R-CNN that learns the same scenes."""
    torch.manual_seed(seed)
    model = detector(LastMap(Trunk((24, 48)), 48, 48), 48, (4,), ((12, 20, 32),), size=SIZE)
    model.roi_heads.score_threshold = 0.001  # as YOLO's: the best are taken, at any score
    train(model, scenes, TWO_STAGE_STEPS, seed)
    return model


def both_found(model: YOLOv1, seed: int) -> tuple[float, float]:
    """Of pairs of digits whose centers share a cell, about 60, and of others, 470: the share found altogether."""
    scenes = DigitScenes(600, seed=seed + 2, split="test", max_overlap=0.8, **{**SCENES, "objects": (2, 2)})[:]
    model.score_threshold, before = 0.2, model.score_threshold
    outcomes = {True: [], False: []}
    for found, (_, truth) in zip(detect(model, scenes), scenes, strict=True):
        if len(truth["labels"].unique()) == 2:
            same_place = box_iou(truth["boxes"], found["boxes"]) > 0.5
            hit = (same_place & (truth["labels"][:, None] == found["labels"])).any(1)
            cells = (to_centres(truth["boxes"])[:, :2] * GRID / SIZE).floor()
            outcomes[bool((cells[0] == cells[1]).all())].append(bool(hit.all()))
    model.score_threshold = before
    return tuple(sum(hits) / len(hits) for hits in (outcomes[True], outcomes[False]))


def draw(images: Tensor, targets, predictions):
    """Scenes with what was found: green where that is right, red where it is not."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for axes, image, truth, found in zip(figure.subplots(3, 4).flat, images, targets, predictions, strict=False):
        axes.imshow(image.permute(1, 2, 0))
        axes.axis("off")
        sure = found["scores"] > 0.2
        for box, label, score in zip(found["boxes"][sure], found["labels"][sure], found["scores"][sure], strict=True):
            right = ((box_iou(box[None], truth["boxes"])[0] > 0.5) & (truth["labels"] == label)).any()
            color = "lime" if right else "red"
            x1, y1, x2, y2 = box.tolist()
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=color, linewidth=2))
            axes.text(x1, y1 - 1, f"{int(label) - 1}: {score:.2f}", color=color, fontsize=9, weight="bold")
    figure.suptitle("YOLO on new scenes: green right, red wrong")
    return figure


def error_types(predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """What the best detections of any detector are, as fractions; of each class as many as there are objects of it.

    Correct: overlaps an object of the class by more than 0.5. Localisation: by more than 0.1. Class: overlaps an object
    of another class by more than 0.1. Background: overlaps none as much. (Section 4.2, after Hoiem et al.; the paper
    tells classes that are alike from others.)
    """
    kinds = []
    for found, truth in zip(predictions, targets, strict=True):
        overlap = F.pad(box_iou(found["boxes"], truth["boxes"]), (0, 1))  # as there may be no object
        same = F.pad(found["labels"][:, None] == truth["labels"], (0, 1))
        right, any_class = (overlap * same).amax(1), overlap.amax(1)
        kinds.append(torch.where(right > 0.5, 0, torch.where(right > 0.1, 1, torch.where(any_class > 0.1, 2, 3))))
    kinds = torch.cat(kinds)
    scores, labels = (torch.cat([p[key] for p in predictions]) for key in ("scores", "labels"))
    tally = torch.zeros(4, dtype=torch.int64)
    for label, count in zip(*torch.cat([t["labels"] for t in targets]).unique(return_counts=True), strict=True):
        mine = labels == label
        best = scores[mine].argsort(descending=True)[:count]
        tally += kinds[mine][best].bincount(minlength=4)
    return dict(zip(("correct", "localisation", "class", "background"), (tally / tally.sum()).tolist(), strict=True))
