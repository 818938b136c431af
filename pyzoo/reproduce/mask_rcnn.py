"""Mask R-CNN, small, on scenes of digits: it learns to draw them, and RoIAlign against RoIPool.

The paper's numbers, COCO, ResNet-50-C4 (Table 2c): mask AP 30.3 with RoIAlign against 26.9 with RoIPool, at IoU 0.75
31.5 against 26.4.
"""

from __future__ import annotations

from functools import partial

import torch

from pyzoo._extras import need
from pyzoo.data import DigitScenes
from pyzoo.metrics import coco_map
from pyzoo.models.faster_rcnn import pool_map
from pyzoo.reproduce import Report
from pyzoo.reproduce._detection import LastMap, Trunk, detect, detector, train

STRIDE = 4
STEPS = 400


def reproduce(report: Report) -> None:
    options = {"size": (96, 96), "objects": (1, 4), "scale": (16, 40)}
    scenes = DigitScenes(800, seed=report.seed, **options)[:]
    test = DigitScenes(80, seed=report.seed, split="test", **options)[:]
    targets = [target for _, target in test]
    figures, found = {}, {}
    for name, pool in {"RoIAlign": None, "RoIPool": partial(pool_map, stride=STRIDE)}.items():
        torch.manual_seed(report.seed)
        backbone = LastMap(Trunk((24, 48)), 48, 48)
        model = detector(backbone, 48, (STRIDE,), ((16, 24, 36),), size=96, masks=True, pool=pool)
        train(model, scenes, STEPS, report.seed)
        found[name] = detect(model, test)
        figures[name] = coco_map(found[name], targets, "segm")
        report.note(f"{name}: mask " + ", ".join(f"{k} {figures[name][k]:.3f}" for k in ("AP", "AP50", "AP75")))
    align, pool = figures["RoIAlign"], figures["RoIPool"]
    report.check(
        "masks of digits it has not seen: AP at IoU 0.5",
        "51.2 on COCO (Table 2c)",
        f"{align['AP50']:.3f}",
        align["AP50"] > 0.6,
    )
    report.check(
        "RoIAlign against RoIPool: mask AP at IoU 0.75",
        "31.5 against 26.4",
        f"{align['AP75']:.3f} against {pool['AP75']:.3f}",
        align["AP75"] > pool["AP75"] + 0.1,
    )
    report.check(
        "the same, mean over IoU 0.5 to 0.95",
        "30.3 against 26.9",
        f"{align['AP']:.3f} against {pool['AP']:.3f}",
        align["AP"] > pool["AP"] + 0.05,
    )
    report.save(picture(test[:8], found["RoIAlign"][:8]))


def picture(scenes, found):
    """Detections with a score above 0.5, masks in color."""
    plt = need("matplotlib.pyplot", "pyzoo reproduce")
    colors = torch.tensor(plt.get_cmap("tab10").colors, dtype=torch.float32)
    figure, axes = plt.subplots(2, len(scenes) // 2, figsize=(len(scenes) * 1.5, 6.2))
    for ax, (image, _), each in zip(axes.flat, scenes, found, strict=True):
        image = image.clone()
        sure = each["scores"] > 0.5
        boxes, labels, scores = (each[key][sure].tolist() for key in ("boxes", "labels", "scores"))
        for mask, label in zip(each["masks"][sure], labels, strict=True):
            image = torch.where(mask > 0.5, 0.3 * image + 0.7 * colors[label - 1][:, None, None], image)
        ax.imshow(image.permute(1, 2, 0))
        ax.axis("off")
        for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True):
            color = colors[label - 1].tolist()
            ax.add_patch(plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=color))
            ax.text(x1, y1 - 2, f"{label - 1}  {score:.2f}", color="white", fontsize=9)
    figure.tight_layout()
    return figure
