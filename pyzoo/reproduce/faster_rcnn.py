"""Faster R-CNN, small, on scenes of digits: what the RPN finds, how good detections are, and images of other sizes.

The paper's numbers are of photographs: with 300 proposals of the RPN, 73.2 mAP at an overlap of 0.5 on VOC 2007.
"""

from __future__ import annotations

import torch

from pyzoo._extras import need
from pyzoo.data import DigitScenes
from pyzoo.metrics import coco_map
from pyzoo.reproduce import Report
from pyzoo.reproduce._detection import LastMap, Trunk, detect, detector, recall, train

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
STEPS = 800


def reproduce(report: Report) -> None:
    torch.manual_seed(report.seed)
    scenes = DigitScenes(1000, (64, 64), seed=report.seed, objects=(1, 3), scale=(14, 32))[:]
    test = DigitScenes(100, (64, 64), seed=report.seed, objects=(1, 3), scale=(14, 32), split="test")[:]
    model = detector(LastMap(Trunk((24, 48)), 48, 48), 48, (4,), ((12, 20, 32),), size=64)
    history = train(model, scenes, STEPS, report.seed)

    share, _, _ = recall(model, test, 30)
    found = detect(model, test)
    figures = coco_map(found, [target for _, target in test])
    report.check(
        "RPN: objects that 30 proposals find, at IoU 0.5",
        "few proposals are enough (Figure 4)",
        f"{share:.3f}",
        share >= 0.9,
    )
    report.check(
        "Faster R-CNN: mAP of digits it has not seen, at IoU 0.5",
        "73.2 on VOC 2007, with VGG-16",
        f"{figures['AP50']:.3f} (at IoU 0.75: {figures['AP75']:.3f})",
        figures["AP50"] >= 0.5,
    )
    # At first there are hardly any positives, on which the losses of boxes are.
    parts = history[100:120], history[-20:]
    first, last = ({k: sum(entry[k] for entry in part) / len(part) for k in LOSSES} for part in parts)
    report.check(
        "one network, trained jointly: all four losses fall",
        "RPN and detector share their convolutions",
        ", ".join(f"{k[5:]} {first[k]:.3f} to {last[k]:.3f}" for k in LOSSES),
        all(last[k] < first[k] for k in LOSSES),
    )
    wide = DigitScenes(60, (48, 96), seed=report.seed + 1, objects=(1, 3), scale=(14, 32), split="test")[:]
    model.transform.min_sizes = (48,)
    other, _, _ = recall(model, wide, 30)
    report.check("the same weights on images of 48 x 96", "any size", f"recall {other:.3f}", other >= 0.85)
    model.transform.min_sizes = (64,)
    report.save(picture(test[:8], found[:8]))


def picture(scenes, found):
    """Detections with a score above 0.5."""
    plt = need("matplotlib.pyplot", "pyzoo reproduce")
    figure, axes = plt.subplots(2, len(scenes) // 2, figsize=(len(scenes) * 1.5, 6.2))
    for ax, (image, _), each in zip(axes.flat, scenes, found, strict=True):
        ax.imshow(image.permute(1, 2, 0))
        ax.axis("off")
        for box, label, score in zip(each["boxes"].tolist(), each["labels"].tolist(), each["scores"], strict=True):
            if score > 0.5:
                x1, y1, x2, y2 = box
                ax.add_patch(plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color="yellow"))
                ax.text(x1, y1 - 2, f"{label - 1}  {score:.2f}", color="yellow", fontsize=9)
    figure.tight_layout()
    return figure
