"""SSD's box counts; a small SSD finds digits in scenes: its fine map the small ones, its coarse maps the large ones.

Section 2.2 and Table 3 of the paper: maps of several resolutions, each for objects of one range of sizes. All digits
are one class here: in two minutes the coarse maps, deep in the net, learn where a digit is, but not yet which.
"""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from pyzoo.data import DigitScenes
from pyzoo.metrics import coco_map
from pyzoo.models import create_model
from pyzoo.models.ssd import SSD, SSD300, SSD512, Layout, default_boxes
from pyzoo.nn.boxes import box_iou
from pyzoo.reproduce import Report
from pyzoo.train import fit

# Configuration A of VGG with a quarter of the channels, on 96 pixels.
LAYOUT = Layout(
    size=96,
    maps=(12, 6, 3),
    extras=((4, 8, 3, 2, 1),),
    steps=(8, 16, 32),
    ratios=((2,), (2,), (2,)),
    sizes={"coco": (14, 22, 34, 50)},
)
NAMES = ("conv4_3, stride 8", "conv7, stride 16", "conv8_2, stride 32")
SIZES = {"below 20": (0, 20), "20 to 28": (20, 28), "above 28": (28, 99)}  # pixels, the longer side of the box
STEPS = 320
SURE = 0.3  # the score above which a detection counts as one


def reproduce(report: Report) -> None:
    """Checks the paper's claims; see the module."""
    counts = [len(default_boxes(layout)) for layout in (SSD300, SSD512)]
    report.check(
        "default boxes of SSD300 and SSD512", "8732 and 24564", " and ".join(map(str, counts)), counts == [8732, 24564]
    )

    ssd, faster = seconds("ssd300_vgg16"), seconds("fasterrcnn_vgg16")
    report.check(
        "SSD300 against Faster R-CNN on VGG-16, a photograph",
        "59 against 7 images a second",
        f"{1 / ssd:.1f} against {1 / faster:.2f} on this machine",
        ssd < faster / 2,
    )

    scenes = partial(DigitScenes, seed=report.seed, scale=(14, 44))
    train, test = one_class(scenes(1500)), one_class(scenes(150, split="test"))
    images, targets = [image for image, _ in test], [target for _, target in test]
    model = make(report.seed)
    iou = [box_iou(target["boxes"], model.default_boxes()) for _, target in train[:300]]
    matched = all((model.matching(i)[None] == torch.arange(len(i))[:, None]).any(1).all() for i in iou)
    report.check("each object of 300 scenes has a default box", "each", "each" if matched else "not each", matched)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.2)
    history = fit(
        model,
        train,
        optimizer=optimizer,
        schedule=schedule,
        batch_size=16,
        steps=STEPS,
        clip_norm=10,
        seed=report.seed,
    )
    report.note(f"loss {history[0]['loss']:.1f} -> {history[-1]['loss']:.2f} in {STEPS} steps of 16 scenes")
    with torch.no_grad():
        found = model(images)
        ap = coco_map(found, targets)["AP50"]
        recall = recalls(model, images, targets)
    report.check("AP at IoU 0.5 on scenes of digits it has not seen", "learns: 0.8 or more", f"{ap:.3f}", ap >= 0.8)
    report.note("objects that the boxes of one map alone find, by the longer side in pixels:")
    for name, row in zip(NAMES, recall.tolist(), strict=True):
        report.note(f"  {name:20}" + "   ".join(f"{size}: {r:4.0%}" for size, r in zip(SIZES, row, strict=True)))
    fine, coarse = recall[0], recall[1:].amax(0)
    report.check(
        "the fine map finds the small objects, and the coarse ones the large",
        "more on the left, less on the right",
        f"{fine[0]:.0%} against {coarse[0]:.0%} of the small, {fine[-1]:.0%} against {coarse[-1]:.0%} of the large",
        bool(fine[0] > coarse[0] + 0.2 and fine[-1] < coarse[-1] - 0.2),
    )
    report.save(picture(images, found, recall))


@torch.no_grad()
def seconds(name: str) -> float:
    """For an image of the size of VOC's, the least of three runs; the weights are constant, which changes no time."""
    image = torch.rand(3, 375, 500)
    with torch.device("meta"):  # as initial weights take longer to draw than all else
        model = create_model(name, num_classes=21)
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last).eval()
    for parameter in model.parameters():
        parameter.fill_(0.01 if parameter.dim() == 1 else 1 / parameter[0].numel())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model([image])
        times.append(time.perf_counter() - start)
    return min(times)


def one_class(scenes) -> list[tuple[Tensor, dict]]:
    return [(image, {**target, "labels": torch.ones_like(target["labels"])}) for image, target in scenes]


def make(seed: int) -> SSD:
    torch.manual_seed(seed)
    normalised = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.25, 0.25)}
    return SSD(2, layout=LAYOUT, config="A", width=16, batch_norm=True, **normalised)


def recalls(model: SSD, images: list[Tensor], targets: list[dict]) -> Tensor:
    """[maps, sizes]: the part of the objects of each size that the boxes of each map alone find, at IoU 0.5."""
    offsets, logits = model.network(model.prepare(images))
    per_map = [cells**2 * 4 for cells in LAYOUT.maps]
    rows = []
    for k in range(len(per_map)):
        alone = torch.full_like(logits, -50)
        alone[..., 0] = 50
        here = slice(sum(per_map[:k]), sum(per_map[: k + 1]))
        alone[:, here] = logits[:, here]
        hits, longer = [], []
        for found, target in zip(model.detect(offsets, alone), targets, strict=True):
            sure = found["scores"] > SURE
            hits.append((box_iou(found["boxes"][sure], target["boxes"]) >= 0.5).any(0))
            longer.append((target["boxes"][:, 2:] - target["boxes"][:, :2]).amax(1))
        hits, longer = torch.cat(hits).float(), torch.cat(longer)
        rows.append([hits[(longer >= low) & (longer < high)].mean() for low, high in SIZES.values()])
    return torch.tensor(rows)


def picture(images: list[Tensor], found: list[dict], recall: Tensor):
    """Six scenes with what is found, and the recalls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    for i in range(6):
        axes = figure.add_subplot(grid[i // 3, i % 3])
        axes.imshow(images[i].permute(1, 2, 0), interpolation="nearest")
        axes.set_axis_off()
        sure = found[i]["scores"] > SURE
        for x1, y1, x2, y2 in found[i]["boxes"][sure].tolist():
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="yellow", linewidth=1.5)
    axes = figure.add_subplot(grid[:, 3:])
    for k, (name, row) in enumerate(zip(NAMES, recall, strict=True)):
        axes.bar(torch.arange(len(SIZES)) + (k - 1) * 0.27, row, 0.25, label=name)
    axes.set_xticks(range(len(SIZES)), SIZES)
    axes.set(xlabel="longer side of the object, pixels", ylabel="found by the boxes of one map alone", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure
