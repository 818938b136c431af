"""A feature pyramid against a single coarse map, on scenes with small digits: proposals and detections.

The paper's numbers, COCO, 1000 proposals (Table 1): average recall 56.3 against 48.3 for a single map, of small objects
44.9 against 32.0; without the way down 49.5, without the lateral connections 46.1.
"""

from __future__ import annotations

import torch

from pyzoo._extras import need
from pyzoo.data import DigitScenes
from pyzoo.metrics import coco_map
from pyzoo.reproduce import Report
from pyzoo.reproduce._detection import LastMap, Pyramid, Trunk, detect, detector, recall, train

WIDTHS = (16, 32, 64, 64)  # at strides 2, 4, 8, 16
SIZES = (8, 16, 32)
STEPS = 250
SMALL = 12


def make(kind: str):
    trunk = Trunk(WIDTHS)
    if kind == "single":
        return detector(LastMap(trunk, WIDTHS[-1], 32), 32, (16,), (SIZES,), size=96)
    backbone = Pyramid(trunk, WIDTHS[1:], 32, kind)
    return detector(backbone, 32, (4, 8, 16), [(size,) for size in SIZES], size=96)


def reproduce(report: Report) -> None:
    options = {"size": (96, 96), "objects": (3, 6), "scale": (6, 40)}
    scenes = DigitScenes(300, seed=report.seed, **options)[:]
    test = DigitScenes(80, seed=report.seed, split="test", **options)[:]
    targets = [target for _, target in test]
    names = {"single": "single map", "both": "pyramid"}
    measured = {}
    for kind in names:
        torch.manual_seed(report.seed)
        model = make(kind)
        train(model, scenes, STEPS, report.seed)
        _, all_sizes, small = recall(model, test, 20, SMALL)
        measured[kind] = all_sizes, small, coco_map(detect(model, test), targets)["AP50"]
        report.note(f"{names[kind]}: AR {all_sizes:.3f}, of small ones {small:.3f}, mAP50 {measured[kind][2]:.3f}")
    (all1, small1, map1), (all2, small2, map2) = measured["single"], measured["both"]
    report.check(
        "average recall of 20 proposals",
        "56.3 against 48.3",
        f"{all2:.3f} against {all1:.3f}",
        all2 > all1 + 0.1,
    )
    report.check(
        f"the same, of digits below {SMALL} pixels",
        "44.9 against 32.0, small objects gain most",
        f"{small2:.3f} against {small1:.3f}",
        small2 > 0.3 and small2 > 4 * small1,
    )
    report.check(
        "mAP of detections at IoU 0.5",
        "higher (Table 2)",
        f"{map2:.3f} against {map1:.3f}",
        map2 > map1 + 0.25,
    )
    plt = need("matplotlib.pyplot", "pyzoo reproduce")
    figure, ax = plt.subplots(figsize=(6, 4))
    for i, (kind, values) in enumerate(measured.items()):
        ax.bar([x + 0.4 * i for x in range(3)], values, 0.38, label=names[kind])
    ax.set_xticks([0.2, 1.2, 2.2], ["AR, 20 proposals", f"AR below {SMALL} pixels", "mAP50"])
    ax.legend()
    figure.tight_layout()
    report.save(figure)
